//! What the policy costs, at 10,000 services with 10 endpoints each: everything from nothing, and one endpoint that changes.
#![allow(missing_docs, reason = "the harness makes items without")]
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on fails")]

use std::{hint::black_box, time::Instant};

use criterion::{BatchSize, Criterion};
use portolan::{
    model::{
        EndpointSlice, Kind, Labels, Locality, NamespacedName, Node, Object, ObjectKey, Pod, Protocol, Scope, Service,
        ServicePort, SliceEndpoint, SlicePort, Target,
    },
    policy::{Client, Compiler, Observed},
    source::{Contents, Read, Reader, Update, read_text},
    store::{Changes, Store},
    table::{Knowledge, Layout, Sizes, Table},
};

const SERVICES: u32 = 10_000;
const ENDPOINTS: u32 = 10;
const NODES: u32 = 100;

/// A third of the endpoints is in each of three regions; failover and distribution are in force for a part of the services.
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

fn name(i: u32) -> NamespacedName {
    NamespacedName::new(format!("n{}", i % 10), format!("service-{i}"))
}

fn object(kind: Kind, name: NamespacedName, object: Object) -> Update {
    let key = ObjectKey { scope: Scope::Cluster("c1".to_owned()), kind, name: name.clone() };
    let contents = Contents { objects: vec![Read { key, object: Some(object) }], whole: true, ..Contents::default() };
    Update::Replace { origin: format!("c1/{kind}/{name}"), contents }
}

/// The endpoints of a service; `ready` says of the first whether it is.
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

fn store() -> Store {
    let mut store = Store::default();
    let mut apply = |update| store.apply(update, &mut Changes::default());
    let contents = read_text(Reader::default(), &Scope::Mesh, "rules.yaml", RULES);
    assert!(contents.findings.is_empty(), "{:?}", contents.findings);
    apply(Update::Replace { origin: "rules.yaml".to_owned(), contents });
    for i in 0..NODES {
        let locality = Locality { region: format!("r{}", i % 3), zone: format!("z{}", i % 9), subzone: String::new() };
        let node = Node { name: format!("node-{i}"), locality: locality.into(), labels: Default::default() };
        apply(object(Kind::Node, NamespacedName::new("", &node.name), Object::Node(node.into())));
    }
    for i in 0..SERVICES {
        let port = ServicePort {
            name: "http".to_owned(),
            port: 80,
            protocol: Protocol::Tcp,
            target: Target::Number(80),
            http: true,
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
    store
}

/// The pods behind all endpoints, as an agent holds them that watches pods.
fn add_pods(store: &mut Store) {
    let mut changes = Changes::everything();
    for (i, e) in (0..SERVICES).flat_map(|i| (0..ENDPOINTS).map(move |e| (i, e))) {
        let name = NamespacedName::new(name(i).namespace, format!("service-{i}-7d4b9c-{e:05}"));
        let labels =
            [("app", format!("service-{i}")), ("version", "v1".to_owned()), ("pod-template-hash", "7d4b9c".to_owned())];
        let labels: Labels = labels.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let pod = Pod { name: name.clone(), labels: labels.into() };
        store.apply(object(Kind::Pod, name, Object::Pod(pod.into())), &mut changes);
    }
}

fn client() -> Client {
    let locality = Locality { region: "r0".to_owned(), zone: "z0".to_owned(), subzone: String::new() };
    Client { cluster: "c1".into(), node: Some("node-0".to_owned()), locality, ..Client::default() }
}

fn compiled(store: &Store) -> Compiler {
    let mut compiler = Compiler::default();
    compiler.compile(store.snapshot(), &client(), &Observed::default(), &Changes::everything());
    compiler
}

/// MiB of memory that this process has in use, from the kernel's own count.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1024.0
}

fn main() {
    let before = resident();
    let store_of_all = store();
    let objects = resident();
    let started = Instant::now();
    let compiler = compiled(&store_of_all);
    let took = started.elapsed();
    let verdict = resident();
    let mut layout = Layout::new(Sizes::default());
    let table = Table::new(&compiler.verdict().assignments);
    let (ops, refused) = layout.update(&table, Knowledge::Complete);
    assert!(refused.is_empty());
    drop((ops, table));
    let all = resident();
    println!("{SERVICES} services, {} endpoints: full compile {took:.0?}", SERVICES * ENDPOINTS);
    println!(
        "resident, MiB: {before:.0} at start, {objects:.0} with all objects, {verdict:.0} with the verdict, {all:.0} with the table"
    );
    assert_eq!(compiler.verdict().assignments.len(), SERVICES as usize);
    let mut with_pods = store_of_all;
    let started = Instant::now();
    add_pods(&mut with_pods);
    println!("and {} pods: {:.0?}, {:.0} MiB", SERVICES * ENDPOINTS, started.elapsed(), resident());
    let store_of_all = with_pods;

    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("policy");
    group.sample_size(10);
    group.bench_function("full compile", |bencher| {
        bencher.iter_with_large_drop(|| compiled(black_box(&store_of_all)));
    });
    group.sample_size(100);
    let (mut store, mut compiler, mut ready) = (store_of_all, compiler, true);
    let (client, observed) = (client(), Observed::default());
    group.bench_function("one endpoint", |bencher| {
        bencher.iter_batched(
            || {
                ready = !ready;
                (slice(4_321, ready), ready)
            },
            |(update, _)| {
                let mut changes = Changes::default();
                store.apply(update, &mut changes);
                let recompiled = compiler.compile(store.snapshot(), &client, &observed, &changes);
                assert_eq!(recompiled.len(), 1);
                let table = Table::new(recompiled.iter().flat_map(|service| &service.after));
                let written = layout.change(&table, &[], Knowledge::Complete);
                if let Some(round) = layout.end_round() {
                    layout.settle(round);
                }
                written
            },
            BatchSize::PerIteration,
        );
    });
    group.finish();
    criterion.final_summary();
}
