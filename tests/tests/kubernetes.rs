//! The agent on API servers: what they say, how they go away and come back, and all that is wrong with what they say.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use portolan_tests::{
    Agent, Api, Bed, Directory,
    api::secret,
    objects::{destination_rule, mesh_config, node, plain, pod, service, slice, tcp_route},
    storm::{Load, Servers},
    wait_until,
};
use serde_json::{Value, json};

const WEB: &str = "172.16.0.10:80";
const ECONNREFUSED: i32 = 111;
const BOUND: Duration = Duration::from_secs(30);
/// An agent that has tried in vain for half a minute tries again within half a minute.
const AFTER_LONG: Duration = Duration::from_secs(90);
/// So that a test need not wait for what else comes after minutes.
const SOON: [&str; 4] = ["--resync", "2s", "--watch-timeout", "1s"];

/// A node, its API server, and how the agent reaches it; each of these addresses serves its name.
fn node_with(addresses: &[&str]) -> Result<(Bed, Api, PathBuf)> {
    let bed = Bed::new()?;
    for address in addresses {
        bed.namespace.add_address(&format!("{address}/32"))?;
        bed.serve(&format!("{address}:9080"), address)?;
    }
    let mut api = Api::new()?;
    let kubeconfig = api.reach(&bed.namespace)?;
    Ok((bed, api, kubeconfig))
}

/// The node, a Service and its endpoints.
fn web(endpoints: &[&str]) -> Vec<Value> {
    let endpoints: Vec<_> = endpoints.iter().map(|address| (*address, "n1", "")).collect();
    vec![node("n1", "r1/z1"), plain(service("web", &["172.16.0.10"], 80)), plain(slice("web", 9080, &endpoints))]
}

/// The object by which the API names the slice of `web`.
fn web_slice(endpoints: &[&str]) -> Value {
    web(endpoints).pop().unwrap_or_default()
}

fn findings(agent: &Agent, code: &str) -> Result<Vec<String>> {
    let findings = agent.get("services")?["findings"].as_array().cloned().unwrap_or_default();
    let of = findings.iter().filter(|finding| finding["code"] == code);
    Ok(of
        .map(|finding| format!("{}: {}", finding["object"].as_str().unwrap(), finding["message"].as_str().unwrap()))
        .collect())
}

fn wait_finding(agent: &Agent, code: &str, says: &str) -> Result<()> {
    wait_until(&format!("{code}: {says}"), BOUND, || {
        let found = findings(agent, code)?;
        ensure!(found.iter().any(|found| found.contains(says)), "{found:?}");
        Ok(())
    })
}

fn wait_no_finding(agent: &Agent, code: &str) -> Result<()> {
    wait_until(&format!("no {code}"), BOUND, || {
        let found = findings(agent, code)?;
        ensure!(found.is_empty(), "{found:?}");
        Ok(())
    })
}

/// What `get sources` says of a resource.
fn source(agent: &Agent, cluster: &str, resource: &str) -> Result<Value> {
    let sources = agent.get("sources")?["sources"].as_array().cloned().unwrap_or_default();
    Ok(sources.into_iter().find(|it| it["cluster"] == cluster && it["resource"] == resource).unwrap_or_default())
}

/// Addresses of the endpoints of a service.
fn endpoints(agent: &Agent, name: &str) -> Result<Vec<String>> {
    let report = agent.get("endpoints")?;
    let services = report["services"].as_array().into_iter().flatten().filter(|service| service["name"] == name);
    let all = services.flat_map(|service| service["endpoints"].as_array().into_iter().flatten());
    Ok(all
        .map(|endpoint| format!("{} {}", endpoint["address"].as_str().unwrap(), endpoint["health"].as_str().unwrap()))
        .collect())
}

