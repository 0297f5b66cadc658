//! Compares outlier detection with a simple model of Envoy: every host has all fields, and the sweep runs at every
//! interval.
//! Both process random sequences of events, configuration changes, and restarts, and are compared after every step.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
#![allow(clippy::disallowed_methods, reason = "a test gets its times and files from somewhere")]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

use portolan_core::{
    health::{Client, Detector, DetectorEventKind, Reached, Signal},
    model::{OutlierDetection, SuccessCriterion},
};
use proptest::prelude::*;

const SEQUENCES: u32 = 10_000;

/// A host with the fields of `DetectorHostMonitorImpl` in Envoy. Times are milliseconds.
#[derive(Clone, Debug, Default)]
struct Host {
    consecutive_5xx: u32,
    consecutive_gateway: u32,
    consecutive_local: u32,
    ejected: bool,
    ejected_at: u64,
    multiplier: u64,
    released_at: Option<u64>,
}

#[derive(Clone, Debug)]
struct Model {
    settings: OutlierDetection,
    success_criterion: SuccessCriterion,
    hosts: BTreeMap<u8, Host>,
    overflow: u64,
    next_sweep: u64,
}

fn millis(time: Duration) -> u64 {
    time.as_millis() as u64
}

impl Model {
    fn ejected(&self) -> Vec<u8> {
        self.hosts.iter().filter(|(_, host)| host.ejected).map(|(name, _)| *name).collect()
    }

    fn time(&self, host: &Host) -> u64 {
        (millis(self.settings.base_ejection_time) * host.multiplier).min(millis(self.settings.max_ejection_time))
    }

    /// `onConsecutiveErrorWorker` in Envoy. Returns whether to reset the counter.
    fn reached(&mut self, now: u64, name: u8) -> bool {
        let active = self.ejected().len();
        let total = self.hosts.len();
        let (base, max) = (millis(self.settings.base_ejection_time), millis(self.settings.max_ejection_time));
        let host = self.hosts.get_mut(&name).unwrap();
        if host.ejected {
            return false;
        }
        if 100.0 * (active + 1) as f64 / total as f64 <= f64::from(self.settings.max_ejection_percent) {
            host.ejected = true;
            host.ejected_at = now;
            if host.multiplier * base < max + base {
                host.multiplier += 1;
            }
        } else {
            self.overflow += 1;
        }
        true
    }

    /// `putHttpResponseCode` in Envoy.
    fn code(&mut self, now: u64, name: u8, code: u16) {
        let (gateway, errors) = (self.settings.gateway_errors, self.settings.consecutive_errors);
        let Some(host) = self.hosts.get_mut(&name) else { return };
        if code < 500 {
            (host.consecutive_5xx, host.consecutive_gateway) = (0, 0);
            return;
        }
        if (502..=504).contains(&code) {
            host.consecutive_gateway += 1;
            if host.consecutive_gateway == gateway && self.reached(now, name) {
                self.hosts.get_mut(&name).unwrap().consecutive_gateway = 0;
            }
        } else {
            host.consecutive_gateway = 0;
        }
        let host = self.hosts.get_mut(&name).unwrap();
        host.consecutive_5xx += 1;
        if host.consecutive_5xx == errors && self.reached(now, name) {
            self.hosts.get_mut(&name).unwrap().consecutive_5xx = 0;
        }
    }

