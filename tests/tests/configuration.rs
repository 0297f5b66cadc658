//! Objects as they come: good, broken, half written, contradicting each other. Whatever is wrong is told, and the rest works.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{fs, io::Write as _, process::Command, time::Duration};

use anyhow::{Result, ensure};
use portolan_tests::{
    Agent, Bed, Directory, binary,
    objects::{destination_rule, mesh_config, node, service, slice},
    wait_until,
};
use serde_json::{Value, json};

const BOUND: Duration = Duration::from_secs(20);
const ECONNREFUSED: i32 = 111;

/// Runs `portolan plan` for node n1 of cluster c1; no root, no kernel.
fn plan(directory: &Directory, more: &[&str]) -> Result<(Value, i32)> {
    let mut command = Command::new(binary("portolan")?);
    command.arg("plan").arg("--config").arg(directory.path()).args(["--cluster", "c1", "--node", "n1", "-o", "json"]);
    let output = command.args(more).output()?;
    let code = output.status.code().unwrap_or(-1);
    ensure!(code <= 1, "{}", String::from_utf8_lossy(&output.stderr));
    Ok((serde_json::from_slice(&output.stdout)?, code))
}

fn service_named<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["services"].as_array().unwrap().iter().find(|service| service["name"] == name).unwrap()
}

fn shares(service: &Value) -> Vec<(String, f64)> {
    let endpoints = service["endpoints"].as_array().unwrap().iter();
    endpoints.map(|it| (it["address"].as_str().unwrap().to_owned(), it["share"].as_f64().unwrap())).collect()
}

/// The finding about this object whose message contains this.
fn finding<'a>(report: &'a Value, object: &str, message: &str) -> &'a Value {
    let findings = report["findings"].as_array().unwrap();
    let found = findings
        .iter()
        .find(|finding| finding["object"] == object && finding["message"].as_str().unwrap().contains(message));
    found.unwrap_or_else(|| panic!("no finding about {object} says {message:?}: {findings:#?}"))
}

#[test]
fn everything_that_is_wrong_is_told_and_the_rest_works() -> Result<()> {
    let directory = Directory::new()?;
    directory.write(
        "c1/good.yaml",
        &[
            node("n1", "r1/z1"),
            service("web", &["172.16.0.10"], 80),
            slice("web", 9080, &[("10.0.0.1", "n1", ""), ("10.0.0.2", "lost", "")]),
            service("twin", &["172.16.0.10"], 80),
            slice("orphan", 9080, &[("10.0.0.9", "n1", "")]),
            slice("sneaky", 9080, &[("127.0.0.1", "n1", ""), ("169.254.169.254", "n1", ""), ("10.0.0.3", "n1", "")]),
            service("sneaky", &["172.16.0.30"], 80),
            service("selfish", &["127.0.0.53"], 53),
        ],
    )?;
    directory.write(
        "c1/empty-ports.yaml",
        &[json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "portless", "namespace": "default"},
        "spec": {"clusterIP": "172.16.0.40"}})],
    )?;
    directory.write(
        "c1/kinds.yaml",
        &[json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web-v1"}})],
    )?;
    directory.write_text(
        "c1/broken.yaml",
        "kind: Service\nmetadata:\n  name: [\n---\napiVersion: v1\nkind: Node\nmetadata: {name: n2}\n",
    )?;
    directory.write_text(
        "c1/typed.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: typed}\nspec: {ports: [{port: many}]}\n",
    )?;
    let distribute = |near: u32, far: u32| {
        json!({"trafficPolicy": {"loadBalancer": {"localityLbSetting": {"distribute": [
            {"from": "r1/*", "to": {"r1/*": near, "r2/*": far}}]}}}})
    };
    directory.write(
        "rules.yaml",
        &[
            destination_rule("web", &distribute(80, 10)),
            destination_rule("nobody", &json!({})),
            destination_rule("sneaky", &json!({"trafficPolicy": {"outlierDetection": {"interval": "soon"}}})),
        ],
    )?;
    let (report, code) = plan(&directory, &[])?;
    assert_eq!(code, 1);
    for (object, message, source) in [
        ("EndpointSlice default/web-ipv4", "no Node lost", ""),
        ("EndpointSlice default/orphan-ipv4", "no Service default/orphan", ""),
        ("EndpointSlice default/sneaky-ipv4", "endpoints[0].addresses[0]: 127.0.0.1 is a loopback", "c1/good.yaml"),
        (
            "EndpointSlice default/sneaky-ipv4",
            "endpoints[1].addresses[0]: 169.254.169.254 is a link-local",
            "c1/good.yaml",
        ),
        ("Service default/selfish", "127.0.0.53 is a loopback", "c1/good.yaml"),
        ("Service default/web", "172.16.0.10 port 80 belongs to Service default/twin", ""),
        ("Service default/portless", "spec.ports is empty", "c1/empty-ports.yaml"),
        ("Deployment web-v1", "does not use this kind", "c1/kinds.yaml"),
        ("c1/broken.yaml", "line ", "c1/broken.yaml"),
        ("Service default/typed", "spec.ports[0].port: ", "c1/typed.yaml"),
        ("DestinationRule default/web", "distribute[0].to: the percentages sum to 90, not to 100", "rules.yaml"),
        ("DestinationRule default/sneaky", "outlierDetection.interval: \"soon\" is no duration", "rules.yaml"),
        ("DestinationRule default/nobody", "no Service is named", ""),
    ] {
        assert_eq!(finding(&report, object, message)["source"].as_str().unwrap_or_default(), source, "{object}");
    }
    // The rest: the twin that comes first by name keeps the address, and what was left of the sneaky one serves.
    assert_eq!(service_named(&report, "twin")["frontends"], json!(["172.16.0.10:80"]));
    assert_eq!(shares(service_named(&report, "sneaky")), [("10.0.0.3:9080".to_owned(), 1.0)]);
    // Allowed on demand, but for what nobody should be sent to.
    let (report, _) = plan(&directory, &["--allow-loopback-endpoints"])?;
    assert_eq!(shares(service_named(&report, "sneaky")).len(), 3);
    Ok(())
}

