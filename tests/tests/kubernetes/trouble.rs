//! An API server that is unreachable, misbehaves, or returns invalid objects.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use portolan_tests::{
    Api, Directory, TestBed,
    objects::{destination_rule, mesh_config, node, plain, service, slice},
    storm::{Load, Servers},
    wait_until,
};
use serde_json::{Value, json};

use super::*;

/// The API server is down while a load runs and objects change.
#[test]
fn api_outage_fails_no_connections_and_one_relist_catches_up() -> Result<()> {
    let bed = TestBed::new()?;
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
    wait_finding(&agent, "PTL0110", "cannot read from the API server")?;
    let load = Load::start(bed.place(), &[WEB.parse()?], 50_000, None)?.finish()?;
    ensure!(load.bad == 0 && load.good == 50_000, "{load:?}");
    assert_eq!(agent.http("/readyz")?.0, 200, "the last known state is served");
    api.apply(&[web_slice(&["10.0.0.2"])]);
    assert!(api.delete("services", "default", "web"));
    api.apply(&[plain(service("web", &["172.16.0.10"], 80))]);
    api.forget_history();

    let began = std::time::Instant::now();
    api.start()?;
    wait_endpoints(&agent, "web", &["10.0.0.2:9080 healthy"])?;
    wait_no_finding(&agent, "PTL0110")?;
    // Each resource finds out separately that its history has expired.
    wait_until("all resources to catch up", BOUND, || {
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
        "{} connections during the outage, none failed; converged {:.1?} after it ended, with {again} list",
        load.good,
        began.elapsed()
    );
    assert_eq!(again, 1);
    Ok(())
}

#[test]
fn expired_history_broken_streams_and_expired_pages_are_handled() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1", "10.0.0.2"])?;
    let mut objects = web(&["10.0.0.1"]);
    objects.extend((0..25).map(|i| plain(service(&format!("s-{i}"), &[&format!("172.17.0.{i}")], 80))));
    api.apply(&objects);
    // Four pages. The token of the second one expires once, so the list starts over.
    api.pages(7, true);
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    assert_eq!(source(&agent, "c1", "services")?["objects"], json!(26));
    let step = |what: &str, address: &str| -> Result<()> {
        api.apply(&[web_slice(&[address])]);
        wait_endpoints(&agent, "web", &[&format!("{address}:9080 healthy")])
            .map_err(|error| error.context(what.to_owned()))
    };
    api.forget_history();
    step("expired history", "10.0.0.2")?;
    api.break_watches();
    step("a stream that breaks within a line", "10.0.0.1")?;
    api.dribble();
    api.break_watches();
    step("a stream that arrives byte by byte", "10.0.0.2")?;
    assert_eq!(source(&agent, "c1", "services")?["error"], Value::Null);
    Ok(())
}

#[test]
fn stalled_watch_is_detected() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1", "10.0.0.2"])?;
    api.apply(&web(&["10.0.0.1"]));
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &["--watch-timeout", "1s"])?;
    api.stall(true);
    api.apply(&[web_slice(&["10.0.0.2"])]);
    // The finding persists across new watches.
    for _ in 0..3 {
        wait_finding(&agent, "PTL0110", "nothing received for 6s")?;
        let watches = api.asked("watch", "services");
        wait_until("another watch", BOUND, || {
            ensure!(api.asked("watch", "services") > watches);
            Ok(())
        })?;
        assert!(!agent.findings("PTL0110")?.is_empty());
    }
    api.stall(false);
    wait_endpoints(&agent, "web", &["10.0.0.2:9080 healthy"])?;
    wait_no_finding(&agent, "PTL0110")
}

#[test]
fn forbidden_resource_is_reported_and_the_rest_works() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1", "10.0.0.2"])?;
    api.forbid("virtualservices.networking.istio.io", true);
    api.apply(&web(&["10.0.0.1"]));
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &SOON)?;
    wait_finding(&agent, "PTL0111", "not allowed to list virtualservices.networking.istio.io")?;
    let mut client = bed.dialer()?;
    assert_eq!(client.dial(WEB, 1)?.greetings(), ["10.0.0.1"]);
    api.apply(&[web_slice(&["10.0.0.2"])]);
    wait_endpoints(&agent, "web", &["10.0.0.2:9080 healthy"])?;
    api.forbid("virtualservices.networking.istio.io", false);
    wait_no_finding(&agent, "PTL0111")
}