    fn observe(&mut self, now: u64, name: u8, signal: Signal) {
        let split = self.settings.local_origin_errors;
        match (signal, split) {
            (Signal::Status(code), _) => self.code(now, name, code),
            // Portolan only: counts like a response with status 500.
            (Signal::Broken, _) => self.code(now, name, 500),
            (Signal::Refused | Signal::TimedOut, Some(threshold)) => {
                let Some(host) = self.hosts.get_mut(&name) else { return };
                host.consecutive_local += 1;
                if host.consecutive_local == threshold && self.reached(now, name) {
                    self.hosts.get_mut(&name).unwrap().consecutive_local = 0;
                }
            }
            (Signal::Refused, None) => self.code(now, name, 503),
            (Signal::TimedOut, None) => self.code(now, name, 504),
            (Signal::Connected, Some(_)) => {
                if let Some(host) = self.hosts.get_mut(&name) {
                    host.consecutive_local = 0;
                }
            }
            (Signal::Connected, None) if self.success_criterion == SuccessCriterion::Connected => {
                self.code(now, name, 200);
            }
            (Signal::Answered, _) if self.success_criterion == SuccessCriterion::FirstByte => self.code(now, name, 200),
            (Signal::Connected | Signal::Answered, _) => {}
        }
    }

    /// `onIntervalTimer` in Envoy.
    fn sweep(&mut self, now: u64) {
        let interval = millis(self.settings.interval);
        let times: Vec<u64> = self.hosts.values().map(|host| self.time(host)).collect();
        for (host, time) in self.hosts.values_mut().zip(times) {
            if host.ejected {
                if now - host.ejected_at >= time {
                    *host = Host { multiplier: host.multiplier, released_at: Some(now), ..Host::default() };
                }
            } else if host.multiplier > 0 && host.released_at.is_none_or(|at| now - at >= interval) {
                host.multiplier -= 1;
            }
        }
    }
}

impl Model {
    /// A rule of Portolan for changed settings: ejections stay, and counters are reset if the thresholds changed.
    fn configure(&mut self, settings: OutlierDetection, success_criterion: SuccessCriterion, now: u64) {
        if settings.interval != self.settings.interval {
            self.next_sweep = now + millis(settings.interval);
        }
        if settings.counters() != self.settings.counters() || success_criterion != self.success_criterion {
            for host in self.hosts.values_mut() {
                (host.consecutive_5xx, host.consecutive_gateway, host.consecutive_local) = (0, 0, 0);
            }
        }
        (self.settings, self.success_criterion) = (settings, success_criterion);
    }

    /// A rule of Portolan for restarts: ejections and multipliers persist, counters do not.
    /// What expired in the meantime has expired.
    fn restart(&mut self, now: u64) {
        let interval = millis(self.settings.interval);
        let times: Vec<u64> = self.hosts.values().map(|host| self.time(host)).collect();
        for (host, time) in self.hosts.values_mut().zip(times) {
            let (gone, is_over) = (now - host.ejected_at, host.ejected && now - host.ejected_at >= time);
            let healthy_intervals = if is_over { (gone - time) / interval } else { 0 };
            *host = Host {
                multiplier: host.multiplier.saturating_sub(healthy_intervals),
                ejected: host.ejected && !is_over,
                ejected_at: host.ejected_at,
                ..Host::default()
            };
        }
        self.next_sweep = now + interval;
    }
}

#[derive(Clone, Debug)]
enum Step {
    Signal(u8, Signal),
    Wait(u64),
    Hosts(BTreeSet<u8>),
    Configure(OutlierDetection, SuccessCriterion),
    Restart,
}

fn signal() -> impl Strategy<Value = Signal> {
    prop_oneof![
        3 => Just(Signal::Refused),
        1 => Just(Signal::TimedOut),
        2 => Just(Signal::Connected),
        1 => Just(Signal::Answered),
        1 => Just(Signal::Broken),
        2 => prop::sample::select(vec![200u16, 404, 500, 502, 503, 504, 505]).prop_map(Signal::Status),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        16 => (0u8..8, signal()).prop_map(|(host, signal)| Step::Signal(host, signal)),
        6 => (1u64..5_000).prop_map(Step::Wait),
        2 => (5_000u64..60_000).prop_map(Step::Wait),
        2 => prop::collection::btree_set(0u8..8, 0..8).prop_map(Step::Hosts),
        1 => (settings(), success_criterion()).prop_map(|(settings, success_criterion)| Step::Configure(settings, success_criterion)),
        1 => Just(Step::Restart),
    ]
}

