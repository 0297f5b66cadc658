//! Agent restarts: connections are not affected.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{
    fs,
    io::Read as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use portolan_tests::{
    Cgroup, ConnectionSlots, Dialer, Directory, Foreign, ForeignProgram, Pod, ProcessContext, TestBed, binary,
    dial::Task,
    objects::{destination_rule, mesh_config, node, service, slice},
    wait_until,
};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use serde_json::json;

const BOUND: Duration = Duration::from_secs(20);
const ENETUNREACH: i32 = 101;
const ECONNREFUSED: i32 = 111;

fn directory(bed: &TestBed) -> Result<Directory> {
    for i in 1..=2 {
        bed.namespace.add_address(&format!("10.0.0.{i}/32"))?;
        bed.serve(&format!("10.0.0.{i}:9080"), &format!("pod{i}"))?;
    }
    let directory = Directory::new()?;
    directory.write(
        "c1/all.yaml",
        &[
            node("n1", "r1"),
            service("web", &["172.16.0.10"], 80),
            slice("web", 9080, &[("10.0.0.1", "n1", ""), ("10.0.0.2", "n1", "")]),
        ],
    )?;
    Ok(directory)
}

#[test]
fn restart_under_load_fails_no_connections() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = directory(&bed)?;
    let mut agent = bed.agent(&directory, "c1", "n1")?;
    let mut load = bed.dialer()?;
    load.begin(&Task::Load { to: "172.16.0.10:80".parse()? })?;
    let mut client = bed.dialer()?;
    for _ in 0..3 {
        agent.process.kill();
        // No agent is running. The load uses the same cursor, so only the sum is certain.
        let reply = client.dial("172.16.0.10:80", 20)?;
        assert_eq!((reply.count("pod1") + reply.count("pod2"), reply.errnos()), (20, vec![0; 20]));
        agent = bed.agent(&directory, "c1", "n1")?;
        ensure!(agent.log().contains("adopted pinned maps"), "{}", agent.log());
    }
    let reply = load.run(&Task::Stop)?;
    assert_eq!(reply.bad, 0);
    assert!(reply.good > 100, "{} connections", reply.good);
    // The counters continue across agents.
    let report = agent.get("services")?;
    let connections = report["services"][0]["kernel"]["connections"].as_u64().unwrap();
    assert_eq!(connections, reply.good + 60);
    Ok(())
}

/// An agent that loses its helper exits with a reason, and the next agent works. A helper exits with its agent.
#[test]
fn agent_exits_when_its_helper_exits() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = directory(&bed)?;
    let mut agent = bed.agent(&directory, "c1", "n1")?;
    let helper = Pid::from_raw(agent.helper()?.try_into()?).context("no process")?;
    kill_process(helper, Signal::KILL)?;
    let status = agent.process.wait(BOUND)?;
    ensure!(status.code() == Some(1), "{status}");
    ensure!(agent.log().contains("the helper exited"), "{}", agent.log());
    let mut client = bed.dialer()?;
    assert_eq!(client.dial("172.16.0.10:80", 4)?.errnos(), [0; 4]);
    // Conversely, only kernel objects outlive an agent.
    let mut agent = bed.agent(&directory, "c1", "n1")?;
    let helper = agent.helper()?;
    agent.process.kill();
    wait_until("the helper to exit", BOUND, || {
        let line = fs::read(format!("/proc/{helper}/cmdline")).unwrap_or_default();
        ensure!(line.is_empty(), "{line:?}");
        Ok(())
    })
}

#[test]
fn unreadable_configuration_after_a_restart_keeps_previous_frontends() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = directory(&bed)?;
    let other = [service("other", &["172.16.0.20"], 80), slice("other", 9080, &[("10.0.0.2", "n1", "")])];
    directory.write("c1/other.yaml", &other)?;
    let all = directory.path().join("c1/all.yaml");
    let good = fs::read_to_string(&all)?;
    let mut client = bed.dialer()?;
    bed.agent(&directory, "c1", "n1")?.process.kill();
    for (what, cluster, text) in [
        ("a syntax error", "c1", "kind: Service\nmetadata: {name: [".to_owned()),
        ("the endpoints cannot be read", "c1", good.replace("\"port\": 9080", "\"port\": \"http\"")),
        ("the file is empty", "c1", String::new()),
        ("the cluster's name is mistyped", "c2", good.clone()),
    ] {
        fs::write(&all, &text)?;
        let mut agent = bed.start(&directory, cluster, "n1")?;
        wait_until("the agent to be running", BOUND, || {
            ensure!(agent.log().lines().rev().any(|line| line.contains("attached")), "{}", agent.log());
            let (status, why) = agent.http("/readyz")?;
            ensure!(
                status == 503 && why.contains("unchanged since the previous agent published them"),
                "{status} {why}"
            );
            Ok(())
        })?;
        assert_eq!(client.dial("172.16.0.10:80", 4)?.errnos(), [0; 4], "{what}");
        assert_eq!(client.dial("172.16.0.20:80", 4)?.greetings(), ["pod2"; 4], "{what}: the other service works");
        agent.process.kill();
        fs::write(&all, &good)?;
        // Readable again: the next agent adopts the frontends and takes over.
        let mut agent = bed.agent(&directory, "c1", "n1")?;
        assert_eq!(client.dial("172.16.0.10:80", 4)?.errnos(), [0; 4], "{what}");
        agent.process.kill();
    }
    Ok(())
}

