//! `plan` with contradictory, invalid, and unordered objects: it reports every problem, and the rest works.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::time::Duration;

use anyhow::{Result, ensure};
use portolan_tests::{
    Agent, Directory, TestBed,
    objects::{destination_rule, mesh_config, node, service, slice},
    report::{finding, service_named, shares},
    wait_until,
};
use serde_json::{Value, json};

const BOUND: Duration = Duration::from_secs(20);

#[test]
fn every_problem_is_reported_and_the_rest_works() -> Result<()> {
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
            destination_rule("missing", &json!({})),
            destination_rule("sneaky", &json!({"trafficPolicy": {"outlierDetection": {"interval": "soon"}}})),
        ],
    )?;
    let (report, code) = directory.plan("c1", "n1", &[])?;
    assert_eq!(code, 1);
    for (object, message, source) in [
        ("EndpointSlice default/web-ipv4", "no Node lost", "c1/good.yaml"),
        ("EndpointSlice default/orphan-ipv4", "no Service default/orphan", "c1/good.yaml"),
        ("EndpointSlice default/sneaky-ipv4", "endpoints[0].addresses[0]: 127.0.0.1 is a loopback", "c1/good.yaml"),
        (
            "EndpointSlice default/sneaky-ipv4",
            "endpoints[1].addresses[0]: 169.254.169.254 is a link-local",
            "c1/good.yaml",
        ),
        ("Service default/selfish", "127.0.0.53 is a loopback", "c1/good.yaml"),
        ("Service default/web", "172.16.0.10 port 80 belongs to Service default/twin", "c1/good.yaml"),
        ("Service default/portless", "spec.ports: is empty", "c1/empty-ports.yaml"),
        ("Deployment web-v1", "does not use this kind", "c1/kinds.yaml"),
        ("c1/broken.yaml", "stay in effect", "c1/broken.yaml"),
        ("Service default/typed", "spec.ports[0].port: ", "c1/typed.yaml"),
        ("DestinationRule default/web", "distribute[0].to: the percentages must sum to 100, not 90", "rules.yaml"),
        ("DestinationRule default/sneaky", "outlierDetection.interval: \"soon\" is not a valid duration", "rules.yaml"),
        ("DestinationRule default/missing", "no service is named", "rules.yaml"),
    ] {
        assert_eq!(finding(&report, object, message)?["source"].as_str().unwrap_or_default(), source, "{object}");
    }
    // The rest works: the twin that is first by name keeps the address, and the valid endpoint of `sneaky` serves.
    assert_eq!(service_named(&report, "twin")?["frontends"], json!(["172.16.0.10:80"]));
    assert_eq!(shares(service_named(&report, "sneaky")?), [("10.0.0.3:9080".to_owned(), 1.0)]);
    // The flag allows loopback and link-local endpoints.
    let (report, _) = directory.plan("c1", "n1", &["--allow-loopback-endpoints"])?;
    assert_eq!(shares(service_named(&report, "sneaky")?).len(), 3);
    Ok(())
}

/// Runs the broken examples of `docs/` as a user would.
/// The output has the codes on their first line, and an error makes the exit code 1.
#[test]
fn broken_examples_are_reported() -> Result<()> {
    let examples = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/examples/broken");
    for example in std::fs::read_dir(examples)? {
        let text = std::fs::read_to_string(example?.path())?;
        let directory = Directory::new()?;
        directory.write("c1/node.yaml", &[node("n1", "r1/z1")])?;
        directory.write_text("c1/example.yaml", &text)?;
        let (report, code) = directory.plan("c1", "n1", &[])?;
        let errors = report["findings"].as_array().into_iter().flatten().any(|finding| finding["severity"] == "error");
        assert_eq!(code, i32::from(errors), "{text}");
        let config = directory.path().display().to_string();
        let place = ["--config", &config, "--cluster", "c1", "--node", "n1"];
        let shown = directory.portolan_unprivileged()?.arg("plan").args(place).output()?;
        let shown = String::from_utf8(shown.stdout)?;
        for code in text.lines().next().unwrap().split_whitespace().filter(|word| word.starts_with("PTL")) {
            assert!(shown.contains(code), "{code}: {shown}");
        }
        for service in report["services"].as_array().unwrap() {
            let name = format!("{}/{}", service["namespace"].as_str().unwrap(), service["name"].as_str().unwrap());
            let explained = directory.portolan_unprivileged()?.args(["explain", &name]).args(place).output()?;
            assert_eq!(explained.status.code(), Some(0), "{}", String::from_utf8_lossy(&explained.stderr));
        }
    }
    Ok(())
}