#[test]
fn an_empty_slice_as_kubectl_prints_it() -> Result<()> {
    let directory = Directory::new()?;
    let mut empty = slice("web", 9080, &[]);
    empty["endpoints"] = Value::Null;
    empty["ports"] = Value::Null;
    directory.write("c1/all.yaml", &[node("n1", "r1/z1"), service("web", &["172.16.0.10"], 80), empty])?;
    let (report, code) = plan(&directory, &[])?;
    assert_eq!((code, &report["findings"]), (0, &json!([])));
    assert_eq!(shares(service_named(&report, "web")), []);
    Ok(())
}

#[test]
fn a_missing_node_is_told_and_everything_is_far() -> Result<()> {
    let directory = Directory::new()?;
    directory.write(
        "c1/all.yaml",
        &[node("n2", "r1/z1"), service("web", &["172.16.0.10"], 80), slice("web", 9080, &[("10.0.0.1", "n2", "")])],
    )?;
    let (report, code) = plan(&directory, &[])?;
    assert_eq!(code, 1);
    finding(&report, "Node n1", "no such Node");
    assert_eq!(shares(service_named(&report, "web")), [("10.0.0.1:9080".to_owned(), 1.0)]);
    Ok(())
}

/// Failover with explicit regions: the same objects in any order, in any file, give the same verdict.
#[test]
fn the_order_in_which_things_are_seen_does_not_matter() -> Result<()> {
    let objects = |remote_first: bool, local: &str| {
        let mut endpoints = vec![("10.0.0.1", "n1", ""), ("10.1.0.1", "n2", "")];
        if remote_first {
            endpoints.reverse();
        }
        let mut objects = vec![
            slice("web", 9080, &endpoints),
            service("web", &["172.16.0.10"], 80),
            node("n1", local),
            node("n2", "r2/z1"),
        ];
        if remote_first {
            objects.reverse();
        }
        objects
    };
    let outlier =
        json!({"trafficPolicy": {"outlierDetection": {"consecutive5xxErrors": 1, "maxEjectionPercent": 100}}});
    let rule = destination_rule("web", &outlier);
    let mut seen = Vec::new();
    for remote_first in [false, true] {
        let directory = Directory::new()?;
        directory.write("rules.yaml", std::slice::from_ref(&rule))?;
        for (i, object) in objects(remote_first, "r1/z1").iter().enumerate() {
            let name = if remote_first { 9 - i } else { i };
            directory.write(&format!("c1/{name}.yaml"), std::slice::from_ref(object))?;
        }
        let report = plan(&directory, &[])?.0;
        seen.push((report["services"].clone(), report["findings"].clone()));
    }
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0].0[0]["endpoints"][0]["priority"], json!(0));
    assert_eq!(seen[0].0[0]["localities"][1]["share"], json!(0.0));

    // The node moves: what was near is far, at once.
    let bed = Bed::new()?;
    let directory = Directory::new()?;
    directory.write("rules.yaml", &[rule])?;
    directory.write("c1/all.yaml", &objects(false, "r1/z1"))?;
    let agent = bed.agent(&directory, "c1", "n2")?;
    let near = |agent: &Agent| -> Result<Value> {
        Ok(agent.get("endpoints")?["services"][0]["endpoints"][0]["priority"].clone())
    };
    assert_eq!(near(&agent)?, json!(1));
    directory.write("c1/all.yaml", &objects(false, "r2/z1"))?;
    wait_until("the endpoint to be near", BOUND, || {
        ensure!(near(&agent)? == json!(0));
        Ok(())
    })
}