fn wait_endpoints(agent: &Agent, name: &str, expected: &[&str]) -> Result<()> {
    wait_until(&format!("{name} to have {expected:?}"), BOUND, || {
        let seen = endpoints(agent, name)?;
        ensure!(seen == expected, "{seen:?}");
        Ok(())
    })
}

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
    assert_eq!(count, 10, "{sources:#}");
    assert!(
        sources["sources"].as_array().unwrap().iter().all(|it| it["lists"] == 1 && it["error"].is_null()),
        "{sources:#}"
    );
    let metrics = agent.http("/metrics")?.1;
    assert!(metrics.contains("portolan_source_objects{cluster=\"c1\",resource=\"services\"} 2"), "{metrics}");
    // Nobody has asked for the labels of pods.
    assert_eq!(api.asked("list", "pods"), 0);
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

/// The API server is away during a whole load, and things change meanwhile.
#[test]
fn nothing_fails_while_the_api_is_away_and_one_list_brings_all_back() -> Result<()> {
    let bed = Bed::new()?;
    let mut api = Api::new()?;
    let kubeconfig = api.reach(&bed.namespace)?;
    bed.namespace.add_address("10.0.0.1/32")?;
    bed.namespace.add_address("10.0.0.2/32")?;
    let servers = [("10.0.0.1:9080".parse()?, 0, 0), ("10.0.0.2:9080".parse()?, 1, 1)];
    let _servers = Servers::start(bed.place(), &servers)?;
    api.apply(&web(&["10.0.0.1"]));
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    let lists = api.asked("list", "services");

    api.stop();
    wait_finding(&agent, "PTL0110", "cannot be read")?;
    let load = Load::start(bed.place(), &[WEB.parse()?], 50_000, None)?.finish()?;
    ensure!(load.bad == 0 && load.good == 50_000, "{load:?}");
    assert_eq!(agent.http("/readyz")?.0, 200, "what is served is served as it should be");
    api.apply(&[web_slice(&["10.0.0.2"])]);
    assert!(api.delete("services", "default", "web"));
    api.apply(&[plain(service("web", &["172.16.0.10"], 80))]);
    api.forget_history();

    let began = std::time::Instant::now();
    api.start()?;
    wait_endpoints(&agent, "web", &["10.0.0.2:9080 healthy"])?;
    wait_no_finding(&agent, "PTL0110")?;
    // Each resource finds out by itself that its history is gone.
    wait_until("all of it to be there again", BOUND, || {
        let sources = agent.get("sources")?["sources"].clone();
        let behind = |source: &&Value| {
            let at = source["version"].as_str().and_then(|at| at.parse::<u64>().ok());
            at.is_none_or(|at| at < api.version())
        };
        let behind: Vec<&Value> = sources.as_array().into_iter().flatten().filter(behind).collect();
        ensure!(behind.is_empty(), "{behind:?}");
        Ok(())
    })?;
    let again = api.asked("list", "services") - lists;
    println!(
        "away for {} connections, none failed; converged {:.1?} after it was back, {again} list",
        load.good,
        began.elapsed()
    );
    assert_eq!(again, 1);
    Ok(())
}

#[test]
fn histories_that_are_gone_streams_that_break_and_pages_that_expire() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1", "10.0.0.2"])?;
    let mut objects = web(&["10.0.0.1"]);
    objects.extend((0..25).map(|i| plain(service(&format!("s-{i}"), &[&format!("172.17.0.{i}")], 80))));
    api.apply(&objects);
    // Four pages, of which the second is too old at first: the list begins anew.
    api.pages(7, true);
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    assert_eq!(source(&agent, "c1", "services")?["objects"], json!(26));
    let step = |what: &str, address: &str| -> Result<()> {
        api.apply(&[web_slice(&[address])]);
        wait_endpoints(&agent, "web", &[&format!("{address}:9080 healthy")])
            .map_err(|error| error.context(what.to_owned()))
    };
    api.forget_history();
    step("a history that is gone", "10.0.0.2")?;
    api.break_watches();
    step("a stream that breaks in a line", "10.0.0.1")?;
    api.dribble();
    api.break_watches();
    step("a stream byte by byte", "10.0.0.2")?;
    assert_eq!(source(&agent, "c1", "services")?["error"], Value::Null);
    Ok(())
}

