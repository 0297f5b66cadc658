//! Properties that hold for every configuration.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
#![allow(clippy::disallowed_methods, reason = "a test gets its times and files from somewhere")]

mod common;

use std::collections::BTreeSet;

use common::{World, destination_rule, node};
use portolan_core::{
    model::{Scope, ServiceId},
    policy::{Compiler, HealthView, PolicyOutput, assign},
    report::Report,
    store::Changes,
};
use proptest::{collection::vec, prelude::*, sample::select};
use serde_json::{Value, json};

const CLUSTERS: [&str; 2] = ["c1", "c2"];
const REGIONS: [&str; 3] = ["r1", "r2", "r3"];

/// An endpoint, as indices of its service, cluster, region, and state.
#[derive(Clone, Debug)]
struct Spec {
    service: usize,
    cluster: usize,
    region: usize,
    state: usize,
}

/// A generated configuration.
#[derive(Clone, Debug)]
struct Configuration {
    /// Objects with their clusters; `None` for objects of the mesh.
    objects: Vec<(Option<&'static str>, Value)>,
    cluster_local: bool,
    panics: bool,
}

fn specs() -> impl Strategy<Value = Vec<Spec>> {
    let spec = (0..2usize, 0..2usize, 0..3usize, 0..6usize);
    vec(spec.prop_map(|(service, cluster, region, state)| Spec { service, cluster, region, state }), 0..14)
}

fn policies() -> impl Strategy<Value = Value> {
    let localities = select(vec![
        json!(null),
        json!({"enabled": false}),
        json!({"failover": [{"from": "r1", "to": "r3"}]}),
        json!({"failoverPriority": ["topology.istio.io/cluster", "topology.kubernetes.io/region"]}),
        json!({"distribute": [{"from": "r1", "to": {"r1": 70, "r2": 20, "r3": 10}}]}),
        json!({"distribute": [{"from": "*", "to": {"r1/z0": 50, "r3": 50}}], "failover": [{"from": "r3", "to": "r2"}]}),
    ]);
    (localities, any::<bool>(), select(vec![0, 30, 80]), any::<bool>()).prop_map(
        |(locality, ejects, threshold, warm)| {
            let mut policy = json!({"loadBalancer": {"localityLbSetting": locality}});
            if ejects {
                policy["outlierDetection"] =
                    json!({"consecutive5xxErrors": 1, "maxEjectionPercent": 100, "minHealthPercent": threshold});
            }
            if warm {
                policy["loadBalancer"]["warmup"] = json!({"duration": "10s"});
            }
            policy
        },
    )
}

fn configurations() -> impl Strategy<Value = Configuration> {
    let distribution = select(vec![json!(null), json!("PreferSameZone"), json!("PreferSameNode")]);
    let routed = select(vec![0, 1, 2, 3, 4]);
    let others = (0..3usize, 0..3usize, select(vec!["", "n1", "n2"]));
    (specs(), policies(), any::<bool>(), distribution, routed, others).prop_map(
        |(specs, policy, cluster_local, distribution, routed, (machines, banks, network))| {
            let panics = policy.pointer("/outlierDetection/minHealthPercent").is_some_and(|percent| *percent != json!(0));
            let mut objects = Vec::new();
            for cluster in CLUSTERS {
                for (i, region) in REGIONS.into_iter().enumerate() {
                    objects.push((Some(cluster), node(&format!("{cluster}-{region}"), region, &format!("z{i}"))));
                }
                for service in 0..2 {
                    let address = format!("172.{}.0.{}", 16 + CLUSTERS.iter().position(|it| *it == cluster).unwrap(), service + 1);
                    objects.push((
                        Some(cluster),
                        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("s{service}"), "namespace": "default"},
                            "spec": {"clusterIP": address, "ports": [{"port": 80, "name": "tcp"}], "trafficDistribution": distribution,
                                "selector": {"app": format!("s{service}")}}}),
                    ));
                }
            }
            for (i, spec) in specs.iter().enumerate() {
                objects.push((Some(CLUSTERS[spec.cluster]), slice(i, spec)));
                // Some endpoints have no Pod.
                if i % 4 > 0 {
                    let version = format!("v{}", spec.state % 2);
                    let pod = json!({"apiVersion": "v1", "kind": "Pod",
                        "metadata": {"name": format!("pod-{i}"), "namespace": "default", "labels": {"version": version}}});
                    objects.push((Some(CLUSTERS[spec.cluster]), pod));
                }
            }
            for i in 0..machines {
                let machine = json!({"apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
                    "metadata": {"name": format!("vm-{i}"), "namespace": "default"},
                    "spec": {"address": format!("10.8.0.{}", i + 1), "labels": {"app": format!("s{i}"), "version": "v1"}, "locality": "r2/z1"}});
                objects.push((if i == 0 { None } else { Some("c1") }, machine));
            }
            if banks > 0 {
                let endpoints: Vec<Value> = (1..=banks).map(|i| json!({"address": format!("10.9.0.{i}"), "weight": i})).collect();
                let entry = json!({"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
                    "metadata": {"name": "bank", "namespace": "default"},
                    "spec": {"hosts": ["bank.example.com"], "addresses": ["172.30.0.1"], "resolution": "STATIC",
                        "ports": [{"number": 80, "name": "tcp", "protocol": "TCP"}], "endpoints": endpoints}});
                objects.push((None, entry));
            }
            if !network.is_empty() {
                let system = json!({"apiVersion": "v1", "kind": "Namespace",
                    "metadata": {"name": "istio-system", "labels": {"topology.istio.io/network": network}}});
                objects.push((Some("c1"), system));
            }
            let mut rule = destination_rule(policy);
            rule["metadata"]["annotations"] = json!({"portolan.io/distribute-with-failover": "true"});
            rule["spec"]["host"] = json!("s0");
            rule["spec"]["subsets"] = json!([
                {"name": "far", "labels": {"topology.istio.io/cluster": "c2"}},
                {"name": "v1", "labels": {"version": "v1"}},
            ]);
            objects.push((None, rule));
            if routed > 0 {
                let there = json!({"host": "s1"});
                let far = json!({"host": "s0", "subset": "far"});
                let new = json!({"host": "s0", "subset": "v1"});
                let bank = json!({"host": "bank.example.com"});
                let route = [(there, 3), (far, 1), (new, 2), (bank, 4)].map(|(to, weight)| json!({"destination": to, "weight": weight}));
                objects.push((
                    None,
                    json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
                        "metadata": {"name": "s0", "namespace": "default"},
                        "spec": {"hosts": ["s0"], "tcp": [{"route": route[..routed]}]}}),
                ));
            }
            if cluster_local {
                objects.push((
                    None,
                    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"},
                        "data": {"mesh": "serviceSettings: [{settings: {clusterLocal: true}, hosts: ['*']}]"}}),
                ));
            }
            Configuration { objects, cluster_local, panics }
        },
    )
}

