//! Helpers that build objects from YAML and JSON, and return the reports of the policy.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
#![allow(unreachable_pub, reason = "each integration test is a separate crate")]
#![allow(dead_code, reason = "not every test uses every helper")]

use portolan_core::{
    decode::{DecodeOptions, read_text},
    model::{Finding, Labels, Scope},
    policy::{Client, HealthView, assign, client::ClientLocation},
    report::{Report, ServiceReport},
    store::{Changes, Store, Update},
};
use serde_json::{Value, json};

/// A store, filled with the objects of a mesh and its clusters.
pub struct World(pub Store);

impl World {
    pub fn new(clusters: &[(&str, Vec<Value>)]) -> Self {
        Self::with_mesh(&[], clusters)
    }

    pub fn with_mesh(mesh: &[Value], clusters: &[(&str, Vec<Value>)]) -> Self {
        let join = |objects: &[Value]| objects.iter().map(Value::to_string).collect::<Vec<_>>().join("\n---\n");
        let texts: Vec<(&str, String)> = clusters.iter().map(|(cluster, objects)| (*cluster, join(objects))).collect();
        let texts: Vec<(&str, &str)> = texts.iter().map(|(cluster, text)| (*cluster, text.as_str())).collect();
        Self::read(&join(mesh), &texts)
    }

    /// Reads one file for the mesh, and one for each cluster.
    pub fn read(mesh: &str, clusters: &[(&str, &str)]) -> Self {
        let mut world = Self(Store::default());
        world.put(&Scope::Mesh, "mesh.yaml", mesh);
        for (cluster, text) in clusters {
            world.put(&Scope::Cluster((*cluster).to_owned()), &format!("{cluster}/all.yaml"), text);
        }
        world
    }

    /// Replaces the contents of a file, and returns what changed.
    pub fn put(&mut self, scope: &Scope, origin: &str, text: &str) -> Changes {
        let mut changes = Changes::default();
        let contents = read_text(DecodeOptions::default(), scope, origin, text);
        self.0.apply(Update::Replace { origin: portolan_core::store::Origin::file(origin), contents }, &mut changes);
        changes
    }

    /// Returns a client on a node of a cluster, with additional labels.
    pub fn client(&self, cluster: &str, node: &str, labels: &[(&str, &str)]) -> Client {
        let labels: Labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let place = ClientLocation { node: Some(node.to_owned()), locality: None, labels };
        place.client(cluster, &self.0, &mut Vec::new())
    }

    pub fn report(&self, cluster: &str, node: &str) -> Report {
        self.report_for(&self.client(cluster, node, &[]), &HealthView::default())
    }

    pub fn report_for(&self, client: &Client, observed: &HealthView) -> Report {
        let mut verdict = assign(self.0.snapshot(), client, observed);
        verdict.findings.extend(self.0.findings());
        verdict.findings.sort();
        Report::new(client, String::new(), &verdict)
    }
}

/// Decodes a text as the mesh and as two clusters, and checks the report: shares are at most 1, and no finding is
/// empty.
/// Must not panic for any text.
pub fn through(text: &str) {
    let world = World::read(text, &[("c1", text), ("c2", text)]);
    let client = world.client("c1", "n1", &[("rack", "a")]);
    let report = world.report_for(&client, &HealthView::default());
    for service in &report.services {
        let given: f64 = service.endpoints.iter().map(|endpoint| endpoint.share).sum();
        assert!((0.0..=1.0 + 1e-9).contains(&given), "{service:?}");
    }
    for finding in &report.findings {
        assert!(!finding.object.to_string().is_empty() && !finding.message.is_empty(), "{finding:?}");
    }
    serde_json::to_string(&report).unwrap();
}

/// Returns the only service with this name. Panics if there is none, or several.
pub fn named<'a>(report: &'a Report, name: &str) -> &'a ServiceReport {
    let mut found = report.services.iter().filter(|service| service.name == name);
    let service = found.next().unwrap_or_else(|| panic!("no {name} in {report:#?}"));
    assert!(found.next().is_none(), "several services are named {name}");
    service
}

/// Returns the last octet and the percentage of each endpoint with a share above zero.
pub fn shares(service: &ServiceReport) -> Vec<(String, f64)> {
    let host = |address: &str| address.rsplit_once(':').unwrap().0.rsplit('.').next().unwrap().to_owned();
    let given = service.endpoints.iter().filter(|endpoint| endpoint.share > 0.0);
    given.map(|endpoint| (host(&endpoint.address), (endpoint.share * 1e6).round() / 1e4)).collect()
}

/// Returns the findings with this code, as `object field: message`.
pub fn findings(report: &Report, code: &str) -> Vec<String> {
    let text = |finding: &Finding| format!("{} {}: {}", finding.object, finding.field, finding.message);
    report.findings.iter().filter(|finding| finding.code.to_string() == code).map(text).collect()
}

pub fn service(more: &Value) -> Value {
    let mut service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "reviews", "namespace": "default"},
        "spec": {"clusterIP": "172.16.0.1", "ports": [{"port": 80, "name": "tcp"}]}});
    for (key, value) in more.as_object().unwrap() {
        service["spec"][key] = value.clone();
    }
    service
}

pub fn slice(endpoints: &[Value]) -> Value {
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "reviews-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "reviews"}},
        "ports": [{"name": "tcp", "port": 80, "protocol": "TCP"}], "endpoints": endpoints})
}

pub fn node(name: &str, region: &str, zone: &str) -> Value {
    let mut labels = json!({});
    for (key, value) in [("topology.kubernetes.io/region", region), ("topology.kubernetes.io/zone", zone)] {
        if !value.is_empty() {
            labels[key] = json!(value);
        }
    }
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}})
}

pub fn destination_rule(policy: Value) -> Value {
    json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
        "metadata": {"name": "reviews", "namespace": "default"}, "spec": {"host": "reviews", "trafficPolicy": policy}})
}