#[test]
fn a_watch_that_stalls_is_noticed() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1", "10.0.0.2"])?;
    api.apply(&web(&["10.0.0.1"]));
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &["--watch-timeout", "1s"])?;
    api.stall(true);
    api.apply(&[web_slice(&["10.0.0.2"])]);
    // It stays, whatever else is begun.
    for _ in 0..3 {
        wait_finding(&agent, "PTL0110", "nothing came for 6s")?;
        let watches = api.asked("watch", "services");
        wait_until("another watch", BOUND, || {
            ensure!(api.asked("watch", "services") > watches);
            Ok(())
        })?;
        assert!(!findings(&agent, "PTL0110")?.is_empty());
    }
    api.stall(false);
    wait_endpoints(&agent, "web", &["10.0.0.2:9080 healthy"])?;
    wait_no_finding(&agent, "PTL0110")
}

#[test]
fn a_resource_that_may_not_be_read_is_named_and_the_rest_works() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1", "10.0.0.2"])?;
    api.forbid("virtualservices.networking.istio.io", true);
    api.apply(&web(&["10.0.0.1"]));
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &SOON)?;
    wait_finding(&agent, "PTL0111", "may not list virtualservices.networking.istio.io")?;
    let mut client = bed.dialler()?;
    assert_eq!(client.dial(WEB, 1)?.greetings(), ["10.0.0.1"]);
    api.apply(&[web_slice(&["10.0.0.2"])]);
    wait_endpoints(&agent, "web", &["10.0.0.2:9080 healthy"])?;
    api.forbid("virtualservices.networking.istio.io", false);
    wait_no_finding(&agent, "PTL0111")
}

/// Nobody may learn from a settings object that cannot be read that traffic may leave its cluster.
#[test]
fn settings_that_may_not_be_read_keep_traffic_in_its_cluster() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1"])?;
    api.forbid("configmaps", true);
    api.apply(&web(&["10.0.0.1"]));
    let mut agent = bed.start_on_api(&kubeconfig, "c1", "n1", &SOON)?;
    wait_finding(&agent, "PTL0034", "what must stay in its cluster")?;
    let (status, why) = agent.http("/readyz")?;
    assert!(status == 503 && why.contains("settings cannot be read"), "{status} {why}");
    api.forbid("configmaps", false);
    agent.wait_ready()
}

#[test]
fn nonsense_is_a_finding_and_everything_else_goes_on() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1"])?;
    let mut broken = plain(service("broken", &["172.16.0.30"], 80));
    broken["spec"]["ports"] = json!("all of them");
    let mut huge = destination_rule("huge", &json!({}));
    huge["metadata"]["annotations"] = json!({"note": "x".repeat(1 << 20)});
    let odd = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "odd", "namespace": "default",
        "labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv4", "ports": [{"port": 9080}],
        "endpoints": [{"addresses": ["not an address"]}, {"addresses": ["127.0.0.1"]}, {"addresses": []}, 7]});
    let mut objects = web(&["10.0.0.1"]);
    objects.extend([broken, huge, odd]);
    // A thousand slices for one service.
    objects.push(plain(service("wide", &["172.16.0.40"], 80)));
    for i in 0..1_000 {
        let mut part = plain(slice("wide", 9080, &[(&format!("10.7.{}.{}", i / 250, i % 250 + 1), "n1", "")]));
        part["metadata"]["name"] = json!(format!("wide-{i}"));
        objects.push(part);
    }
    api.apply(&objects);
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    wait_finding(&agent, "PTL0020", "Service default/broken")?;
    assert!(
        !findings(&agent, "PTL0020")?
            .iter()
            .filter(|found| found.contains("EndpointSlice default/odd"))
            .collect::<Vec<_>>()
            .is_empty()
    );
    assert_eq!(endpoints(&agent, "wide")?.len(), 1_000);
    let mut client = bed.dialler()?;
    assert_eq!(client.dial(WEB, 3)?.greetings(), ["10.0.0.1"; 3]);
    Ok(())
}