prop_compose! {
    fn settings()(
        consecutive_errors in 0u32..4, gateway_errors in 0u32..4, local in prop::option::of(0u32..4), interval in 1u64..20,
        base in 1u64..30, max in 30u64..90, percent in prop::sample::select(vec![1u32, 10, 25, 34, 50, 67, 100]),
    ) -> OutlierDetection {
        OutlierDetection {
            consecutive_errors, gateway_errors, local_origin_errors: local, interval: Duration::from_millis(interval * 500),
            base_ejection_time: Duration::from_millis(base * 500), max_ejection_time: Duration::from_secs(max),
            max_ejection_percent: percent, always_eject_one: false, min_health_percent: 0, count_early_resets: false,
        }
    }
}

fn success_criterion() -> impl Strategy<Value = SuccessCriterion> {
    prop::sample::select(vec![SuccessCriterion::Connected, SuccessCriterion::FirstByte, SuccessCriterion::HttpStatus])
}

fn address(host: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, host], 80))
}

fn compare(settings: OutlierDetection, success_criterion: SuccessCriterion, steps: Vec<Step>) {
    let start = Instant::now();
    let at = |now: u64| start + Duration::from_millis(now);
    let mut detector = Detector::new(settings.clone(), success_criterion, start);
    let hosts: BTreeMap<u8, Host> = (0..6).map(|name| (name, Host::default())).collect();
    detector.set_hosts(&hosts.keys().copied().map(address).collect());
    let mut model = Model { settings, success_criterion, hosts, overflow: 0, next_sweep: 0 };
    model.next_sweep = millis(model.settings.interval);
    let (mut now, mut overflow) = (0, 0);
    for step in steps {
        match &step {
            Step::Signal(host, signal) => {
                model.observe(now, *host, *signal);
                for Reached { cause, .. } in detector.observe(address(*host), *signal, Client::default()) {
                    let event = detector.eject(at(now), address(*host), cause);
                    overflow +=
                        u64::from(event.is_some_and(|event| matches!(event.kind, DetectorEventKind::Overflow { .. })));
                }
            }
            Step::Wait(time) => {
                let end = now + time;
                while model.next_sweep <= end {
                    now = model.next_sweep;
                    model.sweep(now);
                    model.next_sweep += millis(model.settings.interval);
                    if detector.poll_timeout().is_some_and(|timeout| timeout <= at(now)) {
                        detector.handle_timeout(at(now));
                    }
                }
                now = end;
            }
            Step::Configure(settings, success_criterion) => {
                model.configure(settings.clone(), *success_criterion, now);
                detector.configure(settings, *success_criterion, at(now));
            }
            Step::Restart => {
                model.restart(now);
                let saved = detector.snapshot(at(now));
                detector = Detector::new(model.settings.clone(), model.success_criterion, at(now));
                detector.set_hosts(&model.hosts.keys().copied().map(address).collect());
                detector.restore(at(now), Duration::ZERO, saved);
            }
            Step::Hosts(names) => {
                model.hosts.retain(|name, _| names.contains(name));
                for name in names {
                    model.hosts.entry(*name).or_default();
                }
                detector.set_hosts(&names.iter().copied().map(address).collect());
            }
        }
        let expected: Vec<(SocketAddr, Instant)> = model
            .ejected()
            .into_iter()
            .map(|name| {
                let host = &model.hosts[&name];
                (address(name), at(host.ejected_at + model.time(host)))
            })
            .collect();
        let seen: Vec<(SocketAddr, Instant)> =
            detector.ejections().map(|(address, ejection)| (address, ejection.until)).collect();
        assert_eq!(seen, expected, "after {step:?} at {now}");
        assert_eq!(overflow, model.overflow, "after {step:?} at {now}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: SEQUENCES, ..ProptestConfig::default() })]

    #[test]
    fn detector_agrees_with_the_envoy_model(
        settings in settings(), success_criterion in success_criterion(), steps in prop::collection::vec(step(), 1..120),
    ) {
        compare(settings, success_criterion, steps);
    }
}
