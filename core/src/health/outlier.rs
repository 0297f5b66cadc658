//! Outlier detection by Envoy's rules.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::model::{OutlierDetection, SuccessCriterion};

/// An observation of an endpoint, from one of its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// The connection was established.
    Connected,
    /// The connection failed: refused, reset or unreachable. Envoy counts it as status 503.
    Refused,
    /// The connection timed out before it was established. Envoy counts it as status 504.
    TimedOut,
    /// The first byte came back.
    Answered,
    /// The connection was established, but broke before the first byte came back.
    Broken,
    /// The status code of an HTTP response.
    Status(u16),
}

impl Signal {
    /// Returns whether the signal counts against the endpoint.
    pub fn is_failure(self) -> bool {
        match self {
            Self::Refused | Self::TimedOut | Self::Broken => true,
            Self::Status(status) => status >= 500,
            Self::Connected | Self::Answered => false,
        }
    }
}

/// A threshold for consecutive failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Threshold {
    /// `consecutiveGatewayErrors`: status 502 to 504, and failed connects unless local origin failures are split.
    GatewayErrors,
    /// `consecutive5xxErrors`: status 500 and above, broken connections, and failed connects unless split.
    Errors,
    /// `consecutiveLocalOriginFailures`: failed connects, with `splitExternalLocalOriginErrors`.
    LocalOriginFailures,
}

impl Threshold {
    const ALL: [Self; 3] = [Self::GatewayErrors, Self::Errors, Self::LocalOriginFailures];

    /// Returns the name of the field in `outlierDetection` that sets the threshold.
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
    /// Threshold that was reached.
    pub threshold: Threshold,
    /// Number of consecutive failures.
    pub failures: u32,
}

/// A state change of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DetectorEvent {
    /// Endpoint whose state changed.
    pub address: SocketAddr,
    /// What changed.
    pub kind: DetectorEventKind,
    /// Number of endpoints of the pool that are ejected after the event.
    pub ejected: usize,
    /// Number of endpoints of the pool.
    pub hosts: usize,
}

/// Kind of a state change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectorEventKind {
    /// The endpoint is ejected.
    Ejected {
        /// Why it is ejected.
        cause: Cause,
        /// Minimum duration; the first sweep after it releases the endpoint.
        duration: Duration,
    },
    /// The endpoint is released, and eligible again.
    Released,
    /// The endpoint is not ejected, because the ejection limit is reached.
    Overflow {
        /// Why it would be ejected.
        cause: Cause,
    },
}

/// An ejection in effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ejection {
    /// When the endpoint was ejected.
    pub since: Instant,
    /// Earliest end; the first sweep after it releases the endpoint.
    pub until: Instant,
    /// Why the endpoint was ejected.
    pub cause: Cause,
}

/// State of one endpoint that persists across restarts of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Saved {
    /// Time since the ejection, and its cause; `None` if the endpoint is not ejected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ejected: Option<(Duration, Cause)>,
    /// Factor by which the base ejection time was multiplied last.
    pub multiplier: u32,
}

/// A threshold that an endpoint has reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reached {
    /// Threshold and number of failures.
    pub cause: Cause,
    /// The client whose own failures reached it.
    /// `None` if those of all clients together did, without a success of any in between.
    pub client: Option<Client>,
}

/// Who saw a signal. The default is an unknown client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Client {
    /// The cookie of its network namespace; 0 if unknown.
    pub netns: u64,
    /// The pod, which may have several network namespaces.
    pub pod: u32,
}

impl Client {
    /// Returns whether two clients are independent witnesses: neither in the same pod, nor in the same network namespace.
    pub fn is_independent_of(&self, other: &Self) -> bool {
        self.pod != other.pod && self.netns != other.netns
    }
}

/// The clients of an endpoint whose failures are counted one by one. Of more, those of pods with the fewest of them, and
/// of these the ones with the most failures.
const MAX_CLIENTS: usize = 8;
/// A client's failures are forgotten after this many sweeps in which it saw nothing of the endpoint.
const MAX_IDLE_SWEEPS: u32 = 30;

/// Consecutive failures that one client saw.
#[derive(Clone, Debug, PartialEq)]
struct ClientFailures {
    client: Client,
    /// Indexed as `Threshold::ALL`.
    failures: [u32; 3],
    /// Sweeps since the last failure.
    idle_sweeps: u32,
}

/// State of an endpoint that has failed or been ejected.
#[derive(Clone, Debug, Default, PartialEq)]
struct Host {
    /// Consecutive failures that all clients together saw, indexed as `Threshold::ALL`.
    failures: [u32; 3],
    /// The same for each client, none of which is zero throughout.
    /// A success of another client does not reset it: that client may have dialed something else at the same address.
    clients: Vec<ClientFailures>,
    ejected: Option<(Instant, Cause)>,
    /// Factor for the base ejection time of the last ejection; one less after each interval of good health.
    multiplier: u32,
    last_release: Option<Instant>,
}

