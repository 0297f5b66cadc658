//! Step-by-step tests of the detector.

use super::*;

const DOWN: Signal = Signal::Refused;

fn new(settings: OutlierDetection, now: Instant) -> Detector {
    Detector::new(settings, SuccessCriterion::Connected, now)
}

/// Records a signal, and ejects the endpoint if a threshold is reached.
fn take(detector: &mut Detector, now: Instant, host: SocketAddr, signal: Signal) -> Option<DetectorEvent> {
    let reached = detector.observe(host, signal, Client::default());
    reached.into_iter().filter_map(|reached| detector.eject(now, host, reached.cause)).next()
}

fn settings(consecutive_errors: u32) -> OutlierDetection {
    OutlierDetection {
        consecutive_errors,
        gateway_errors: 0,
        local_origin_errors: None,
        interval: Duration::from_secs(1),
        base_ejection_time: Duration::from_secs(30),
        max_ejection_time: Duration::from_secs(300),
        max_ejection_percent: 100,
        always_eject_one: false,
        min_health_percent: 0,
        count_early_resets: false,
    }
}

/// Returns a client that is alone in its pod.
fn pod(number: u32) -> Client {
    Client { netns: number.into(), pod: number }
}

#[test]
fn thresholds_count_independently() {
    let (now, host) = (Instant::now(), SocketAddr::from(([10, 0, 0, 1], 80)));
    let eject_after = |settings: OutlierDetection| {
        let mut detector = new(settings, now);
        detector.set_hosts(&BTreeSet::from([host]));
        (1..10).find(|_| take(&mut detector, now, host, DOWN).is_some())
    };
    assert_eq!(eject_after(settings(5)), Some(5));
    assert_eq!(eject_after(OutlierDetection { gateway_errors: 3, ..settings(5) }), Some(3));
    assert_eq!(eject_after(OutlierDetection { gateway_errors: 3, ..settings(0) }), Some(3));
    assert_eq!(eject_after(settings(0)), None);
    let split = OutlierDetection { gateway_errors: 1, local_origin_errors: Some(4), ..settings(1) };
    assert_eq!(eject_after(split.clone()), Some(4));
    assert_eq!(eject_after(OutlierDetection { local_origin_errors: Some(0), ..split }), None);
}

#[test]
fn always_eject_one_overrides_the_limit() {
    let (now, hosts) = (Instant::now(), [1, 2, 3].map(|i| SocketAddr::from(([10, 0, 0, i], 80))));
    let most = |settings: OutlierDetection| {
        let mut detector = new(settings, now);
        detector.set_hosts(&BTreeSet::from(hosts));
        for host in hosts {
            take(&mut detector, now, host, DOWN);
        }
        detector.ejections().count()
    };
    let small = || OutlierDetection { max_ejection_percent: 10, ..settings(1) };
    assert_eq!(most(small()), 0);
    assert_eq!(most(OutlierDetection { always_eject_one: true, ..small() }), 1);
    assert_eq!(most(OutlierDetection { always_eject_one: true, max_ejection_percent: 67, ..small() }), 2);
}

#[test]
fn changed_threshold_resets_the_count() {
    let (now, host) = (Instant::now(), SocketAddr::from(([10, 0, 0, 1], 80)));
    let mut detector = new(settings(5), now);
    detector.set_hosts(&BTreeSet::from([host]));
    for _ in 0..4 {
        assert_eq!(take(&mut detector, now, host, DOWN), None);
    }
    detector.configure(&settings(2), SuccessCriterion::Connected, now);
    assert_eq!(take(&mut detector, now, host, DOWN), None);
    assert!(take(&mut detector, now, host, DOWN).is_some());
}

#[test]
fn removed_host_loses_its_ejection() {
    let (now, [a, b]) = (Instant::now(), [1, 2].map(|i| SocketAddr::from(([10, 0, 0, i], 80))));
    let mut detector = new(OutlierDetection { max_ejection_percent: 50, ..settings(1) }, now);
    detector.set_hosts(&BTreeSet::from([a, b]));
    assert!(matches!(
        take(&mut detector, now, a, DOWN),
        Some(DetectorEvent { kind: DetectorEventKind::Ejected { .. }, .. })
    ));
    assert!(matches!(
        take(&mut detector, now, b, DOWN),
        Some(DetectorEvent { kind: DetectorEventKind::Overflow { .. }, .. })
    ));
    let c = SocketAddr::from(([10, 0, 0, 3], 80));
    detector.set_hosts(&BTreeSet::from([b, c]));
    assert_eq!(detector.ejections().count(), 0);
    assert!(matches!(
        take(&mut detector, now, b, DOWN),
        Some(DetectorEvent { kind: DetectorEventKind::Ejected { .. }, .. })
    ));
}

