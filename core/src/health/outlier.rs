//! Outlier detection (Envoy's rules): an endpoint whose connections or responses fail too often in a row is ejected for a while, longer each
//! time.
//!
//! No I/O, no clock: signs and the time come in as parameters, and `poll_timeout` says when to come back. That a threshold is reached and that an
//! endpoint is ejected are two steps, so that somebody may ask for evidence in between.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::model::{OutlierDetection, SuccessCriterion};

/// What a connection says of its endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// It was established.
    Connected,
    /// It was not: refused, reset or unreachable. Envoy counts it as status 503.
    Refused,
    /// It was not in time. Envoy counts it as status 504.
    TimedOut,
    /// A byte came back on it.
    Answered,
    /// It was established, and broke before a byte came back.
    Broken,
    /// The status of an HTTP response.
    Status(u16),
}

impl Signal {
    /// Whether it says something against the endpoint.
    pub fn is_failure(self) -> bool {
        match self {
            Self::Refused | Self::TimedOut | Self::Broken => true,
            Self::Status(status) => status >= 500,
            Self::Connected | Self::Answered => false,
        }
    }
}

/// One of the thresholds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Threshold {
    /// `consecutiveGatewayErrors`
    GatewayErrors,
    /// `consecutive5xxErrors`
    Errors,
    /// `consecutiveLocalOriginFailures`
    LocalOriginFailures,
}

impl Threshold {
    const ALL: [Self; 3] = [Self::GatewayErrors, Self::Errors, Self::LocalOriginFailures];

    /// The field that sets it.
    pub fn field(self) -> &'static str {
        match self {
            Self::GatewayErrors => "consecutiveGatewayErrors",
            Self::Errors => "consecutive5xxErrors",
            Self::LocalOriginFailures => "consecutiveLocalOriginFailures",
        }
    }
}

/// Why an endpoint is, or would be, ejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// The threshold that was reached.
    pub threshold: Threshold,
    /// Failures in a row.
    pub failures: u32,
}

/// A change of an endpoint's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DetectorEvent {
    /// Which endpoint.
    pub address: SocketAddr,
    /// What happened to it.
    pub kind: DetectorEventKind,
    /// Endpoints of the pool that are ejected now.
    pub ejected: usize,
    /// Endpoints of the pool.
    pub hosts: usize,
}

/// What happened to an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectorEventKind {
    /// It is out.
    Ejected {
        /// Why.
        cause: Cause,
        /// For how long at least: the sweep after it releases.
        duration: Duration,
    },
    /// It may be chosen again.
    Released,
    /// It would be out, but the limit allows no more.
    Overflow {
        /// Why it would be.
        cause: Cause,
    },
}

/// An ejection in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ejection {
    /// Since when.
    pub since: Instant,
    /// When it ends at the earliest.
    pub until: Instant,
    /// Why.
    pub cause: Cause,
}

/// What outlives a restart of the agent: of one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Saved {
    /// How long ago it was ejected, if it is, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ejected: Option<(Duration, Cause)>,
    /// How often in a row.
    pub multiplier: u32,
}

/// An endpoint of which there is something to be said.
#[derive(Clone, Debug, Default, PartialEq)]
struct Host {
    /// Failures in a row, for each threshold.
    failures: [u32; 3],
    ejected: Option<(Instant, Cause)>,
    /// How many times the base time the last ejection lasted; one less with each interval that it has been well.
    multiplier: u32,
    last_release: Option<Instant>,
}

impl Host {
    /// Whether it is as if nothing had ever happened to it. (A release only delays that the multiplier goes down.)
    fn is_blank(&self) -> bool {
        self.failures == [0; 3] && self.ejected.is_none() && self.multiplier == 0
    }
}

/// The detector of one pool.
#[derive(Clone, Debug)]
pub struct Detector {
    settings: OutlierDetection,
    success_criterion: SuccessCriterion,
    /// In order.
    hosts: Arc<[SocketAddr]>,
    /// Those that are not blank: of a large mesh, a few.
    marked: BTreeMap<SocketAddr, Host>,
    next_sweep: Instant,
}

impl Detector {
    /// A detector for a pool without endpoints yet.
    pub fn new(settings: OutlierDetection, success_criterion: SuccessCriterion, now: Instant) -> Self {
        let next_sweep = now + settings.interval;
        Self { settings, success_criterion, hosts: Arc::default(), marked: BTreeMap::new(), next_sweep }
    }