#[test]
fn a_write_that_is_half_done_or_broken_keeps_the_last_good_state() -> Result<()> {
    let bed = Bed::new()?;
    bed.namespace.add_address("10.0.0.1/32")?;
    bed.serve("10.0.0.1:9080", "web")?;
    let directory = Directory::new()?;
    let objects = [service("web", &["172.16.0.10"], 80), slice("web", 9080, &[("10.0.0.1", "n1", "")])];
    directory.write("c1/node.yaml", &[node("n1", "r1")])?;
    directory.write("c1/web.yaml", &objects)?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialler()?;
    let path = directory.path().join("c1/web.yaml");
    let good = fs::read_to_string(&path)?;
    // The agent has read everything that was there when this returns: a marker after it has arrived.
    let mut marker = 0;
    let mut settled = |agent: &Agent| -> Result<()> {
        marker += 1;
        let name = format!("marker-{marker}");
        directory.write("c1/marker.yaml", &[service(&name, &["172.16.9.9"], 80)])?;
        wait_until("the marker", BOUND, || {
            ensure!(agent.get("services")?.to_string().contains(&name));
            Ok(())
        })
    };

    // Half of it is written, and the writer takes its time: the text as it stands is sound YAML, without the endpoints.
    let half = good.split("---").next().unwrap_or_default();
    let mut writer = fs::File::create(&path)?;
    writer.write_all(half.as_bytes())?;
    writer.flush()?;
    settled(&agent)?;
    assert_eq!(client.dial("172.16.0.10:80", 3)?.greetings(), ["web"; 3], "while it is being written");
    writer.write_all(&good.as_bytes()[half.len()..])?;
    drop(writer);
    settled(&agent)?;
    assert_eq!(client.dial("172.16.0.10:80", 3)?.greetings(), ["web"; 3]);

    for (what, text, said) in [
        ("a syntax error", "kind: Service\nmetadata: {name: [".to_owned(), "line "),
        ("an endpoint's port that is none", good.replace("\"port\": 9080", "\"port\": \"http\""), "ports[0].port"),
        ("an empty file", String::new(), "empty all of a sudden"),
    ] {
        directory.write_text("c1/web.yaml", &text)?;
        wait_until(&format!("a finding about {what}"), BOUND, || {
            let findings = agent.get("services")?["findings"].to_string();
            ensure!(findings.contains("c1/web.yaml") && findings.contains(said), "{findings}");
            Ok(())
        })?;
        assert_eq!(client.dial("172.16.0.10:80", 3)?.greetings(), ["web"; 3], "{what}");
        directory.write_text("c1/web.yaml", &good)?;
        wait_until("the finding to go", BOUND, || {
            let findings = agent.get("services")?["findings"].clone();
            ensure!(findings == json!([]), "{findings}");
            Ok(())
        })?;
    }
    // What is taken out on purpose goes.
    directory.write("c1/web.yaml", &objects[..1])?;
    wait_until("the endpoints to go", BOUND, || {
        let errnos = client.dial("172.16.0.10:80", 1)?.errnos();
        ensure!(errnos == [ECONNREFUSED], "{errnos:?}");
        Ok(())
    })
}

