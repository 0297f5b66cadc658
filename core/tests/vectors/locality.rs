//! Failover levels and settings, by locality and label.

use std::collections::BTreeSet;

use portolan_core::{
    decode::{DecodeOptions, read_text},
    model::{
        Distribute, Failover, Finding, LabelPreference, Labels, Locality, LocalityPattern, LocalitySetting, Object,
        Scope, TrafficDistribution, TrafficPolicy,
    },
    policy::{SettingSource, distribute_weights, effective_setting, failover_levels, label_levels, levels},
};
use serde_json::{Value, json};

use crate::{
    common::{World, destination_rule, node, service, slice},
    values::{labels, list, locality, number, text, texts},
};

/// Checks the priorities of a service with an endpoint in each of these localities, for a client in another one.
pub fn failover(input: &Value, expect: &Value) {
    let place = |value: &Value| {
        let locality = locality(value);
        let mut node = node("", &locality.region, &locality.zone);
        if !locality.subzone.is_empty() {
            node["metadata"]["labels"]["topology.istio.io/subzone"] = json!(locality.subzone);
        }
        node
    };
    let mut objects = vec![service(&json!({})), place(&input["proxy_locality"])];
    objects[1]["metadata"]["name"] = json!("client");
    let mut endpoints = Vec::new();
    for (i, at) in list(&input["endpoint_localities"]).iter().enumerate() {
        let mut node = place(at);
        node["metadata"]["name"] = json!(format!("n{i}"));
        objects.push(node);
        endpoints.push(json!({"addresses": [format!("10.0.0.{}", i + 1)], "nodeName": format!("n{i}")}));
    }
    let mut setting = json!({"failover": input["failover"]});
    if input["locality_lb_enabled"].is_boolean() {
        setting["enabled"] = input["locality_lb_enabled"].clone();
    }
    let mut policy = json!({"loadBalancer": {"localityLbSetting": setting}});
    if input["outlier_detection_set"] == json!(true) {
        policy["outlierDetection"] = json!({});
    }
    objects.extend([slice(&endpoints), destination_rule(policy)]);
    let report = World::new(&[("c1", objects)]).report("c1", "client");
    let levels: Vec<u32> = report.services[0].endpoints.iter().map(|endpoint| endpoint.priority).collect();
    assert_eq!(json!(levels), expect["priorities"], "{:?}", report.findings);
}

pub fn distribute(input: &Value, expect: &Value) {
    // Built without the decoder, which rejects overlapping rules.
    let rules: Vec<Distribute> = list(&input["distribute"])
        .iter()
        .map(|rule| Distribute {
            from: text(&rule["from"]).parse().unwrap(),
            to: rule["to"]
                .as_object()
                .unwrap()
                .iter()
                .map(|(to, percent)| (to.parse().unwrap(), number(percent) as u32))
                .collect(),
        })
        .collect();
    let client = locality(&input["proxy_locality"]);
    let groups: Vec<(Locality, u64)> = list(&input["groups"])
        .iter()
        .map(|group| (locality(&group["locality"]), group["weight"].as_u64().unwrap_or(1)))
        .collect();
    let own: Vec<(&Locality, u64)> = groups.iter().map(|(locality, weight)| (locality, *weight)).collect();
    let weights = distribute_weights(&client, &own, &rules)
        .unwrap_or_else(|| own.iter().map(|(_, weight)| Some(*weight)).collect());
    let kept: Vec<bool> = weights.iter().map(Option::is_some).collect();
    assert_eq!(json!(kept), expect["endpoints_kept"]);
    for (weight, expected) in weights.iter().zip(list(&expect["locality_weights"])) {
        // An excluded group has no weight.
        assert!(weight.is_none_or(|weight| json!(weight) == *expected), "{weights:?}");
    }
}

pub fn locality_match(input: &Value, expect: &Value) {
    let pattern: LocalityPattern = text(&input["rule"]).parse().unwrap();
    assert_eq!(json!(pattern.matches(&locality(&input["locality"]))), expect["match"]);
}

