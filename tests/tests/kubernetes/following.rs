//! Objects of the API server take effect, and so do their changes.

use anyhow::{Result, ensure};
use portolan_tests::{
    TestBed,
    objects::{destination_rule, mesh_config, node, plain, pod, service, slice, tcp_route},
    storm::{Load, Servers},
    wait_until,
};
use serde_json::json;

use super::*;

#[test]
fn api_objects_and_their_changes_take_effect() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1", "10.0.0.2"])?;
    api.apply(&web(&["10.0.0.1"]));
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    let mut client = bed.dialer()?;
    assert_eq!(client.dial(WEB, 3)?.greetings(), ["10.0.0.1"; 3]);
    let report = agent.get("services")?;
    assert_eq!((&report["client"]["locality"], &report["findings"]), (&json!("r1/z1"), &json!([])), "{report:#}");

    // One object changes, one is added, one is deleted.
    api.apply(&[web_slice(&["10.0.0.2"])]);
    wait_endpoints(&agent, "web", &["10.0.0.2:9080 healthy"])?;
    assert_eq!(client.dial(WEB, 3)?.greetings(), ["10.0.0.2"; 3]);
    api.apply(&[plain(service("more", &["172.16.0.20"], 80)), plain(slice("more", 9080, &[("10.0.0.1", "n1", "")]))]);
    wait_endpoints(&agent, "more", &["10.0.0.1:9080 healthy"])?;
    assert_eq!(client.dial("172.16.0.20:80", 1)?.greetings(), ["10.0.0.1"]);
    assert!(api.delete("endpointslices.discovery.k8s.io", "default", "web-ipv4"));
    wait_endpoints(&agent, "web", &[])?;
    assert_eq!(client.dial(WEB, 1)?.errnos(), [ECONNREFUSED]);

    // The node moves, and rules are added.
    api.apply(&[node("n1", "r2/z7"), mesh_config(&json!({"localityLbSetting": {"enabled": false}}))]);
    wait_until("the new locality", BOUND, || {
        let seen = agent.get("services")?["client"]["locality"].clone();
        ensure!(seen == "r2/z7", "{seen}");
        Ok(())
    })?;
    let policy = json!({"trafficPolicy": {"loadBalancer": {"simple": "RANDOM"}}});
    api.apply(&[destination_rule("more", &policy)]);
    wait_until("the rule", BOUND, || {
        let report = agent.get("services")?;
        ensure!(report["services"][0]["algorithm"] == "RANDOM", "{report:#}");
        Ok(())
    })?;
    let sources = agent.get("sources")?;
    let count = sources["sources"].as_array().unwrap().len();
    assert_eq!(count, 12, "{sources:#}");
    assert!(
        sources["sources"].as_array().unwrap().iter().all(|it| it["lists"] == 1 && it["error"].is_null()),
        "{sources:#}"
    );
    let metrics = agent.http("/metrics")?.1;
    assert!(metrics.contains("portolan_source_objects{cluster=\"c1\",resource=\"services\"} 2"), "{metrics}");
    // No rule needs pod labels, so only the pods of this node are watched, for opt-out labels.
    assert_eq!(api.selectors("pods"), ["spec.nodeName=n1"]);
    Ok(())
}

#[test]
fn pods_are_watched_only_while_a_rule_needs_their_labels() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1", "10.0.0.2"])?;
    let subsets = json!({"subsets": [{"name": "v2", "labels": {"version": "v2"}}]});
    api.apply(&[
        node("n1", "r1/z1"),
        plain(service("web", &["172.16.0.10"], 80)),
        plain(service("front", &["172.16.0.20"], 80)),
        plain(slice("web", 9080, &[("10.0.0.1", "n1", "a"), ("10.0.0.2", "n1", "b")])),
        pod("a", &json!({"version": "v1"})),
        pod("b", &json!({"version": "v2"})),
        destination_rule("web", &subsets),
        tcp_route("front", "web", "v2"),
    ]);
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    let mut client = bed.dialer()?;
    assert_eq!(client.dial("172.16.0.20:80", 4)?.greetings(), ["10.0.0.2"; 4], "{}", agent.log());
    api.apply(&[pod("a", &json!({"version": "v2"}))]);
    wait_endpoints(&agent, "front", &["10.0.0.1:9080 healthy", "10.0.0.2:9080 healthy"])?;
    assert_eq!(source(&agent, "c1", "pods")?["objects"], json!(2));
    // The rule becomes invalid: its last valid version stays in effect, and pod labels are still needed.
    let mut broken = destination_rule("web", &subsets);
    broken["spec"]["subsets"] = json!(7);
    api.apply(&[broken]);
    wait_finding(&agent, "PTL0020", "DestinationRule default/web")?;
    assert_eq!(endpoints(&agent, "front")?.len(), 2);
    assert!(api.delete("destinationrules.networking.istio.io", "default", "web"));
    wait_until("the pod watch to end", BOUND, || {
        let seen = source(&agent, "c1", "pods")?;
        ensure!(seen.is_null(), "{seen}");
        Ok(())
    })?;
    api.apply(&[destination_rule("web", &subsets)]);
    wait_endpoints(&agent, "front", &["10.0.0.1:9080 healthy", "10.0.0.2:9080 healthy"])
}