#[test]
fn unreadable_mesh_settings_keep_connections_in_the_cluster() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = directory(&bed)?;
    bed.namespace.add_address("10.1.0.1/32")?;
    bed.serve("10.1.0.1:9080", "elsewhere")?;
    directory.write(
        "c2/all.yaml",
        &[node("n2", "r1"), service("web", &["172.17.0.10"], 80), slice("web", 9080, &[("10.1.0.1", "n2", "")])],
    )?;
    let keep = json!({"serviceSettings": [{"settings": {"clusterLocal": true}, "hosts": ["*"]}]});
    directory.write("mesh.yaml", &[mesh_config(&keep)])?;
    let mut client = bed.dialer()?;
    bed.agent(&directory, "c1", "n1")?.process.kill();
    assert_eq!(client.dial("172.16.0.10:80", 20)?.count("elsewhere"), 0);

    directory.write_text("mesh.yaml", "kind: [")?;
    let agent = bed.start(&directory, "c1", "n1")?;
    wait_until("the agent to report what is missing", BOUND, || {
        let (status, why) = agent.http("/readyz")?;
        ensure!(status == 503 && why.contains("mesh.yaml cannot be read"), "{status} {why}");
        Ok(())
    })?;
    assert_eq!(client.dial("172.16.0.10:80", 20)?.count("elsewhere"), 0);
    // The same holds for a service that no previous agent has published.
    for (cluster, address, endpoint, node) in
        [("c1", "172.16.0.30", "10.0.0.1", "n1"), ("c2", "172.17.0.30", "10.1.0.1", "n2")]
    {
        let objects = [service("fresh", &[address], 80), slice("fresh", 9080, &[(endpoint, node, "")])];
        directory.write(&format!("{cluster}/fresh.yaml"), &objects)?;
    }
    wait_until("the new service", BOUND, || {
        let errnos = client.dial("172.16.0.30:80", 1)?.errnos();
        ensure!(errnos == [0], "{errnos:?}");
        Ok(())
    })?;
    assert_eq!(client.dial("172.16.0.30:80", 20)?.count("elsewhere"), 0);
    directory.write("mesh.yaml", &[mesh_config(&json!({}))])?;
    wait_until("the new settings to take effect", BOUND, || {
        ensure!(client.dial("172.16.0.10:80", 3)?.count("elsewhere") == 1);
        Ok(())
    })?;
    assert_eq!(agent.http("/readyz")?.0, 200);
    Ok(())
}

#[test]
fn objects_moved_between_files_stay_available() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = directory(&bed)?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let mut load = bed.dialer()?;
    load.begin(&Task::Load { to: "172.16.0.10:80".parse()? })?;
    let (mut from, mut to) = (directory.path().join("c1/all.yaml"), directory.path().join("c1/zzz.yaml"));
    for i in 0..10 {
        fs::rename(&from, &to)?;
        std::mem::swap(&mut from, &mut to);
        let marker = format!("marker-{i}");
        directory.write("c1/marker.yaml", &[service(&marker, &["172.16.9.9"], 80)])?;
        wait_until("the move to be detected", BOUND, || {
            ensure!(agent.get("services")?.to_string().contains(&marker));
            Ok(())
        })?;
    }
    let reply = load.run(&Task::Stop)?;
    assert_eq!(reply.bad, 0, "of {}", reply.good);
    Ok(())
}

#[test]
fn regular_file_at_the_admin_socket_path_is_not_removed() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = directory(&bed)?;
    fs::write(bed.admin(), "precious")?;
    let mut agent = bed.start(&directory, "c1", "n1")?;
    assert_eq!(agent.process.wait(BOUND)?.code(), Some(1));
    assert!(agent.log().contains("not a socket"), "{}", agent.log());
    assert_eq!(fs::read_to_string(bed.admin())?, "precious");
    Ok(())
}

