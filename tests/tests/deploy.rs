//! The permissions that `deploy/` grants are exactly those that the agent needs.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{
    collections::BTreeSet,
    fs,
    os::fd::{FromRawFd as _, OwnedFd},
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use portolan_tests::{
    Api, Container, Directory, Pod, TestBed,
    dial::Task,
    helper_of,
    objects::{destination_rule, node, plain, pod, service, slice, udp_service, udp_slice},
    wait_until,
};
use serde_json::{Value, json};

const BOUND: Duration = Duration::from_secs(30);
const ECONNABORTED: i32 = 103;

/// Returns the documents of the rendered manifest.
fn manifest() -> Result<Vec<Value>> {
    read("portolan.yaml")
}

fn read(name: &str) -> Result<Vec<Value>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/manifests").join(name);
    let text = fs::read_to_string(path)?;
    text.split("\n---\n").map(|document| Ok(serde_saphyr::from_str(document)?)).collect()
}

fn of_kind<'a>(documents: &'a [Value], kind: &str) -> Result<&'a Value> {
    documents.iter().find(|document| document["kind"] == kind).with_context(|| format!("no {kind}"))
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(|text| text.as_str().map(str::to_owned)).collect()
}

#[test]
fn roles_grant_exactly_the_requests_made() -> Result<()> {
    check_roles(&manifest()?)
}

/// As above, with remote clusters and Kubernetes Events enabled.
#[test]
fn roles_with_all_options_grant_exactly_the_requests_made() -> Result<()> {
    check_roles(&read("portolan-multicluster.yaml")?)
}

fn check_roles(documents: &[Value]) -> Result<()> {
    let (mut granted, mut named) = (BTreeSet::new(), Vec::new());
    for role in documents.iter().filter(|it| matches!(it["kind"].as_str(), Some("ClusterRole" | "Role"))) {
        for rule in role["rules"].as_array().into_iter().flatten() {
            for (group, resource) in texts(&rule["apiGroups"])
                .iter()
                .flat_map(|group| texts(&rule["resources"]).into_iter().map(move |it| (group, it)))
            {
                let name = if group.is_empty() { resource } else { format!("{resource}.{group}") };
                named.extend(texts(&rule["resourceNames"]).into_iter().map(|only| (name.clone(), only)));
                granted.extend(texts(&rule["verbs"]).into_iter().map(|verb| (verb, name.clone())));
            }
        }
    }
    let bed = TestBed::new()?;
    let mut api = Api::new()?;
    let kubeconfig = api.reach(&bed.namespace)?;
    // A rule with subsets, so that the agent reads all Pods.
    let subsets = json!({"subsets": [{"name": "v1", "labels": {"version": "v1"}}]});
    api.apply(&[node("n1", "r1/z1"), pod("a", &json!({"version": "v1"})), destination_rule("web", &subsets)]);
    // An invalid rule, which becomes an Event if Events are enabled.
    api.apply(&[destination_rule("invalid", &json!({"subsets": 7}))]);
    let container = &of_kind(documents, "DaemonSet")?["spec"]["template"]["spec"]["containers"][0];
    let set = |name: &str| {
        let variables = container["env"].as_array().into_iter().flatten();
        variables.filter(|it| it["name"] == name).find_map(|it| it["value"].as_str()).map(str::to_owned)
    };
    let others = set("PORTOLAN_OTHER_CLUSTERS").unwrap_or_else(|| "true".to_owned());
    let mut more = vec!["--other-clusters", others.as_str()];
    more.extend(set("PORTOLAN_KUBERNETES_EVENTS").is_some().then_some("--kubernetes-events"));
    let _agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &more)?;
    wait_until("every request to be made", BOUND, || {
        let requested = api.all_asked();
        ensure!(requested == granted, "requested {requested:?}, granted {granted:?}");
        Ok(())
    })?;
    // A rule with resourceNames permits only requests that select that name.
    assert_eq!(named.len(), 1, "{named:?}");
    for (resource, only) in named {
        assert_eq!(api.selectors(&resource), [format!("metadata.name={only}")], "{resource}");
    }
    Ok(())
}