/// Decodes a DestinationRule with this setting, as the agent does.
pub fn read_setting(setting: Value, outlier: bool) -> (Option<TrafficPolicy>, Vec<Finding>) {
    let mut policy = json!({"loadBalancer": {"localityLbSetting": setting}});
    if outlier {
        policy["outlierDetection"] = json!({"consecutive5xxErrors": 1});
    }
    read_policy(policy)
}

pub fn read_policy(policy: Value) -> (Option<TrafficPolicy>, Vec<Finding>) {
    let rule = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
        "metadata": {"name": "rule", "namespace": "default"},
        "spec": {"host": "reviews", "trafficPolicy": policy},
    });
    let contents = read_text(DecodeOptions::default(), &Scope::Mesh, "rule.yaml", &rule.to_string());
    let rule = contents.objects.into_iter().next().and_then(|read| read.object);
    let policy = match rule {
        Some(Object::DestinationRule(rule)) => Some(rule.policy.clone()),
        _ => None,
    };
    (policy, contents.findings)
}

pub fn validation(input: &Value, expect: &Value) {
    let setting = input["localityLbSetting"].clone();
    let (policy, findings) = read_setting(setting.clone(), input["outlier_detection_set"] == json!(true));
    assert_eq!(json!(policy.is_none()), expect["error"], "{findings:?}");
    // The warning of Istio is about failover without outlier detection. Portolan reports it once a service matches the
    // rule.
    let mut rule = destination_rule(json!({"loadBalancer": {"localityLbSetting": setting}}));
    if input["outlier_detection_set"] == json!(true) {
        rule["spec"]["trafficPolicy"]["outlierDetection"] = json!({"consecutive5xxErrors": 1});
    }
    let report = World::new(&[("c1", vec![service(&json!({})), rule])]).report("c1", "");
    let needs = report.findings.iter().any(|finding| finding.code.to_string() == "PTL0065");
    assert_eq!(json!(needs), expect["warning"], "{:?}", report.findings);
}

pub fn effective(input: &Value, expect: &Value) {
    let setting = |value: &Value, mark: &str| {
        // A mark that shows which setting was selected.
        let failover = vec![Failover { from: mark.to_owned(), to: "elsewhere".to_owned() }];
        value.as_str().map(|state| LocalitySetting { enabled: state == "on", failover, ..LocalitySetting::default() })
    };
    let mesh =
        setting(&input["mesh"], "mesh").unwrap_or(LocalitySetting { enabled: false, ..LocalitySetting::default() });
    let rule = setting(&input["dr"], "dr");
    let distribution = input["trafficDistribution"].as_str().map(|text| match text {
        "PreferSameNode" => TrafficDistribution::PreferSameNode,
        _ => TrafficDistribution::PreferSameZone,
    });
    let found = effective_setting(rule.as_ref(), distribution, &mesh);
    let (name, from) = match &found {
        None => (json!(null), String::new()),
        Some((setting, SettingSource::DestinationRule)) => (json!("dr"), setting.failover[0].from.clone()),
        Some((setting, SettingSource::Mesh)) => (json!("mesh"), setting.failover[0].from.clone()),
        Some((_, SettingSource::TrafficDistribution)) => (json!("trafficDistribution"), String::new()),
    };
    assert_eq!(name, expect["effective"]);
    assert!(from.is_empty() || name == from);
    let forced = matches!(found, Some((_, SettingSource::TrafficDistribution)));
    assert_eq!(json!(forced), expect["force_failover"]);
    if let Some(keys) = expect["failoverPriority"].as_array() {
        let ours: Vec<Value> =
            found.unwrap().0.failover_priority.iter().map(|preference| json!(preference.key)).collect();
        assert_eq!(ours, *keys);
    }
}

pub fn preferences(input: &Value) -> Vec<LabelPreference> {
    list(&input["failover_priority"])
        .iter()
        .map(|key| {
            let key = text(key);
            let (key, value) = key.split_once('=').map_or((key.as_str(), None), |(key, value)| (key, Some(value)));
            LabelPreference { key: key.to_owned(), value: value.map(str::to_owned) }
        })
        .collect()
}

