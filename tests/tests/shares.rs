//! The kernel distributes connections as `plan` says, for random configurations with real connections and exact counts.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Result, ensure};
use portolan_tests::{
    Directory, TestBed,
    objects::{destination_rule, mesh_config, node, pod, service},
    report, wait_until,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use serde_json::{Value, json};

const BOUND: Duration = Duration::from_secs(20);
const CONFIGURATIONS: usize = 50;
const CONNECTIONS: u32 = 1_000;
/// Number of endpoints, across two clusters.
const ENDPOINTS: usize = 10;
const REGIONS: [&str; 3] = ["r1/z1", "r2/z2", "r3/z3"];

fn address(i: usize) -> String {
    format!("10.0.0.{}", i + 1)
}

/// Generates a random configuration: localities, conditions, and rules of every kind that affects shares.
fn configuration(random: &mut StdRng, round: usize) -> Vec<(&'static str, Vec<Value>)> {
    let mut clusters: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    let own = [REGIONS[0], REGIONS[1], REGIONS[2]].choose(random).copied().unwrap_or(REGIONS[0]);
    let mut endpoints: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for i in 0..random.random_range(1..=ENDPOINTS) {
        let cluster = if random.random_bool(0.5) { "c1" } else { "c2" };
        let ready = random.random_bool(0.8);
        let place = random.random_range(0..REGIONS.len());
        endpoints.entry(cluster).or_default().push(json!({
            "addresses": [address(i)], "nodeName": format!("node-{place}"),
            "conditions": {"ready": ready, "serving": ready, "terminating": !ready && random.random_bool(0.3)},
            "targetRef": {"kind": "Pod", "name": format!("web-{i}"), "namespace": "default"},
        }));
        let version = ["v1", "v2"].choose(random).copied().unwrap_or_default();
        clusters.entry(cluster).or_default().push(pod(&format!("web-{i}"), &json!({"version": version})));
    }
    for cluster in ["c1", "c2"] {
        let objects = clusters.entry(cluster).or_default();
        objects.push(node("n1", own));
        objects.extend((0..).zip(REGIONS).map(|(i, place)| node(&format!("node-{i}"), place)));
        // A new address in each round, so that its cursor starts at zero.
        let mut web = service("web", &[&format!("172.{}.0.{}", if cluster == "c1" { 16 } else { 17 }, round + 1)], 80);
        if random.random_bool(0.2) {
            web["spec"]["trafficDistribution"] = json!("PreferSameZone");
        }
        objects.push(web);
        let mut slice = portolan_tests::objects::slice("web", 9080, &[]);
        slice["endpoints"] = json!(endpoints.remove(cluster).unwrap_or_default());
        objects.push(slice);
    }
    let settings = [
        json!({"failover": [{"from": "r1", "to": "r3"}]}),
        json!({"failoverPriority": ["topology.istio.io/cluster"]}),
        json!({"distribute": [{"from": "*", "to": {"r1/*": 50, "r2/*": 30, "r3/*": 20}}]}),
        json!({"distribute": [{"from": "*", "to": {"r1/*": 90, "r2/*": 10}}], "failover": [{"from": "r2", "to": "r3"}]}),
        Value::Null,
    ];
    let mut policy = json!({"loadBalancer": {"localityLbSetting": settings.choose(random)}});
    if random.random_bool(0.6) {
        let threshold = [0, 50].choose(random);
        policy["outlierDetection"] =
            json!({"consecutive5xxErrors": 5, "maxEjectionPercent": 100, "minHealthPercent": threshold});
    }
    let subsets = json!([{"name": "v1", "labels": {"version": "v1"}}, {"name": "v2", "labels": {"version": "v2"}}]);
    let mut rule = destination_rule("web", &json!({"trafficPolicy": policy, "subsets": subsets}));
    rule["metadata"]["annotations"] = json!({"portolan.io/distribute-with-failover": "true"});
    let mut mesh = vec![rule];
    if random.random_bool(0.3) {
        let to =
            |subset: &str, weight: u32| json!({"destination": {"host": "web", "subset": subset}, "weight": weight});
        mesh.push(json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {"hosts": ["web"], "tcp": [{"route": [to("v1", 80), to("v2", 20)]}]}}));
    }
    if random.random_bool(0.3) {
        mesh.push(mesh_config(&json!({"serviceSettings": [{"settings": {"clusterLocal": true}, "hosts": ["*.default.svc.cluster.local"]}]})));
    }
    let own = |cluster: &str| clusters.get(cluster).cloned().unwrap_or_default();
    vec![("mesh.yaml", mesh), ("c1/all.yaml", own("c1")), ("c2/all.yaml", own("c2"))]
}

