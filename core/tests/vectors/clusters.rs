//! Cluster-local traffic, and the shares of the demo scenarios.

use std::collections::{BTreeMap, BTreeSet};

use portolan_core::{
    decode::{DecodeOptions, read_text},
    model::{ClusterLocal, Object, Scope, Severity},
    policy::cluster_local,
    report::Report,
};
use serde_json::{Value, json};

use crate::{
    common::{World, destination_rule, node, service, slice},
    values::{ip, list, number, text, texts},
};

pub fn cluster_local_setting(input: &Value, expect: &Value) {
    let setting = |it: &Value| json!({"settings": {"clusterLocal": it["clusterLocal"]}, "hosts": it["hosts"]});
    let settings: Vec<Value> = list(&input["service_settings"]).iter().map(setting).collect();
    let config = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"},
        "data": {"mesh": json!({"serviceSettings": settings}).to_string()}});
    let contents = read_text(DecodeOptions::default(), &Scope::Mesh, "mesh.yaml", &config.to_string());
    let Some(Object::MeshConfig(mesh)) = &contents.objects[0].object else { panic!("{:?}", contents.findings) };
    let (cluster_local, _) = cluster_local(mesh, &text(&input["host"]));
    assert_eq!(json!(cluster_local == ClusterLocal::Strict), expect["cluster_local"]);
}

pub fn cluster_local_endpoints(input: &Value, expect: &Value) {
    let mut clusters: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for endpoint in list(&input["endpoints"]) {
        clusters.entry(text(&endpoint["cluster"])).or_default().push(json!({"addresses": [endpoint["addr"]]}));
    }
    clusters.entry(text(&input["client_cluster"])).or_default();
    let mut mesh = String::new();
    if input["cluster_local"] == json!(true) {
        mesh = "serviceSettings: [{settings: {clusterLocal: true}, hosts: [reviews.default.svc.cluster.local]}]"
            .to_owned();
    }
    let config = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"},
        "data": {"mesh": mesh}});
    let objects: Vec<(String, Vec<Value>)> = clusters
        .into_iter()
        .map(|(cluster, endpoints)| (cluster, vec![service(&json!({})), slice(&endpoints)]))
        .collect();
    let objects: Vec<(&str, Vec<Value>)> =
        objects.iter().map(|(cluster, objects)| (cluster.as_str(), objects.clone())).collect();
    let world = World::with_mesh(&[config], &objects);
    let report = world.report(&text(&input["client_cluster"]), "");
    let visible: BTreeSet<String> =
        report.services[0].endpoints.iter().filter(|endpoint| endpoint.share > 0.0).map(ip).collect();
    assert_eq!(visible, texts(&expect["visible"]));
}

