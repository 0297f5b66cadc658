//! Configuration: files that change while they are read, routes, and unsuitable machines.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{fs, io::Write as _, process::Command, time::Duration};

use anyhow::{Result, ensure};
use portolan_tests::{
    Agent, Directory, TestBed, binary,
    objects::{destination_rule, node, service, slice},
    report::{finding, service_named, shares},
    wait_until,
};
use serde_json::{Value, json};

const BOUND: Duration = Duration::from_secs(20);
const ECONNREFUSED: i32 = 111;
const EHOSTUNREACH: i32 = 113;

#[test]
fn partial_or_invalid_write_keeps_the_last_good_state() -> Result<()> {
    let bed = TestBed::new()?;
    bed.namespace.add_address("10.0.0.1/32")?;
    bed.serve("10.0.0.1:9080", "web")?;
    let directory = Directory::new()?;
    let objects = [service("web", &["172.16.0.10"], 80), slice("web", 9080, &[("10.0.0.1", "n1", "")])];
    directory.write("c1/node.yaml", &[node("n1", "r1")])?;
    directory.write("c1/web.yaml", &objects)?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    let path = directory.path().join("c1/web.yaml");
    let good = fs::read_to_string(&path)?;
    // Returns once the agent has read everything written before: it then has seen a marker that is written afterwards.
    let mut marker = 0;
    let mut sync = |agent: &Agent| -> Result<()> {
        marker += 1;
        let name = format!("marker-{marker}");
        directory.write("c1/marker.yaml", &[service(&name, &["172.16.9.9"], 80)])?;
        wait_until("the marker", BOUND, || {
            ensure!(agent.get("services")?.to_string().contains(&name));
            Ok(())
        })
    };

    // A slow writer has written half of the file. The text so far is valid YAML, but without the endpoints.
    let half = good.split("---").next().unwrap_or_default();
    let mut writer = fs::File::create(&path)?;
    writer.write_all(half.as_bytes())?;
    writer.flush()?;
    sync(&agent)?;
    assert_eq!(client.dial("172.16.0.10:80", 3)?.greetings(), ["web"; 3], "while the file is being written");
    writer.write_all(&good.as_bytes()[half.len()..])?;
    drop(writer);
    sync(&agent)?;
    assert_eq!(client.dial("172.16.0.10:80", 3)?.greetings(), ["web"; 3]);

    let mut portless = objects[0].clone();
    portless["spec"]["ports"] = json!([]);
    let without_ports = format!("{portless}\n---\n{}", objects[1]);
    for (what, text, said) in [
        ("a syntax error", "kind: Service\nmetadata: {name: [".to_owned(), "unclosed bracket"),
        ("an invalid endpoint port", good.replace("\"port\": 9080", "\"port\": \"http\""), "ports[0].port"),
        ("an empty file", String::new(), "became empty"),
        ("a file with only a comment", "\n# nothing\n".to_owned(), "became empty"),
        ("a Service without ports", without_ports, "add at least one port"),
    ] {
        directory.write_text("c1/web.yaml", &text)?;
        wait_until(&format!("a finding about {what}"), BOUND, || {
            let findings = agent.get("services")?["findings"].to_string();
            ensure!(findings.contains("c1/web.yaml") && findings.contains(said), "{findings}");
            Ok(())
        })?;
        assert_eq!(client.dial("172.16.0.10:80", 3)?.greetings(), ["web"; 3], "{what}");
        assert!(agent.log().lines().any(|line| line.contains("ERROR") && line.contains(said)), "{}", agent.log());
        directory.write_text("c1/web.yaml", &good)?;
        wait_until("the finding to be cleared", BOUND, || {
            let findings = agent.get("services")?["findings"].to_string();
            ensure!(!findings.contains("c1/web.yaml"), "{findings}");
            Ok(())
        })?;
    }
    // A file that was never readable does not affect others.
    directory.write_text("c1/never.yaml", "kind: [")?;
    // Endpoints that are removed deliberately are removed.
    directory.write("c1/web.yaml", &objects[..1])?;
    wait_until("the endpoints to be removed", BOUND, || {
        let errnos = client.dial("172.16.0.10:80", 1)?.errnos();
        // While a file that may hold the mesh settings is unreadable, clusterLocal is strict.
        ensure!(errnos == [EHOSTUNREACH], "{errnos:?}");
        Ok(())
    })
}

#[test]
fn route_weights_are_exact_and_zero_gets_nothing() -> Result<()> {
    let directory = Directory::new()?;
    let destination =
        |subset: &str, weight: u32| json!({"destination": {"host": "web", "subset": subset}, "weight": weight});
    let route = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"hosts": ["web"], "tcp": [{"route": [destination("v1", 3), destination("v2", 1), destination("v3", 0)]}]},
    });
    let subset = |name: &str| json!({"name": name, "labels": {"version": name}});
    directory.write(
        "rules.yaml",
        &[route, destination_rule("web", &json!({"subsets": [subset("v1"), subset("v2"), subset("v3")]}))],
    )?;
    let pod = |i: u32| portolan_tests::objects::pod(&format!("web-{i}"), &json!({"version": format!("v{i}")}));
    directory.write(
        "c1/all.yaml",
        &[
            node("n1", "r1/z1"),
            service("web", &["172.16.0.10"], 80),
            slice(
                "web",
                9080,
                &[("10.0.0.1", "n1", "web-1"), ("10.0.0.2", "n1", "web-2"), ("10.0.0.3", "n1", "web-3")],
            ),
            pod(1),
            pod(2),
            pod(3),
        ],
    )?;
    let bed = TestBed::new()?;
    for i in 1..=3 {
        bed.namespace.add_address(&format!("10.0.0.{i}/32"))?;
        bed.serve(&format!("10.0.0.{i}:9080"), &format!("v{i}"))?;
    }
    let _agent = bed.agent(&directory, "c1", "n1")?;
    let reply = bed.dialer()?.dial("172.16.0.10:80", 400)?;
    assert_eq!(["v1", "v2", "v3"].map(|version| reply.count(version)), [300, 100, 0]);
    Ok(())
}

