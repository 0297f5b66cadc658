//! Outlier detection.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

use portolan_core::{
    health::{Client, Detector, DetectorEvent, DetectorEventKind, Signal},
    model::{OutlierDetection, SuccessCriterion},
};
use serde_json::{Value, json};

use crate::{
    locality::read_policy,
    values::{host, list, number, text},
};

pub fn detector(hosts: u64, settings: OutlierDetection, now: Instant) -> Detector {
    let mut detector = Detector::new(settings, SuccessCriterion::Connected, now);
    detector.set_hosts(&(0..hosts).map(host).collect::<BTreeSet<_>>());
    detector
}

/// Observes a signal, and ejects for every cause. In the agent, a confirmation may come in between.
pub fn take(detector: &mut Detector, now: Instant, host: SocketAddr, signal: Signal) -> Option<DetectorEvent> {
    let reached = detector.observe(host, signal, Client::default());
    reached.into_iter().filter_map(|reached| detector.eject(now, host, reached.cause)).next()
}

pub fn settings(consecutive_errors: u32, max_ejection_percent: u32) -> OutlierDetection {
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
        count_early_resets: false,
    }
}

pub fn ejection_limit(input: &Value, expect: &Value) {
    let hosts = number(&input["hosts"]);
    let percent = number(&input["max_ejection_percent"]) as u32;
    let always_one = input["always_eject_one_host"] == json!(true);
    let most = |settings: OutlierDetection| {
        let now = Instant::now();
        let mut detector = detector(hosts, settings, now);
        for i in 0..hosts {
            take(&mut detector, now, host(i), Signal::Refused);
        }
        detector.ejections().count()
    };
    let current = most(OutlierDetection { always_eject_one: always_one, ..settings(1, percent) });
    match text(&input["rule"]).as_str() {
        "ge1_28" => assert_eq!(json!(current), expect["max_ejected"]),
        // In one version, the change that made the percentage strict always allowed one host.
        "pr27624" => {
            assert_eq!(
                json!(most(OutlierDetection { always_eject_one: true, ..settings(1, percent) })),
                expect["max_ejected"]
            );
        }
        // Before that change, the percentage was checked without the host itself, which allowed one ejection too many.
        "legacy" => {
            let legacy = (0..hosts).find(|ejected| 100 * ejected >= u64::from(percent) * hosts).unwrap_or(hosts);
            assert_eq!(json!(legacy), expect["max_ejected"]);
            assert_eq!(current as u64, legacy - 1, "Portolan follows the rule of 1.28");
        }
        other => panic!("unknown rule {other}"),
    }
}

pub fn timing(input: &Value) -> OutlierDetection {
    let seconds = |field: &str| Duration::from_secs(number(&input[field]));
    OutlierDetection {
        base_ejection_time: seconds("base_ejection_time_s"),
        max_ejection_time: seconds("max_ejection_time_s"),
        interval: seconds("interval_s"),
        ..settings(1, 100)
    }
}

pub fn ejection_timeline(input: &Value, expect: &Value) {
    let start = Instant::now();
    let mut detector = detector(1, timing(input), start);
    let mut states = Vec::new();
    for event in list(&input["events"]) {
        let now = start + Duration::from_secs_f64(event["t"].as_f64().unwrap());
        match text(&event["op"]).as_str() {
            "eject" => drop(take(&mut detector, now, host(0), Signal::Refused)),
            "tick" => drop(detector.handle_timeout(now)),
            other => panic!("unknown event {other}"),
        }
        states.push(detector.ejections().count() == 1);
    }
    assert_eq!(json!(states), expect["ejected_after_event"]);
}

pub fn ejection_growth(input: &Value, expect: &Value) {
    assert_eq!(json!(durations(input)), expect["durations_s"]);
}

/// Returns the durations, in seconds, of consecutive ejections.
pub fn durations(input: &Value) -> Vec<u64> {
    let mut now = Instant::now();
    let interval = Duration::from_secs(1);
    let mut detector = detector(1, OutlierDetection { interval, ..timing(input) }, now);
    let mut durations = Vec::new();
    for _ in 0..number(&input["consecutive_ejections"]) {
        let event = take(&mut detector, now, host(0), Signal::Refused).unwrap();
        let DetectorEventKind::Ejected { duration, .. } = event.kind else { panic!("{event:?}") };
        durations.push(duration.as_secs());
        now += duration;
        assert_eq!(detector.handle_timeout(now.max(detector.poll_timeout().unwrap())).len(), 1);
    }
    durations
}