#[test]
fn what_would_be_if_an_endpoint_were_ejected() -> Result<()> {
    let directory = Directory::new()?;
    let outlier = json!({"consecutive5xxErrors": 1, "maxEjectionPercent": 100});
    directory.write(
        "mesh.yaml",
        &[mesh_config(&json!({"localityLbSetting": {"failover": [{"from": "r1", "to": "r2"}]}}))],
    )?;
    directory
        .write("rules.yaml", &[destination_rule("web", &json!({"trafficPolicy": {"outlierDetection": outlier}}))])?;
    directory.write(
        "c1/all.yaml",
        &[
            node("n1", "r1/z1"),
            node("n2", "r2/z1"),
            node("n3", "r3/z1"),
            service("web", &["172.16.0.10"], 80),
            slice(
                "web",
                9080,
                &[("10.0.0.1", "n1", ""), ("10.0.0.2", "n1", ""), ("10.1.0.1", "n2", ""), ("10.2.0.1", "n3", "")],
            ),
        ],
    )?;
    let share = |ejected: &[&str]| -> Result<Vec<f64>> {
        let more: Vec<&str> = ejected.iter().flat_map(|address| ["--eject", address]).collect();
        Ok(shares(service_named(&plan(&directory, &more)?.0, "web")).into_iter().map(|(_, share)| share).collect())
    };
    assert_eq!(share(&[])?, [0.5, 0.5, 0.0, 0.0]);
    // Half of the near ones can carry 70 %; the rest spills to the preferred region.
    assert_eq!(share(&["10.0.0.1"])?, [0.0, 0.7, 0.3, 0.0]);
    assert_eq!(share(&["10.0.0.1", "10.0.0.2:9080"])?, [0.0, 0.0, 1.0, 0.0]);
    assert_eq!(share(&["10.0.0.1", "10.0.0.2", "10.1.0.1"])?, [0.0, 0.0, 0.0, 1.0]);
    assert_eq!(share(&["10.0.0.1", "10.0.0.2", "10.1.0.1", "10.2.0.1"])?, [0.0; 4]);
    assert!(share(&["10.9.9.9"]).is_err(), "an endpoint that there is not");
    Ok(())
}

#[test]
fn a_route_by_weight_and_a_weight_of_zero() -> Result<()> {
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
    let bed = Bed::new()?;
    for i in 1..=3 {
        bed.namespace.add_address(&format!("10.0.0.{i}/32"))?;
        bed.serve(&format!("10.0.0.{i}:9080"), &format!("v{i}"))?;
    }
    let _agent = bed.agent(&directory, "c1", "n1")?;
    let reply = bed.dialler()?.dial("172.16.0.10:80", 400)?;
    assert_eq!(["v1", "v2", "v3"].map(|version| reply.count(version)), [300, 100, 0]);
    Ok(())
}

/// Envoy's weighted clusters: one that is empty fails its share; the others were not meant for it.
#[test]
fn a_route_that_leads_to_nobody_refuses_its_share_and_no_more() -> Result<()> {
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
    let (report, code) = plan(&directory, &[])?;
    assert_eq!(code, 1);
    finding(&report, "VirtualService default/web", "no Service is named \"nowhere.default.svc.cluster.local\"");
    finding(&report, "Service default/web", "its route to default/web:80 subset gone leads to nobody");
    assert_eq!(shares(service_named(&report, "web")), [("10.0.0.1:9080".to_owned(), 0.6)]);
    let bed = Bed::new()?;
    bed.namespace.add_address("10.0.0.1/32")?;
    bed.serve("10.0.0.1:9080", "v1")?;
    let _agent = bed.agent(&directory, "c1", "n1")?;
    let reply = bed.dialler()?.dial("172.16.0.10:80", 100)?;
    let refused = reply.seen.iter().filter(|seen| seen.errno == ECONNREFUSED).count();
    assert_eq!((reply.count("v1"), refused), (60, 40));
    Ok(())
}

#[test]
fn a_rule_has_no_say_over_the_services_of_another_namespace() -> Result<()> {
    let directory = Directory::new()?;
    let in_namespace = |mut object: Value, namespace: &str| {
        object["metadata"]["namespace"] = json!(namespace);
        object
    };
    let distribute = json!({"trafficPolicy": {"loadBalancer": {"localityLbSetting": {"distribute": [
        {"from": "r1/*", "to": {"r2/*": 100}}]}}}});
    let host = "web.default.svc.cluster.local";
    let mut route = portolan_tests::objects::tcp_route(host, host, "v1");
    route["metadata"]["name"] = json!("route");
    directory.write(
        "rules.yaml",
        &[in_namespace(destination_rule(host, &distribute), "other"), in_namespace(route, "other")],
    )?;
    directory.write(
        "c1/all.yaml",
        &[
            node("n1", "r1/z1"),
            node("n2", "r2/z1"),
            service("web", &["172.16.0.10"], 80),
            slice("web", 9080, &[("10.0.0.1", "n1", ""), ("10.1.0.1", "n2", "")]),
        ],
    )?;
    let (report, code) = plan(&directory, &[])?;
    assert_eq!(code, 1);
    finding(&report, &format!("DestinationRule other/{host}"), "in another namespace");
    finding(&report, "VirtualService other/route", "in another namespace");
    let service = service_named(&report, "web");
    assert_eq!((&service["mode"], &service["subset"]), (&json!("none"), &Value::Null));
    // From the mesh's own namespace it counts; from the service's own it counts before that.
    directory.write("rules.yaml", &[in_namespace(destination_rule(host, &distribute), "istio-system")])?;
    let (report, code) = plan(&directory, &[])?;
    assert_eq!((code, &service_named(&report, "web")["mode"]), (0, &json!("distribute")));
    let twice = |name: &str| {
        let mut rule = destination_rule("web", &json!({}));
        rule["metadata"]["name"] = json!(name);
        rule
    };
    directory.write("more.yaml", &[twice("a"), twice("b")])?;
    let report = plan(&directory, &[])?.0;
    assert_eq!(service_named(&report, "web")["mode"], json!("none"));
    finding(&report, "DestinationRule default/b", "DestinationRule default/a, which counts");
    Ok(())
}