/// Checks the shares of each scenario. The demo runs the same scenarios with pages and a kernel.
pub fn acceptance(input: &Value, expect: &Value) {
    let pods = |names: &[(&str, &str)]| -> Vec<Value> {
        let pod = |(name, label): &(&str, &str)| json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default", "labels": {"cluster": label}}});
        names.iter().map(pod).collect()
    };
    let endpoint = |address: &str, node: &str, pod: &str| json!({"addresses": [address], "nodeName": node, "targetRef": {"kind": "Pod", "name": pod, "namespace": "default"}});
    let share = |report: &Report, address: &str| -> f64 {
        report
            .services
            .iter()
            .flat_map(|service| &service.endpoints)
            .filter(|it| ip(it) == address)
            .map(|it| it.share)
            .sum()
    };
    if let Some(versions) = input["reviews_versions"].as_u64() {
        let endpoints: Vec<Value> = (1..=versions).map(|i| endpoint(&format!("10.0.0.{i}"), "n1", "p")).collect();
        let report = World::new(&[("c1", vec![service(&json!({})), slice(&endpoints), node("n1", "r1", "")])])
            .report("c1", "n1");
        let shares: Vec<f64> = report.services[0].endpoints.iter().map(|endpoint| endpoint.share).collect();
        for (ours, expected) in shares.iter().zip(list(&expect["shares"])) {
            assert!((ours - expected.as_f64().unwrap()).abs() < 1e-9);
        }
        assert_eq!(shares.len(), versions as usize);
    } else if input["distribute"].is_object() {
        let to = input["distribute"].clone();
        let rule = destination_rule(
            json!({"loadBalancer": {"localityLbSetting": {"distribute": [{"from": input["client_region"], "to": to}]}}}),
        );
        let endpoints = [endpoint("10.0.0.1", "h", "p"), endpoint("10.0.0.2", "s", "p")];
        let nodes = [node("h", "cn-hangzhou", ""), node("s", "cn-shanghai", "")];
        let objects = [service(&json!({})), slice(&endpoints), rule].into_iter().chain(nodes).collect();
        let report = World::new(&[("c1", objects)]).report("c1", "h");
        let requests = number(&input["requests"]) as f64;
        assert_eq!(json!((share(&report, "10.0.0.1") * requests).round() as u64), expect["to_hangzhou"]);
        assert_eq!(json!((share(&report, "10.0.0.2") * requests).round() as u64), expect["to_shanghai"]);
        // Each page from the far region shows its stars twice.
        assert_eq!(number(&expect["full_stars_lines"]), 2 * number(&expect["to_shanghai"]));
    } else if input["subset_labels"].is_object() {
        let mut rule = destination_rule(json!({}));
        rule["spec"]["subsets"] = json!([{"name": "one", "labels": input["subset_labels"]}]);
        let route = json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
            "metadata": {"name": "reviews", "namespace": "default"},
            "spec": {"hosts": ["reviews"], "tcp": [{"route": [{"destination": {"host": "reviews", "subset": "one"}}]}]}});
        let endpoints = [endpoint("10.0.0.1", "n", "a"), endpoint("10.0.0.2", "n", "b")];
        let objects = [service(&json!({})), slice(&endpoints), rule, route].into_iter();
        let report =
            World::new(&[("c1", objects.chain(pods(&[("a", "m1c1"), ("b", "m1c2")])).collect())]).report("c1", "n");
        let visible: Vec<usize> = ["10.0.0.1", "10.0.0.2"]
            .iter()
            .enumerate()
            .filter(|(_, it)| share(&report, it) > 0.0)
            .map(|(i, _)| i)
            .collect();
        assert_eq!(json!(visible), expect["visible"]);
    } else {
        let client = text(&input["client_cluster"]);
        let hosts: Vec<String> = list(&input["cluster_local"]).iter().map(text).collect();
        let settings = json!({"serviceSettings": [{"settings": {"clusterLocal": true}, "hosts": hosts}]});
        let config = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"},
            "data": {"mesh": if hosts.is_empty() { String::new() } else { settings.to_string() }}});
        // With failover configured too, which must not leave the cluster.
        let rule = destination_rule(json!({"outlierDetection": {"consecutive5xxErrors": 1}}));
        let rules = if input["reviews"][&client] == json!(0) { vec![config, rule] } else { vec![config] };
        let of = |cluster: &str, address: &str| {
            let count = input["reviews"][cluster].as_u64().unwrap_or(1);
            let endpoints: Vec<Value> = (0..count).map(|_| endpoint(address, "n", "p")).collect();
            vec![service(&json!({})), slice(&endpoints), node("n", cluster, "")]
        };
        let report = World::with_mesh(&rules, &[("m1c1", of("m1c1", "10.0.0.1")), ("m1c2", of("m1c2", "10.0.0.2"))])
            .report(&client, "n");
        let (near, far) = (share(&report, "10.0.0.1"), share(&report, "10.0.0.2"));
        let requests = number(&input["requests"]) as f64;
        for (field, ours) in [
            ("to_m1c1", near * requests),
            ("to_m1c2", far * requests),
            ("to_m1c1_share", near),
            ("to_m1c2_share", far),
            ("errors", requests * (1.0 - near - far)),
        ] {
            assert!(
                expect[field].is_null() || (expect[field].as_f64().unwrap() - ours).abs() < 1e-9,
                "{field}: {ours}"
            );
        }
        assert!(report.findings.iter().all(|finding| finding.severity == Severity::Warning), "{:?}", report.findings);
    }
}