/// Returns a field of `/proc/<pid>/task/<tid>/status` for each thread of a process.
fn of_threads(process: u32, field: &str) -> Result<Vec<String>> {
    let threads = fs::read_dir(format!("/proc/{process}/task"))?;
    threads
        .map(|thread| {
            let status = fs::read_to_string(thread?.path().join("status")).context("status")?;
            let line = status.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
            Ok(line.trim_start_matches(':').trim().to_owned())
        })
        .collect()
}

/// Checks that an agent that serves has no capabilities, that its helper has exactly those that it needs, and that each
/// of their threads has at least this many system call filters.
fn check_privileges(own: u32, filters: u32) -> Result<()> {
    const NONE: &str = "0000000000000000";
    for field in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        let sets = of_threads(own, field)?;
        ensure!(sets.len() >= 3 && sets.iter().all(|set| set == NONE), "{field}: {sets:?}");
    }
    ensure!(of_threads(own, "NoNewPrivs")?.iter().all(|set| set == "1"));
    let helper = helper_of(own)?;
    for process in [own, helper] {
        let counts = of_threads(process, "Seccomp_filters")?;
        // A thread that another one has started has that one's filters too.
        let enough = |count: &String| count.parse().is_ok_and(|count: u32| count >= filters);
        ensure!(counts.iter().all(enough), "filters of {process}: {counts:?}");
    }
    // CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_SYS_ADMIN.
    let expected = format!("{:016x}", 1 << 12 | 1 << 19 | 1 << 21);
    for field in ["CapPrm", "CapEff"] {
        let sets = of_threads(helper, field)?;
        ensure!(sets.len() == 3 && sets.iter().all(|set| *set == expected), "{field}: {sets:?}");
    }
    Ok(())
}

/// Drops capabilities in a thread of this test, as the threads of the agent do.
#[test]
fn thread_without_capabilities_cannot_load_programs() -> Result<()> {
    // The instructions of `return 0`.
    let program: [u64; 2] = [0xb7, 0x95];
    let load = || {
        let licence = c"GPL";
        #[repr(C)]
        struct Attr {
            kind: u32,
            count: u32,
            instructions: u64,
            licence: u64,
            rest: [u64; 12],
        }
        const CGROUP_SOCK: u32 = 9;
        const BPF_PROG_LOAD: libc::c_long = 5;
        let mut attr = Attr {
            kind: CGROUP_SOCK,
            count: 2,
            instructions: program.as_ptr().addr() as u64,
            licence: licence.as_ptr().addr() as u64,
            rest: [0; 12],
        };
        // SAFETY: the attributes are those of this command, and what they point to outlives the call.
        let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw mut attr, size_of::<Attr>()) };
        if fd < 0 {
            return std::io::Error::last_os_error().raw_os_error().unwrap_or_default();
        }
        // SAFETY: the kernel returned this new descriptor, and nothing else owns it.
        drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        0
    };
    assert_eq!(load(), 0);
    let without = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            portolan_datapath::capabilities::drop_capabilities()?;
            // A child process has no capabilities either, even as root.
            let output = Command::new("cat").arg("/proc/self/status").output()?;
            ensure!(String::from_utf8_lossy(&output.stdout).contains("CapEff:\t0000000000000000"));
            Ok(load())
        });
        thread.join().unwrap()
    })?;
    assert_eq!(without, libc::EPERM);
    // Also with all capabilities, and with a filter of a container that allows everything.
    let filtered = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            allow_all_system_calls()?;
            ensure!(load() == 0);
            portolan_datapath::capabilities::retain_capabilities(rustix::thread::CapabilitySet::all())?;
            Ok(load())
        });
        thread.join().unwrap()
    })?;
    assert_eq!(filtered, libc::EPERM);
    // Other threads keep their capabilities.
    assert_eq!(load(), 0);
    Ok(())
}