/// Returns an EndpointSlice with one endpoint.
fn slice(i: usize, spec: &Spec) -> Value {
    let conditions = match spec.state {
        0 => json!({"ready": false, "serving": false, "terminating": false}),
        1 => json!({"ready": false, "serving": true, "terminating": true}),
        2 => json!({}),
        _ => json!({"ready": true, "serving": true, "terminating": false}),
    };
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": format!("slice-{i}"), "namespace": "default",
            "labels": {"kubernetes.io/service-name": format!("s{}", spec.service)}},
        "ports": [{"name": "tcp", "port": 80}],
        "endpoints": [{"addresses": [format!("10.{}.0.{}", spec.cluster, i + 1)], "conditions": conditions,
            "targetRef": {"kind": "Pod", "name": format!("pod-{i}"), "namespace": "default"},
            "nodeName": format!("{}-{}", CLUSTERS[spec.cluster], REGIONS[spec.region])}]})
}

/// Returns the files of a configuration: `count` for each cluster and for the mesh, with the objects in the given
/// order.
fn files(objects: &[(Option<&'static str>, Value)], count: usize) -> Vec<(Scope, String, String)> {
    let scopes = [None, Some("c1"), Some("c2")];
    let mut files = Vec::new();
    for scope in scopes {
        let own: Vec<&Value> = objects.iter().filter(|(of, _)| *of == scope).map(|(_, object)| object).collect();
        for part in 0..count {
            let text: Vec<String> = own.iter().skip(part).step_by(count).map(ToString::to_string).collect();
            let (scope, name) = match scope {
                None => (Scope::Mesh, format!("{part}.yaml")),
                Some(cluster) => (Scope::Cluster(cluster.to_owned()), format!("{cluster}/{part}.yaml")),
            };
            files.push((scope, name, text.join("\n---\n") + "\n"));
        }
    }
    files
}

fn world(objects: &[(Option<&'static str>, Value)], count: usize) -> World {
    let mut world = World::read("", &[]);
    for (scope, origin, text) in files(objects, count) {
        world.put(&scope, &origin, &text);
    }
    world
}

fn everywhere(addresses: impl IntoIterator<Item = String>) -> HealthView {
    let ejected_everywhere = addresses.into_iter().map(|address| address.parse().unwrap()).collect();
    HealthView { ejected_everywhere, ..HealthView::default() }
}

/// Removes sources and positions from the findings, because they depend on the files.
fn without_sources(mut report: Report) -> Report {
    for finding in &mut report.findings {
        finding.source.clear();
        finding.position = None;
    }
    report.findings.sort();
    report
}

fn sorted_output(compiler: &Compiler) -> PolicyOutput {
    let mut output = compiler.output();
    output.findings.sort();
    output
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// The shares of all destinations of a port and the refused share sum to one, or all of them are zero.
    #[test]
    fn shares_sum_to_one_or_zero(configuration in configurations()) {
        let report = world(&configuration.objects, 1).report("c1", "c1-r1");
        for name in ["s0", "s1"] {
            let own = || report.services.iter().filter(|service| service.name == name);
            let given: f64 = own().flat_map(|service| &service.endpoints).map(|endpoint| endpoint.share).sum();
            let refused: f64 = own().filter_map(|service| service.refused_share).sum();
            prop_assert!((given + refused - 1.0).abs() < 1e-9 || (given == 0.0 && refused == 0.0), "{given} {refused} {report:#?}");
        }
    }

    #[test]
    fn cluster_local_services_have_no_remote_endpoints(configuration in configurations()) {
        prop_assume!(configuration.cluster_local);
        let report = world(&configuration.objects, 1).report("c1", "c1-r1");
        for endpoint in report.services.iter().flat_map(|service| &service.endpoints) {
            prop_assert_eq!(&endpoint.cluster, "c1");
        }
    }

    /// Configurations with panic mode are excluded, because it uses ejected endpoints.
    #[test]
    fn ejecting_an_endpoint_never_raises_its_share(configuration in configurations(), ejected in vec(0..14usize, 0..6)) {
        prop_assume!(!configuration.panics);
        let world = world(&configuration.objects, 1);
        let client = world.client("c1", "c1-r1", &[]);
        let known: Vec<String> =
            world.report("c1", "c1-r1").services.iter().flat_map(|it| &it.endpoints).map(|it| it.address.clone()).collect();
        prop_assume!(!known.is_empty());
        let mut gone = BTreeSet::new();
        for i in ejected {
            let before = world.report_for(&client, &everywhere(gone.iter().cloned()));
            let next = known[i % known.len()].clone();
            gone.insert(next.clone());
            let after = world.report_for(&client, &everywhere(gone.iter().cloned()));
            let share = |report: &Report| -> f64 {
                report.services.iter().flat_map(|it| &it.endpoints).filter(|it| it.address == next).map(|it| it.share).sum()
            };
            prop_assert!(share(&after) <= share(&before));
            prop_assert_eq!(share(&after), 0.0);
        }
    }

    /// The order of objects and their distribution over files do not matter.
    #[test]
    fn object_order_does_not_matter(configuration in configurations(), seed in any::<u64>(), count in 1..4usize) {
        let in_order = without_sources(world(&configuration.objects, 1).report("c1", "c1-r1"));
        let mut objects = configuration.objects;
        // Shuffles by the seed.
        let mut state = seed | 1;
        for i in (1..objects.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            objects.swap(i, (state >> 33) as usize % (i + 1));
        }
        prop_assert_eq!(without_sources(world(&objects, count).report("c1", "c1-r1")), in_order);
    }

    /// Incremental compilation gives the same output as a full compilation.
    #[test]
    fn incremental_and_full_compilation_agree(
        from in configurations(),
        to in configurations(),
        ejections in vec((0..2usize, 0..14u8), 0..4),
        twice in 0..8usize,
    ) {
        let mut world = world(&from.objects, 3);
        // Some objects are in a second file as well, which is emptied at the end.
        let copies: Vec<_> = from.objects.iter().filter(|(of, _)| *of == Some("c1")).take(twice).map(|(_, it)| it.to_string()).collect();
        let own = Scope::Cluster("c1".to_owned());
        world.put(&own, "c1/copies.yaml", &(copies.join("\n---\n") + "\n"));
        let client = world.client("c1", "c1-r1", &[]);
        let (mut compiler, mut observed) = (Compiler::default(), HealthView::default());
        compiler.compile(world.0.snapshot(), &client, &observed, &Changes::everything());
        let last = [(own, "c1/copies.yaml".to_owned(), "# nothing\n".to_owned())];
        for (scope, origin, text) in files(&to.objects, 3).into_iter().chain(last) {
            let changes = world.put(&scope, &origin, &text);
            compiler.compile(world.0.snapshot(), &client, &observed, &changes);
            let mut full = assign(world.0.snapshot(), &client, &observed);
            full.findings.sort();
            prop_assert_eq!(sorted_output(&compiler), full);
        }
        for (cluster, i) in ejections {
            let pools: Vec<_> = compiler.output().assignments.iter().flat_map(|it| &it.routes).map(|it| it.pool.key.clone()).collect();
            for pool in pools {
                let mut changes = Changes::default();
                changes.services.insert(ServiceId::clone(&pool.service));
                observed.ejected.entry(pool).or_default().insert(format!("10.{cluster}.0.{i}:80").parse().unwrap());
                compiler.compile(world.0.snapshot(), &client, &observed, &changes);
            }
            let mut full = assign(world.0.snapshot(), &client, &observed);
            full.findings.sort();
            prop_assert_eq!(sorted_output(&compiler), full);
        }
    }
}