/// As for weighted clusters in Envoy, an empty destination fails its share, which the others do not take over.
#[test]
fn route_to_an_empty_destination_refuses_only_its_share() -> Result<()> {
    let directory = Directory::new()?;
    let destination = |host: &str, subset: &str, weight: u32| json!({"destination": {"host": host, "subset": subset}, "weight": weight});
    let route = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"hosts": ["web"], "tcp": [{"route": [
            destination("web", "v1", 6), destination("web", "gone", 3), destination("nowhere", "v1", 1)]}]},
    });
    let subset = |name: &str| json!({"name": name, "labels": {"version": name}});
    directory
        .write("rules.yaml", &[route, destination_rule("web", &json!({"subsets": [subset("v1"), subset("gone")]}))])?;
    directory.write(
        "c1/all.yaml",
        &[
            node("n1", "r1/z1"),
            service("web", &["172.16.0.10"], 80),
            slice("web", 9080, &[("10.0.0.1", "n1", "web-1")]),
            portolan_tests::objects::pod("web-1", &json!({"version": "v1"})),
        ],
    )?;
    let (report, code) = directory.plan("c1", "n1", &[])?;
    assert_eq!(code, 1);
    finding(&report, "VirtualService default/web", "no service is named \"nowhere.default.svc.cluster.local\"")?;
    finding(
        &report,
        "Service default/web",
        "default/web:80 subset gone are refused: no Pod behind its endpoints has the labels",
    )?;
    assert_eq!(service_named(&report, "web")?["refusedShare"], Value::Null);
    assert_eq!(report["services"][1]["refusedShare"], json!(0.3));
    assert_eq!(shares(service_named(&report, "web")?), [("10.0.0.1:9080".to_owned(), 0.6)]);
    let bed = TestBed::new()?;
    bed.namespace.add_address("10.0.0.1/32")?;
    bed.serve("10.0.0.1:9080", "v1")?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let reply = bed.dialer()?.dial("172.16.0.10:80", 100)?;
    let refused = reply.seen.iter().filter(|seen| seen.errno == ECONNREFUSED).count();
    assert_eq!((reply.count("v1"), refused), (60, 40));
    let metrics = agent.http("/metrics")?.1;
    for (name, count) in [("portolan_picks_total", 60), ("portolan_refused_total", 40)] {
        assert!(
            metrics.lines().any(|line| line.starts_with(name) && line.ends_with(&format!(" {count}"))),
            "{metrics}"
        );
    }
    Ok(())
}

#[test]
fn unsuitable_machine_is_reported_in_one_line() -> Result<()> {
    let directory = Directory::new()?;
    directory.write("c1/node.yaml", &[node("n1", "r1")])?;
    let bed = TestBed::new()?;
    let start = |command: &mut Command, cgroup: &str, bpffs: &str, admin: &str| -> Result<(Option<i32>, String)> {
        command.arg("agent").arg("--config").arg(directory.path()).args(["--cluster", "c1", "--node", "n1"]);
        command.args(["--cgroup", cgroup, "--bpffs", bpffs, "--admin", admin, "--metrics", "127.0.0.1:0"]);
        let output = command.output()?;
        Ok((output.status.code(), String::from_utf8(output.stderr)?))
    };
    let (cgroup, pins) = (bed.cgroup.path().display().to_string(), bed.pins().display().to_string());
    let admin = directory.scratch("admin.sock").display().to_string();
    let portolan = || binary("portolan").map(Command::new);
    for (mut command, cgroup, bpffs, said) in [
        (portolan()?, "/proc", pins.as_str(), "/proc is not on a cgroup v2 file system"),
        (portolan()?, "/sys/fs/cgroup/no/such", pins.as_str(), "does not exist"),
        (portolan()?, cgroup.as_str(), "/tmp/portolan-no-bpffs", "is not on a bpffs"),
        (directory.portolan_unprivileged()?, cgroup.as_str(), pins.as_str(), "root is needed"),
        (without(&binary("portolan")?, "/sys/kernel/btf"), cgroup.as_str(), pins.as_str(), "the kernel has no BTF"),
    ] {
        let (code, text) = start(&mut command, cgroup, bpffs, &admin)?;
        assert_eq!((code, text.lines().count()), (Some(2), 1), "{said}: {text}");
        assert!(text.starts_with("portolan: ") && text.contains(said), "{said}: {text}");
    }
    // No cgroup v2 in the mount table.
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c"]);
    command.arg(format!(
        "for mount in $(awk '$3 == \"cgroup2\" {{print $2}}' /proc/mounts); do umount -l $mount; done; \
         exec {} agent --config {} --cluster c1 --node n1 --bpffs {pins} --admin {admin} --metrics 127.0.0.1:0",
        binary("portolan")?.display(),
        directory.path().display()
    ));
    let output = command.output()?;
    let text = String::from_utf8(output.stderr)?;
    assert_eq!((output.status.code(), text.lines().count()), (Some(2), 1), "{text}");
    assert!(text.contains("no cgroup v2 is mounted"), "{text}");
    Ok(())
}

/// Returns a command that runs `binary` in a mount namespace in which this directory is empty.
fn without(binary: &std::path::Path, folder: &str) -> Command {
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", "mount -t tmpfs none \"$1\" && shift && exec \"$@\"", "sh", folder])
        .arg(binary);
    command
}