/// While the mesh settings cannot be read, traffic must not leave its cluster.
#[test]
fn forbidden_mesh_settings_keep_traffic_in_its_cluster() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1"])?;
    api.forbid("configmaps", true);
    api.apply(&web(&["10.0.0.1"]));
    let mut agent = bed.start_on_api(&kubeconfig, "c1", "n1", &SOON)?;
    wait_finding(&agent, "PTL0034", "clusterLocal settings are unknown")?;
    let (status, why) = agent.http("/readyz")?;
    assert!(status == 503 && why.contains("settings cannot be read"), "{status} {why}");
    api.forbid("configmaps", false);
    agent.wait_ready()
}

#[test]
fn invalid_objects_are_findings_and_the_rest_works() -> Result<()> {
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
    // One service with a thousand slices.
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
        !agent
            .findings("PTL0020")?
            .iter()
            .filter(|found| found.contains("EndpointSlice default/odd"))
            .collect::<Vec<_>>()
            .is_empty()
    );
    assert_eq!(endpoints(&agent, "wide")?.len(), 1_000);
    let mut client = bed.dialer()?;
    assert_eq!(client.dial(WEB, 3)?.greetings(), ["10.0.0.1"; 3]);
    Ok(())
}

/// The token is rotated: the server rejects the old one, and the file has the new one.
#[test]
fn rotated_token_is_reloaded() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1", "10.0.0.2"])?;
    api.apply(&web(&["10.0.0.1"]));
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &["--watch-timeout", "1s"])?;
    api.rotate("the-second-token")?;
    wait_unauthorized(&agent)?;
    api.apply(&[web_slice(&["10.0.0.2"])]);
    // The file is read again once a minute.
    wait_until("the new token", Duration::from_secs(150), || {
        let seen = endpoints(&agent, "web")?;
        ensure!(seen == ["10.0.0.2:9080 healthy"], "{seen:?}");
        Ok(())
    })?;
    wait_no_finding(&agent, "PTL0110")
}

/// Waits until the server rejects the token. A watch that started earlier continues until it ends.
fn wait_unauthorized(agent: &Agent) -> Result<()> {
    wait_until("the server to reject the token", BOUND, || {
        let error = source(agent, "c1", "endpointslices.discovery.k8s.io")?["error"].clone();
        ensure!(error.as_str().is_some_and(|error| error.contains("Unauthorized")), "{error}");
        Ok(())
    })
}

/// Clock skew: the server does not accept the token yet, and later no longer accepts it.
#[test]
fn rejected_token_is_retried() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1", "10.0.0.2"])?;
    api.apply(&web(&["10.0.0.1"]));
    api.accept(false);
    let mut agent = bed.start_on_api(&kubeconfig, "c1", "n1", &SOON)?;
    wait_unauthorized(&agent)?;
    ensure!(agent.http("/readyz")?.0 == 503);
    api.accept(true);
    agent.wait_ready()?;
    let mut client = bed.dialer()?;
    assert_eq!(client.dial(WEB, 1)?.greetings(), ["10.0.0.1"]);
    // The last known state stays in effect.
    api.accept(false);
    wait_finding(&agent, "PTL0110", "Unauthorized")?;
    wait_unauthorized(&agent)?;
    api.apply(&[web_slice(&["10.0.0.2"])]);
    assert_eq!(client.dial(WEB, 1)?.greetings(), ["10.0.0.1"]);
    api.accept(true);
    wait_endpoints(&agent, "web", &["10.0.0.2:9080 healthy"])?;
    wait_no_finding(&agent, "PTL0110")
}

