//! From objects to BPF maps: time to build the table of a whole mesh, and to apply the change of one endpoint.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use portolan_core::{
    decode::{DecodeOptions, read_text},
    model::{
        EndpointSlice, Kind, Locality, NamespacedName, Node, Object, ObjectKey, Protocol, Scope, Service, ServicePort,
        SliceEndpoint, SlicePort, Target,
    },
    policy::{Client, Compiler, HealthView},
    store::{Changes, Contents, Decoded, Origin, Store, Update},
    table::{Sizes, Table},
};
use portolan_tests::{TestBed, direct::Direct};
use serde::Serialize;

use crate::{figures::percentile, progress};

const ENDPOINTS: u32 = 10;
const NODES: u32 = 100;

/// Rules of every mesh: outlier detection and failover for all Services, and a split by region for a tenth of them.
/// Endpoints are spread evenly over three regions.
const RULES: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: all, namespace: istio-system}
spec:
  host: '*.svc.cluster.local'
  trafficPolicy:
    outlierDetection: {consecutive5xxErrors: 3, maxEjectionPercent: 50}
    loadBalancer: {localityLbSetting: {failover: [{from: r0, to: r1}]}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: split, namespace: n1}
spec:
  host: '*.n1.svc.cluster.local'
  trafficPolicy:
    loadBalancer: {localityLbSetting: {distribute: [{from: r0, to: {r0: 80, r1: 15, r2: 5}}]}}
";

/// Number of DestinationRules in [`RULES`].
const SHARED_RULES: u32 = 2;

/// Times for one mesh.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Built {
    pub(crate) services: u32,
    pub(crate) endpoints: u32,
    /// Number of DestinationRules: the two of [`RULES`], plus one per Service that has its own.
    pub(crate) rules: u32,
    /// Seconds to compile the policy of all Services.
    pub(crate) policy: f64,
    /// Seconds to lay out the compiled table and write it into empty maps.
    pub(crate) written: f64,
    /// Milliseconds from the change of one endpoint to its publication in the maps: p50, p99.
    pub(crate) change: [f64; 2],
}

/// Measures each mesh size with this many changes, and the largest one again with a DestinationRule per Service.
pub(crate) fn run(services: &[u32], changes: u32) -> Result<Vec<Built>> {
    let most = services.iter().copied().max().unwrap_or(1);
    let without = services.iter().map(|services| (*services, 0));
    without.chain([(most, most)]).map(|(services, rules)| build(services, rules, changes)).collect()
}