/// A token that is exchanged: the old one is refused, the new one is in the file.
#[test]
fn a_token_that_is_rotated_is_followed() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1", "10.0.0.2"])?;
    api.apply(&web(&["10.0.0.1"]));
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &["--watch-timeout", "1s"])?;
    api.rotate("the-second-token")?;
    api.apply(&[web_slice(&["10.0.0.2"])]);
    // The file is read again once a minute.
    wait_until("the new token", Duration::from_secs(150), || {
        let seen = endpoints(&agent, "web")?;
        ensure!(seen == ["10.0.0.2:9080 healthy"], "{seen:?}");
        Ok(())
    })?;
    wait_until("no error", BOUND, || {
        let found = findings(&agent, "PTL0110")?;
        ensure!(found.is_empty(), "{found:?}");
        Ok(())
    })
}

/// A second cluster with an endpoint of the same service, and the Secret that names it.
fn second(bed: &Bed, endpoint: &str) -> Result<(Api, Value)> {
    let mut api = Api::new()?;
    api.apply(&[
        node("n2", "r2/z1"),
        plain(service("web", &["172.17.0.10"], 80)),
        plain(service("foreign", &["172.17.0.66"], 80)),
        plain(slice("web", 9080, &[(endpoint, "n2", "")])),
        plain(slice("foreign", 9080, &[(endpoint, "n2", "")])),
    ]);
    let named = api.secret(&bed.namespace, "c2")?;
    Ok((api, named))
}

#[test]
fn other_clusters_come_change_and_go() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1", "10.1.0.1", "10.2.0.1"])?;
    let (mut other, named) = second(&bed, "10.1.0.1")?;
    api.apply(&web(&["10.0.0.1"]));
    let both = ["10.0.0.1:9080 healthy", "10.1.0.1:9080 healthy"];
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &["--remote-grace", "2s"])?;
    wait_endpoints(&agent, "web", &both[..1])?;
    api.apply(std::slice::from_ref(&named));
    wait_endpoints(&agent, "web", &both)?;
    // It adds endpoints to what is here, and nothing else.
    assert_eq!(endpoints(&agent, "foreign")?, Vec::<String>::new());
    assert_eq!(source(&agent, "c2", "endpointslices.discovery.k8s.io")?["objects"], json!(2));
    assert_eq!(other.asked("list", "configmaps") + other.asked("list", "destinationrules.networking.istio.io"), 0);
    let mut client = bed.dialler()?;
    let seen = client.dial(WEB, 10)?;
    assert_eq!((seen.count("10.0.0.1"), seen.count("10.1.0.1")), (5, 5));

    // The same id once more, in another Secret: it does not count. The own id: neither.
    let imposter = secret("another", &[("c2", "{}"), ("c1", "{}")]);
    api.apply(&[imposter]);
    wait_finding(&agent, "PTL0112", "cluster c2 is named by istio-system/another as well")?;
    assert_eq!(endpoints(&agent, "web")?, both);
    assert!(api.delete("secrets", "istio-system", "another"));
    wait_no_finding(&agent, "PTL0112")?;

    // Another kubeconfig: nonsense and a dead address change nothing, one that answers does.
    let instead = |text: &str| secret("istio-remote-secret-c2", &[("c2", text)]);
    api.apply(&[instead("users: [")]);
    wait_finding(&agent, "PTL0112", "is no kubeconfig")?;
    api.apply(&[instead("users: [{user: {token: hush-hush}]")]);
    wait_finding(&agent, "PTL0112", "is no kubeconfig")?;
    assert!(!agent.log().contains("hush"), "{}", agent.log());
    let runs = json!({"command": "/bin/false", "apiVersion": "client.authentication.k8s.io/v1"});
    api.apply(&[instead(&other.kubeconfig("127.0.0.1:9".parse()?, &json!({"exec": runs})).to_string())]);
    wait_finding(&agent, "PTL0112", "a program to run")?;
    api.apply(&[instead(&other.kubeconfig("127.0.0.1:9".parse()?, &json!({"token": "t"})).to_string())]);
    wait_finding(&agent, "PTL0112", "does not answer to its new kubeconfig")?;
    assert_eq!(endpoints(&agent, "web")?, both);
    let (third, moved) = second(&bed, "10.2.0.1")?;
    api.apply(&[moved]);
    wait_endpoints(&agent, "web", &["10.0.0.1:9080 healthy", "10.2.0.1:9080 healthy"])?;
    wait_no_finding(&agent, "PTL0112")?;
    drop(third);

    // It cannot be reached: for a while its endpoints are believed, then they get nothing.
    wait_endpoints(&agent, "web", &["10.0.0.1:9080 healthy", "10.2.0.1:9080 unhealthy"])?;
    wait_finding(&agent, "PTL0110", "Cluster c2")?;
    assert_eq!(client.dial(WEB, 6)?.greetings(), ["10.0.0.1"; 6]);
    api.apply(&[named]);
    wait_endpoints(&agent, "web", &both)?;
    wait_no_finding(&agent, "PTL0110")?;
    other.stop();
    other.start()?;
    wait_endpoints(&agent, "web", &both)?;

    // Nobody names it any more.
    assert!(api.delete("secrets", "istio-system", "istio-remote-secret-c2"));
    wait_endpoints(&agent, "web", &both[..1])?;
    assert_eq!(source(&agent, "c2", "services")?, Value::Null);
    Ok(())
}