#[test]
fn missing_apis_are_tolerated_and_detected_once_installed() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1"])?;
    api.install("networking.istio.io", false);
    api.apply(&web(&["10.0.0.1"]));
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &SOON)?;
    assert_eq!(agent.get("services")?["findings"], json!([]));
    assert_eq!(source(&agent, "c1", "destinationrules.networking.istio.io")?["error"], "is not installed");
    api.install("networking.istio.io", true);
    api.apply(&[destination_rule("web", &json!({"trafficPolicy": {"loadBalancer": {"simple": "RANDOM"}}}))]);
    wait_until("the rule", BOUND, || {
        let report = agent.get("services")?;
        ensure!(report["services"][0]["algorithm"] == "RANDOM", "{report:#}");
        Ok(())
    })
}

/// A rolling update of the DaemonSet under load: one agent after the other.
#[test]
fn rolling_update_under_load_fails_no_connections() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&[])?;
    bed.namespace.add_address("10.0.0.1/32")?;
    let _servers = Servers::start(bed.place(), &[("10.0.0.1:9080".parse()?, 0, 0)])?;
    api.apply(&web(&["10.0.0.1"]));
    let mut agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    let load = Load::start(bed.place(), &[WEB.parse()?], u64::MAX, None)?;
    for _ in 0..3 {
        agent.process.signal(rustix::process::Signal::TERM)?;
        agent.process.wait(BOUND)?;
        agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    }
    let load = load.stop()?;
    println!(
        "three agents in sequence: {} connections, {:.0} per second, {} failed",
        load.good + load.bad,
        load.rate(),
        load.bad
    );
    ensure!(load.bad == 0 && load.good > 1_000, "{load:?}");
    Ok(())
}

/// Two agents have the same finding. There is one Event, on the object.
#[test]
fn findings_become_events_on_their_objects_once() -> Result<()> {
    let (bed, mut api, kubeconfig) = node_with(&["10.0.0.1"])?;
    let mut objects = web(&["10.0.0.1"]);
    objects.push(destination_rule("nowhere", &json!({})));
    api.apply(&objects);
    let second = TestBed::new()?;
    let reach = api.reach(&second.namespace)?;
    let _agents = [
        bed.agent_on_api(&kubeconfig, "c1", "n1", &["--kubernetes-events"])?,
        second.agent_on_api(&reach, "c1", "n1", &["--kubernetes-events"])?,
    ];
    wait_until("both agents to have created the Event", BOUND, || {
        ensure!(api.asked("create", "events.events.k8s.io") >= 2);
        Ok(())
    })?;
    let events = api.events();
    assert_eq!(events.len(), 1, "{events:#?}");
    let event = &events[0];
    assert_eq!((&event["reason"], &event["type"]), (&json!("PTL0060"), &json!("Warning")));
    assert_eq!(event["regarding"]["name"], "nowhere");
    assert_eq!(event["regarding"]["uid"], "uid-default-nowhere");
    assert!(event["note"].as_str().unwrap().contains("no service is named"), "{event:#}");
    Ok(())
}

/// A relist finds what a watch missed. Unchanged objects cause no publication.
#[test]
fn periodic_relist_finds_missed_changes() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1", "10.0.0.2"])?;
    api.apply(&web(&["10.0.0.1"]));
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &["--resync", "1s"])?;
    let published =
        || -> Result<usize> { Ok(agent.events()?.iter().filter(|event| event["kind"] == "published").count()) };
    let before = published()?;
    wait_until("three relists", BOUND, || {
        ensure!(source(&agent, "c1", "services")?["lists"].as_u64() >= Some(4));
        Ok(())
    })?;
    assert_eq!(published()?, before);
    api.apply_unseen(&[web_slice(&["10.0.0.2"])]);
    wait_endpoints(&agent, "web", &["10.0.0.2:9080 healthy"])
}

/// A dual-stack Service: each family has its own endpoints.
#[test]
fn dual_stack_service_is_served() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1"])?;
    bed.namespace.add_address("fd00::1/128")?;
    bed.serve("[fd00::1]:9080", "six")?;
    api.apply(&[
        node("n1", "r1/z1"),
        plain(service("web", &["172.16.0.10", "fd16::10"], 80)),
        plain(slice("web", 9080, &[("10.0.0.1", "n1", "")])),
        plain(slice("web", 9080, &[("fd00::1", "n1", "")])),
    ]);
    let _agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    let mut client = bed.dialer()?;
    assert_eq!(client.dial(WEB, 2)?.greetings(), ["10.0.0.1"; 2]);
    assert_eq!(client.dial("[fd16::10]:80", 2)?.greetings(), ["six"; 2]);
    Ok(())
}
