//! The vectors in `data/vectors.json`: what Istio, Envoy and Kubernetes do, as figures with their sources.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Trial};
use portolan::{
    health::{Detector, EventKind, Verdict},
    model::{
        Distribute, Failover, Finding, LabelPreference, Labels, Locality, LocalityPattern, LocalitySetting, MeshConfig,
        Object, OutlierDetection, Retention, RetentionRule, Scope, Severity, TrafficDistribution, Warmup,
    },
    policy::{
        Level, OVERPROVISIONING_FACTOR, Schedule, SettingSource, Share, distribute_weights, effective_setting,
        effective_weights, failover_levels, label_levels, levels, loads, retention, warmup_factor,
    },
    report::Report,
    source::{Reader, read_text},
};
use serde_json::{Value, json};

use common::{World, destination_rule, node, service, slice};

/// Checks one vector; the text says what is wrong with ours.
type Check = fn(&Value, &Value);

/// Every kind, and what checks it.
const KINDS: [(&str, Check); 32] = [
    ("acceptance", acceptance),
    ("cluster_local", cluster_local),
    ("cluster_local_endpoints", cluster_local_endpoints),
    ("ejection_growth", ejection_growth),
    ("ejection_limit", ejection_limit),
    ("ejection_timeline", ejection_timeline),
    ("istio_distribute", distribute),
    ("istio_effective_setting", effective),
    ("istio_endpoint_health", endpoint_health),
    ("istio_failover_mixed", failover_mixed),
    ("istio_failover_priority_labels", failover_labels),
    ("istio_lb_validation", validation),
    ("istio_locality_failover", failover),
    ("istio_locality_match", locality_match),
    ("istio_od_mapping", outlier_mapping),
    ("istio_panic_mapping", outlier_mapping),
    ("istio_zone_aware", zone_aware),
    ("k8s_conditions", kubernetes_conditions),
    ("k8s_endpoints", kubernetes_endpoints),
    ("locality_weight_share", weight_share),
    ("locality_wrr_counts", wrr_counts),
    ("locality_wrr_sequence", wrr_sequence),
    ("locality_wrr_windows", wrr_windows),
    ("od_config", outlier_config),
    ("od_consecutive", consecutive),
    ("od_failure_percentage", failure_percentage),
    ("od_jitter", jitter),
    ("od_success_rate", success_rate),
    ("od_tcp_mapping", tcp_mapping),
    ("priority_load", priority_load),
    ("slow_start_factor", slow_start),
    ("ztunnel_candidates", ztunnel),
];