/// The introductory example has no findings. Each region serves itself, and the other region takes over if it fails.
#[test]
fn two_regions_example_fails_over() -> Result<()> {
    let examples = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/examples/two-regions");
    let example = Directory::new()?;
    for file in ["rules.yaml", "hangzhou/all.yaml", "shanghai/all.yaml"] {
        example.write_text(file, &std::fs::read_to_string(examples.join(file))?)?;
    }
    for (cluster, own, other) in [("hangzhou", 1, 2), ("shanghai", 2, 1)] {
        let half =
            |region: u8| [5, 6].map(|i| (format!("10.{region}.0.{i}:9080"), 0.5)).into_iter().collect::<Vec<_>>();
        let node = format!("{cluster}-1");
        let nonzero_shares = |eject: &[&str]| -> Result<Vec<(String, f64)>> {
            let (report, code) = example.plan(cluster, &node, eject)?;
            assert_eq!((code, &report["findings"]), (0, &json!([])), "{report:#}");
            Ok(shares(service_named(&report, "reviews")?).into_iter().filter(|(_, share)| *share > 0.0).collect())
        };
        assert_eq!(nonzero_shares(&[])?, half(own));
        let ejected = [5, 6].map(|i| format!("10.{own}.0.{i}"));
        assert_eq!(nonzero_shares(&["--eject", &ejected[0], "--eject", &ejected[1]])?, half(other));
    }
    Ok(())
}

#[test]
fn empty_slice_with_null_lists_is_accepted() -> Result<()> {
    let directory = Directory::new()?;
    let mut empty = slice("web", 9080, &[]);
    empty["endpoints"] = Value::Null;
    empty["ports"] = Value::Null;
    directory.write("c1/all.yaml", &[node("n1", "r1/z1"), service("web", &["172.16.0.10"], 80), empty])?;
    let (report, code) = directory.plan("c1", "n1", &[])?;
    assert_eq!(code, 0);
    finding(&report, "Service default/web", "it has no endpoints")?;
    assert_eq!(report["findings"].as_array().map(Vec::len), Some(1));
    assert_eq!(shares(service_named(&report, "web")?), []);
    Ok(())
}

#[test]
fn refusing_service_has_a_reason() -> Result<()> {
    let directory = Directory::new()?;
    let mut unready = slice("unready", 9080, &[("10.0.0.1", "n1", "")]);
    unready["endpoints"][0]["conditions"]["ready"] = json!(false);
    let mut renamed = slice("renamed", 9080, &[("10.0.0.1", "n1", "")]);
    renamed["ports"][0]["name"] = json!("other");
    directory.write(
        "c1/all.yaml",
        &[
            node("n1", "r1/z1"),
            service("empty", &["172.16.0.1"], 80),
            service("unready", &["172.16.0.2"], 80),
            unready,
            service("renamed", &["172.16.0.3"], 80),
            renamed,
            service("six", &["fd16::4"], 80),
            slice("six", 9080, &[("10.0.0.1", "n1", "")]),
            service("remote", &["172.16.0.5"], 80),
        ],
    )?;
    directory.write(
        "c2/all.yaml",
        &[
            node("n2", "r1/z1"),
            service("remote", &["172.17.0.5"], 80),
            slice("remote", 9080, &[("10.1.0.1", "n2", "")]),
        ],
    )?;
    directory.write(
        "mesh.yaml",
        &[mesh_config(&json!({"serviceSettings": [
        {"settings": {"clusterLocal": true}, "hosts": ["remote.default.svc.cluster.local"]}]}))],
    )?;
    let report = directory.plan("c1", "n1", &[])?.0;
    for (name, why) in [
        ("empty", "it has no endpoints"),
        ("unready", "none of its 1 endpoints is healthy"),
        ("renamed", "no EndpointSlice has a TCP port named \"http\""),
        ("six", "of the other address family"),
        ("remote", "clusterLocal keeps connections in the client's cluster"),
    ] {
        finding(&report, &format!("Service default/{name}"), why)?;
    }
    Ok(())
}