    /// Takes new settings; what is ejected stays so.
    pub fn configure(&mut self, settings: &OutlierDetection, success_criterion: SuccessCriterion, now: Instant) {
        if self.settings.interval != settings.interval {
            self.next_sweep = now + settings.interval;
        }
        if self.settings.counters() != settings.counters() || self.success_criterion != success_criterion {
            // Counted under another rule.
            self.marked.values_mut().for_each(|host| host.failures = [0; 3]);
        }
        self.success_criterion = success_criterion;
        if self.settings != *settings {
            self.settings = settings.clone();
        }
        self.tidy();
    }

    /// The endpoints of the pool now. One that is gone takes its ejection with it.
    pub fn set_hosts(&mut self, hosts: &BTreeSet<SocketAddr>) {
        if !self.hosts.iter().eq(hosts) {
            self.hosts = hosts.iter().copied().collect();
            self.marked.retain(|address, _| hosts.contains(address));
        }
    }

    fn has(&self, address: &SocketAddr) -> bool {
        self.hosts.binary_search(address).is_ok()
    }

    fn tidy(&mut self) {
        self.marked.retain(|_, host| !host.is_blank());
    }

    /// Takes a sign of an endpoint; the thresholds that it reaches, in the order in which Envoy looks at them. Each begins anew, whatever comes
    /// of it.
    pub fn observe(&mut self, address: SocketAddr, signal: Signal) -> Vec<Cause> {
        let counters = self.settings.counters();
        let split = self.settings.local_origin_errors.is_some();
        // What the sign does to each counter: one more, back to zero, or nothing.
        const UP: Option<bool> = Some(true);
        const ZERO: Option<bool> = Some(false);
        let is_proof = match self.success_criterion {
            SuccessCriterion::Connected => signal == Signal::Connected,
            SuccessCriterion::FirstByte => signal == Signal::Answered,
            SuccessCriterion::HttpStatus => false,
        };
        let effect = match signal {
            Signal::Connected if split => [None, None, ZERO],
            Signal::Refused | Signal::TimedOut if split => [None, None, UP],
            Signal::Refused | Signal::TimedOut => [UP, UP, None],
            Signal::Broken => [ZERO, UP, None],
            Signal::Status(502..=504) => [UP, UP, None],
            Signal::Status(500..) => [ZERO, UP, None],
            Signal::Status(_) => [ZERO, ZERO, None],
            Signal::Connected | Signal::Answered if is_proof => [ZERO, ZERO, None],
            Signal::Connected | Signal::Answered => [None; 3],
        };
        if !effect.contains(&UP) {
            if let Some(host) = self.marked.get_mut(&address) {
                for (count, effect) in host.failures.iter_mut().zip(effect) {
                    if effect == ZERO {
                        *count = 0;
                    }
                }
                if host.is_blank() {
                    self.marked.remove(&address);
                }
            }
            return Vec::new();
        }
        if !self.has(&address) {
            return Vec::new();
        }
        let host = self.marked.entry(address).or_default();
        let mut reached = Vec::new();
        for (i, effect) in effect.into_iter().enumerate() {
            match effect {
                // A threshold of zero is none.
                Some(true) if counters[i] > 0 => {
                    host.failures[i] = host.failures[i].saturating_add(1);
                    if host.failures[i] == counters[i] && host.ejected.is_none() {
                        let failures = std::mem::take(&mut host.failures[i]);
                        reached.push(Cause { threshold: Threshold::ALL[i], failures });
                    }
                }
                Some(false) => host.failures[i] = 0,
                _ => {}
            }
        }
        if host.is_blank() {
            self.marked.remove(&address);
        }
        reached
    }

    /// Ejects an endpoint, where the limit allows it; nothing, where it is ejected or not one of the pool's.
    pub fn eject(&mut self, now: Instant, address: SocketAddr, cause: Cause) -> Option<DetectorEvent> {
        let (ejected, hosts) = (self.ejected_count(), self.hosts.len());
        if !self.has(&address) || self.marked.get(&address).is_some_and(|host| host.ejected.is_some()) {
            return None;
        }
        let within = 100.0 * (ejected + 1) as f64 / hosts as f64 <= f64::from(self.settings.max_ejection_percent);
        let first = self.settings.always_eject_one && ejected == 0;
        if !(within || first) {
            return Some(DetectorEvent { address, kind: DetectorEventKind::Overflow { cause }, ejected, hosts });
        }
        // Sweeps that had nothing to do were skipped; the beat goes on as if they had been.
        if let Some(late) = now.checked_duration_since(self.next_sweep) {
            let interval = self.settings.interval;
            self.next_sweep += interval.mul_f64((late.as_secs_f64() / interval.as_secs_f64()).floor() + 1.0);
        }
        let (base, max) = (self.settings.base_ejection_time, self.settings.max_ejection_time);
        let host = self.marked.entry(address).or_default();
        host.ejected = Some((now, cause));
        if base * host.multiplier < max + base {
            host.multiplier += 1;
        }
        let duration = time(&self.settings, host);
        Some(DetectorEvent {
            address,
            kind: DetectorEventKind::Ejected { cause, duration },
            ejected: ejected + 1,
            hosts,
        })
    }