/// Gives the calling thread a system call filter, as a container or a systemd unit may have one.
fn allow_all_system_calls() -> Result<()> {
    let mut allow = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW };
    let filter = libc::sock_fprog { len: 1, filter: &raw mut allow };
    // SAFETY: the filter is valid during the call, in which the kernel copies it.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) };
    ensure!(result == 0, std::io::Error::last_os_error());
    Ok(())
}

/// Runs the container as the manifest says (seccomp, read-only root, and so on), on an API server.
#[test]
fn container_serves_the_node() -> Result<()> {
    let documents = manifest()?;
    let pod = &of_kind(&documents, "DaemonSet")?["spec"]["template"]["spec"];
    ensure!(pod["hostNetwork"] == true && pod["hostPID"] == true);
    let bed = TestBed::new()?;
    for address in ["10.0.0.1", "10.0.0.2"] {
        bed.namespace.add_address(&format!("{address}/32"))?;
        bed.serve(&format!("{address}:9080"), address)?;
        bed.serve_datagrams(&format!("{address}:5353"), address)?;
    }
    let mut api = Api::new()?;
    let server = api.listen(&bed.namespace, "127.0.0.1:0".parse()?)?;
    let both = [("10.0.0.1", "n1", ""), ("10.0.0.2", "n1", "")];
    let mut web = service("web", &["172.16.0.10"], 80);
    web["spec"]["ports"][0]["name"] = json!("http");
    let outlier = json!({"trafficPolicy": {"outlierDetection": {"consecutive5xxErrors": 2}}});
    api.apply(&[
        node("n1", "r1/z1"),
        web,
        slice("web", 9080, &both),
        destination_rule("web", &outlier),
        plain(udp_service("dns", &["172.16.0.53"], 53)),
        plain(udp_slice("dns", 5353, &both)),
    ]);
    let container = Container::start(&bed, &pod["containers"][0], &api.account()?, server)?;
    // Its own filter, in addition to that of the container.
    check_privileges(container.process()?, 2)?;
    // Every hook but the packet hook is attached without privileges. The helper attaches that one.
    for hook in ["connect4", "received"] {
        fs::remove_file(bed.pins().join("links").join(hook)).context(hook)?;
        wait_until("the hook to be reattached", BOUND, || {
            ensure!(bed.pins().join("links").join(hook).exists(), "{hook}\n{}", container.agent.log());
            Ok(())
        })?;
    }
    let mut pod = Pod::new(&bed, 1)?;
    let seen = pod.client.dial("172.16.0.10:80", 2)?;
    assert_eq!((seen.count("10.0.0.1"), seen.count("10.0.0.2")), (1, 1));
    // Pods usually do not run as root.
    pod.client.run(&Task::Become { uid: 65_534 })?;
    for _ in 0..2 {
        pod.client.run(&Task::HoldDatagram { to: "172.16.0.53:53".parse()?, mapped: false, then: None })?;
    }
    api.apply(&[plain(udp_slice("dns", 5353, &both[..1]))]);
    wait_until("the socket to be closed", BOUND, || {
        let mut errnos = pod.client.run(&Task::Held)?.errnos();
        errnos.sort_unstable();
        ensure!(errnos == [0, ECONNABORTED], "{errnos:?}\n{}", container.agent.log());
        Ok(())
    })?;
    // The BPF programs keep serving without the agent.
    drop(container);
    assert_eq!(pod.client.dial("172.16.0.10:80", 2)?.errnos(), [0; 2]);
    Ok(())
}

