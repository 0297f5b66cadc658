//! Which endpoints Kubernetes and Istio consider healthy.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::{
    common::{World, destination_rule, node, service, slice},
    values::{ip, list, text, texts},
};

pub fn kubernetes_endpoints(input: &Value, expect: &Value) {
    let own = text(&input["node"]);
    let endpoints: Vec<Value> = list(&input["endpoints"])
        .iter()
        .map(|endpoint| {
            let names = |field: &str| -> Vec<Value> {
                list(&endpoint[field]).iter().map(|name| json!({"name": name})).collect()
            };
            // A name that is a letter stands for an address.
            let name = text(&endpoint["name"]);
            let address = if name.contains('.') { name } else { format!("10.9.9.{}", name.as_bytes()[0]) };
            let mut slice = json!({"addresses": [address],
                "conditions": {"ready": endpoint["ready"], "serving": endpoint["serving"], "terminating": endpoint["terminating"]},
                "nodeName": if endpoint["local"] == json!(true) { own.as_str() } else { "another-node" }});
            let hints = json!({"forZones": names("zoneHints"), "forNodes": names("nodeHints")});
            if !names("zoneHints").is_empty() || !names("nodeHints").is_empty() {
                slice["hints"] = hints;
            }
            slice
        })
        .collect();
    let objects = vec![
        service(&json!({"internalTrafficPolicy": input["internalTrafficPolicy"]})),
        slice(&endpoints),
        node(&own, "r", &text(&input["node_zone"])),
        node("another-node", "r", "another-zone"),
    ];
    let report = World::new(&[("c1", objects)]).report("c1", &own);
    let usable: BTreeSet<String> =
        report.services[0].endpoints.iter().filter(|endpoint| endpoint.share > 0.0).map(ip).collect();
    let expected: BTreeSet<String> = texts(&expect["usable"])
        .into_iter()
        .map(|name| if name.contains('.') { name } else { format!("10.9.9.{}", name.as_bytes()[0]) })
        .collect();
    assert_eq!(usable, expected, "{:?}", report.findings);
}

/// The conditions that the EndpointSlice controller sets for a pod, and the health that Portolan derives from them.
pub fn kubernetes_conditions(input: &Value, expect: &Value) {
    let is = |field: &str| input[field] == json!(true);
    let (publish, ready, deleting) = (is("publishNotReadyAddresses"), is("pod_ready"), is("pod_deleting"));
    let conditions = json!({"ready": publish || (ready && !deleting), "serving": ready, "terminating": deleting});
    assert_eq!(conditions, *expect, "the rule of the controller");
    let endpoint = json!({"addresses": ["10.0.0.1"], "conditions": conditions});
    let objects = vec![service(&json!({"publishNotReadyAddresses": publish})), slice(&[endpoint])];
    let report = World::new(&[("c1", objects)]).report("c1", "");
    let health = report.services[0].endpoints.first().map(|endpoint| endpoint.health.clone());
    let expected = if publish || (ready && !deleting) { "healthy" } else { "unhealthy" };
    assert_eq!(health.as_deref(), Some(expected));
}

/// Under an Istio rule, which endpoints are healthy, are unhealthy, or are excluded.
pub fn endpoint_health(input: &Value, expect: &Value) {
    assert_eq!(input["persistent_session"], json!(false));
    let mut conditions = input.as_object().unwrap().clone();
    conditions.retain(|key, value| key != "persistent_session" && !value.is_null());
    let other = json!({"addresses": ["10.0.0.2"], "conditions": {"ready": true}});
    let endpoint = json!({"addresses": ["10.0.0.1"], "conditions": conditions});
    let rule = destination_rule(json!({"outlierDetection": {"consecutive5xxErrors": 1}}));
    let report = World::new(&[("c1", vec![service(&json!({})), slice(&[endpoint, other]), rule])]).report("c1", "");
    let health =
        report.services[0].endpoints.iter().find(|endpoint| ip(endpoint) == "10.0.0.1").map(|it| it.health.as_str());
    let expected = match text(&expect["health"]).as_str() {
        "Healthy" => Some("healthy"),
        "UnHealthy" => Some("unhealthy"),
        "Terminating" => None,
        other => panic!("unknown health {other}"),
    };
    assert_eq!(health, expected);
}