#[test]
fn what_the_machine_lacks_is_one_clear_line() -> Result<()> {
    let directory = Directory::new()?;
    directory.write("c1/node.yaml", &[node("n1", "r1")])?;
    let bed = Bed::new()?;
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
        (directory.portolan_as_nobody()?, cgroup.as_str(), pins.as_str(), "root is needed"),
        (without(&binary("portolan")?, "/sys/kernel/btf"), cgroup.as_str(), pins.as_str(), "the kernel has no BTF"),
    ] {
        let (code, text) = start(&mut command, cgroup, bpffs, &admin)?;
        assert_eq!((code, text.lines().count()), (Some(2), 1), "{said}: {text}");
        assert!(text.starts_with("portolan: ") && text.contains(said), "{said}: {text}");
    }
    // No cgroup v2 anywhere in the mount table.
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

/// In a mount namespace in which this folder is empty.
fn without(binary: &std::path::Path, folder: &str) -> Command {
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", "mount -t tmpfs none \"$1\" && shift && exec \"$@\"", "sh", folder])
        .arg(binary);
    command
}

#[test]
fn plan_needs_no_root_and_speaks_every_format() -> Result<()> {
    let directory = Directory::new()?;
    directory.write(
        "c1/all.yaml",
        &[node("n1", "r1/z1"), service("web", &["172.16.0.10"], 80), slice("web", 9080, &[("10.0.0.1", "n1", "")])],
    )?;
    let run = |more: &[&str]| -> Result<(Option<i32>, String)> {
        let mut command = directory.portolan_as_nobody()?;
        command.arg("plan").arg("--config").arg(directory.path()).args(["--cluster", "c1"]).args(more);
        let output = command.output()?;
        Ok((output.status.code(), String::from_utf8(output.stdout)? + &String::from_utf8(output.stderr)?))
    };
    let (code, table) = run(&["--locality", "r1/z1/s1"])?;
    assert_eq!(code, Some(0), "{table}");
    assert!(
        table.contains("default/web:80") && table.contains("10.0.0.1:9080") && table.contains("100.00%"),
        "{table}"
    );
    let (_, yaml) = run(&["--node", "n1", "-o", "yaml"])?;
    assert!(yaml.contains("clusterLocal: false") && yaml.contains("onEmpty: refuse"), "{yaml}");
    let (_, json) = run(&["--node", "n1", "-o", "json", "--service", "default/web", "--port", "80"])?;
    let json: Value = serde_json::from_str(&json)?;
    // The contract, field by field.
    let expected = json!({"namespace": "default", "name": "web", "host": "web.default.svc.cluster.local", "port": 80,
        "protocol": "TCP", "subset": null, "frontends": ["172.16.0.10:80"], "mode": "none", "clusterLocal": false,
        "algorithm": "ROUND_ROBIN", "onEmpty": "refuse",
        "priorities": [{"priority": 0, "hosts": 1, "healthy": 1, "load": 100, "panic": false}],
        "localities": [{"locality": "r1/z1", "priority": 0, "weight": 1, "share": 1.0}],
        "endpoints": [{"address": "10.0.0.1:9080", "cluster": "c1", "locality": "r1/z1", "priority": 0, "weight": 1,
            "health": "healthy", "share": 1.0}]});
    assert_eq!(json["services"], json!([expected]));
    assert_eq!(json["client"], json!({"cluster": "c1", "node": "n1", "locality": "r1/z1"}));
    // Neither node nor locality, and both: wrong usage.
    assert_eq!(run(&[])?.0, Some(2));
    assert_eq!(run(&["--node", "n1", "--locality", "r1"])?.0, Some(2));
    Ok(())
}