/// Runs the agent as the container does: as root, with only these capabilities, and with no_new_privs.
#[test]
fn container_capabilities_are_sufficient() -> Result<()> {
    let documents = manifest()?;
    let container = &of_kind(&documents, "DaemonSet")?["spec"]["template"]["spec"]["containers"][0];
    let security = &container["securityContext"];
    assert_eq!((&security["privileged"], &security["allowPrivilegeEscalation"]), (&json!(false), &json!(false)));
    let capabilities = texts(&security["capabilities"]["add"]);
    ensure!(texts(&security["capabilities"]["drop"]) == ["ALL"] && !capabilities.is_empty());
    let bounding: String = capabilities.iter().map(|name| format!(",+{}", name.to_lowercase())).collect();
    let bounding = format!("--bounding-set=-all{bounding}");

    let bed = TestBed::new()?;
    let directory = Directory::new()?;
    for address in ["10.0.0.1", "10.0.0.2"] {
        bed.namespace.add_address(&format!("{address}/32"))?;
        bed.serve(&format!("{address}:9080"), address)?;
        bed.serve_datagrams(&format!("{address}:5353"), address)?;
    }
    let outlier =
        json!({"consecutive5xxErrors": 2, "interval": "1s", "baseEjectionTime": "2m", "maxEjectionPercent": 100});
    let mut web = service("web", &["172.16.0.10"], 80);
    web["spec"]["ports"][0]["name"] = json!("http");
    let both = [("10.0.0.1", "n1", ""), ("10.0.0.2", "n1", "")];
    // The packet program is attached as well.
    directory.write(
        "c1/all.yaml",
        &[
            node("n1", "r1/z1"),
            web,
            slice("web", 9080, &both),
            destination_rule("web", &json!({"trafficPolicy": {"outlierDetection": outlier}})),
        ],
    )?;
    let dns = |endpoints: &[(&str, &str, &str)]| {
        directory.write("c1/dns.yaml", &[udp_service("dns", &["172.16.0.53"], 53), udp_slice("dns", 5353, endpoints)])
    };
    dns(&both)?;
    let mut agent = bed.start_under(&["setpriv", "--no-new-privs", &bounding], &directory, "c1", "n1")?;
    agent.wait_ready()?;
    check_privileges(agent.process.id(), 1)?;
    // The packet program is detached and reattached.
    fs::remove_file(bed.pins().join("links/received")).with_context(|| agent.log())?;
    wait_until("the program to be reattached", BOUND, || {
        ensure!(bed.pins().join("links/received").exists(), "{}", agent.log());
        Ok(())
    })?;

    // Pods have their own network namespaces: connections are closed there, and findings name the pod.
    let (mut bad, mut good) = (Pod::new(&bed, 1)?, Pod::new(&bed, 2)?);
    // Pods usually do not run as root.
    good.client.run(&Task::Become { uid: 65_534 })?;
    for _ in 0..2 {
        good.client.run(&Task::HoldDatagram { to: "172.16.0.53:53".parse()?, mapped: false, then: None })?;
    }
    dns(&both[..1])?;
    wait_until("the socket to be closed", BOUND, || {
        let mut errnos = good.client.run(&Task::Held)?.errnos();
        errnos.sort_unstable();
        ensure!(errnos == [0, ECONNABORTED], "{errnos:?}\n{}", agent.log());
        Ok(())
    })?;
    good.client.dial("172.16.0.10:80", 4)?;
    bad.rejects("10.0.0.1")?;
    bad.client.dial("172.16.0.10:80", 20)?;
    wait_until("the finding", BOUND, || {
        let report = agent.get("services")?;
        let found = report["findings"].as_array().unwrap().iter().any(|finding| {
            finding["code"] == "PTL0100" && finding["message"].as_str().unwrap().contains("(dial) in cgroup")
        });
        ensure!(found, "{report:#}");
        Ok(())
    })?;
    // Another agent with the same capabilities takes over.
    agent.process.kill();
    let mut agent = bed.start_under(&["setpriv", "--no-new-privs", &bounding], &directory, "c1", "n1")?;
    agent.wait_ready()?;
    Ok(())
}
