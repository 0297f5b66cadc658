//! What an API server says is served, and followed.

use anyhow::{Result, ensure};
use portolan_tests::{
    Bed,
    objects::{destination_rule, mesh_config, node, plain, pod, service, slice, tcp_route},
    storm::{Load, Servers},
    wait_until,
};
use serde_json::json;

use super::*;

#[test]
fn what_the_api_says_is_served_and_followed() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1", "10.0.0.2"])?;
    api.apply(&web(&["10.0.0.1"]));
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    let mut client = bed.dialler()?;
    assert_eq!(client.dial(WEB, 3)?.greetings(), ["10.0.0.1"; 3]);
    let report = agent.get("services")?;
    assert_eq!((&report["client"]["locality"], &report["findings"]), (&json!("r1/z1"), &json!([])), "{report:#}");

    // An object that changes, one that comes, one that goes.
    api.apply(&[web_slice(&["10.0.0.2"])]);
    wait_endpoints(&agent, "web", &["10.0.0.2:9080 healthy"])?;
    assert_eq!(client.dial(WEB, 3)?.greetings(), ["10.0.0.2"; 3]);
    api.apply(&[plain(service("more", &["172.16.0.20"], 80)), plain(slice("more", 9080, &[("10.0.0.1", "n1", "")]))]);
    wait_endpoints(&agent, "more", &["10.0.0.1:9080 healthy"])?;
    assert_eq!(client.dial("172.16.0.20:80", 1)?.greetings(), ["10.0.0.1"]);
    assert!(api.delete("endpointslices.discovery.k8s.io", "default", "web-ipv4"));
    wait_endpoints(&agent, "web", &[])?;
    assert_eq!(client.dial(WEB, 1)?.errnos(), [ECONNREFUSED]);

    // The node moves; rules come.
    api.apply(&[node("n1", "r2/z7"), mesh_config(&json!({"localityLbSetting": {"enabled": false}}))]);
    wait_until("the new place", BOUND, || {
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
    // Nobody has asked for the labels of pods; those of the own node may ask to be left alone.
    assert_eq!(api.selectors("pods"), ["spec.nodeName=n1"]);
    Ok(())
}

#[test]
fn pods_are_read_while_a_rule_asks_for_their_labels() -> Result<()> {
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
    let mut client = bed.dialler()?;
    assert_eq!(client.dial("172.16.0.20:80", 4)?.greetings(), ["10.0.0.2"; 4], "{}", agent.log());
    api.apply(&[pod("a", &json!({"version": "v2"}))]);
    wait_endpoints(&agent, "front", &["10.0.0.1:9080 healthy", "10.0.0.2:9080 healthy"])?;
    assert_eq!(source(&agent, "c1", "pods")?["objects"], json!(2));
    // Broken all of a sudden: the last good state stays in force, and with it the labels that it asks for.
    let mut broken = destination_rule("web", &subsets);
    broken["spec"]["subsets"] = json!(7);
    api.apply(&[broken]);
    wait_finding(&agent, "PTL0020", "DestinationRule default/web")?;
    assert_eq!(endpoints(&agent, "front")?.len(), 2);
    assert!(api.delete("destinationrules.networking.istio.io", "default", "web"));
    wait_until("pods to be left alone", BOUND, || {
        let seen = source(&agent, "c1", "pods")?;
        ensure!(seen.is_null(), "{seen}");
        Ok(())
    })?;
    api.apply(&[destination_rule("web", &subsets)]);
    wait_endpoints(&agent, "front", &["10.0.0.1:9080 healthy", "10.0.0.2:9080 healthy"])
}

#[test]
fn apis_that_are_not_installed_are_no_error_and_are_picked_up() -> Result<()> {
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

/// The DaemonSet's binary is exchanged under load, one agent after the other.
#[test]
fn agents_that_roll_under_load_fail_nobody() -> Result<()> {
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
        "three agents one after the other: {} connections, {:.0} a second, {} failed",
        load.good + load.bad,
        load.rate(),
        load.bad
    );
    ensure!(load.bad == 0 && load.good > 1_000, "{load:?}");
    Ok(())
}

/// Two agents find the same; there is one Event, on the object.
#[test]
fn findings_become_events_on_their_objects() -> Result<()> {
    let (bed, mut api, kubeconfig) = node_with(&["10.0.0.1"])?;
    let mut objects = web(&["10.0.0.1"]);
    objects.push(destination_rule("nowhere", &json!({})));
    api.apply(&objects);
    let second = Bed::new()?;
    let reach = api.reach(&second.namespace)?;
    let _agents = [
        bed.agent_on_api(&kubeconfig, "c1", "n1", &["--kubernetes-events"])?,
        second.agent_on_api(&reach, "c1", "n1", &["--kubernetes-events"])?,
    ];
    wait_until("both to have told", BOUND, || {
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

/// What a watch has missed is found by reading everything again; and what is as it was changes nothing.
#[test]
fn everything_is_read_again_from_time_to_time_and_compared() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1", "10.0.0.2"])?;
    api.apply(&web(&["10.0.0.1"]));
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &["--resync", "1s"])?;
    let published =
        || -> Result<usize> { Ok(agent.events()?.iter().filter(|event| event["kind"] == "published").count()) };
    let before = published()?;
    wait_until("everything to be read again", BOUND, || {
        ensure!(source(&agent, "c1", "services")?["lists"].as_u64() >= Some(4));
        Ok(())
    })?;
    assert_eq!(published()?, before);
    api.apply_unseen(&[web_slice(&["10.0.0.2"])]);
    wait_endpoints(&agent, "web", &["10.0.0.2:9080 healthy"])
}

/// A service of both families: each has its own endpoints.
#[test]
fn both_families_are_served() -> Result<()> {
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
    let mut client = bed.dialler()?;
    assert_eq!(client.dial(WEB, 2)?.greetings(), ["10.0.0.1"; 2]);
    assert_eq!(client.dial("[fd16::10]:80", 2)?.greetings(), ["six"; 2]);
    Ok(())
}