#[test]
fn a_cluster_that_cannot_be_reached_at_the_start_holds_up_nobody_for_long() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1"])?;
    let (mut other, named) = second(&bed, "10.1.0.1")?;
    other.stop();
    api.apply(&web(&["10.0.0.1"]));
    api.apply(&[named]);
    let began = std::time::Instant::now();
    let mut agent = bed.start_on_api(&kubeconfig, "c1", "n1", &[])?;
    wait_until("the agent to be ready", Duration::from_secs(60), || {
        let (status, why) = agent.http("/readyz")?;
        ensure!(status == 200, "{why}");
        Ok(())
    })?;
    println!("ready after {:.1?} without a cluster that was named", began.elapsed());
    wait_finding(&agent, "PTL0110", "Cluster c2")?;
    let mut client = bed.dialler()?;
    assert_eq!(client.dial(WEB, 1)?.greetings(), ["10.0.0.1"]);
    other.start()?;
    wait_until("the endpoints of the other cluster", AFTER_LONG, || {
        let seen = endpoints(&agent, "web")?;
        ensure!(seen == ["10.0.0.1:9080 healthy", "10.1.0.1:9080 healthy"], "{seen:?}");
        Ok(())
    })?;
    agent.wait_ready()
}

/// Whatever the API says, its own service keeps the endpoints that it had: without them nobody would learn of others.
#[test]
fn the_api_servers_own_service_is_never_emptied() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1", "10.0.0.2"])?;
    let own = |endpoints: &[&str]| {
        let endpoints: Vec<_> = endpoints.iter().map(|address| (*address, "n1", "")).collect();
        plain(slice("kubernetes", 9080, &endpoints))
    };
    api.apply(&[node("n1", "r1/z1"), plain(service("kubernetes", &["172.16.0.1"], 443)), own(&["10.0.0.1"])]);
    // And whatever is ejected, and whatever shares regions get.
    let shares = json!({"localityLbSetting": {"distribute": [{"from": "r1/*", "to": {"r1/*": 80, "r2/*": 20}}]}});
    api.apply(&[mesh_config(&shares)]);
    let outlier =
        json!({"consecutive5xxErrors": 1, "interval": "1s", "baseEjectionTime": "1m", "maxEjectionPercent": 100});
    api.apply(&[destination_rule("kubernetes", &json!({"trafficPolicy": {"outlierDetection": outlier}}))]);
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    let mut client = bed.dialler()?;
    api.apply(&[own(&[])]);
    wait_finding(&agent, "PTL0113", "the last ones stay")?;
    let own_service = plain(service("kubernetes", &["172.16.0.1"], 443));
    assert!(api.delete("services", "default", "kubernetes"));
    wait_finding(&agent, "PTL0113", "is not there any more")?;
    assert_eq!(client.dial("172.16.0.1:443", 2)?.greetings(), ["10.0.0.1"; 2]);
    api.apply(&[own_service]);
    assert_eq!(client.dial("172.16.0.1:443", 2)?.greetings(), ["10.0.0.1"; 2]);
    assert!(api.delete("endpointslices.discovery.k8s.io", "default", "kubernetes-ipv4"));
    api.apply(&[plain(service("more", &["172.16.0.20"], 80))]);
    wait_until("what came after", BOUND, || {
        let report = agent.get("services")?;
        ensure!(report["services"].as_array().unwrap().len() == 2, "{report:#}");
        Ok(())
    })?;
    assert_eq!(client.dial("172.16.0.1:443", 2)?.greetings(), ["10.0.0.1"; 2]);
    api.apply(&[own(&["10.0.0.2"])]);
    wait_endpoints(&agent, "kubernetes", &["10.0.0.2:9080 healthy"])?;
    wait_no_finding(&agent, "PTL0113")?;
    // All that there is fails, and is ejected: it is taken all the same.
    api.apply(&[own(&["10.0.0.9"])]);
    bed.namespace.add_address("10.0.0.9/32")?;
    wait_endpoints(&agent, "kubernetes", &["10.0.0.9:9080 healthy"])?;
    assert_eq!(client.dial("172.16.0.1:443", 1)?.errnos(), [ECONNREFUSED]);
    wait_endpoints(&agent, "kubernetes", &["10.0.0.9:9080 ejected"])?;
    bed.serve("10.0.0.9:9080", "back")?;
    assert_eq!(client.dial("172.16.0.1:443", 2)?.greetings(), ["back"; 2]);
    Ok(())
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