#[test]
fn shutdown_keeps_pinned_state_and_cleanup_removes_it() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = directory(&bed)?;
    let mut client = bed.dialer()?;
    let mut agent = bed.agent(&directory, "c1", "n1")?;
    let pins = bed.pins().display().to_string();

    let (admin, state) = (bed.admin().display().to_string(), bed.state().display().to_string());
    let cleanup = ["cleanup", "--bpffs", &pins, "--admin", &admin, "--state", &state];
    let busy = bed.portolan(&cleanup)?;
    assert_eq!(busy.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&busy.stderr).contains("stop it first"));

    agent.process.signal(Signal::TERM)?;
    assert!(agent.process.wait(BOUND)?.success());
    assert!(!bed.admin().exists(), "the socket is gone");
    assert_eq!(client.dial("172.16.0.10:80", 2)?.errnos(), [0; 2], "SIGTERM leaves the data plane in place");

    // A killed agent leaves its admin socket behind, and an operator override leaves a state file.
    agent = bed.agent(&directory, "c1", "n1")?;
    let eject = bed.portolan(&["eject", "10.0.0.1:9080", "--admin", &admin])?;
    assert!(eject.status.success(), "{}", String::from_utf8_lossy(&eject.stderr));
    agent.process.kill();
    assert!(bed.admin().exists() && bed.state().exists());
    let cleaned = bed.portolan(&cleanup)?;
    let stdout = String::from_utf8_lossy(&cleaned.stdout).into_owned();
    assert!(!bed.admin().exists() && !bed.state().exists());
    assert!(stdout.contains(&admin) && stdout.contains(&state), "{stdout}");
    assert!(cleaned.status.success() && stdout.contains("links/connect4") && stdout.contains("/FRONTENDS"), "{stdout}");
    assert!(!bed.pins().exists());
    assert_eq!(client.dial("172.16.0.10:80", 1)?.errnos(), [ENETUNREACH]);
    let nothing = bed.portolan(&cleanup)?;
    // Agents of tests that run in parallel may start and stop meanwhile, and leave locks.
    let stdout = String::from_utf8_lossy(&nothing.stdout).into_owned();
    let locks =
        stdout.lines().all(|line| line.starts_with("nothing to remove") || line.contains("/run/portolan/cgroup-"));
    assert!(nothing.status.success() && locks, "{stdout}");
    Ok(())
}

#[test]
fn second_agent_on_the_same_pins_does_not_start() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = directory(&bed)?;
    let _agent = bed.agent(&directory, "c1", "n1")?;
    let mut second = bed.start(&directory, "c1", "n1")?;
    let status = second.process.wait(BOUND)?;
    assert_eq!(status.code(), Some(1));
    assert!(second.log().contains("another agent already uses"), "{}", second.log());
    Ok(())
}

#[test]
fn readiness_reflects_attached_programs() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = directory(&bed)?;
    let mut agent = bed.agent(&directory, "c1", "n1")?;
    assert_eq!(agent.http("/healthz")?, (200, "ok\n".to_owned()));
    assert_eq!(agent.http("/readyz")?, (200, "ready\n".to_owned()));
    // A program is detached externally: the agent reports it and reattaches the program.
    detach(&bed.pins().join("links/connect4"))?;
    let mut client = bed.dialer()?;
    wait_until("the program to be reattached", BOUND, || {
        let repaired = agent.events()?.iter().any(|event| {
            event["kind"] == "repaired" && event["message"].as_str().is_some_and(|text| text.contains("connect4"))
        });
        ensure!(repaired && agent.http("/readyz")?.0 == 200, "{}", agent.log());
        Ok(())
    })?;
    assert_eq!(client.dial("172.16.0.10:80", 2)?.errnos(), [0; 2]);
    // A link whose program has been replaced is attached, and yet not Portolan's.
    ForeignProgram::replace_in_link(&bed.pins().join("links/connect6"), Foreign::DenyV6)?;
    wait_until("the program to be replaced again", BOUND, || {
        let events = agent.events()?;
        let found = |event: &serde_json::Value| {
            let message = event["message"].as_str().unwrap_or_default();
            event["kind"] == "repaired" && message.contains("connect6 was replaced by program")
        };
        ensure!(events.iter().any(found) && agent.http("/readyz")?.0 == 200, "{}", agent.log());
        Ok(())
    })?;
    // A removed pin is restored too: without it, the link would not outlive the agent.
    fs::remove_file(bed.pins().join("links/sock_ops"))?;
    wait_until("the pin to be restored", BOUND, || {
        ensure!(bed.pins().join("links/sock_ops").exists());
        Ok(())
    })?;
    // A program that is detached while no agent runs is reattached by the next agent.
    agent.process.kill();
    detach(&bed.pins().join("links/connect4"))?;
    assert_eq!(client.dial("172.16.0.10:80", 1)?.errnos(), [ENETUNREACH]);
    let agent = bed.agent(&directory, "c1", "n1")?;
    assert!(agent.log().contains("connect4 was detached"), "{}", agent.log());
    assert_eq!(client.dial("172.16.0.10:80", 2)?.errnos(), [0; 2]);
    Ok(())
}