#[test]
fn status_counts_on_http_ports() {
    let (now, host) = (Instant::now(), SocketAddr::from(([10, 0, 0, 1], 80)));
    let ejects = |signals: &[Signal], settings: OutlierDetection| {
        let mut detector = Detector::new(settings, SuccessCriterion::HttpStatus, now);
        detector.set_hosts(&BTreeSet::from([host]));
        signals.iter().any(|signal| take(&mut detector, now, host, *signal).is_some())
    };
    let [up, bad, gone] = [Signal::Connected, Signal::Status(500), Signal::Status(503)];
    assert!(ejects(&[bad, up, bad, up, gone], settings(3)), "an established connection is not a success");
    assert!(ejects(&[bad, DOWN, gone], settings(3)), "a refused connection counts as 503");
    assert!(!ejects(&[bad, bad, Signal::Status(404), bad, bad], settings(3)));
    let gateway = || OutlierDetection { gateway_errors: 2, ..settings(0) };
    assert!(ejects(&[gone, Signal::TimedOut], gateway()));
    assert!(!ejects(&[gone, bad, gone, Signal::Status(200), gone], gateway()), "500 is not a gateway error");
    let split = || OutlierDetection { local_origin_errors: Some(2), ..settings(2) };
    assert!(!ejects(&[DOWN, bad, up, DOWN, Signal::Status(200)], split()), "local origin failures count separately");
    assert!(ejects(&[bad, DOWN, up, bad], split()));
    assert!(ejects(&[DOWN, bad, Signal::Status(200), DOWN], split()));
}

#[test]
fn early_resets_count_with_first_byte_criterion() {
    let (now, host) = (Instant::now(), SocketAddr::from(([10, 0, 0, 1], 80)));
    let mut detector = Detector::new(settings(2), SuccessCriterion::FirstByte, now);
    detector.set_hosts(&BTreeSet::from([host]));
    for signal in
        [Signal::Connected, Signal::Broken, Signal::Connected, Signal::Answered, Signal::Broken, Signal::Connected]
    {
        assert_eq!(take(&mut detector, now, host, signal), None, "{signal:?}");
    }
    assert!(take(&mut detector, now, host, Signal::Broken).is_some());
}

#[test]
fn restore_continues_ejections_and_drops_expired_ones() {
    let (start, hosts) =
        (Instant::now() + Duration::from_secs(10_000), [1, 2].map(|i| SocketAddr::from(([10, 0, 0, i], 80))));
    let seconds = Duration::from_secs;
    let fresh = || {
        let mut detector = new(settings(1), start);
        detector.set_hosts(&BTreeSet::from(hosts));
        detector
    };
    let mut before = fresh();
    take(&mut before, start, hosts[0], DOWN);
    let saved = before.snapshot(start + seconds(10));
    let after = |away: u64| {
        let mut detector = fresh();
        let now = start + seconds(10 + away);
        detector.restore(now, seconds(away), saved.clone());
        detector.ejection(&hosts[0]).map(|ejection| ejection.until - now)
    };
    assert_eq!((after(0), after(15), after(20), after(1_000)), (Some(seconds(20)), Some(seconds(5)), None, None));
    // The multiplier decreases while the agent is away, so the next ejection lasts only the base time.
    let mut soon = fresh();
    soon.restore(start + seconds(40), seconds(30), saved.iter().copied());
    let event = take(&mut soon, start + seconds(40), hosts[0], DOWN);
    assert!(
        matches!(event, Some(DetectorEvent { kind: DetectorEventKind::Ejected { duration, .. }, .. }) if duration == seconds(30))
    );
    // An endpoint that no longer exists is not restored.
    let mut other = new(settings(1), start);
    other.set_hosts(&BTreeSet::from([hosts[1]]));
    other.restore(start, Duration::ZERO, saved);
    assert_eq!(other.ejections().count(), 0);
}