#[test]
fn misplaced_objects_are_reported() -> Result<()> {
    let directory = Directory::new()?;
    let all =
        [node("n1", "r1/z1"), service("web", &["172.16.0.10"], 80), slice("web", 9080, &[("10.0.0.1", "n1", "")])];
    directory.write("c1/all.yaml", &all)?;
    directory.write("stray.yaml", &[service("stray", &["172.16.0.20"], 80)])?;
    let mut tenant = mesh_config(&json!({"serviceSettings": [{"settings": {"clusterLocal": true}, "hosts": ["*"]}]}));
    tenant["metadata"]["namespace"] = json!("tenant");
    directory.write("tenant.yaml", &[tenant])?;
    let deep = directory.path().join("c1").join("d/".repeat(12));
    std::fs::create_dir_all(&deep)?;
    for i in 0..6 {
        std::os::unix::fs::symlink(".", directory.path().join(format!("c1/loop{i}")))?;
    }
    let (report, code) = directory.plan("c1", "n1", &[])?;
    assert_eq!(code, 1);
    finding(&report, "Service default/stray", "belongs to a cluster")?;
    finding(&report, "ConfigMap tenant/istio", "is not in istio-system")?;
    assert!(report["findings"].to_string().contains("nested deeper"), "{report:#}");
    let web = service_named(&report, "web")?;
    assert_eq!((&web["clusterLocal"], shares(web).len()), (&json!(false), 1));
    Ok(())
}

#[test]
fn missing_node_is_reported_and_makes_every_endpoint_far() -> Result<()> {
    let directory = Directory::new()?;
    directory.write(
        "c1/all.yaml",
        &[node("n2", "r1/z1"), service("web", &["172.16.0.10"], 80), slice("web", 9080, &[("10.0.0.1", "n2", "")])],
    )?;
    let (report, code) = directory.plan("c1", "n1", &[])?;
    assert_eq!(code, 1);
    finding(&report, "Node n1", "no such Node")?;
    assert_eq!(shares(service_named(&report, "web")?), [("10.0.0.1:9080".to_owned(), 1.0)]);
    Ok(())
}

/// The order of objects and their distribution over files do not change the result.
#[test]
fn object_order_does_not_matter() -> Result<()> {
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
        let report = directory.plan("c1", "n1", &[])?.0;
        seen.push((report["services"].clone(), report["findings"].clone()));
    }
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0].0[0]["endpoints"][0]["priority"], json!(0));
    assert_eq!(seen[0].0[0]["localities"][1]["share"], json!(0.0));

    // The node moves: the far endpoint becomes near at once.
    let bed = TestBed::new()?;
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
fn plan_eject_shows_shares_after_an_ejection() -> Result<()> {
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
        Ok(shares(service_named(&directory.plan("c1", "n1", &more)?.0, "web")?)
            .into_iter()
            .map(|(_, share)| share)
            .collect())
    };
    assert_eq!(share(&[])?, [0.5, 0.5, 0.0, 0.0]);
    // Half of the near endpoints can carry 70%. The rest spills over to the preferred region.
    assert_eq!(share(&["10.0.0.1"])?, [0.0, 0.7, 0.3, 0.0]);
    assert_eq!(share(&["10.0.0.1", "10.0.0.2:9080"])?, [0.0, 0.0, 1.0, 0.0]);
    assert_eq!(share(&["10.0.0.1", "10.0.0.2", "10.1.0.1"])?, [0.0, 0.0, 0.0, 1.0]);
    assert_eq!(share(&["10.0.0.1", "10.0.0.2", "10.1.0.1", "10.2.0.1"])?, [0.0; 4]);
    assert!(share(&["10.9.9.9"]).is_err(), "an unknown endpoint is an error");
    Ok(())
}

#[test]
fn rule_does_not_apply_to_services_of_another_namespace() -> Result<()> {
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
    let (report, code) = directory.plan("c1", "n1", &[])?;
    assert_eq!(code, 1);
    finding(&report, &format!("DestinationRule other/{host}"), "in another namespace")?;
    finding(&report, "VirtualService other/route", "in another namespace")?;
    let service = service_named(&report, "web")?;
    assert_eq!((&service["mode"], &service["subset"]), (&json!("none"), &Value::Null));
    // A rule in the root namespace applies. A rule in the namespace of the service takes precedence over it.
    directory.write("rules.yaml", &[in_namespace(destination_rule(host, &distribute), "istio-system")])?;
    let (report, code) = directory.plan("c1", "n1", &[])?;
    assert_eq!((code, &service_named(&report, "web")?["mode"]), (0, &json!("distribute")));
    let twice = |name: &str| {
        let policy = json!({"connectionPool": {"tcp": {"connectTimeout": if name == "a" { "1s" } else { "2s" }}}});
        let mut rule = destination_rule("web", &json!({"trafficPolicy": policy}));
        rule["metadata"]["name"] = json!(name);
        rule
    };
    directory.write("more.yaml", &[twice("a"), twice("b")])?;
    let report = directory.plan("c1", "n1", &[])?.0;
    assert_eq!(service_named(&report, "web")?["mode"], json!("none"));
    finding(&report, "DestinationRule default/b", "DestinationRule default/a, which takes precedence")?;
    Ok(())
}