/// The programs are in place, but connections over IPv6 do not get through.
#[test]
fn readiness_reflects_connections_over_ipv6() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = directory(&bed)?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    assert_eq!(agent.http("/readyz")?.0, 200);
    let denying = ForeignProgram::attach(&bed.cgroup, Foreign::DenyV6)?;
    wait_until("the agent to be unready", BOUND, || {
        let (status, why) = agent.http("/readyz")?;
        ensure!(status == 503 && why.contains("connect6 or getpeername6 does not work for IPv6"), "{status} {why}");
        Ok(())
    })?;
    drop(denying);
    wait_until("the agent to be ready", BOUND, || {
        ensure!(agent.http("/readyz")?.0 == 200, "{}", agent.log());
        Ok(())
    })
}

/// In a cgroup namespace of its own, what looks like the root of all cgroups is that of the container.
#[test]
fn cgroup_of_a_container_is_not_that_of_the_machine() -> Result<()> {
    let bed = TestBed::new()?;
    let (directory, pod) = (directory(&bed)?, Pod::new(&bed, 1)?);
    let mount = directory.scratch("cgroup");
    fs::create_dir(&mount)?;
    let script = "mount -t cgroup2 none $0 && exec $1 agent --cluster c1 --node n1 --config $2 --bpffs $3 2>&1";
    let portolan = binary("portolan")?;
    let arguments = [mount.as_path(), &portolan, &directory.path(), bed.pins()].map(|path| path.display().to_string());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut agent = pod
        .start("timeout", &[&["20", "unshare", "--cgroup", "--mount", "sh", "-c", script], &arguments[..]].concat())?;
    let mut output = String::new();
    agent.child().stdout.take().context("no stdout")?.read_to_string(&mut output)?;
    assert!(!agent.child().wait()?.success(), "{output}");
    assert!(output.contains("is the cgroup of this container, not of the machine"), "{output}");
    assert!(output.contains("set --cgroup to that path"), "{output}");
    Ok(())
}

/// While the agent has no descriptors left, connections wait; afterwards, it answers them.
#[test]
fn lack_of_descriptors_is_temporary() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = directory(&bed)?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let id = Pid::from_raw(agent.process.id() as i32).context("no process id")?;
    let usual = getrlimit(Resource::Nofile);
    prlimit(Some(id), Resource::Nofile, Rlimit { current: Some(3), ..usual })?;
    // It cannot answer, not even itself, and does not end.
    assert!(agent.http_within("/healthz", Duration::from_secs(1)).is_err());
    wait_until("the self-probe to fail", BOUND, || {
        ensure!(agent.log().contains("the self-probe failed"), "{}", agent.log());
        Ok(())
    })?;
    prlimit(Some(id), Resource::Nofile, usual)?;
    wait_until("the agent to answer", BOUND, || {
        ensure!(agent.http("/readyz")?.0 == 200, "{}", agent.log());
        agent.get("services").map(drop)
    })
}

#[test]
fn recreated_cgroup_is_served_again() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = directory(&bed)?;
    let name = format!("{}/pods", bed.cgroup.path().file_name().unwrap().display());
    let pods = Cgroup::new(&name)?;
    let path = pods.path().display().to_string();
    let agent = bed.agent_with(&directory, "c1", "n1", &["--cgroup", &path])?;
    let dial = |pods: &Cgroup| {
        let place = ProcessContext { namespace: Some(&bed.namespace), cgroup: Some(pods) };
        Dialer::start(place)?.dial("172.16.0.10:80", 2)
    };
    assert_eq!(dial(&pods)?.errnos(), [0; 2]);
    // Kill its processes first: they include the agent's self-probe.
    wait_until("the cgroup to be removed", BOUND, || {
        fs::write(pods.path().join("cgroup.kill"), "1")?;
        Ok(fs::remove_dir(pods.path())?)
    })?;
    std::mem::forget(pods);
    wait_until("the agent to detect the removal", BOUND, || {
        let (status, why) = agent.http("/readyz")?;
        ensure!(status == 503, "{status} {why}");
        Ok(())
    })?;
    let pods = Cgroup::new(&name)?;
    wait_until("the new cgroup to be served", BOUND, || {
        ensure!(agent.http("/readyz")?.0 == 200, "{}", agent.log());
        Ok(())
    })?;
    assert_eq!(dial(&pods)?.errnos(), [0; 2]);
    Ok(())
}