impl Host {
    /// Returns whether the state equals the initial one.
    fn is_blank(&self) -> bool {
        !self.is_counting() && self.ejected.is_none() && self.multiplier == 0
    }

    fn is_counting(&self) -> bool {
        self.failures != [0; 3] || !self.clients.is_empty()
    }

    fn forget_failures(&mut self) {
        self.failures = [0; 3];
        self.clients.clear();
    }

    /// Sets counters to zero: those of all clients together, and those of this client.
    fn reset(&mut self, client: Client, which: impl Fn(usize) -> bool) {
        for i in (0..3).filter(|i| which(*i)) {
            self.failures[i] = 0;
            self.clients.iter_mut().filter(|row| row.client == client).for_each(|row| row.failures[i] = 0);
        }
        self.clients.retain(|row| row.failures != [0; 3]);
    }

    /// Returns the failures of a client; `None` if it is unknown.
    ///
    /// Without room for one more, a client of the pod with the most of them makes room: a pod that makes network namespaces
    /// pushes out its own. Of those, it is the one with the fewest failures.
    fn row(&mut self, client: Client) -> Option<&mut ClientFailures> {
        if client.netns == 0 {
            return None;
        }
        if let Some(known) = self.clients.iter().position(|row| row.client == client) {
            return self.clients.get_mut(known);
        }
        self.clients.push(ClientFailures { client, failures: [0; 3], idle_sweeps: 0 });
        if self.clients.len() > MAX_CLIENTS {
            let of_pod = |pod| self.clients.iter().filter(|row| row.client.pod == pod).count();
            let rank = |row: &ClientFailures| {
                (Reverse(of_pod(row.client.pod)), row.failures.into_iter().max(), Reverse(row.idle_sweeps))
            };
            // The new one has no failures yet, and is not among those that may have to go.
            let first = (0..MAX_CLIENTS).min_by_key(|i| rank(&self.clients[*i]))?;
            self.clients.remove(first);
        }
        self.clients.last_mut()
    }
}

/// The outlier detector of one pool.
#[derive(Clone, Debug)]
pub struct Detector {
    settings: OutlierDetection,
    success_criterion: SuccessCriterion,
    /// Sorted, for binary search.
    hosts: Arc<[SocketAddr]>,
    /// Endpoints whose state is not blank: only a few, even in a large mesh.
    marked: BTreeMap<SocketAddr, Host>,
    next_sweep: Instant,
}

impl Detector {
    /// Creates a detector for a pool that has no endpoints yet.
    pub fn new(settings: OutlierDetection, success_criterion: SuccessCriterion, now: Instant) -> Self {
        let next_sweep = now + settings.interval;
        Self { settings, success_criterion, hosts: Arc::default(), marked: BTreeMap::new(), next_sweep }
    }

    /// Applies new settings. Ejections stay in effect.
    pub fn configure(&mut self, settings: &OutlierDetection, success_criterion: SuccessCriterion, now: Instant) {
        if self.settings.interval != settings.interval {
            self.next_sweep = now + settings.interval;
        }
        if self.settings.counters() != settings.counters() || self.success_criterion != success_criterion {
            // The failures were counted under other rules.
            self.marked.values_mut().for_each(Host::forget_failures);
        }
        self.success_criterion = success_criterion;
        if self.settings != *settings {
            self.settings = settings.clone();
        }
        self.drop_blank();
    }

    /// Replaces the endpoints of the pool. The ejection of a removed endpoint is dropped.
    pub fn set_hosts(&mut self, hosts: &BTreeSet<SocketAddr>) {
        if !self.hosts.iter().eq(hosts) {
            self.hosts = hosts.iter().copied().collect();
            self.marked.retain(|address, _| hosts.contains(address));
        }
    }

    fn has(&self, address: &SocketAddr) -> bool {
        self.hosts.binary_search(address).is_ok()
    }

    fn drop_blank(&mut self) {
        self.marked.retain(|_, host| !host.is_blank());
    }

    /// Records a signal that `client` saw, and returns the thresholds that it reaches, in the order in which Envoy checks
    /// them.
    ///
    /// An Envoy counts for one client. Failures of several clients count together as well, which finds a dead endpoint
    /// sooner.
    pub fn observe(&mut self, address: SocketAddr, signal: Signal, client: Client) -> Vec<Reached> {
        let counters = self.settings.counters();
        let split = self.settings.local_origin_errors.is_some();
        // Effect of the signal on each counter: increment, reset to zero, or none.
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
                host.reset(client, |i| effect[i] == ZERO);
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
        host.reset(client, |i| effect[i] == ZERO);
        let is_ejected = host.ejected.is_some();
        // A threshold of zero is disabled.
        for i in (0..3).filter(|i| effect[*i] == UP && counters[*i] > 0) {
            let threshold = Threshold::ALL[i];
            host.failures[i] = host.failures[i].saturating_add(1);
            let own = host.row(client).map_or(0, |row| {
                row.idle_sweeps = 0;
                row.failures[i] = row.failures[i].saturating_add(1);
                row.failures[i]
            });
            if is_ejected {
                continue;
            }
            if host.failures[i] == counters[i] {
                let failures = std::mem::take(&mut host.failures[i]);
                host.clients.iter_mut().for_each(|row| row.failures[i] = 0);
                reached.push(Reached { cause: Cause { threshold, failures }, client: None });
            } else if own == counters[i] {
                host.clients.iter_mut().filter(|row| row.client == client).for_each(|row| row.failures[i] = 0);
                reached.push(Reached { cause: Cause { threshold, failures: own }, client: Some(client) });
            }
        }
        host.clients.retain(|row| row.failures != [0; 3]);
        if host.is_blank() {
            self.marked.remove(&address);
        }
        reached
    }

