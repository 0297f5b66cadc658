//! The whole path from text to shares, as one function.

use crate::{
    decode::{DecodeOptions, read_text},
    model::{Finding, Scope},
    policy::{Client, HealthView, assign, client::ClientLocation},
    report::Report,
    store::{Changes, Origin, Store, Update},
};

/// A text with Kubernetes and Istio objects, such as a file of a configuration directory.
#[derive(Clone, Debug)]
pub struct Document<'a> {
    /// The mesh, or the cluster that the objects belong to.
    pub scope: Scope,
    /// The name that findings show, such as the file's path.
    pub origin: &'a str,
    /// One or more YAML documents.
    pub text: &'a str,
}

/// Computes the share of each endpoint in the new connections of a client, from texts.
///
/// This is what `portolan plan` prints, and what the kernel does with the same objects. It never fails: whatever is wrong
/// with an object is a finding of the report.
///
/// # Examples
///
/// ```
/// use portolan_core::{Document, model::Scope, plan, policy::{HealthView, client::ClientLocation}};
///
/// let objects = r#"
/// apiVersion: v1
/// kind: Service
/// metadata: {name: reviews, namespace: default}
/// spec: {clusterIP: 172.16.0.30, ports: [{name: http, port: 9080}]}
/// ---
/// apiVersion: discovery.k8s.io/v1
/// kind: EndpointSlice
/// metadata: {name: reviews-1, namespace: default, labels: {kubernetes.io/service-name: reviews}}
/// addressType: IPv4
/// ports: [{name: http, port: 9080}]
/// endpoints: [{addresses: [10.0.0.1]}, {addresses: [10.0.0.2]}]
/// "#;
/// let documents = [Document { scope: Scope::Cluster("c1".to_owned()), origin: "c1/reviews.yaml", text: objects }];
/// let location = ClientLocation { locality: Some("r1/z1".parse()?), ..ClientLocation::default() };
///
/// let report = plan(&documents, "c1", &location, &HealthView::default());
///
/// let shares: Vec<_> = report.services[0].endpoints.iter().map(|it| (it.address.as_str(), it.share)).collect();
/// assert_eq!(shares, [("10.0.0.1:9080", 0.5), ("10.0.0.2:9080", 0.5)]);
/// # Ok::<(), String>(())
/// ```
pub fn plan(documents: &[Document<'_>], cluster: &str, location: &ClientLocation, health: &HealthView) -> Report {
    let mut store = Store::default();
    for Document { scope, origin, text } in documents {
        let contents = read_text(DecodeOptions::default(), scope, origin, text);
        store.apply(Update::Replace { origin: Origin::file(origin), contents }, &mut Changes::default());
    }
    let mut findings = Vec::new();
    let client = location.client(cluster, &store, &mut findings);
    plan_for_client(&store, &client, findings, health)
}

/// Computes the same for a client, from the objects of a store. `findings` are those about the client's location.
pub fn plan_for_client(store: &Store, client: &Client, findings: Vec<Finding>, health: &HealthView) -> Report {
    let mut output = assign(store.snapshot(), client, health);
    output.findings.extend(store.findings());
    output.findings.extend(findings);
    for finding in &mut output.findings {
        store.add_source(&client.cluster, finding);
    }
    output.findings.sort();
    output.findings.dedup();
    Report::new(client, store.fingerprint(), &output)
}