#[test]
fn success_of_one_client_does_not_reset_the_failures_of_another() {
    let (now, host) = (Instant::now(), SocketAddr::from(([10, 0, 0, 1], 80)));
    let mut detector = new(settings(5), now);
    detector.set_hosts(&BTreeSet::from([host]));
    let (victim, other) = (pod(7), pod(8));
    for _ in 0..4 {
        assert_eq!(detector.observe(host, DOWN, victim), []);
        assert_eq!(detector.observe(host, Signal::Connected, other), []);
    }
    let cause = Cause { threshold: Threshold::Errors, failures: 5 };
    assert_eq!(detector.observe(host, DOWN, victim), [Reached { cause, client: Some(victim) }]);
    // Its own success does reset them, and the count of all clients.
    detector.observe(host, Signal::Connected, victim);
    for _ in 0..3 {
        (0..4).for_each(|_| assert_eq!(detector.observe(host, DOWN, victim), []));
        assert_eq!(detector.observe(host, Signal::Connected, victim), []);
    }
    assert!(!detector.is_counting_failures(&host));
}

#[test]
fn failures_of_several_clients_count_together() {
    let (now, host) = (Instant::now(), SocketAddr::from(([10, 0, 0, 1], 80)));
    let mut detector = new(settings(5), now);
    detector.set_hosts(&BTreeSet::from([host]));
    let reached: Vec<Reached> = (1..=5).flat_map(|client| detector.observe(host, DOWN, pod(client))).collect();
    let cause = Cause { threshold: Threshold::Errors, failures: 5 };
    assert_eq!(reached, [Reached { cause, client: None }]);
    // What led to it is used up, in every count.
    assert!(!detector.is_counting_failures(&host));
}

#[test]
fn many_clients_cannot_crowd_out_the_one_with_the_most_failures() {
    let (now, host) = (Instant::now(), SocketAddr::from(([10, 0, 0, 1], 80)));
    let mut detector = new(settings(5), now);
    detector.set_hosts(&BTreeSet::from([host]));
    let victim = pod(7);
    let mut reached = Vec::new();
    for round in 0..5 {
        reached.extend(detector.observe(host, DOWN, victim));
        reached.extend((0..100).flat_map(|i| {
            let client = pod(1_000 + round * 100 + i);
            let failed = detector.observe(host, DOWN, client);
            detector.observe(host, Signal::Connected, client);
            failed
        }));
    }
    let cause = Cause { threshold: Threshold::Errors, failures: 5 };
    assert_eq!(reached, [Reached { cause, client: Some(victim) }]);
}

/// A pod fills all rows with namespaces that are about to reach the threshold, and keeps adding another one.
#[test]
fn namespaces_of_one_pod_cannot_crowd_out_another_pod() {
    let (now, host) = (Instant::now(), SocketAddr::from(([10, 0, 0, 1], 80)));
    let mut detector = new(settings(5), now);
    detector.set_hosts(&BTreeSet::from([host]));
    let namespace = |netns| Client { netns, pod: 1 };
    let victim = pod(7);
    for netns in 0..20 {
        for _ in 0..4 {
            assert_eq!(detector.observe(host, DOWN, namespace(100 + netns)), []);
            assert_eq!(detector.observe(host, Signal::Connected, namespace(99)), []);
        }
    }
    let mut reached = Vec::new();
    for _ in 0..5 {
        reached.extend(detector.observe(host, DOWN, victim));
        for netns in 200..220 {
            reached.extend(detector.observe(host, DOWN, namespace(netns)));
            reached.extend(detector.observe(host, Signal::Connected, namespace(netns)));
        }
    }
    let cause = Cause { threshold: Threshold::Errors, failures: 5 };
    assert_eq!(reached, [Reached { cause, client: Some(victim) }]);
}

#[test]
fn failures_of_a_client_that_is_gone_are_forgotten() {
    let (mut now, host) = (Instant::now(), SocketAddr::from(([10, 0, 0, 1], 80)));
    let mut detector = new(settings(5), now);
    detector.set_hosts(&BTreeSet::from([host]));
    detector.observe(host, DOWN, pod(7));
    detector.observe(host, Signal::Connected, pod(8));
    assert!(detector.is_counting_failures(&host));
    let sweeps = (1..100).find(|_| {
        now += Duration::from_secs(1);
        assert!(detector.handle_timeout(now).is_empty());
        detector.poll_timeout().is_none()
    });
    assert_eq!(sweeps, Some(MAX_IDLE_SWEEPS as usize));
    assert!(!detector.is_counting_failures(&host));
}