    /// Ejects an endpoint, or returns an overflow event if the ejection limit does not allow it.
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
        // Sweeps without work are skipped; keep their schedule as if they had run.
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
        let duration = ejection_time(&self.settings, host);
        Some(DetectorEvent {
            address,
            kind: DetectorEventKind::Ejected { cause, duration },
            ejected: ejected + 1,
            hosts,
        })
    }

    /// Returns when to call [`Self::handle_timeout`]; `None` while there is nothing to release, no multiplier to
    /// decrease, and no client's failures to forget.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let is_busy = |host: &Host| host.ejected.is_some() || host.multiplier > 0 || !host.clients.is_empty();
        self.marked.values().any(is_busy).then_some(self.next_sweep)
    }

    /// Runs the sweep: releases endpoints whose ejection time is over, and decreases the multipliers of those that have
    /// been healthy for an interval.
    pub fn handle_timeout(&mut self, now: Instant) -> Vec<DetectorEvent> {
        if now < self.next_sweep {
            return Vec::new();
        }
        // Even if this sweep is late, the next one is a full interval away.
        self.next_sweep = now + self.settings.interval;
        let mut released = Vec::new();
        for (address, host) in &mut self.marked {
            host.clients.iter_mut().for_each(|row| row.idle_sweeps += 1);
            host.clients.retain(|row| row.idle_sweeps < MAX_IDLE_SWEEPS);
            if let Some((since, _)) = host.ejected {
                if now.saturating_duration_since(since) >= ejection_time(&self.settings, host) {
                    host.ejected = None;
                    host.last_release = Some(now);
                    host.forget_failures();
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
        self.drop_blank();
        let (ejected, hosts) = (self.ejected_count(), self.hosts.len());
        released
            .into_iter()
            .map(|address| DetectorEvent { address, kind: DetectorEventKind::Released, ejected, hosts })
            .collect()
    }

    /// Returns whether the endpoint has consecutive failures, so that a success would reset them.
    pub fn is_counting_failures(&self, address: &SocketAddr) -> bool {
        self.marked.get(address).is_some_and(Host::is_counting)
    }

    /// Returns the ejections in effect, ordered by address.
    pub fn ejections(&self) -> impl Iterator<Item = (SocketAddr, Ejection)> {
        self.marked.iter().filter_map(|(address, host)| {
            let (since, cause) = host.ejected?;
            Some((*address, Ejection { since, until: since + ejection_time(&self.settings, host), cause }))
        })
    }

    /// Returns the ejection of an endpoint, if it is ejected.
    pub fn ejection(&self, address: &SocketAddr) -> Option<Ejection> {
        let host = self.marked.get(address)?;
        let (since, cause) = host.ejected?;
        Some(Ejection { since, until: since + ejection_time(&self.settings, host), cause })
    }

    /// Returns the state to persist for the next agent.
    pub fn snapshot(&self, now: Instant) -> Vec<(SocketAddr, Saved)> {
        let kept = self.marked.iter().filter(|(_, host)| host.multiplier > 0);
        kept.map(|(address, host)| {
            let ejected = host.ejected.map(|(since, cause)| (now.saturating_duration_since(since), cause));
            (*address, Saved { ejected, multiplier: host.multiplier })
        })
        .collect()
    }

    /// Restores the state that a previous agent persisted `away` ago.
    pub fn restore(&mut self, now: Instant, away: Duration, saved: impl IntoIterator<Item = (SocketAddr, Saved)>) {
        for (address, saved) in saved {
            if !self.has(&address) || self.marked.get(&address).is_some_and(|host| host.ejected.is_some()) {
                continue;
            }
            let mut host = Host { multiplier: saved.multiplier, ..Host::default() };
            let mut well = away;
            if let Some((ago, cause)) = saved.ejected {
                let elapsed = ago.saturating_add(away);
                let remaining = ejection_time(&self.settings, &host).saturating_sub(elapsed);
                well = elapsed.saturating_sub(ejection_time(&self.settings, &host));
                // After a reboot, the clock may not reach back that far.
                if !remaining.is_zero()
                    && let Some(since) = now.checked_sub(elapsed)
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

/// Returns the minimum duration of the current ejection.
fn ejection_time(settings: &OutlierDetection, host: &Host) -> Duration {
    (settings.base_ejection_time * host.multiplier).min(settings.max_ejection_time)
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test gets its times from somewhere")]
mod tests;