/// All of them, each by its id.
fn main() {
    let arguments = Arguments::from_args();
    let file: Value = serde_json::from_str(include_str!("data/vectors.json")).unwrap();
    let trials = file["vectors"].as_array().unwrap().iter().map(|vector| {
        let (id, kind) = (text(&vector["id"]), text(&vector["kind"]));
        let check = KINDS
            .iter()
            .find(|(known, _)| *known == kind)
            .unwrap_or_else(|| panic!("{id}: kind {kind} is not known"))
            .1;
        let vector = vector.clone();
        Trial::test(format!("{kind}/{id}"), move || {
            check(&vector["input"], &vector["expect"]);
            Ok(())
        })
    });
    let trials: Vec<Trial> = trials.collect();
    assert_eq!(trials.len(), 204, "all vectors are there");
    libtest_mimic::run(&arguments, trials).exit();
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_default()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn locality(value: &Value) -> Locality {
    text(value).parse().unwrap()
}

fn host(i: u64) -> SocketAddr {
    SocketAddr::from(([10, 0, (i / 200) as u8, (i % 200) as u8 + 1], 80))
}

fn priority_load(input: &Value, expect: &Value) {
    let weighted = input["weighted_priority_health"] == json!(true);
    let levels: Vec<Level> = list(&input["priorities"])
        .iter()
        .map(|level| {
            let count = |field: &str| number(&level[field]) as usize;
            let (healthy, degraded, excluded) = (count("healthy"), count("degraded"), count("excluded"));
            if !weighted || !level["weights"].is_array() {
                let [healthy, degraded, excluded] = [healthy, degraded, excluded].map(|hosts| hosts as u64);
                return Level { hosts: number(&level["hosts"]), healthy, degraded, excluded };
            }
            // Hosts are in this order, and count by what they weigh.
            let weights: Vec<u64> = list(&level["weights"]).iter().map(number).collect();
            let sum = |from: usize, hosts: usize| weights[from..from + hosts].iter().sum();
            Level {
                hosts: weights.iter().sum(),
                healthy: sum(0, healthy),
                degraded: sum(healthy, degraded),
                excluded: sum(healthy + degraded, excluded),
            }
        })
        .collect();
    let threshold = number(&input["panic_threshold_percent"]) as u32;
    let loads = loads(&levels, threshold, number(&input["overprovisioning_factor_percent"]));
    assert_eq!(json!(loads.load), expect["healthy_load"]);
    if expect["degraded_load"].is_array() {
        assert_eq!(json!(loads.degraded), expect["degraded_load"]);
    }
    if expect["panic"].is_array() {
        assert_eq!(json!(loads.panic), expect["panic"]);
    }
}

/// The schedule of localities by what is left of them.
fn locality_schedule(input: &Value) -> Schedule {
    let factor = input["overprovisioning_factor_percent"].as_u64().unwrap_or(OVERPROVISIONING_FACTOR);
    let localities: Vec<_> = list(&input["localities"])
        .iter()
        .map(|locality| (number(&locality["weight"]), number(&locality["hosts"]), number(&locality["healthy"])))
        .collect();
    let groups = effective_weights(&localities, factor).into_iter().zip(0..);
    Schedule::new(groups.map(|(weight, i)| (Share::from(weight), vec![(host(i), 1)])).collect())
}

fn picks(schedule: &Schedule, count: usize) -> Vec<u32> {
    schedule.turns.iter().cycle().take(if schedule.turns.is_empty() { 0 } else { count }).map(|turn| turn.run).collect()
}

fn wrr_counts(input: &Value, expect: &Value) {
    let picks = picks(&locality_schedule(input), number(&input["picks"]) as usize);
    let counts: Vec<usize> = (0..list(&input["localities"]).len() as u32)
        .map(|run| picks.iter().filter(|pick| **pick == run).count())
        .collect();
    assert_eq!(json!(counts), expect["counts"]);
}

fn wrr_sequence(input: &Value, expect: &Value) {
    let picks = picks(&locality_schedule(input), list(&expect["sequence"]).len());
    assert_eq!(json!(picks), expect["sequence"]);
}

fn wrr_windows(input: &Value, expect: &Value) {
    let size = number(&input["window_size"]) as usize;
    let picks = picks(&locality_schedule(input), size * number(&input["windows"]) as usize);
    let remote: Vec<usize> = picks.chunks(size).map(|window| window.iter().filter(|run| **run == 1).count()).collect();
    assert_eq!(json!(remote), expect["remote_picks_per_window"]);
}

fn failover(input: &Value, expect: &Value) {
    let client = locality(&input["proxy_locality"]);
    let endpoints: Vec<Locality> = list(&input["endpoint_localities"]).iter().map(locality).collect();
    let rules: Vec<Failover> = list(&input["failover"])
        .iter()
        .map(|rule| Failover { from: text(&rule["from"]), to: text(&rule["to"]) })
        .collect();
    let on = input["outlier_detection_set"] == json!(true) && input["locality_lb_enabled"] != json!(false);
    let levels = if on {
        failover_levels(&client, &endpoints.iter().collect::<Vec<_>>(), &rules)
    } else {
        vec![0; endpoints.len()]
    };
    assert_eq!(json!(levels), expect["priorities"]);
}

fn distribute(input: &Value, expect: &Value) {
    // Made by hand, for some of these rules overlap, which a reader refuses.
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
        // The weight of a group that is left out has no meaning.
        assert!(weight.is_none_or(|weight| json!(weight) == *expected), "{weights:?}");
    }
}

fn locality_match(input: &Value, expect: &Value) {
    let pattern: LocalityPattern = text(&input["rule"]).parse().unwrap();
    assert_eq!(json!(pattern.matches(&locality(&input["locality"]))), expect["match"]);
}

/// Reads a DestinationRule with this setting, as the agent would.
fn read_setting(setting: Value, outlier: bool) -> (Option<portolan::model::TrafficPolicy>, Vec<Finding>) {
    let mut policy = json!({"loadBalancer": {"localityLbSetting": setting}});
    if outlier {
        policy["outlierDetection"] = json!({"consecutive5xxErrors": 1});
    }
    read_policy(policy)
}