/// The Service of the API server never loses its last endpoints: without them, no agent would learn of new ones.
#[test]
fn api_server_service_never_loses_all_endpoints() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1", "10.0.0.2"])?;
    let own = |endpoints: &[&str]| {
        let endpoints: Vec<_> = endpoints.iter().map(|address| (*address, "n1", "")).collect();
        plain(slice("kubernetes", 9080, &endpoints))
    };
    api.apply(&[node("n1", "r1/z1"), plain(service("kubernetes", &["172.16.0.1"], 443)), own(&["10.0.0.1"])]);
    // The same holds with ejections and with shares by region.
    let shares = json!({"localityLbSetting": {"distribute": [{"from": "r1/*", "to": {"r1/*": 80, "r2/*": 20}}]}});
    api.apply(&[mesh_config(&shares)]);
    let outlier =
        json!({"consecutive5xxErrors": 1, "interval": "1s", "baseEjectionTime": "1m", "maxEjectionPercent": 100});
    api.apply(&[destination_rule("kubernetes", &json!({"trafficPolicy": {"outlierDetection": outlier}}))]);
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    let mut client = bed.dialer()?;
    api.apply(&[own(&[])]);
    wait_finding(&agent, "PTL0113", "the last known ones stay")?;
    let own_service = plain(service("kubernetes", &["172.16.0.1"], 443));
    assert!(api.delete("services", "default", "kubernetes"));
    wait_finding(&agent, "PTL0113", "was deleted")?;
    assert_eq!(client.dial("172.16.0.1:443", 2)?.greetings(), ["10.0.0.1"; 2]);
    api.apply(&[own_service]);
    assert_eq!(client.dial("172.16.0.1:443", 2)?.greetings(), ["10.0.0.1"; 2]);
    assert!(api.delete("endpointslices.discovery.k8s.io", "default", "kubernetes-ipv4"));
    api.apply(&[plain(service("more", &["172.16.0.20"], 80))]);
    wait_until("the later object", BOUND, || {
        let report = agent.get("services")?;
        ensure!(report["services"].as_array().unwrap().len() == 2, "{report:#}");
        Ok(())
    })?;
    assert_eq!(client.dial("172.16.0.1:443", 2)?.greetings(), ["10.0.0.1"; 2]);
    api.apply(&[own(&["10.0.0.2"])]);
    wait_endpoints(&agent, "kubernetes", &["10.0.0.2:9080 healthy"])?;
    wait_no_finding(&agent, "PTL0113")?;
    // The only endpoint fails and is ejected. It is used all the same.
    api.apply(&[own(&["10.0.0.9"])]);
    bed.namespace.add_address("10.0.0.9/32")?;
    wait_endpoints(&agent, "kubernetes", &["10.0.0.9:9080 healthy"])?;
    assert_eq!(client.dial("172.16.0.1:443", 1)?.errnos(), [ECONNREFUSED]);
    wait_endpoints(&agent, "kubernetes", &["10.0.0.9:9080 ejected"])?;
    bed.serve("10.0.0.9:9080", "back")?;
    assert_eq!(client.dial("172.16.0.1:443", 2)?.greetings(), ["back"; 2]);
    Ok(())
}

#[test]
fn missing_api_access_is_an_error_at_startup() -> Result<()> {
    let directory = Directory::new()?;
    let missing = directory.scratch("none");
    for (arguments, complaint) in [
        (vec!["--kubernetes"], "not running in a pod"),
        (vec!["--kubernetes", "--kubeconfig", missing.to_str().unwrap()], "--kubeconfig"),
        (vec!["--kubernetes", "--config", "/etc"], "cannot be used with"),
        (vec![], "--config"),
    ] {
        let bed = TestBed::new()?;
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
        assert!(!bed.pins().exists(), "a failed start pins nothing");
    }
    Ok(())
}

/// A full page of objects of 1 MB exceeds the size limit of a response.
#[test]
fn oversized_pages_are_requested_in_smaller_ones() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1"])?;
    api.apply(&web(&["10.0.0.1"]));
    let long = "x".repeat(1 << 20);
    let large: Vec<Value> = (0..40)
        .map(|i| {
            let mut large = plain(service(&format!("large{i}"), &[&format!("172.16.1.{i}")], 80));
            large["metadata"]["annotations"] = json!({"example.com/notes": long});
            large
        })
        .collect();
    api.apply(&large);
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    assert_eq!(source(&agent, "c1", "services")?["objects"], json!(41));
    assert_eq!(bed.dialer()?.dial(WEB, 1)?.greetings(), ["10.0.0.1"]);
    // Two responses were aborted, and then pages had 7 objects.
    assert_eq!(api.asked("list", "services"), 8);
    Ok(())
}