    /// When [`Self::handle_timeout`] wants to be called; `None` while there is nothing to release or to forgive.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.marked.values().any(|host| host.ejected.is_some() || host.multiplier > 0).then_some(self.next_sweep)
    }

    /// The sweep: releases those whose time is up, and forgives those that have been well for an interval.
    pub fn handle_timeout(&mut self, now: Instant) -> Vec<DetectorEvent> {
        if now < self.next_sweep {
            return Vec::new();
        }
        // Late or not, the next one is an interval away.
        self.next_sweep = now + self.settings.interval;
        let mut released = Vec::new();
        for (address, host) in &mut self.marked {
            if let Some((since, _)) = host.ejected {
                if now.saturating_duration_since(since) >= time(&self.settings, host) {
                    host.ejected = None;
                    host.last_release = Some(now);
                    host.failures = [0; 3];
                    released.push(*address);
                }
                continue;
            }
            let last = host.last_release;
            let well = last.is_none_or(|release| now.saturating_duration_since(release) >= self.settings.interval);
            if well && host.multiplier > 0 {
                host.multiplier -= 1;
            }
        }
        self.tidy();
        let (ejected, hosts) = (self.ejected_count(), self.hosts.len());
        released
            .into_iter()
            .map(|address| DetectorEvent { address, kind: DetectorEventKind::Released, ejected, hosts })
            .collect()
    }

    /// Whether failures of the endpoint are being counted, so that a success would change something.
    pub fn is_counting_failures(&self, address: &SocketAddr) -> bool {
        self.marked.get(address).is_some_and(|host| host.failures != [0; 3])
    }

    /// The ejections in force.
    pub fn ejections(&self) -> impl Iterator<Item = (SocketAddr, Ejection)> {
        self.marked.iter().filter_map(|(address, host)| {
            let (since, cause) = host.ejected?;
            Some((*address, Ejection { since, until: since + time(&self.settings, host), cause }))
        })
    }

    /// The ejection of an endpoint, if it is ejected.
    pub fn ejection(&self, address: &SocketAddr) -> Option<Ejection> {
        let host = self.marked.get(address)?;
        let (since, cause) = host.ejected?;
        Some(Ejection { since, until: since + time(&self.settings, host), cause })
    }

    /// What the next agent shall know.
    pub fn snapshot(&self, now: Instant) -> Vec<(SocketAddr, Saved)> {
        let kept = self.marked.iter().filter(|(_, host)| host.multiplier > 0);
        kept.map(|(address, host)| {
            let ejected = host.ejected.map(|(since, cause)| (now.saturating_duration_since(since), cause));
            (*address, Saved { ejected, multiplier: host.multiplier })
        })
        .collect()
    }

    /// Takes what a former agent has left, `away` ago: ejections go on as if nobody had been away, and what would be over is over.
    pub fn restore(&mut self, now: Instant, away: Duration, saved: impl IntoIterator<Item = (SocketAddr, Saved)>) {
        for (address, saved) in saved {
            if !self.has(&address) || self.marked.get(&address).is_some_and(|host| host.ejected.is_some()) {
                continue;
            }
            let mut host = Host { multiplier: saved.multiplier, ..Host::default() };
            let mut well = away;
            if let Some((ago, cause)) = saved.ejected {
                let gone = ago.saturating_add(away);
                let left = time(&self.settings, &host).saturating_sub(gone);
                well = gone.saturating_sub(time(&self.settings, &host));
                // The clock may not reach back that far where the machine has been started in between.
                if !left.is_zero()
                    && let Some(since) = now.checked_sub(gone)
                {
                    host.ejected = Some((since, cause));
                    well = Duration::ZERO;
                }
            }
            let intervals = well.as_nanos() / self.settings.interval.as_nanos().max(1);
            host.multiplier = host.multiplier.saturating_sub(u32::try_from(intervals).unwrap_or(u32::MAX));
            if !host.is_blank() {
                self.marked.insert(address, host);
            }
        }
    }

    fn ejected_count(&self) -> usize {
        self.marked.values().filter(|host| host.ejected.is_some()).count()
    }
}

/// How long the current ejection of an endpoint lasts at least.
fn time(settings: &OutlierDetection, host: &Host) -> Duration {
    (settings.base_ejection_time * host.multiplier).min(settings.max_ejection_time)
}

#[cfg(test)]
mod tests;