fn read_policy(policy: Value) -> (Option<portolan::model::TrafficPolicy>, Vec<Finding>) {
    let rule = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
        "metadata": {"name": "rule", "namespace": "default"},
        "spec": {"host": "reviews", "trafficPolicy": policy},
    });
    let contents = read_text(Reader::default(), &Scope::Mesh, "rule.yaml", &rule.to_string());
    let rule = contents.objects.into_iter().next().and_then(|read| read.object);
    let policy = match rule {
        Some(Object::DestinationRule(rule)) => Some(rule.policy.clone()),
        _ => None,
    };
    (policy, contents.findings)
}

fn validation(input: &Value, expect: &Value) {
    let setting = input["localityLbSetting"].clone();
    let (policy, findings) = read_setting(setting.clone(), input["outlier_detection_set"] == json!(true));
    assert_eq!(json!(policy.is_none()), expect["error"], "{findings:?}");
    // Istio's own warning is about failover without outlier detection, which shows once the rule is for a service.
    let mut rule = destination_rule(json!({"loadBalancer": {"localityLbSetting": setting}}));
    if input["outlier_detection_set"] == json!(true) {
        rule["spec"]["trafficPolicy"]["outlierDetection"] = json!({"consecutive5xxErrors": 1});
    }
    let report = World::new(&[("c1", vec![service(&json!({})), rule])]).report("c1", "");
    let needs = report.findings.iter().any(|finding| finding.code.to_string() == "PTL0065");
    assert_eq!(json!(needs), expect["warning"], "{:?}", report.findings);
}

fn cluster_local(input: &Value, expect: &Value) {
    let rules = list(&input["service_settings"]).iter().flat_map(|setting| {
        let strict = if setting["clusterLocal"] == json!(true) { Retention::Strict } else { Retention::Off };
        list(&setting["hosts"]).iter().map(move |host| RetentionRule { host: text(host), retention: strict })
    });
    let mesh = MeshConfig { retention: rules.collect(), ..MeshConfig::default() };
    let (retention, _) = retention(&mesh, &text(&input["host"]));
    assert_eq!(json!(retention == Retention::Strict), expect["cluster_local"]);
}

fn detector(hosts: u64, settings: OutlierDetection, now: Instant) -> Detector {
    let mut detector = Detector::new(settings, now);
    detector.set_hosts(&(0..hosts).map(host).collect::<BTreeSet<_>>());
    detector
}

fn settings(consecutive_errors: u32, max_ejection_percent: u32) -> OutlierDetection {
    let seconds = Duration::from_secs;
    OutlierDetection {
        consecutive_errors,
        gateway_errors: 0,
        local_origin_errors: None,
        interval: seconds(10),
        base_ejection_time: seconds(30),
        max_ejection_time: seconds(300),
        max_ejection_percent,
        always_eject_one: false,
        min_health_percent: 0,
    }
}

fn ejection_limit(input: &Value, expect: &Value) {
    let hosts = number(&input["hosts"]);
    let percent = number(&input["max_ejection_percent"]) as u32;
    let always_one = input["always_eject_one_host"] == json!(true);
    let most = |settings: OutlierDetection| {
        let now = Instant::now();
        let mut detector = detector(hosts, settings, now);
        for i in 0..hosts {
            detector.observe(now, host(i), Verdict::Failure);
        }
        detector.ejections().count()
    };
    let current = most(OutlierDetection { always_eject_one: always_one, ..settings(1, percent) });
    match text(&input["rule"]).as_str() {
        "ge1_28" => assert_eq!(json!(current), expect["max_ejected"]),
        // For one version, the change that made the percentage strict kept one host.
        "pr27624" => {
            assert_eq!(
                json!(most(OutlierDetection { always_eject_one: true, ..settings(1, percent) })),
                expect["max_ejected"]
            );
        }
        // Before it, the percentage was looked at without the host in question: one more went than it allows.
        "legacy" => {
            let legacy = (0..hosts).find(|ejected| 100 * ejected >= u64::from(percent) * hosts).unwrap_or(hosts);
            assert_eq!(json!(legacy), expect["max_ejected"]);
            assert_eq!(current as u64, legacy - 1, "Portolan has the rule that counts since 1.28");
        }
        other => panic!("{other} is no rule"),
    }
}