/// Returns the expected number of connections of each endpoint. The empty name stands for refused connections.
fn expected(report: &Value) -> BTreeMap<String, f64> {
    let mut counts: BTreeMap<String, f64> = BTreeMap::new();
    let all = f64::from(CONNECTIONS);
    for service in report["services"].as_array().into_iter().flatten() {
        for (endpoint, share) in report::shares(service).into_iter().filter(|(_, share)| *share > 0.0) {
            *counts.entry(endpoint).or_default() += share * all;
        }
    }
    let refused = all - counts.values().sum::<f64>();
    if refused > 1e-6 {
        counts.insert(String::new(), refused);
    }
    counts
}

#[test]
fn kernel_distributes_as_plan_says() -> Result<()> {
    let bed = TestBed::new()?;
    for i in 0..ENDPOINTS {
        bed.namespace.add_address(&format!("{}/32", address(i)))?;
        bed.serve(&format!("{}:9080", address(i)), &format!("{}:9080", address(i)))?;
    }
    let directory = Directory::new()?;
    let mut agent = None;
    let mut client = bed.dialer()?;
    let mut random = StdRng::seed_from_u64(20_261_122);
    let (mut round, mut exact, mut modes) = (0, 0, BTreeMap::<String, usize>::new());
    for attempt in 0.. {
        ensure!(
            attempt < 20 * CONFIGURATIONS,
            "only {round} configurations have shares that {CONNECTIONS} connections can show exactly"
        );
        for (file, objects) in configuration(&mut random, round) {
            directory.write(file, &objects)?;
        }
        let (plan, _) = directory.plan("c1", "n1", &[])?;
        let expected = expected(&plan);
        *modes.entry(plan["services"][0]["mode"].to_string()).or_default() += 1;
        if agent.is_none() {
            agent = Some(bed.agent(&directory, "c1", "n1")?);
        }
        wait_until("the agent to have read the configuration", BOUND, || {
            let config =
                agent.as_ref().map(|agent| agent.get("services")).transpose()?.unwrap_or_default()["config"].clone();
            ensure!(config == plan["config"], "{config} is not {}", plan["config"]);
            Ok(())
        })?;
        let reply = client.dial(&format!("172.16.0.{}:80", round + 1), CONNECTIONS)?;
        let mut counts: BTreeMap<String, u32> = BTreeMap::new();
        for seen in &reply.seen {
            *counts.entry(seen.greeting.clone()).or_default() += 1;
        }
        // If the connections are a whole number of cycles, counts are exact. Otherwise they may be off by one.
        let is_exact = expected.values().all(|count| (count - count.round()).abs() < 1e-6);
        let tolerance = if is_exact { 1e-6 } else { 1.0 };
        let names: BTreeSet<&String> = counts.keys().chain(expected.keys()).collect();
        for name in names {
            let (seen, expected) = (counts.get(name).copied().unwrap_or(0), expected.get(name).copied().unwrap_or(0.0));
            let difference = (f64::from(seen) - expected).abs();
            assert!(difference <= tolerance, "configuration {round}: {name:?} got {seen}, not {expected}: {plan:#}");
        }
        round += 1;
        exact += usize::from(is_exact);
        if exact == CONFIGURATIONS {
            break;
        }
    }
    // Every mode occurred.
    println!("{exact} of {round} configurations compared exactly; modes: {modes:?}");
    assert_eq!(modes.len(), 3, "{modes:?}");
    Ok(())
}