#[test]
fn without_a_way_to_the_api_the_agent_says_so_in_one_line() -> Result<()> {
    let directory = Directory::new()?;
    let missing = directory.scratch("none");
    for (arguments, complaint) in [
        (vec!["--kubernetes"], "no pod with a service account"),
        (vec!["--kubernetes", "--kubeconfig", missing.to_str().unwrap()], "--kubeconfig"),
        (vec!["--kubernetes", "--config", "/etc"], "cannot be used with"),
        (vec![], "--config"),
    ] {
        let bed = Bed::new()?;
        let cgroup = bed.cgroup.path().display().to_string();
        let pins = bed.pins().display().to_string();
        let admin = bed.admin().display().to_string();
        let state = bed.state().display().to_string();
        let own =
            ["agent", "--cluster", "c1", "--node", "n1", "--cgroup", &cgroup, "--bpffs", &pins, "--admin", &admin];
        let more = ["--state", &state, "--metrics", "127.0.0.1:0"];
        let output = bed.portolan(&[&own[..], &more[..], &arguments[..]].concat())?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(complaint), "{arguments:?}: {said}");
        assert!(!bed.pins().exists(), "nothing is left in the kernel where nothing was begun");
    }
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

/// An agent that starts while another cluster is away leaves what a former one has published of it; and one that ends takes nothing away.
#[test]
fn endpoints_of_a_cluster_that_is_away_outlive_the_agent() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.1.0.1"])?;
    let (mut other, named) = second(&bed, "10.1.0.1")?;
    // All that there is, is in the other cluster.
    api.apply(&web(&[]));
    api.apply(&[named]);
    let mut agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    let mut client = bed.dialler()?;
    assert_eq!(client.dial(WEB, 2)?.greetings(), ["10.1.0.1"; 2]);
    agent.process.signal(rustix::process::Signal::TERM)?;
    agent.process.wait(BOUND)?;
    assert_eq!(client.dial(WEB, 2)?.greetings(), ["10.1.0.1"; 2]);
    other.stop();
    let agent = bed.start_on_api(&kubeconfig, "c1", "n1", &[])?;
    wait_until("the agent to be ready", Duration::from_secs(60), || {
        let (status, why) = agent.http("/readyz")?;
        ensure!(status == 200, "{why}");
        Ok(())
    })?;
    assert_eq!(client.dial(WEB, 2)?.greetings(), ["10.1.0.1"; 2]);
    // Back, and without it.
    other.replace(&[node("n2", "r2/z1"), plain(service("web", &["172.17.0.10"], 80))]);
    other.start()?;
    wait_until("nobody to be left", AFTER_LONG, || {
        let errnos = client.dial(WEB, 1)?.errnos();
        ensure!(errnos == [ECONNREFUSED], "{errnos:?}");
        Ok(())
    })
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