fn timing(input: &Value) -> OutlierDetection {
    let seconds = |field: &str| Duration::from_secs(number(&input[field]));
    OutlierDetection {
        base_ejection_time: seconds("base_ejection_time_s"),
        max_ejection_time: seconds("max_ejection_time_s"),
        interval: seconds("interval_s"),
        ..settings(1, 100)
    }
}

fn ejection_timeline(input: &Value, expect: &Value) {
    let start = Instant::now();
    let mut detector = detector(1, timing(input), start);
    let mut states = Vec::new();
    for event in list(&input["events"]) {
        let now = start + Duration::from_secs_f64(event["t"].as_f64().unwrap());
        match text(&event["op"]).as_str() {
            "eject" => drop(detector.observe(now, host(0), Verdict::Failure)),
            "tick" => drop(detector.handle_timeout(now)),
            other => panic!("{other} is no event"),
        }
        states.push(detector.ejections().count() == 1);
    }
    assert_eq!(json!(states), expect["ejected_after_event"]);
}

fn ejection_growth(input: &Value, expect: &Value) {
    assert_eq!(json!(durations(input)), expect["durations_s"]);
}

/// Seconds of ejections that follow one another.
fn durations(input: &Value) -> Vec<u64> {
    let mut now = Instant::now();
    let interval = Duration::from_secs(1);
    let mut detector = detector(1, OutlierDetection { interval, ..timing(input) }, now);
    let mut durations = Vec::new();
    for _ in 0..number(&input["consecutive_ejections"]) {
        let event = detector.observe(now, host(0), Verdict::Failure).unwrap();
        let EventKind::Ejected { duration, .. } = event.kind else { panic!("{event:?}") };
        durations.push(duration.as_secs());
        now += duration;
        assert_eq!(detector.handle_timeout(now.max(detector.poll_timeout().unwrap())).len(), 1);
    }
    durations
}

fn outlier_config(input: &Value, expect: &Value) {
    // Istio has no field for the maximum; the detector takes one all the same.
    if let Some(max) = input["max_ejection_time_s"].as_u64() {
        let timing = json!({"base_ejection_time_s": input["base_ejection_time_s"], "max_ejection_time_s": max,
            "consecutive_ejections": 100, "interval_s": 1});
        assert_eq!(durations(&timing).into_iter().max(), expect["max_ejection_time_s"].as_u64());
        return;
    }
    let base = format!("{}s", number(&input["base_ejection_time_s"]));
    let (policy, _) = read_policy(json!({"outlierDetection": {"baseEjectionTime": base}}));
    let max = policy.and_then(|policy| policy.outlier).unwrap().max_ejection_time;
    assert_eq!(json!(max.as_secs()), expect["max_ejection_time_s"]);
}

fn consecutive(input: &Value, expect: &Value) {
    let now = Instant::now();
    let percent = number(&input["max_ejection_percent"]) as u32;
    let mut detector = detector(1, settings(number(&input["threshold"]) as u32, percent), now);
    for event in list(&input["events"]) {
        // A refused and a timed-out connect count alike.
        let verdict = if event == "S" { Verdict::Success } else { Verdict::Failure };
        detector.observe(now, host(0), verdict);
    }
    assert_eq!(json!(detector.ejections().count() == 1), expect["ejected"]);
}

