//! Kubernetes and Istio objects for tests, as JSON, which is also valid YAML.

use serde_json::{Value, json};

/// Returns a Node with the labels of a locality (`region/zone/subzone`).
pub fn node(name: &str, locality: &str) -> Value {
    let mut parts = locality.split('/');
    let mut labels = serde_json::Map::new();
    for key in ["topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone"] {
        if let Some(part) = parts.next() {
            labels.insert(key.to_owned(), json!(part));
        }
    }
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}})
}

/// Returns a Service in `default` with one TCP port, named `http`.
pub fn service(name: &str, addresses: &[&str], port: u16) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": addresses[0], "clusterIPs": addresses, "ports": [{"name": "http", "port": port}]},
    })
}

/// Returns a Service in `default` with one UDP port, named `dns`.
pub fn udp_service(name: &str, addresses: &[&str], port: u16) -> Value {
    let mut object = service(name, addresses, port);
    object["spec"]["ports"] = json!([{"name": "dns", "port": port, "protocol": "UDP"}]);
    object
}

/// Returns an EndpointSlice for a [`udp_service`]. Each endpoint is (address, node, pod).
pub fn udp_slice(service: &str, port: u16, endpoints: &[(&str, &str, &str)]) -> Value {
    let mut object = slice(service, port, endpoints);
    object["ports"] = json!([{"name": "dns", "port": port, "protocol": "UDP"}]);
    object
}

/// Returns an EndpointSlice for a [`service`](fn@service). Each endpoint is (address, node, pod).
pub fn slice(service: &str, port: u16, endpoints: &[(&str, &str, &str)]) -> Value {
    let family = if endpoints.first().is_some_and(|(address, ..)| address.contains(':')) { "IPv6" } else { "IPv4" };
    let list: Vec<Value> = endpoints
        .iter()
        .map(|(address, node, pod)| {
            json!({
                "addresses": [address], "nodeName": node, "conditions": {"ready": true},
                "targetRef": {"kind": "Pod", "name": pod, "namespace": "default"},
            })
        })
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-{}", family.to_lowercase()), "namespace": "default",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": family, "ports": [{"name": "http", "port": port}], "endpoints": list,
    })
}

/// Returns a Pod in `default` with these labels.
pub fn pod(name: &str, labels: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default", "labels": labels}})
}

/// Returns the ConfigMap `istio-system/istio` with this MeshConfig.
pub fn mesh_config(mesh: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"},
        "data": {"mesh": mesh.to_string()},
    })
}

/// Returns a DestinationRule in `default` for `host`, with the fields of `spec` in its spec.
pub fn destination_rule(host: &str, spec: &Value) -> Value {
    let mut rule = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
        "metadata": {"name": host, "namespace": "default"}, "spec": {"host": host},
    });
    for (field, value) in spec.as_object().into_iter().flatten() {
        rule["spec"][field] = value.clone();
    }
    rule
}

/// Returns a VirtualService in `default` for `host`, whose only `tcp` route leads to a subset of `to`.
pub fn tcp_route(host: &str, to: &str, subset: &str) -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
        "metadata": {"name": host, "namespace": "default"},
        "spec": {"hosts": [host], "tcp": [{"route": [{"destination": {"host": to, "subset": subset}}]}]},
    })
}

/// Renames the ports of a Service or EndpointSlice to `tcp`, so that they are not HTTP.
pub fn plain(mut object: Value) -> Value {
    let ports = if object["kind"] == "Service" { &mut object["spec"]["ports"] } else { &mut object["ports"] };
    for port in ports.as_array_mut().into_iter().flatten() {
        port["name"] = json!("tcp");
    }
    object
}
