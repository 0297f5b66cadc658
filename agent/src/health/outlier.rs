//! Outlier detection (Envoy's rules): an endpoint whose connects fail too often in a row is ejected for a while, longer each time.
//!
//! No I/O, no clock: events and the time come in as parameters, and `poll_timeout` says when to come back.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

use portolan_common::OutcomeKind;

use crate::model::OutlierDetection;

/// How a connect ended, as far as it says something of the endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Established.
    Success,
    /// Refused, reset, unreachable or timed out.
    Failure,
}

impl From<OutcomeKind> for Verdict {
    fn from(outcome: OutcomeKind) -> Self {
        match outcome {
            OutcomeKind::Established => Self::Success,
            OutcomeKind::Failed | OutcomeKind::TimedOut => Self::Failure,
        }
    }
}

/// A change of an endpoint's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Which endpoint.
    pub address: SocketAddr,
    /// What happened to it.
    pub kind: EventKind,
    /// Endpoints of the pool that are ejected now.
    pub ejected: usize,
    /// Endpoints of the pool.
    pub hosts: usize,
}

/// What happened to an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// It is out.
    Ejected {
        /// Failures in a row.
        failures: u32,
        /// For how long at least: the sweep after it releases.
        duration: Duration,
    },
    /// It may be chosen again.
    Released,
    /// It would be out, but the limit allows no more.
    Overflow {
        /// Failures in a row.
        failures: u32,
    },
}

/// An ejection in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ejection {
    /// Since when.
    pub since: Instant,
    /// When it ends at the earliest.
    pub until: Instant,
}

#[derive(Clone, Debug, Default)]
struct Host {
    /// Failures in a row, for each threshold.
    failures: [u32; 2],
    ejected_at: Option<Instant>,
    /// How many times the base time the next ejection lasts, less one.
    multiplier: u32,
    last_release: Option<Instant>,
}

/// The detector of one pool.
#[derive(Clone, Debug)]
pub struct Detector {
    settings: OutlierDetection,
    hosts: BTreeMap<SocketAddr, Host>,
    next_sweep: Instant,
}

impl Detector {
    /// A detector for a pool without endpoints yet.
    pub fn new(settings: OutlierDetection, now: Instant) -> Self {
        let next_sweep = now + settings.interval;
        Self { settings, hosts: BTreeMap::new(), next_sweep }
    }

    /// Takes new settings; what is ejected stays so.
    pub fn configure(&mut self, settings: &OutlierDetection, now: Instant) {
        if self.settings.interval != settings.interval {
            self.next_sweep = now + settings.interval;
        }
        if self.settings.thresholds() != settings.thresholds() {
            // Counted under another rule.
            self.hosts.values_mut().for_each(|host| host.failures = [0; 2]);
        }
        if self.settings != *settings {
            self.settings = settings.clone();
        }
    }

    /// The endpoints of the pool now. One that is gone takes its ejection with it.
    pub fn set_hosts(&mut self, hosts: &BTreeSet<SocketAddr>) {
        self.hosts.retain(|address, _| hosts.contains(address));
        for address in hosts {
            self.hosts.entry(*address).or_default();
        }
    }

    /// A connect to an endpoint has ended.
    pub fn observe(&mut self, now: Instant, address: SocketAddr, verdict: Verdict) -> Option<Event> {
        let ejected = self.ejected_count();
        let hosts = self.hosts.len();
        let host = self.hosts.get_mut(&address)?;
        if verdict == Verdict::Success {
            host.failures = [0; 2];
            return None;
        }
        // Each threshold counts for itself, and starts again when it is reached, whether the limit allows the ejection or not.
        let mut reached = None;
        for (count, threshold) in host.failures.iter_mut().zip(self.settings.thresholds()).filter(|(_, it)| *it > 0) {
            *count = count.saturating_add(1);
            if *count == threshold && host.ejected_at.is_none() {
                reached = Some(std::mem::take(count));
            }
        }
        let failures = reached?;
        let within = 100.0 * (ejected + 1) as f64 / hosts as f64 <= f64::from(self.settings.max_ejection_percent);
        let first = self.settings.always_eject_one && ejected == 0;
        if !(within || first) {
            return Some(Event { address, kind: EventKind::Overflow { failures }, ejected, hosts });
        }
        host.ejected_at = Some(now);
        // Sweeps that had nothing to do were skipped; the beat goes on as if they had been.
        if let Some(late) = now.checked_duration_since(self.next_sweep) {
            let interval = self.settings.interval;
            self.next_sweep += interval.mul_f64((late.as_secs_f64() / interval.as_secs_f64()).floor() + 1.0);
        }
        let (base, max) = (self.settings.base_ejection_time, self.settings.max_ejection_time);
        if base * host.multiplier < max + base {
            host.multiplier += 1;
        }
        let duration = (base * host.multiplier).min(max);
        Some(Event { address, kind: EventKind::Ejected { failures, duration }, ejected: ejected + 1, hosts })
    }