fn outlier_mapping(input: &Value, expect: &Value) {
    let (policy, findings) = read_policy(json!({"outlierDetection": input["outlierDetection"]}));
    let Some(outlier) = policy.and_then(|policy| policy.outlier) else {
        assert_eq!(expect["envoy"], Value::Null, "{findings:?}");
        return;
    };
    let milliseconds = |time: Duration| json!(time.as_millis() as u64);
    let split = outlier.local_origin_errors.is_some();
    let ours: BTreeMap<&str, Value> = BTreeMap::from([
        ("consecutive_5xx", json!(outlier.consecutive_errors)),
        ("enforcing_consecutive_5xx", json!(if outlier.consecutive_errors > 0 { 100 } else { 0 })),
        ("consecutive_gateway_failure", json!(outlier.gateway_errors)),
        ("enforcing_consecutive_gateway_failure", json!(if outlier.gateway_errors > 0 { 100 } else { 0 })),
        ("split_external_local_origin_errors", json!(split)),
        ("consecutive_local_origin_failure", json!(outlier.local_origin_errors)),
        (
            "enforcing_consecutive_local_origin_failure",
            json!(if outlier.local_origin_errors > Some(0) { 100 } else { 0 }),
        ),
        ("interval_ms", milliseconds(outlier.interval)),
        ("base_ejection_time_ms", milliseconds(outlier.base_ejection_time)),
        ("max_ejection_percent", json!(outlier.max_ejection_percent)),
        ("healthy_panic_threshold", json!(outlier.min_health_percent)),
        // Never, in Portolan as under Istio.
        ("enforcing_local_origin_success_rate", json!(0)),
        ("enforcing_success_rate", json!(0)),
    ]);
    let expected = expect.as_object().unwrap();
    let expected = expected.get("envoy").and_then(Value::as_object).unwrap_or(expected);
    let mut compared = 0;
    for (field, value) in expected {
        match ours.get(field.as_str()) {
            // Not enforced: the threshold has no meaning.
            _ if field == "consecutive_gateway_failure" && outlier.gateway_errors == 0 => {}
            _ if field == "consecutive_5xx" && outlier.consecutive_errors == 0 => {}
            Some(ours) => {
                assert_eq!(ours, value, "{field}");
                compared += 1;
            }
            None => panic!("{field} is not compared"),
        }
    }
    assert!(compared > 0);
}

