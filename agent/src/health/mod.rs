//! Health from what really happens to connections: one outlier detector for each pool that asks for one, and the age of endpoints where
//! new ones get less.

mod outlier;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

pub use outlier::{Detector, Ejection, Event, EventKind, Verdict};

use crate::{
    model::ServiceId,
    policy::{Assignment, Observed, Pool, PoolKey},
};

/// Steps in which the share of a new endpoint grows.
const WARMUP_STEPS: u32 = 20;
/// But no more often than this.
const SHORTEST_STEP: Duration = Duration::from_secs(1);

/// All pools.
#[derive(Clone, Debug, Default)]
pub struct Health {
    pools: BTreeMap<PoolKey, Watched>,
    /// The pools that the assignments of a service use.
    used: BTreeMap<ServiceId, BTreeSet<PoolKey>>,
    /// Pools in which something is under way: failures that count, ejections, endpoints that warm up.
    busy: BTreeSet<PoolKey>,
    /// Pools that count failures of an endpoint.
    counting: HashMap<SocketAddr, BTreeSet<PoolKey>>,
    observed: Observed,
    /// Services of pools in which endpoints have begun to warm up since somebody asked.
    warming: BTreeSet<ServiceId>,
}

/// A pool that somebody looks after.
#[derive(Clone, Debug, Default)]
struct Watched {
    /// The endpoints, by the service whose assignments use the pool: it may be reached by several frontends, in both families.
    hosts: BTreeMap<ServiceId, BTreeSet<SocketAddr>>,
    detector: Option<Detector>,
    warming: Option<Warming>,
}

/// Endpoints that are new.
#[derive(Clone, Debug)]
struct Warming {
    window: Duration,
    /// Since when each is there; `None`: from the beginning.
    since: HashMap<SocketAddr, Option<Instant>>,
    next: Option<Instant>,
}

impl Health {
    /// Takes the pools of one service, their endpoints and their settings from its assignments. What is ejected stays so, as long as it
    /// is there.
    pub fn configure(&mut self, now: Instant, service: &ServiceId, assignments: &[Arc<Assignment>]) {
        let mut wanted: BTreeMap<&PoolKey, Vec<&Pool>> = BTreeMap::new();
        for pool in assignments.iter().flat_map(|assignment| &assignment.routes).map(|route| &route.pool) {
            if pool.outlier.is_some() || pool.warmup.is_some() {
                wanted.entry(&pool.key).or_default().push(pool);
            }
        }
        let keys: BTreeSet<PoolKey> = wanted.keys().map(|key| (*key).clone()).collect();
        let before =
            if keys.is_empty() { self.used.remove(service) } else { self.used.insert(service.clone(), keys.clone()) };
        for key in before.iter().flatten().filter(|key| !keys.contains(key)) {
            if let Some(watched) = self.pools.get_mut(key) {
                watched.hosts.remove(service);
            }
            self.settle(now, key);
        }
        for (key, pools) in wanted {
            let hosts = pools.iter().flat_map(|pool| &pool.endpoints).map(|endpoint| endpoint.address).collect();
            let watched = self.pools.entry(key.clone()).or_default();
            watched.hosts.insert(service.clone(), hosts);
            match (pools[0].outlier.as_ref(), &mut watched.detector) {
                (Some(settings), Some(detector)) => detector.configure(settings, now),
                (Some(settings), none) => *none = Some(Detector::new(settings.clone(), now)),
                (None, some) => *some = None,
            }
            match (pools[0].warmup.as_ref(), &mut watched.warming) {
                (Some(warmup), Some(warming)) => warming.window = warmup.window,
                (Some(warmup), none) => {
                    *none = Some(Warming { window: warmup.window, since: HashMap::new(), next: None });
                }
                (None, some) => *some = None,
            }
            self.settle(now, key);
        }
    }