fn build(services: u32, rules: u32, changes: u32) -> Result<Built> {
    progress(&format!("tables of {services} services, {rules} of them with their own rule"));
    let mut store = store(services, rules)?;
    let (client, observed) = (client(), HealthView::default());
    let bed = TestBed::named("tables")?;
    let sizes = Sizes { frontends: services.next_power_of_two().max(1 << 14), ..sizes_for(services) };
    let mut direct = Direct::new(&bed, sizes)?;
    let began = Instant::now();
    let mut compiler = Compiler::default();
    compiler.compile(store.snapshot(), &client, &observed, &Changes::everything());
    let policy = began.elapsed();
    direct.publish(&Table::new(&compiler.output().assignments))?;
    let complete = began.elapsed();
    let mut times: Vec<f64> = Vec::with_capacity(changes as usize);
    for turn in 0..changes {
        // Even turns make an endpoint of the next Service unready; odd turns make it ready again.
        let update = slice((turn / 2 * 7) % services, turn % 2 == 1);
        let began = Instant::now();
        let mut changed = Changes::default();
        store.apply(update, &mut changed);
        let changed_services = compiler.compile(store.snapshot(), &client, &observed, &changed);
        ensure!(changed_services.len() == 1, "one change recompiled {} services instead of 1", changed_services.len());
        direct.change(&Table::new(changed_services.iter().flat_map(|service| &service.after)))?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    let at = |part| percentile(&times, part).unwrap_or(f64::NAN);
    let seconds = |time: Duration| time.as_secs_f64();
    Ok(Built {
        services,
        endpoints: services * ENDPOINTS,
        rules: rules + SHARED_RULES,
        policy: seconds(policy),
        written: seconds(complete.saturating_sub(policy)),
        change: [at(0.5), at(0.99)],
    })
}

/// Returns the default map sizes, enlarged where this many Services need it.
fn sizes_for(services: u32) -> Sizes {
    let own = Sizes::default();
    Sizes { backends: own.backends.max(services * ENDPOINTS + 1), slots: own.slots.max(services * 64), ..own }
}

fn name(i: u32) -> NamespacedName {
    NamespacedName::new(format!("n{}", i % 10), format!("service-{i}"))
}

fn object(kind: Kind, name: NamespacedName, object: Object) -> Update {
    let key = ObjectKey { scope: Scope::Cluster("c1".to_owned()), kind, name: name.clone() };
    let contents =
        Contents { objects: vec![Decoded { key, object: Some(object) }], complete: true, ..Contents::default() };
    Update::Replace { origin: Origin::file(format!("c1/{kind}/{name}")), contents }
}

/// Returns an update with the EndpointSlice of Service `i`, in which `ready` sets the condition of the first endpoint.
fn slice(i: u32, ready: bool) -> Update {
    let endpoint = |e: u32| SliceEndpoint {
        address: (0x0a00_0000 + i * ENDPOINTS + e + 1).to_be_bytes().into(),
        ready: ready || e > 0,
        serving: true,
        terminating: Some(false),
        node: Some(format!("node-{}", (i + e) % NODES).into_boxed_str()),
        pod: Some(format!("service-{i}-7d4b9c-{e:05}").into_boxed_str()),
        hints: None,
    };
    let slice = EndpointSlice {
        name: NamespacedName::new(name(i).namespace, format!("service-{i}-abcde")),
        service: name(i),
        ports: vec![SlicePort { name: "http".to_owned(), port: 8080, protocol: Protocol::Tcp }],
        endpoints: (0..ENDPOINTS).map(endpoint).collect(),
    };
    object(Kind::EndpointSlice, slice.name.clone(), Object::EndpointSlice(slice.into()))
}

/// Returns the DestinationRule of Service `i`, as YAML.
fn rule(i: u32) -> String {
    let NamespacedName { namespace, name } = name(i);
    let algorithm = ["LEAST_REQUEST", "RANDOM", "ROUND_ROBIN"][i as usize % 3];
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  host: {name}\n  \
         trafficPolicy:\n    outlierDetection: {{consecutive5xxErrors: {}, maxEjectionPercent: 50}}\n    loadBalancer:\n      simple: {algorithm}\n      \
         localityLbSetting: {{failover: [{{from: r0, to: r1}}]}}\n",
        i % 5 + 1
    )
}

fn store(services: u32, rules: u32) -> Result<Store> {
    let mut store = Store::default();
    let mut apply = |update| store.apply(update, &mut Changes::default());
    let contents = read_text(DecodeOptions::default(), &Scope::Mesh, "rules.yaml", RULES);
    ensure!(contents.findings.is_empty(), "{:?}", contents.findings);
    apply(Update::Replace { origin: Origin::file("rules.yaml"), contents });
    for i in 0..rules {
        let origin = format!("rules-{i}.yaml");
        let contents = read_text(DecodeOptions::default(), &Scope::Mesh, &origin, &rule(i));
        ensure!(contents.findings.is_empty(), "{:?}", contents.findings);
        apply(Update::Replace { origin: Origin::file(origin), contents });
    }
    for i in 0..NODES {
        let locality = Locality { region: format!("r{}", i % 3), zone: format!("z{}", i % 9), subzone: String::new() };
        let node = Node { name: format!("node-{i}"), locality: locality.into(), labels: Default::default() };
        apply(object(Kind::Node, NamespacedName::new("", &node.name), Object::Node(node.into())));
    }
    for i in 0..services {
        let port = ServicePort {
            name: "http".to_owned(),
            port: 80,
            protocol: Protocol::Tcp,
            target: Target::Number(80),
            http: true,
            http1: true,
        };
        let service = Service {
            name: name(i),
            addresses: vec![(0xac10_0000 + i).to_be_bytes().into()],
            ports: vec![port],
            node_local: false,
            publish_not_ready: false,
            distribution: None,
            affinity: None,
            selector: Default::default(),
        };
        apply(object(Kind::Service, service.name.clone(), Object::Service(service.into())));
        apply(slice(i, true));
    }
    Ok(store)
}

fn client() -> Client {
    let locality = Locality { region: "r0".to_owned(), zone: "z0".to_owned(), subzone: String::new() };
    Client { cluster: "c1".into(), node: Some("node-0".to_owned()), locality, ..Client::default() }
}