fn cluster_local_endpoints(input: &Value, expect: &Value) {
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

fn effective(input: &Value, expect: &Value) {
    let setting = |value: &Value, mark: &str| {
        // Something by which they can be told apart.
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

fn preferences(input: &Value) -> Vec<LabelPreference> {
    list(&input["failover_priority"])
        .iter()
        .map(|key| {
            let key = text(key);
            let (key, value) = key.split_once('=').map_or((key.as_str(), None), |(key, value)| (key, Some(value)));
            LabelPreference { key: key.to_owned(), value: value.map(str::to_owned) }
        })
        .collect()
}

fn labels(value: &Value) -> Labels {
    value.as_object().into_iter().flatten().map(|(key, value)| (key.clone(), text(value))).collect()
}

fn failover_labels(input: &Value, expect: &Value) {
    let endpoints: Vec<Labels> = list(&input["endpoint_labels"]).iter().map(labels).collect();
    let nowhere = Locality::default();
    let setting = LocalitySetting { failover_priority: preferences(input), ..LocalitySetting::default() };
    let client = labels(&input["proxy_labels"]);
    let ours = levels((&client, &nowhere), &setting, &vec![&nowhere; endpoints.len()], &endpoints);
    assert_eq!(json!(ours), expect["priorities"]);
}

fn failover_mixed(input: &Value, expect: &Value) {
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

/// A mode of Istio's in which only regions are levels: failover where nobody has a zone.
fn zone_aware(input: &Value, expect: &Value) {
    let region = |value: &Value| Locality { region: locality(value).region, ..Locality::default() };
    let endpoints: Vec<Locality> = list(&input["endpoint_localities"]).iter().map(region).collect();
    let rules: Vec<Failover> = list(&input["failover"])
        .iter()
        .map(|rule| Failover { from: text(&rule["from"]), to: text(&rule["to"]) })
        .collect();
    let ours = failover_levels(&region(&input["proxy_locality"]), &endpoints.iter().collect::<Vec<_>>(), &rules);
    assert_eq!(json!(ours), expect["priorities"]);
}

fn ip(endpoint: &portolan::report::EndpointReport) -> String {
    endpoint.address.split(':').next().unwrap().to_owned()
}

fn texts(value: &Value) -> BTreeSet<String> {
    list(value).iter().map(text).collect()
}

fn kubernetes_endpoints(input: &Value, expect: &Value) {
    let own = text(&input["node"]);
    let endpoints: Vec<Value> = list(&input["endpoints"])
        .iter()
        .map(|endpoint| {
            let names = |field: &str| -> Vec<Value> {
                list(&endpoint[field]).iter().map(|name| json!({"name": name})).collect()
            };
            // Its name may be a letter; then it stands for an address.
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

/// What the EndpointSlice controller makes of a pod, and what Portolan reads from that.
fn kubernetes_conditions(input: &Value, expect: &Value) {
    let is = |field: &str| input[field] == json!(true);
    let (publish, ready, deleting) = (is("publishNotReadyAddresses"), is("pod_ready"), is("pod_deleting"));
    let conditions = json!({"ready": publish || (ready && !deleting), "serving": ready, "terminating": deleting});
    assert_eq!(conditions, *expect, "the controller's rule");
    let endpoint = json!({"addresses": ["10.0.0.1"], "conditions": conditions});
    let objects = vec![service(&json!({"publishNotReadyAddresses": publish})), slice(&[endpoint])];
    let report = World::new(&[("c1", objects)]).report("c1", "");
    let health = report.services[0].endpoints.first().map(|endpoint| endpoint.health.clone());
    let expected = if publish || (ready && !deleting) { "healthy" } else { "unhealthy" };
    assert_eq!(health.as_deref(), Some(expected));
}

/// Under an Istio rule: which endpoints are healthy, count as unhealthy, or are not there at all.
fn endpoint_health(input: &Value, expect: &Value) {
    assert_eq!(input["persistent_session"], json!(false));
    let mut conditions = input.as_object().unwrap().clone();
    conditions.retain(|key, value| key != "persistent_session" && !value.is_null());
    let others = json!({"addresses": ["10.0.0.2"], "conditions": {"ready": true}});
    let endpoint = json!({"addresses": ["10.0.0.1"], "conditions": conditions});
    let rule = destination_rule(json!({"outlierDetection": {"consecutive5xxErrors": 1}}));
    let report = World::new(&[("c1", vec![service(&json!({})), slice(&[endpoint, others]), rule])]).report("c1", "");
    let health =
        report.services[0].endpoints.iter().find(|endpoint| ip(endpoint) == "10.0.0.1").map(|it| it.health.as_str());
    let expected = match text(&expect["health"]).as_str() {
        "Healthy" => Some("healthy"),
        "UnHealthy" => Some("unhealthy"),
        "Terminating" => None,
        other => panic!("{other} is no health"),
    };
    assert_eq!(health, expected);
}

fn weight_share(input: &Value, expect: &Value) {
    let localities: Vec<_> = list(&input["localities"])
        .iter()
        .map(|locality| (number(&locality["weight"]), number(&locality["hosts"]), number(&locality["healthy"])))
        .collect();
    let weights = effective_weights(&localities, number(&input["overprovisioning_factor_percent"]));
    let total: u128 = weights.iter().sum();
    for (weight, exact) in weights.iter().zip(list(&expect["share_exact"])) {
        let share = 100.0 * *weight as f64 / total as f64;
        assert!((share - exact.as_f64().unwrap()).abs() < 0.001, "{weights:?}");
    }
}

fn slow_start(input: &Value, expect: &Value) {
    let warmup = Warmup {
        window: Duration::from_secs(number(&input["window_s"])),
        minimum_percent: 100.0 * input["min_weight_fraction"].as_f64().unwrap(),
        aggression: input["aggression"].as_f64().unwrap(),
    };
    let factor = warmup_factor(&warmup, Duration::from_secs(number(&input["age_s"])));
    let (expected, tolerance) = (expect["factor"].as_f64().unwrap(), expect["tolerance"].as_f64().unwrap());
    assert!((factor - expected).abs() <= tolerance, "{factor}");
}

/// The kernel tells these events apart (tests/tests/outcomes.rs makes each of them happen); here is what each of them does.
fn tcp_mapping(input: &Value, expect: &Value) {
    let reports = list(&expect["result"]);
    for (event, result) in list(&input["events"]).iter().zip(reports) {
        let verdict = match text(event).as_str() {
            "connect_timeout" | "connect_refused_or_reset" => Some(Verdict::Failure),
            "connected" => Some(Verdict::Success),
            _ => None,
        };
        let result = text(result);
        let expected = if result.contains("->50") {
            Some(Verdict::Failure)
        } else if result.contains("->200") {
            Some(Verdict::Success)
        } else {
            None
        };
        assert_eq!(verdict, expected, "{event}");
        // One failure short of the threshold: a failure ejects, a success starts the count again, all else changes nothing.
        let now = Instant::now();
        let mut detector = detector(1, settings(2, 100), now);
        detector.observe(now, host(0), Verdict::Failure);
        if let Some(verdict) = verdict {
            detector.observe(now, host(0), verdict);
        }
        assert_eq!(detector.ejections().count() == 1, verdict == Some(Verdict::Failure), "{event}");
        assert_eq!(detector.counts(&host(0)), verdict.is_none(), "{event}");
    }
}

/// A detector that Istio turns off, and Portolan has not: the figure is right, and nobody goes for it.
fn success_rate(input: &Value, expect: &Value) {
    let rates: Vec<f64> = list(&input["success_rates"]).iter().map(|rate| rate.as_f64().unwrap()).collect();
    let mean = rates.iter().sum::<f64>() / rates.len() as f64;
    let deviation = (rates.iter().map(|rate| (rate - mean).powi(2)).sum::<f64>() / rates.len() as f64).sqrt();
    let threshold = mean - input["stdev_factor"].as_f64().unwrap() * deviation;
    assert_eq!((json!(mean), json!(threshold.round())), (expect["mean"].clone(), expect["threshold"].clone()));
    let now = Instant::now();
    let mut detector = detector(rates.len() as u64, settings(5, 100), now);
    for (i, rate) in (0..).zip(&rates) {
        for request in 0..100 {
            // Half of them, one after another: never five in a row.
            let fails = *rate < 100.0 && request % 2 == 0;
            detector.observe(now, host(i), if fails { Verdict::Failure } else { Verdict::Success });
        }
    }
    assert_eq!(detector.ejections().count(), 0);
}

/// Likewise.
fn failure_percentage(input: &Value, expect: &Value) {
    let hosts = list(&input["hosts"]);
    let failed =
        |host: &Value| 100.0 * number(&host["fail"]) as f64 / (number(&host["success"]) + number(&host["fail"])) as f64;
    let ours: Vec<bool> = hosts.iter().map(|host| failed(host) >= input["threshold"].as_f64().unwrap()).collect();
    assert_eq!(json!(ours), expect["ejected"]);
    let now = Instant::now();
    let mut detector = detector(hosts.len() as u64, settings(50, 100), now);
    for (i, of) in (0..).zip(hosts) {
        let (good, bad) = (number(&of["success"]), number(&of["fail"]));
        for _ in 0..good {
            for _ in 0..bad / good {
                detector.observe(now, host(i), Verdict::Failure);
            }
            detector.observe(now, host(i), Verdict::Success);
        }
    }
    assert_eq!(detector.ejections().count(), 0);
}

/// Istio sets no jitter, and Portolan has none: an ejection lasts as long as it says.
fn jitter(input: &Value, expect: &Value) {
    let max = number(&input["max_ejection_time_jitter_ms"]);
    assert_eq!(json!(number(&input["random"]) % (max + 1)), expect["jitter_ms"], "Envoy's rule");
    let once =
        json!({"base_ejection_time_s": 30, "max_ejection_time_s": 300, "consecutive_ejections": 1, "interval_s": 1});
    assert_eq!(durations(&once), [30]);
}

/// ztunnel ranks by the same labels as failoverPriority does, and keeps the best, or in strict mode those that share all.
fn ztunnel(input: &Value, expect: &Value) {
    let key = |scope: &Value| match text(scope).as_str() {
        "NETWORK" => "topology.istio.io/network",
        "REGION" => "topology.kubernetes.io/region",
        "ZONE" => "topology.kubernetes.io/zone",
        "CLUSTER" => "topology.istio.io/cluster",
        other => panic!("{other} is no scope"),
    };
    let fields = [("network", "NETWORK"), ("region", "REGION"), ("zone", "ZONE"), ("cluster", "CLUSTER")];
    let labels_of = |of: &Value| -> Labels {
        let set = fields.iter().filter(|(field, _)| !text(&of[*field]).is_empty());
        set.map(|(field, scope)| (key(&json!(scope)).to_owned(), text(&of[*field]))).collect()
    };
    // One without an address is no endpoint.
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

/// The scenarios as shares. The demo plays them with pages and a kernel.
fn acceptance(input: &Value, expect: &Value) {
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
        // Each page of the far one shows its stars twice.
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
        // With failover configured as well, which must not lead out of the cluster.
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
