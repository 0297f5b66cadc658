//! The vectors in `data/vectors.json`: what Istio, Envoy and Kubernetes do, as figures with their sources.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

use portolan::{
    health::{Detector, EventKind, Verdict},
    model::{
        ClusterLocalRule, Distribute, Failover, Finding, Locality, LocalityPattern, MeshConfig, Object,
        OutlierDetection, Scope,
    },
    policy::{Level, Schedule, Share, distribute_weights, edf_order, failover_levels, is_cluster_local, loads},
    source::{Reader, read_text},
};
use serde_json::{Value, json};

/// Kinds whose rules are not built yet. A kind that is neither here nor handled makes the test fail.
const NOT_YET: [&str; 14] = [
    "acceptance",
    "cluster_local_endpoints",
    "istio_effective_setting",
    "istio_endpoint_health",
    "istio_failover_mixed",
    "istio_failover_priority_labels",
    "istio_zone_aware",
    "k8s_conditions",
    "k8s_endpoints",
    "locality_weight_share",
    "od_failure_percentage",
    "od_jitter",
    "od_success_rate",
    "slow_start_factor",
];

#[test]
fn vectors() {
    let file: Value = serde_json::from_str(include_str!("data/vectors.json")).unwrap();
    let vectors = file["vectors"].as_array().unwrap();
    let (mut checked, mut left) = (0, 0);
    for vector in vectors {
        let (id, kind) = (text(&vector["id"]), text(&vector["kind"]));
        let (input, expect) = (&vector["input"], &vector["expect"]);
        let done = match kind.as_str() {
            "priority_load" => priority_load(&id, input, expect),
            "locality_wrr_counts" => wrr_counts(&id, input, expect),
            "locality_wrr_sequence" => wrr_sequence(&id, input, expect),
            "locality_wrr_windows" => wrr_windows(&id, input, expect),
            "istio_locality_failover" => failover(&id, input, expect),
            "istio_distribute" => distribute(&id, input, expect),
            "istio_locality_match" => locality_match(&id, input, expect),
            "istio_lb_validation" => validation(&id, input, expect),
            "cluster_local" => cluster_local(&id, input, expect),
            "ejection_limit" => ejection_limit(&id, input, expect),
            "ejection_timeline" => ejection_timeline(&id, input, expect),
            "ejection_growth" => ejection_growth(&id, input, expect),
            "od_config" => outlier_config(&id, input, expect),
            "od_consecutive" => consecutive(&id, input, expect),
            "istio_od_mapping" | "istio_panic_mapping" => outlier_mapping(&id, input, expect),
            // The events are the kernel's: tests/tests/outcomes.rs makes each of them happen.
            "od_tcp_mapping" => false,
            // Another balancer's own algorithm, kept for comparison.
            "ztunnel_candidates" => false,
            other => {
                assert!(NOT_YET.contains(&other), "{id}: kind {other} is not known");
                false
            }
        };
        *(if done { &mut checked } else { &mut left }) += 1;
    }
    println!("{checked} vectors checked, {left} left for what is not built");
    assert!(checked >= 110, "only {checked} vectors were checked");
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

fn priority_load(id: &str, input: &Value, expect: &Value) -> bool {
    let special = |level: &Value| number(&level["degraded"]) > 0 || number(&level["excluded"]) > 0;
    if input["weighted_priority_health"] == json!(true) || list(&input["priorities"]).iter().any(special) {
        return false;
    }
    let levels: Vec<Level> = list(&input["priorities"])
        .iter()
        .map(|level| Level { hosts: number(&level["hosts"]), healthy: number(&level["healthy"]) })
        .collect();
    let threshold = number(&input["panic_threshold_percent"]) as u32;
    let loads = loads(&levels, threshold, number(&input["overprovisioning_factor_percent"]));
    assert_eq!(json!(loads.load), expect["healthy_load"], "{id}");
    if expect["panic"].is_array() {
        assert_eq!(json!(loads.panic), expect["panic"], "{id}");
    }
    true
}

/// Effective weights of localities, and the schedule that they give.
fn locality_schedule(input: &Value) -> Schedule {
    let factor = input["overprovisioning_factor_percent"].as_u64().unwrap_or(140);
    let groups = list(&input["localities"]).iter().zip(0u64..).map(|(locality, i)| {
        let (weight, hosts, healthy) =
            (number(&locality["weight"]), number(&locality["hosts"]), number(&locality["healthy"]));
        let health = Share::new(u128::from(factor * healthy), u128::from(100 * hosts.max(1))).min(Share::from(1));
        (health * Share::from(u128::from(weight)), vec![(host(i), 1)])
    });
    Schedule::new(groups.collect())
}

fn picks(schedule: &Schedule, count: usize) -> Vec<u32> {
    schedule.turns.iter().cycle().take(if schedule.turns.is_empty() { 0 } else { count }).map(|turn| turn.run).collect()
}

fn wrr_counts(id: &str, input: &Value, expect: &Value) -> bool {
    let picks = picks(&locality_schedule(input), number(&input["picks"]) as usize);
    let counts: Vec<usize> = (0..list(&input["localities"]).len() as u32)
        .map(|run| picks.iter().filter(|pick| **pick == run).count())
        .collect();
    assert_eq!(json!(counts), expect["counts"], "{id}");
    true
}

fn wrr_sequence(id: &str, input: &Value, expect: &Value) -> bool {
    let picks = picks(&locality_schedule(input), list(&expect["sequence"]).len());
    assert_eq!(json!(picks), expect["sequence"], "{id}");
    true
}

fn wrr_windows(id: &str, input: &Value, expect: &Value) -> bool {
    let size = number(&input["window_size"]) as usize;
    let picks = picks(&locality_schedule(input), size * number(&input["windows"]) as usize);
    let remote: Vec<usize> = picks.chunks(size).map(|window| window.iter().filter(|run| **run == 1).count()).collect();
    assert_eq!(json!(remote), expect["remote_picks_per_window"], "{id}");
    true
}

fn failover(id: &str, input: &Value, expect: &Value) -> bool {
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
    assert_eq!(json!(levels), expect["priorities"], "{id}");
    true
}

fn distribute(id: &str, input: &Value, expect: &Value) -> bool {
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
    assert_eq!(json!(kept), expect["endpoints_kept"], "{id}");
    for (weight, expected) in weights.iter().zip(list(&expect["locality_weights"])) {
        // The weight of a group that is left out has no meaning.
        assert!(weight.is_none_or(|weight| json!(weight) == *expected), "{id}: {weights:?}");
    }
    true
}

fn locality_match(id: &str, input: &Value, expect: &Value) -> bool {
    let pattern: LocalityPattern = text(&input["rule"]).parse().unwrap();
    assert_eq!(json!(pattern.matches(&locality(&input["locality"]))), expect["match"], "{id}");
    true
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

fn validation(id: &str, input: &Value, expect: &Value) -> bool {
    if input["localityLbSetting"]["failoverPriority"].is_array() {
        return false;
    }
    let (policy, findings) =
        read_setting(input["localityLbSetting"].clone(), input["outlier_detection_set"] == json!(true));
    assert_eq!(json!(policy.is_none()), expect["error"], "{id}: {findings:?}");
    true
}

fn cluster_local(id: &str, input: &Value, expect: &Value) -> bool {
    let rules = list(&input["service_settings"]).iter().flat_map(|setting| {
        list(&setting["hosts"])
            .iter()
            .map(|host| ClusterLocalRule { host: text(host), cluster_local: setting["clusterLocal"] == json!(true) })
    });
    let mesh = MeshConfig { cluster_local: rules.collect(), ..MeshConfig::default() };
    assert_eq!(json!(is_cluster_local(&mesh, &text(&input["host"]))), expect["cluster_local"], "{id}");
    true
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
        interval: seconds(10),
        base_ejection_time: seconds(30),
        max_ejection_time: seconds(300),
        max_ejection_percent,
        min_health_percent: 0,
    }
}

fn ejection_limit(id: &str, input: &Value, expect: &Value) -> bool {
    // Envoy's former rules, and `always_eject_one_host`, which is off in Istio.
    if input["rule"] != json!("ge1_28") || input["always_eject_one_host"] == json!(true) {
        return false;
    }
    let now = Instant::now();
    let hosts = number(&input["hosts"]);
    let mut detector = detector(hosts, settings(1, number(&input["max_ejection_percent"]) as u32), now);
    for i in 0..hosts {
        detector.observe(now, host(i), Verdict::Failure);
    }
    assert_eq!(json!(detector.ejections().count()), expect["max_ejected"], "{id}");
    true
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

fn ejection_timeline(id: &str, input: &Value, expect: &Value) -> bool {
    let start = Instant::now();
    let mut detector = detector(1, timing(input), start);
    let mut states = Vec::new();
    for event in list(&input["events"]) {
        let now = start + Duration::from_secs_f64(event["t"].as_f64().unwrap());
        match text(&event["op"]).as_str() {
            "eject" => drop(detector.observe(now, host(0), Verdict::Failure)),
            "tick" => drop(detector.handle_timeout(now)),
            other => panic!("{id}: {other} is no event"),
        }
        states.push(detector.ejections().count() == 1);
    }
    assert_eq!(json!(states), expect["ejected_after_event"], "{id}");
    true
}

fn ejection_growth(id: &str, input: &Value, expect: &Value) -> bool {
    let mut now = Instant::now();
    let interval = Duration::from_secs(1);
    let mut detector = detector(1, OutlierDetection { interval, ..timing(input) }, now);
    let mut durations = Vec::new();
    for _ in 0..number(&input["consecutive_ejections"]) {
        let event = detector.observe(now, host(0), Verdict::Failure).expect(id);
        let EventKind::Ejected { duration, .. } = event.kind else { panic!("{id}: {event:?}") };
        durations.push(duration.as_secs());
        now += duration;
        assert_eq!(detector.handle_timeout(now.max(detector.poll_timeout().unwrap())).len(), 1, "{id}");
    }
    assert_eq!(json!(durations), expect["durations_s"], "{id}");
    true
}

fn outlier_config(id: &str, input: &Value, expect: &Value) -> bool {
    // Istio has no field for the maximum.
    if !input["max_ejection_time_s"].is_null() {
        return false;
    }
    let base = format!("{}s", number(&input["base_ejection_time_s"]));
    let (policy, _) = read_policy(json!({"outlierDetection": {"baseEjectionTime": base}}));
    let max = policy.and_then(|policy| policy.outlier).expect(id).max_ejection_time;
    assert_eq!(json!(max.as_secs()), expect["max_ejection_time_s"], "{id}");
    true
}

fn consecutive(id: &str, input: &Value, expect: &Value) -> bool {
    let now = Instant::now();
    let percent = number(&input["max_ejection_percent"]) as u32;
    let mut detector = detector(1, settings(number(&input["threshold"]) as u32, percent), now);
    for event in list(&input["events"]) {
        // A refused and a timed-out connect count alike.
        let verdict = if event == "S" { Verdict::Success } else { Verdict::Failure };
        detector.observe(now, host(0), verdict);
    }
    assert_eq!(json!(detector.ejections().count() == 1), expect["ejected"], "{id}");
    true
}

fn outlier_mapping(id: &str, input: &Value, expect: &Value) -> bool {
    let (policy, _) = read_policy(json!({"outlierDetection": input["outlierDetection"]}));
    let Some(outlier) = policy.and_then(|policy| policy.outlier) else {
        assert_eq!(expect["envoy"], Value::Null, "{id}");
        return true;
    };
    let milliseconds = |time: Duration| json!(time.as_millis() as u64);
    let ours: BTreeMap<&str, Value> = BTreeMap::from([
        ("consecutive_5xx", json!(outlier.consecutive_errors)),
        ("interval_ms", milliseconds(outlier.interval)),
        ("base_ejection_time_ms", milliseconds(outlier.base_ejection_time)),
        ("max_ejection_percent", json!(outlier.max_ejection_percent)),
        ("healthy_panic_threshold", json!(outlier.min_health_percent)),
    ]);
    let expected = expect.as_object().unwrap();
    let expected = expected.get("envoy").and_then(Value::as_object).unwrap_or(expected);
    let mut compared = false;
    for (field, value) in expected {
        if let Some(ours) = ours.get(field.as_str()) {
            assert_eq!(ours, value, "{id}: {field}");
            compared = true;
        }
    }
    compared
}

#[test]
fn edf_is_smooth() {
    assert_eq!(edf_order(&[2, 1]), [0, 1, 0]);
    assert_eq!(edf_order(&[1, 1, 1]), [0, 1, 2]);
}