#[test]
fn connections_closed_while_detached_are_reconciled() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = directory(&bed)?;
    let limit = json!({"trafficPolicy": {"connectionPool": {"tcp": {"maxConnections": 5}}}});
    directory.write("c1/limit.yaml", &[destination_rule("web", &limit)])?;
    let to = "172.16.0.10:80".parse()?;
    let mut agent = bed.agent(&directory, "c1", "n1")?;
    let places = ConnectionSlots::open(bed.pins())?;
    // Three connections stay open. Two close while sock_ops is detached: first without an agent, then with one.
    let mut stay = bed.dialer()?;
    stay.run(&Task::Hold { to, times: 3 })?;
    for agent_stopped in [true, false] {
        let mut leave = bed.dialer()?;
        leave.run(&Task::Hold { to, times: 2 })?;
        assert_eq!(bed.dialer()?.dial("172.16.0.10:80", 1)?.errnos(), [ECONNREFUSED], "the pool is full");
        if agent_stopped {
            agent.process.kill();
        }
        detach(&bed.pins().join("links/sock_ops"))?;
        drop(leave);
        if agent_stopped {
            agent = bed.agent(&directory, "c1", "n1")?;
        }
        wait_until("the counts to be reconciled", BOUND, || {
            // A connect that no hook sees, such as one of the self-probe, keeps its slot for a while.
            let taken = places.connected();
            ensure!(taken == 3, "{taken} slots are in use\n{}", agent.log());
            let events = agent.events()?;
            let repaired = events
                .iter()
                .any(|event| event["message"].as_str().is_some_and(|it| it.contains("missed close events")));
            ensure!(repaired && agent.http("/readyz")?.0 == 200, "{}", agent.log());
            Ok(())
        })?;
        let mut two = bed.dialer()?;
        assert_eq!(two.run(&Task::Hold { to, times: 2 })?.errnos(), [0; 2]);
        assert_eq!(bed.dialer()?.dial("172.16.0.10:80", 1)?.errnos(), [ECONNREFUSED], "the limit is unchanged");
        drop(two);
        wait_until("their slots to be freed", BOUND, || {
            ensure!(places.connected() == 3, "{} slots are in use", places.connected());
            Ok(())
        })?;
    }
    Ok(())
}

/// Detaches a pinned link (`BPF_LINK_DETACH`). The pin stays.
fn detach(pin: &std::path::Path) -> Result<()> {
    let output = std::process::Command::new("bpftool").args(["-j", "link", "show", "pinned"]).arg(pin).output()?;
    let link: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let id = link["id"].to_string();
    let status = std::process::Command::new("bpftool").args(["link", "detach", "id", &id]).status()?;
    ensure!(status.success() && link["id"] != json!(null), "bpftool cannot detach {link}");
    Ok(())
}

#[test]
fn changes_under_load_fail_no_connections() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = directory(&bed)?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let mut load = bed.dialer()?;
    load.begin(&Task::Load { to: "172.16.0.10:80".parse()? })?;
    let end = Instant::now() + Duration::from_secs(3);
    let mut changes = 0;
    // At least four changes, however slow the machine is.
    while Instant::now() < end || changes < 4 {
        let endpoints: &[(&str, &str, &str)] = if changes % 2 == 0 {
            &[("10.0.0.1", "n1", "")]
        } else {
            &[("10.0.0.1", "n1", ""), ("10.0.0.2", "n1", "")]
        };
        directory.write(
            "c1/all.yaml",
            &[node("n1", "r1"), service("web", &["172.16.0.10"], 80), slice("web", 9080, endpoints)],
        )?;
        changes += 1;
        wait_until("the change to be published", BOUND, || {
            let count = agent.get("services")?["services"][0]["endpoints"].as_array().map_or(0, Vec::len);
            ensure!(count == endpoints.len(), "{count}");
            Ok(())
        })?;
    }
    let reply = load.run(&Task::Stop)?;
    assert_eq!(reply.bad, 0, "of {} over {changes} changes", reply.good);
    assert!(reply.good > 100, "{changes} changes, {} connections", reply.good);
    Ok(())
}