/// A server that has just started has not loaded its roles yet, and forbids everything.
#[test]
fn temporarily_forbidden_resources_are_retried_soon() -> Result<()> {
    let (bed, mut api, kubeconfig) = node_with(&["10.0.0.1", "10.0.0.2"])?;
    api.apply(&web(&["10.0.0.1"]));
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    api.stop();
    let all = ["services", "endpointslices.discovery.k8s.io", "nodes", "pods", "configmaps", "namespaces"];
    all.iter().for_each(|resource| api.forbid(resource, true));
    api.start()?;
    wait_finding(&agent, "PTL0111", "endpointslices.discovery.k8s.io")?;
    api.apply(&[web_slice(&["10.0.0.2"])]);
    all.iter().for_each(|resource| api.forbid(resource, false));
    // This takes less than half a minute, which is sooner than the retry of a resource that stays forbidden.
    wait_endpoints(&agent, "web", &["10.0.0.2:9080 healthy"])?;
    wait_no_finding(&agent, "PTL0111")
}

/// In a pod, the agent dials the endpoints of the API server directly, because its Service may not work.
#[test]
fn api_server_endpoints_are_dialed_directly() -> Result<()> {
    let (bed, mut api, _) = node_with(&["10.0.0.1", "10.0.0.2"])?;
    let own = |endpoint: SocketAddr| {
        let address = endpoint.ip().to_string();
        plain(slice("kubernetes", endpoint.port(), &[(&address, "n1", "")]))
    };
    bed.namespace.add_address("10.0.0.9/32")?;
    bed.namespace.add_address("172.16.255.1/32")?;
    // A listener on the Service address stands in for kube-proxy.
    let service_address = api.listen(&bed.namespace, "172.16.255.1:443".parse()?)?;
    let endpoint = api.listen(&bed.namespace, "10.0.0.9:0".parse()?)?;
    api.apply(&web(&["10.0.0.1"]));
    api.apply(&[plain(service("kubernetes", &["172.16.255.1"], 443)), own(endpoint)]);
    let agent = bed.agent_in_cluster(&api.account()?, service_address, ("c1", "n1"), &SOON)?;
    wait_endpoints(&agent, "kubernetes", &[&format!("{endpoint} healthy")])?;
    bed.namespace.ip(&["address", "del", "172.16.255.1/32", "dev", "lo"])?;
    api.break_watches();
    api.apply(&[web_slice(&["10.0.0.2"])]);
    // Only the silence shows that connections through the old address are dead.
    wait_until("the change", AFTER_LONG, || {
        let seen = endpoints(&agent, "web")?;
        ensure!(seen == ["10.0.0.2:9080 healthy"], "{seen:?}\n{}", agent.log());
        Ok(())
    })?;
    // If no endpoint responds, the agent dials the Service.
    let dead = "10.0.0.8:6443".parse()?;
    api.apply(&[own(dead)]);
    wait_endpoints(&agent, "kubernetes", &["10.0.0.8:6443 healthy"])?;
    bed.namespace.add_address("172.16.255.1/32")?;
    api.break_watches();
    api.apply(&[web_slice(&["10.0.0.1"])]);
    wait_endpoints(&agent, "web", &["10.0.0.1:9080 healthy"])
}

#[test]
fn api_server_flag_overrides_the_kubeconfig() -> Result<()> {
    let (bed, mut api, _) = node_with(&["10.0.0.1"])?;
    api.apply(&web(&["10.0.0.1"]));
    let address = api.listen(&bed.namespace, "127.0.0.1:0".parse()?)?;
    let dead = api.kubeconfig("172.16.255.1:443".parse()?, &json!({"tokenFile": api.account()?.join("token")}));
    let directory = Directory::new()?;
    let kubeconfig = directory.scratch("kubeconfig");
    std::fs::write(&kubeconfig, dead.to_string())?;
    bed.agent_on_api(&kubeconfig, "c1", "n1", &["--api-server", &format!("https://{address}")])?;
    assert_eq!(bed.dialer()?.dial(WEB, 1)?.greetings(), ["10.0.0.1"]);
    Ok(())
}