pub fn outlier_config(input: &Value, expect: &Value) {
    // Istio has no field for the maximum, but the detector has one.
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

pub fn consecutive(input: &Value, expect: &Value) {
    let now = Instant::now();
    let percent = number(&input["max_ejection_percent"]) as u32;
    let mut detector = detector(1, settings(number(&input["threshold"]) as u32, percent), now);
    for event in list(&input["events"]) {
        // Refused and timed-out connects count alike.
        let signal = if event == "S" { Signal::Connected } else { Signal::Refused };
        take(&mut detector, now, host(0), signal);
    }
    assert_eq!(json!(detector.ejections().count() == 1), expect["ejected"]);
}

pub fn outlier_mapping(input: &Value, expect: &Value) {
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
        // Never enforced, neither by Portolan nor under Istio.
        ("enforcing_local_origin_success_rate", json!(0)),
        ("enforcing_success_rate", json!(0)),
    ]);
    let expected = expect.as_object().unwrap();
    let expected = expected.get("envoy").and_then(Value::as_object).unwrap_or(expected);
    let mut compared = 0;
    for (field, value) in expected {
        match ours.get(field.as_str()) {
            // The threshold has no meaning if it is not enforced.
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

/// The effect of each TCP event. `tests/tests/outcomes.rs` produces the events in the kernel.
pub fn tcp_mapping(input: &Value, expect: &Value) {
    let reports = list(&expect["result"]);
    for (event, result) in list(&input["events"]).iter().zip(reports) {
        // The signal that the kernel reports for each event. It reports nothing for the others.
        let signal = match text(event).as_str() {
            "connect_timeout" => Some(Signal::TimedOut),
            "connect_refused_or_reset" => Some(Signal::Refused),
            "connected" => Some(Signal::Connected),
            _ => None,
        };
        let result = text(result);
        let fails = result.contains("->50");
        assert_eq!(signal.map(Signal::is_failure), (fails || result.contains("->200")).then_some(fails), "{event}");
        // One failure below the threshold: a failure ejects, a success resets the count, and anything else changes
        // nothing.
        let now = Instant::now();
        let mut detector = detector(1, settings(2, 100), now);
        take(&mut detector, now, host(0), Signal::Refused);
        if let Some(signal) = signal {
            take(&mut detector, now, host(0), signal);
        }
        assert_eq!(detector.ejections().count() == 1, fails, "{event}");
        assert_eq!(detector.is_counting_failures(&host(0)), signal.is_none(), "{event}");
    }
}

/// Success-rate detection, which Istio disables and Portolan does not have: the figure is correct, and no host is
/// ejected.
pub fn success_rate(input: &Value, expect: &Value) {
    let rates: Vec<f64> = list(&input["success_rates"]).iter().map(|rate| rate.as_f64().unwrap()).collect();
    let mean = rates.iter().sum::<f64>() / rates.len() as f64;
    let deviation = (rates.iter().map(|rate| (rate - mean).powi(2)).sum::<f64>() / rates.len() as f64).sqrt();
    let threshold = mean - input["stdev_factor"].as_f64().unwrap() * deviation;
    assert_eq!((json!(mean), json!(threshold.round())), (expect["mean"].clone(), expect["threshold"].clone()));
    let now = Instant::now();
    let mut detector = detector(rates.len() as u64, settings(5, 100), now);
    for (i, rate) in (0..).zip(&rates) {
        for request in 0..100 {
            // Every second request fails, so there are never five failures in a row.
            let fails = *rate < 100.0 && request % 2 == 0;
            take(&mut detector, now, host(i), if fails { Signal::Refused } else { Signal::Connected });
        }
    }
    assert_eq!(detector.ejections().count(), 0);
}

/// Failure-percentage detection, which Istio disables and Portolan does not have: no host is ejected.
pub fn failure_percentage(input: &Value, expect: &Value) {
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
                take(&mut detector, now, host(i), Signal::Refused);
            }
            take(&mut detector, now, host(i), Signal::Connected);
        }
    }
    assert_eq!(detector.ejections().count(), 0);
}

/// Istio sets no jitter, and Portolan has none: an ejection lasts exactly as long as configured.
pub fn jitter(input: &Value, expect: &Value) {
    let max = number(&input["max_ejection_time_jitter_ms"]);
    assert_eq!(json!(number(&input["random"]) % (max + 1)), expect["jitter_ms"], "the rule of Envoy");
    let once =
        json!({"base_ejection_time_s": 30, "max_ejection_time_s": 300, "consecutive_ejections": 1, "interval_s": 1});
    assert_eq!(durations(&once), [30]);
}