#[test]
fn plan_needs_no_root_and_supports_every_output_format() -> Result<()> {
    let directory = Directory::new()?;
    directory.write(
        "c1/all.yaml",
        &[node("n1", "r1/z1"), service("web", &["172.16.0.10"], 80), slice("web", 9080, &[("10.0.0.1", "n1", "")])],
    )?;
    let run = |more: &[&str]| -> Result<(Option<i32>, String)> {
        let mut command = directory.portolan_unprivileged()?;
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
    // The JSON contract, field by field.
    let expected = json!({"namespace": "default", "name": "web", "host": "web.default.svc.cluster.local", "port": 80,
        "protocol": "TCP", "subset": null, "frontends": ["172.16.0.10:80"], "mode": "none", "clusterLocal": false,
        "algorithm": "ROUND_ROBIN", "onEmpty": "refuse",
        "priorities": [{"priority": 0, "hosts": 1, "healthy": 1, "load": 100, "panic": false}],
        "localities": [{"locality": "r1/z1", "priority": 0, "weight": 1, "share": 1.0}],
        "endpoints": [{"address": "10.0.0.1:9080", "cluster": "c1", "locality": "r1/z1", "priority": 0, "weight": 1,
            "health": "healthy", "share": 1.0}]});
    assert_eq!(json["services"], json!([expected]));
    assert_eq!(json["client"], json!({"cluster": "c1", "node": "n1", "locality": "r1/z1"}));
    // Without node and locality: usage error. With both: the node, at that locality instead of its own.
    assert_eq!(run(&[])?.0, Some(2));
    assert!(run(&["--node", "n1", "--locality", "r9"])?.1.contains("node n1 at r9"));
    let (code, said) = run(&["--node", "n1", "--service", "default/nosuch"])?;
    assert!(code == Some(1) && said.contains("no service of this client"), "{said}");
    Ok(())
}

/// A remote cluster may only have endpoints within its own ranges.
#[test]
fn endpoints_outside_the_ranges_of_their_cluster_are_rejected() -> Result<()> {
    let directory = Directory::new()?;
    let web = service("web", &["172.16.0.10"], 80);
    directory
        .write("c1/all.yaml", &[node("n1", "r1/z1"), web.clone(), slice("web", 9080, &[("10.0.0.1", "n1", "")])])?;
    let remote = [("10.1.0.1", "n2", ""), ("10.0.0.2", "n2", ""), ("10.1.255.1", "n2", ""), ("10.2.0.1", "n2", "")];
    directory.write("c2/all.yaml", &[node("n2", "r1/z1"), web, slice("web", 9080, &remote)])?;
    let endpoints = |ranges: &[&str]| -> Result<(usize, usize)> {
        let (report, _) = directory.plan("c1", "n1", ranges)?;
        let rejected = report["findings"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|it| it["code"] == "PTL0024" && it["message"].as_str().unwrap().contains("--cluster-ranges"));
        Ok((report["services"][0]["endpoints"].as_array().unwrap().len(), rejected.count()))
    };
    assert_eq!(endpoints(&[])?, (5, 0));
    assert_eq!(endpoints(&["--cluster-ranges", "c2=10.1.0.0/16"])?, (3, 2));
    assert_eq!(
        endpoints(&["--cluster-ranges", "c2=10.1.0.0/24,10.2.0.1", "--cluster-ranges", "c3=10.9.0.0/16"])?,
        (3, 2)
    );
    let wrong = directory.portolan_unprivileged()?.args(["plan", "--cluster-ranges", "c2=10.1.0.0/99"]).output()?;
    assert!(wrong.status.code() == Some(2) && String::from_utf8_lossy(&wrong.stderr).contains("is not a CIDR range"));
    Ok(())
}