    /// Brings everything that is kept about a pool into line with its endpoints.
    fn settle(&mut self, now: Instant, key: &PoolKey) {
        let Some(watched) = self.pools.get_mut(key) else { return };
        let hosts: BTreeSet<SocketAddr> = watched.hosts.values().flatten().copied().collect();
        if watched.hosts.is_empty() {
            self.pools.remove(key);
        } else {
            if let Some(detector) = &mut watched.detector {
                detector.set_hosts(&hosts);
            }
            if let Some(warming) = &mut watched.warming
                && warming.set_hosts(now, &hosts)
            {
                self.warming.insert(key.service.clone());
            }
        }
        let detector = self.pools.get(key).and_then(|watched| watched.detector.as_ref());
        self.counting.retain(|host, pools| {
            if !detector.is_some_and(|detector| detector.counts(host)) {
                pools.remove(key);
            }
            !pools.is_empty()
        });
        self.observe_pool(now, key);
    }

    /// Takes down what a pool has to say.
    fn observe_pool(&mut self, now: Instant, key: &PoolKey) {
        let watched = self.pools.get(key);
        let detector = watched.and_then(|watched| watched.detector.as_ref());
        let ejected: BTreeSet<SocketAddr> =
            detector.into_iter().flat_map(Detector::ejections).map(|(address, _)| address).collect();
        let ages =
            watched.and_then(|watched| watched.warming.as_ref()).map(|warming| warming.ages(now)).unwrap_or_default();
        if watched.is_some_and(|watched| watched.poll_timeout().is_some()) {
            self.busy.insert(key.clone());
        } else {
            self.busy.remove(key);
        }
        set(&mut self.observed.ejected, key, ejected, BTreeSet::is_empty);
        set(&mut self.observed.ages, key, ages, HashMap::is_empty);
    }

    /// A connect to an endpoint of one of these pools has ended.
    pub fn observe(
        &mut self,
        now: Instant,
        pools: &[PoolKey],
        address: SocketAddr,
        verdict: Verdict,
    ) -> Vec<(PoolKey, Event)> {
        let mut events = Vec::new();
        for key in pools {
            let Some(detector) = self.pools.get_mut(key).and_then(|watched| watched.detector.as_mut()) else {
                continue;
            };
            let event = detector.observe(now, address, verdict);
            if detector.counts(&address) {
                self.counting.entry(address).or_default().insert(key.clone());
            } else if let Some(counting) = self.counting.get_mut(&address) {
                counting.remove(key);
            }
            if let Some(event) = event {
                self.observe_pool(now, key);
                events.push((key.clone(), event));
            }
        }
        if self.counting.get(&address).is_some_and(BTreeSet::is_empty) {
            self.counting.remove(&address);
        }
        events
    }

    /// Whether some pool counts failures of the endpoint, so that a success would change something.
    pub fn counts(&self, address: &SocketAddr) -> bool {
        self.counting.contains_key(address)
    }

    /// When [`Self::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.busy.iter().filter_map(|key| self.pools.get(key)?.poll_timeout()).min()
    }

    /// The sweeps that are due, and the pools whose endpoints are to get more by now.
    pub fn handle_timeout(&mut self, now: Instant) -> (Vec<(PoolKey, Event)>, BTreeSet<PoolKey>) {
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let (mut events, mut warmer) = (Vec::new(), BTreeSet::new());
        for key in self.busy.clone() {
            let Some(watched) = self.pools.get_mut(&key) else { continue };
            if let Some(detector) = watched.detector.as_mut().filter(|detector| is_due(detector.poll_timeout())) {
                events.extend(detector.handle_timeout(now).into_iter().map(|event| (key.clone(), event)));
            }
            if let Some(warming) = watched.warming.as_mut().filter(|warming| is_due(warming.next)) {
                warming.next = warming.next_step(now);
                warmer.insert(key.clone());
            }
            self.observe_pool(now, &key);
        }
        (events, warmer)
    }

    /// The services in whose pools endpoints have begun to warm up since this was asked before.
    pub fn newly_warming(&mut self) -> BTreeSet<ServiceId> {
        std::mem::take(&mut self.warming)
    }

    /// The ejections in force and the ages of new endpoints, for the policy.
    pub fn observed(&self) -> &Observed {
        &self.observed
    }

    /// The ejection of an endpoint, if it is ejected.
    pub fn ejection(&self, pool: &PoolKey, address: &SocketAddr) -> Option<Ejection> {
        let detector = self.pools.get(pool)?.detector.as_ref()?;
        detector.ejections().find(|(ejected, _)| ejected == address).map(|(_, ejection)| ejection)
    }

    /// How many endpoints are ejected.
    pub fn ejected(&self) -> usize {
        self.observed.ejected.values().map(BTreeSet::len).sum()
    }
}

