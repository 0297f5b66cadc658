//! Objects that the tests share.

use portolan_core::policy::HealthView;

/// Nodes in three regions, and a Service `web` with one endpoint in each region, 10.0.0.1 to 10.0.0.3.
pub const WEB: &str = r#"
{apiVersion: v1, kind: Node, metadata: {name: a, labels: {topology.kubernetes.io/region: r1, topology.kubernetes.io/zone: z1}}}
---
{apiVersion: v1, kind: Node, metadata: {name: b, labels: {topology.kubernetes.io/region: r2, topology.kubernetes.io/zone: z2}}}
---
{apiVersion: v1, kind: Node, metadata: {name: c, labels: {topology.kubernetes.io/region: r3, topology.kubernetes.io/zone: z3}}}
---
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: default}, spec: {clusterIP: 172.16.0.1, ports: [{port: 80, name: tcp}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
addressType: IPv4
metadata: {name: web-1, namespace: default, labels: {kubernetes.io/service-name: web}}
ports: [{name: tcp, port: 80}]
endpoints:
- {addresses: [10.0.0.1], nodeName: a, targetRef: {kind: Pod, name: web-a}}
- {addresses: [10.0.0.2], nodeName: b, targetRef: {kind: Pod, name: web-b}}
- {addresses: [10.0.0.3], nodeName: c, targetRef: {kind: Pod, name: web-c}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web-a, namespace: default, labels: {version: v1, rack: left}}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web-b, namespace: default, labels: {version: v2, rack: right}}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web-c, namespace: default, labels: {version: v2, rack: right}}}
"#;

pub const ENTRY: &str = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: bank, namespace: shop}
spec:
  hosts: [bank.example.com]
  addresses: [172.30.0.1]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{number: 443, name: tls, protocol: TLS, targetPort: 8443}]
  endpoints:
  - {address: 10.9.0.1, locality: r1/z1, weight: 3}
  - {address: 10.9.0.2, locality: r1/z1, ports: {tls: 9443}}
  - {address: 10.9.0.3, locality: r2/z2}
";

/// Returns a DestinationRule for `web` with this `trafficPolicy`.
pub fn rule(policy: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: web, namespace: default}}\n\
         spec: {{host: web, trafficPolicy: {policy}}}\n"
    )
}

pub fn route(spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: web, namespace: default}}\nspec: {spec}\n"
    )
}

/// Returns a second slice of `web` with one endpoint.
/// `endpoint` continues the list of addresses: `10.0.0.1], nodeName: a`.
pub fn slice_of(endpoint: &str) -> String {
    format!(
        "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, \
         metadata: {{name: web-9, namespace: default, labels: {{kubernetes.io/service-name: web}}}}, \
         ports: [{{name: tcp, port: 80}}], endpoints: [{{addresses: [{endpoint}}}]}}\n"
    )
}

pub fn given(pairs: &[(&str, f64)]) -> Vec<(String, f64)> {
    pairs.iter().map(|(host, share)| ((*host).to_owned(), *share)).collect()
}

pub fn ejected(addresses: &[&str]) -> HealthView {
    let everywhere = addresses.iter().map(|address| format!("{address}:80").parse().unwrap());
    HealthView { ejected_everywhere: everywhere.collect(), ..HealthView::default() }
}