pub fn failover_labels(input: &Value, expect: &Value) {
    let endpoints: Vec<Labels> = list(&input["endpoint_labels"]).iter().map(labels).collect();
    let unknown_locality = Locality::default();
    let setting = LocalitySetting { failover_priority: preferences(input), ..LocalitySetting::default() };
    let client = labels(&input["proxy_labels"]);
    let ours = levels((&client, &unknown_locality), &setting, &vec![&unknown_locality; endpoints.len()], &endpoints);
    assert_eq!(json!(ours), expect["priorities"]);
}

pub fn failover_mixed(input: &Value, expect: &Value) {
    let endpoints: Vec<Labels> = list(&input["endpoint_labels"]).iter().map(labels).collect();
    let localities: Vec<Locality> = list(&input["endpoint_localities"]).iter().map(locality).collect();
    let failover =
        list(&input["failover"]).iter().map(|rule| Failover { from: text(&rule["from"]), to: text(&rule["to"]) });
    let setting = LocalitySetting {
        failover_priority: preferences(input),
        failover: failover.collect(),
        ..LocalitySetting::default()
    };
    let client = (&labels(&input["proxy_labels"]), &locality(&input["proxy_locality"]));
    let ours = levels(client, &setting, &localities.iter().collect::<Vec<_>>(), &endpoints);
    assert_eq!(json!(ours), expect["priorities"]);
}

/// A mode of Istio in which only regions are levels: failover without zones.
pub fn zone_aware(input: &Value, expect: &Value) {
    let region = |value: &Value| Locality { region: locality(value).region, ..Locality::default() };
    let endpoints: Vec<Locality> = list(&input["endpoint_localities"]).iter().map(region).collect();
    let rules: Vec<Failover> = list(&input["failover"])
        .iter()
        .map(|rule| Failover { from: text(&rule["from"]), to: text(&rule["to"]) })
        .collect();
    let ours = failover_levels(&region(&input["proxy_locality"]), &endpoints.iter().collect::<Vec<_>>(), &rules);
    assert_eq!(json!(ours), expect["priorities"]);
}

/// ztunnel ranks by the same labels as failoverPriority, and keeps the best rank. In strict mode, all labels must
/// match.
pub fn ztunnel(input: &Value, expect: &Value) {
    let key = |scope: &Value| match text(scope).as_str() {
        "NETWORK" => "topology.istio.io/network",
        "REGION" => "topology.kubernetes.io/region",
        "ZONE" => "topology.kubernetes.io/zone",
        "CLUSTER" => "topology.istio.io/cluster",
        other => panic!("unknown scope {other}"),
    };
    let fields = [("network", "NETWORK"), ("region", "REGION"), ("zone", "ZONE"), ("cluster", "CLUSTER")];
    let labels_of = |of: &Value| -> Labels {
        let set = fields.iter().filter(|(field, _)| !text(&of[*field]).is_empty());
        set.map(|(field, scope)| (key(&json!(scope)).to_owned(), text(&of[*field]))).collect()
    };
    // A workload without an address is not an endpoint.
    let endpoints: Vec<&Value> = list(&input["endpoints"]).iter().filter(|it| it["ip"] != json!(false)).collect();
    let own: Vec<Labels> = endpoints.iter().map(|endpoint| labels_of(endpoint)).collect();
    let keys: Vec<LabelPreference> = list(&input["routing_preference"])
        .iter()
        .map(|scope| LabelPreference { key: key(scope).to_owned(), value: None })
        .collect();
    let levels = label_levels(&labels_of(&input["source"]), &own, &keys);
    let best = if input["mode"] == json!("STRICT") { Some(0) } else { levels.iter().min().copied() };
    let candidates: BTreeSet<String> = endpoints
        .iter()
        .zip(levels)
        .filter(|(_, level)| Some(*level) == best)
        .map(|(endpoint, _)| text(&endpoint["name"]))
        .collect();
    assert_eq!(candidates, texts(&expect["candidates"]));
}