fn set<T>(map: &mut BTreeMap<PoolKey, T>, key: &PoolKey, value: T, is_empty: impl Fn(&T) -> bool) {
    if is_empty(&value) {
        map.remove(key);
    } else {
        map.insert(key.clone(), value);
    }
}

impl Watched {
    fn poll_timeout(&self) -> Option<Instant> {
        let detector = self.detector.as_ref().and_then(Detector::poll_timeout);
        let warming = self.warming.as_ref().and_then(|warming| warming.next);
        [detector, warming].into_iter().flatten().min()
    }
}

impl Warming {
    /// Those that are there when the pool is first seen count as old: how long they have been there is not known. Returns whether anybody
    /// is new.
    fn set_hosts(&mut self, now: Instant, hosts: &BTreeSet<SocketAddr>) -> bool {
        let since = if self.since.is_empty() { None } else { Some(now) };
        self.since.retain(|host, _| hosts.contains(host));
        let before = self.since.len();
        for host in hosts {
            self.since.entry(*host).or_insert(since);
        }
        self.next = self.next_step(now);
        since.is_some() && self.since.len() > before
    }

    fn ages(&self, now: Instant) -> HashMap<SocketAddr, Duration> {
        let age = |since: Instant| Some(now.saturating_duration_since(since)).filter(|age| *age < self.window);
        self.since.iter().filter_map(|(host, since)| Some((*host, age((*since)?)?))).collect()
    }

    /// While anybody is new.
    fn next_step(&self, now: Instant) -> Option<Instant> {
        let youngest = self.since.values().flatten().max()?;
        (now.saturating_duration_since(*youngest) < self.window).then(|| {
            let step = (self.window / WARMUP_STEPS).max(SHORTEST_STEP);
            (now + step).min(*youngest + self.window)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_comes_later_is_new() {
        let [a, b, c] = [1, 2, 3].map(|i| SocketAddr::from(([10, 0, 0, i], 80)));
        let start = Instant::now();
        let window = Duration::from_secs(10);
        let mut warming = Warming { window, since: HashMap::new(), next: None };
        warming.set_hosts(start, &BTreeSet::from([a, b]));
        assert_eq!((warming.ages(start), warming.next), (HashMap::new(), None));
        let later = start + Duration::from_secs(60);
        warming.set_hosts(later, &BTreeSet::from([a, b, c]));
        assert_eq!(warming.ages(later), HashMap::from([(c, Duration::ZERO)]));
        let half = later + window / 2;
        assert_eq!(warming.ages(half), HashMap::from([(c, window / 2)]));
        assert_eq!(warming.next, Some(later + SHORTEST_STEP));
        assert_eq!(warming.next_step(half), Some(half + SHORTEST_STEP));
        assert_eq!((warming.ages(later + window), warming.next_step(later + window)), (HashMap::new(), None));
        // One that goes and comes back is new again.
        warming.set_hosts(half, &BTreeSet::from([b]));
        warming.set_hosts(half, &BTreeSet::from([a, b]));
        assert_eq!(warming.ages(half), HashMap::from([(a, Duration::ZERO)]));
    }
}