    /// When [`Self::handle_timeout`] wants to be called; `None` while there is nothing to release or to forgive.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.hosts.values().any(|host| host.ejected_at.is_some() || host.multiplier > 0).then_some(self.next_sweep)
    }

    /// The sweep: releases those whose time is up, and forgives those that have been well for an interval.
    pub fn handle_timeout(&mut self, now: Instant) -> Vec<Event> {
        if now < self.next_sweep {
            return Vec::new();
        }
        // Late or not, the next one is an interval away.
        self.next_sweep = now + self.settings.interval;
        let mut released = Vec::new();
        for (address, host) in &mut self.hosts {
            match host.ejected_at {
                Some(since) => {
                    let time =
                        (self.settings.base_ejection_time * host.multiplier).min(self.settings.max_ejection_time);
                    if now.saturating_duration_since(since) >= time {
                        host.ejected_at = None;
                        host.last_release = Some(now);
                        host.failures = [0; 2];
                        released.push(*address);
                    }
                }
                None => {
                    let well = host
                        .last_release
                        .is_none_or(|release| now.saturating_duration_since(release) >= self.settings.interval);
                    if well && host.multiplier > 0 {
                        host.multiplier -= 1;
                    }
                }
            }
        }
        let (ejected, hosts) = (self.ejected_count(), self.hosts.len());
        released.into_iter().map(|address| Event { address, kind: EventKind::Released, ejected, hosts }).collect()
    }

    /// Whether failures of the endpoint are being counted, so that a success would change something.
    pub fn counts(&self, address: &SocketAddr) -> bool {
        self.hosts.get(address).is_some_and(|host| host.failures != [0; 2])
    }

    /// The ejections in force.
    pub fn ejections(&self) -> impl Iterator<Item = (SocketAddr, Ejection)> {
        self.hosts.iter().filter_map(|(address, host)| {
            let since = host.ejected_at?;
            let time = (self.settings.base_ejection_time * host.multiplier).min(self.settings.max_ejection_time);
            Some((*address, Ejection { since, until: since + time }))
        })
    }

    fn ejected_count(&self) -> usize {
        self.hosts.values().filter(|host| host.ejected_at.is_some()).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        }
    }

    #[test]
    fn thresholds_count_for_themselves() {
        let (now, host) = (Instant::now(), SocketAddr::from(([10, 0, 0, 1], 80)));
        let eject_after = |settings: OutlierDetection| {
            let mut detector = Detector::new(settings, now);
            detector.set_hosts(&BTreeSet::from([host]));
            (1..10).find(|_| detector.observe(now, host, Verdict::Failure).is_some())
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
    fn one_may_always_go_where_that_is_asked_for() {
        let (now, hosts) = (Instant::now(), [1, 2, 3].map(|i| SocketAddr::from(([10, 0, 0, i], 80))));
        let most = |settings: OutlierDetection| {
            let mut detector = Detector::new(settings, now);
            detector.set_hosts(&BTreeSet::from(hosts));
            for host in hosts {
                detector.observe(now, host, Verdict::Failure);
            }
            detector.ejections().count()
        };
        let small = || OutlierDetection { max_ejection_percent: 10, ..settings(1) };
        assert_eq!(most(small()), 0);
        assert_eq!(most(OutlierDetection { always_eject_one: true, ..small() }), 1);
        assert_eq!(most(OutlierDetection { always_eject_one: true, max_ejection_percent: 67, ..small() }), 2);
    }

    #[test]
    fn another_threshold_counts_anew() {
        let (now, host) = (Instant::now(), SocketAddr::from(([10, 0, 0, 1], 80)));
        let mut detector = Detector::new(settings(5), now);
        detector.set_hosts(&BTreeSet::from([host]));
        for _ in 0..4 {
            assert_eq!(detector.observe(now, host, Verdict::Failure), None);
        }
        detector.configure(&settings(2), now);
        assert_eq!(detector.observe(now, host, Verdict::Failure), None);
        assert!(detector.observe(now, host, Verdict::Failure).is_some());
    }

    #[test]
    fn a_host_that_goes_takes_its_ejection_with_it() {
        let (now, [a, b]) = (Instant::now(), [1, 2].map(|i| SocketAddr::from(([10, 0, 0, i], 80))));
        let mut detector = Detector::new(OutlierDetection { max_ejection_percent: 50, ..settings(1) }, now);
        detector.set_hosts(&BTreeSet::from([a, b]));
        assert!(matches!(
            detector.observe(now, a, Verdict::Failure),
            Some(Event { kind: EventKind::Ejected { .. }, .. })
        ));
        assert!(matches!(
            detector.observe(now, b, Verdict::Failure),
            Some(Event { kind: EventKind::Overflow { .. }, .. })
        ));
        let c = SocketAddr::from(([10, 0, 0, 3], 80));
        detector.set_hosts(&BTreeSet::from([b, c]));
        assert_eq!(detector.ejections().count(), 0);
        assert!(matches!(
            detector.observe(now, b, Verdict::Failure),
            Some(Event { kind: EventKind::Ejected { .. }, .. })
        ));
    }
}
