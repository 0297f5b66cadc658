//! Endpoint health from observed connections: an outlier detector and active health checks for each pool that requests
//! them, the age of endpoints that warm up, and operator overrides.

mod active;
mod outlier;
mod overrides;
mod warmup;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use self::{active::Probing, warmup::Warming};
use crate::{
    model::{IpFamily, Probe, ServiceId},
    policy::{Assignment, HealthView, Pool, PoolKey},
};

pub use self::{
    active::{Target, Wanted},
    outlier::{Cause, Client, Detector, DetectorEvent, DetectorEventKind, Ejection, Reached, Saved, Signal, Threshold},
    overrides::{Drain, Override, OverrideCommand, Overrides},
};

/// How long after an ejection the restored state of a pool is kept if the pool does not appear.
const RESTORE_WINDOW: Duration = Duration::from_secs(24 * 3_600);

/// Health state of all pools.
#[derive(Clone, Debug, Default)]
pub struct Health {
    pools: BTreeMap<PoolKey, PoolState>,
    /// Pools that the assignments of each service use.
    used: HashMap<ServiceId, Box<[PoolKey]>>,
    /// Pools with a timeout: ejections, multipliers that decrease, or endpoints that warm up.
    busy: BTreeSet<PoolKey>,
    /// Pools that count failures of an endpoint, by endpoint.
    counting: HashMap<SocketAddr, BTreeSet<PoolKey>>,
    observed: HealthView,
    /// Services to recompile: endpoints have started to warm up, or restored ejections have taken effect.
    services_to_recompute: BTreeSet<ServiceId>,
    /// State from a previous agent, for pools that have not appeared yet.
    restored: BTreeMap<PoolKey, Vec<(SocketAddr, Saved)>>,
    /// When the state was restored, and how old it was then.
    restored_at: Option<(Instant, Duration)>,
    overrides: Overrides,
    probing: Probing,
}

/// State of a pool with outlier detection, warmup or probes.
#[derive(Clone, Debug, Default)]
struct PoolState {
    /// Sorted endpoints, by the service whose assignments use the pool; routes of several services may lead to it.
    hosts: Vec<(ServiceId, Box<[SocketAddr]>)>,
    detector: Option<Detector>,
    warming: Option<Warming>,
    probe: Option<Arc<Probe>>,
    /// The pool's effective connect timeout.
    connect_timeout: Option<Duration>,
    /// Clients whose connections have failed since the last success, by endpoint.
    clients: HashMap<SocketAddr, FailingClients>,
}

/// Clients whose connections to an endpoint have failed in a row.
#[derive(Clone, Copy, Debug)]
struct FailingClients {
    /// The first one that is known.
    first: Client,
    /// Whether connections of an independent one failed too.
    several: bool,
}

/// An endpoint that has reached a threshold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThresholdReached {
    /// Address and port of the endpoint.
    pub address: SocketAddr,
    /// Threshold and number of failures.
    pub cause: Cause,
    /// The only client whose connections failed; `None` if several independent ones did.
    pub client: Option<Client>,
}

impl Health {
    /// Updates the pools of one service, with their endpoints and settings, from its assignments.
    pub fn configure(&mut self, now: Instant, service: &ServiceId, assignments: &[Arc<Assignment>]) {
        let mut wanted: BTreeMap<&PoolKey, Vec<&Pool>> = BTreeMap::new();
        for pool in assignments.iter().flat_map(|assignment| &assignment.routes).map(|route| &route.pool) {
            if pool.outlier.is_some() || pool.warmup.is_some() || pool.probe.is_some() {
                wanted.entry(&pool.key).or_default().push(pool);
            }
        }
        // Sorted like the map, for the binary search below.
        let keys: Box<[PoolKey]> = wanted.keys().map(|key| (*key).clone()).collect();
        let before =
            if keys.is_empty() { self.used.remove(service) } else { self.used.insert(service.clone(), keys.clone()) };
        for key in before.iter().flatten().filter(|key| keys.binary_search(key).is_err()) {
            if let Some(pool_state) = self.pools.get_mut(key) {
                pool_state.hosts.retain(|(of, _)| of != service);
            }
            self.sync_pool(now, key);
        }
        for (key, pools) in wanted {
            let mut hosts: Vec<SocketAddr> =
                pools.iter().flat_map(|pool| &pool.endpoints).map(|endpoint| endpoint.address).collect();
            hosts.sort_unstable();
            hosts.dedup();
            let pool_state = self.pools.entry(key.clone()).or_default();
            match pool_state.hosts.iter_mut().find(|(of, _)| of == service) {
                Some((_, known)) => *known = hosts.into(),
                None => pool_state.hosts.push((service.clone(), hosts.into())),
            }
            let success_criterion = pools[0].success_criterion;
            match (pools[0].outlier.as_ref(), &mut pool_state.detector) {
                (Some(settings), Some(detector)) => detector.configure(settings, success_criterion, now),
                (Some(settings), none) => *none = Some(Detector::new(settings.clone(), success_criterion, now)),
                (None, some) => *some = None,
            }
            match (pools[0].warmup.as_ref(), &mut pool_state.warming) {
                (Some(warmup), Some(warming)) => warming.window = warmup.window,
                (Some(warmup), none) => *none = Some(Warming::new(warmup.window)),
                (None, some) => *some = None,
            }
            pool_state.probe.clone_from(&pools[0].probe);
            pool_state.connect_timeout = pools[0].limits.connect_timeout;
            self.sync_pool(now, key);
        }
    }

    /// Updates all state of a pool after its endpoints or settings changed.
    fn sync_pool(&mut self, now: Instant, key: &PoolKey) {
        let Some(pool_state) = self.pools.get_mut(key) else { return };
        if pool_state.hosts.is_empty() {
            let gone = self.pools.remove(key);
            let counted: Vec<SocketAddr> = gone.map(|gone| gone.clients.into_keys().collect()).unwrap_or_default();
            self.index_counting(key, &counted);
            self.probing.set(key, &BTreeSet::new(), None);
            self.observe_pool(now, key);
            return;
        }
        let hosts: BTreeSet<SocketAddr> = pool_state.all_hosts().collect();
        if let Some(detector) = &mut pool_state.detector {
            detector.set_hosts(&hosts);
            if let Some(saved) = self.restored.remove(key)
                && let Some((at, away)) = self.restored_at
            {
                detector.restore(now, away + now.saturating_duration_since(at), saved);
                if detector.ejections().next().is_some() {
                    self.services_to_recompute.insert(key.service.clone());
                    self.services_to_recompute.extend(pool_state.hosts.iter().map(|(service, _)| service.clone()));
                }
            }
        }
        if let Some(warming) = &mut pool_state.warming
            && warming.set_hosts(now, &hosts)
        {
            self.services_to_recompute.insert(key.service.clone());
        }
        self.probing.set(key, &hosts, pool_state.probe.as_ref());
        self.reset_clients(key);
        self.observe_pool(now, key);
    }

    /// Drops failing clients of endpoints whose failures are no longer counted.
    fn reset_clients(&mut self, key: &PoolKey) {
        let Some(pool_state) = self.pools.get_mut(key) else { return };
        let detector = pool_state.detector.as_ref();
        let counts = |host: &SocketAddr| detector.is_some_and(|detector| detector.is_counting_failures(host));
        let over: Vec<SocketAddr> =
            pool_state.clients.extract_if(|host, _| !counts(host)).map(|(host, _)| host).collect();
        self.index_counting(key, &over);
    }

    /// Updates the index of pools that count failures, for these endpoints.
    fn index_counting(&mut self, key: &PoolKey, hosts: &[SocketAddr]) {
        let detector = self.pools.get(key).and_then(|pool_state| pool_state.detector.as_ref());
        for host in hosts {
            if detector.is_some_and(|detector| detector.is_counting_failures(host)) {
                self.counting.entry(*host).or_default().insert(key.clone());
            } else if let Some(pools) = self.counting.get_mut(host) {
                pools.remove(key);
                if pools.is_empty() {
                    self.counting.remove(host);
                }
            }
        }
    }

    /// Publishes the observations of a pool to the policy, and updates `busy`.
    fn observe_pool(&mut self, now: Instant, key: &PoolKey) {
        let pool_state = self.pools.get(key);
        let detector = pool_state.and_then(|pool_state| pool_state.detector.as_ref());
        let ejected: BTreeSet<SocketAddr> =
            detector.into_iter().flat_map(Detector::ejections).map(|(address, _)| address).collect();
        let ages = pool_state
            .and_then(|pool_state| pool_state.warming.as_ref())
            .map(|warming| warming.ages(now))
            .unwrap_or_default();
        if pool_state.is_some_and(|pool_state| pool_state.poll_timeout().is_some()) {
            self.busy.insert(key.clone());
        } else {
            self.busy.remove(key);
        }
        set(&mut self.observed.ejected, key, ejected, BTreeSet::is_empty);
        set(&mut self.observed.ages, key, ages, HashMap::is_empty);
        set(&mut self.observed.failing, key, self.probing.failing(key), BTreeSet::is_empty);
    }

    /// Returns the probes to start or stop since the previous call.
    pub fn probes_wanted(&mut self) -> Vec<Wanted> {
        self.probing.news()
    }

    /// Records a probe result: why the endpoint fails, or `None` on success.
    pub fn record_probe(&mut self, target: &Target, number: u64, failing: Option<String>) -> BTreeSet<PoolKey> {
        let pools = self.probing.take(target, number, failing);
        for key in &pools {
            set(&mut self.observed.failing, key, self.probing.failing(key), BTreeSet::is_empty);
        }
        pools
    }

    /// Returns the number of probed endpoints, the number of failing ones, and the probes per second.
    pub fn probes(&self) -> (usize, usize, f64) {
        self.probing.extent()
    }

    /// Returns the connect timeout of a pool, if it is limited.
    pub fn connect_timeout_of(&self, key: &PoolKey) -> Option<Duration> {
        self.pools.get(key)?.connect_timeout
    }

    /// Returns the probe settings of a pool, if it has any.
    pub fn probe_of(&self, key: &PoolKey) -> Option<&Arc<Probe>> {
        self.pools.get(key)?.probe.as_ref()
    }

    /// Records a signal of an endpoint in these pools, and returns the thresholds that it reaches.
    pub fn observe(
        &mut self,
        pools: &[PoolKey],
        address: SocketAddr,
        signal: Signal,
        client: Client,
    ) -> Vec<(PoolKey, ThresholdReached)> {
        let mut all = Vec::new();
        for key in pools {
            let Some(pool_state) = self.pools.get_mut(key) else { continue };
            let Some(detector) = pool_state.detector.as_mut() else { continue };
            let counted = detector.is_counting_failures(&address);
            let reached = detector.observe(address, signal, client);
            let counts = detector.is_counting_failures(&address);
            // A client's failures are forgotten after a while.
            if counts && client.netns != 0 && !self.busy.contains(key) {
                self.busy.insert(key.clone());
            }
            if counts || !reached.is_empty() {
                let known =
                    pool_state.clients.entry(address).or_insert(FailingClients { first: client, several: false });
                if known.first.netns == 0 {
                    known.first = client;
                }
                known.several |= signal.is_failure() && client.netns != 0 && client.is_independent_of(&known.first);
            }
            let clients = pool_state.clients.get(&address).copied();
            let only = clients.filter(|clients| !clients.several).map(|clients| clients.first);
            all.extend(reached.into_iter().map(|Reached { cause, client }| {
                (key.clone(), ThresholdReached { address, cause, client: client.or(only) })
            }));
            if !counts {
                pool_state.clients.remove(&address);
            }
            if counted != counts {
                self.index_counting(key, &[address]);
            }
        }
        all
    }

    /// Ejects an endpoint that has reached a threshold, or returns an overflow event if the limit does not allow it.
    pub fn eject(&mut self, now: Instant, key: &PoolKey, address: SocketAddr, cause: Cause) -> Option<DetectorEvent> {
        let event = self.pools.get_mut(key)?.detector.as_mut()?.eject(now, address, cause)?;
        self.observe_pool(now, key);
        Some(event)
    }

    /// Returns whether any pool counts failures of the endpoint, so that a success would reset them.
    pub fn is_counting_failures(&self, address: &SocketAddr) -> bool {
        self.counting.contains_key(address)
    }

    /// Returns the pools that may eject an endpoint. This scans all pools.
    pub fn pools_of(&self, address: &SocketAddr) -> Vec<PoolKey> {
        let has = |pool_state: &PoolState| {
            pool_state.detector.is_some()
                && pool_state.hosts.iter().any(|(_, hosts)| hosts.binary_search(address).is_ok())
        };
        self.pools.iter().filter(|(_, pool_state)| has(pool_state)).map(|(key, _)| key.clone()).collect()
    }

    /// Returns when to call [`Self::handle_timeout`] if nothing changes until then.
    pub fn poll_timeout(&self, now: Instant, wall: SystemTime) -> Option<Instant> {
        let pools = self.busy.iter().filter_map(|key| self.pools.get(key)?.poll_timeout()).min();
        let overrides = self.overrides.left(wall).map(|left| now + left);
        [pools, overrides].into_iter().flatten().min()
    }

    /// Runs the sweeps that are due.
    pub fn handle_timeout(&mut self, now: Instant) -> (Vec<(PoolKey, DetectorEvent)>, BTreeSet<PoolKey>) {
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let (mut events, mut warmer) = (Vec::new(), BTreeSet::new());
        for key in self.busy.clone() {
            let Some(pool_state) = self.pools.get_mut(&key) else { continue };
            if let Some(detector) = pool_state.detector.as_mut().filter(|detector| is_due(detector.poll_timeout())) {
                events.extend(detector.handle_timeout(now).into_iter().map(|event| (key.clone(), event)));
            }
            if let Some(warming) = pool_state.warming.as_mut().filter(|warming| is_due(warming.next)) {
                warming.next = warming.next_step(now);
                warmer.insert(key.clone());
            }
            // A released endpoint starts without failing clients.
            self.reset_clients(&key);
            self.observe_pool(now, &key);
        }
        (events, warmer)
    }

    /// Returns the services to recompile since the previous call, because endpoints in their pools have started to warm
    /// up or have restored ejections.
    pub fn services_to_recompute(&mut self) -> BTreeSet<ServiceId> {
        std::mem::take(&mut self.services_to_recompute)
    }

    /// Returns the observed endpoint state, as input to the policy.
    pub fn observed(&self) -> &HealthView {
        &self.observed
    }

    /// Returns the ejection of an endpoint, if its pool has ejected it.
    pub fn ejection(&self, pool: &PoolKey, address: &SocketAddr) -> Option<Ejection> {
        self.pools.get(pool)?.detector.as_ref()?.ejection(address)
    }

    /// Returns the endpoints of a pool, possibly with duplicates; empty if the pool is not tracked.
    pub fn hosts_of(&self, key: &PoolKey) -> Vec<SocketAddr> {
        self.pools.get(key).into_iter().flat_map(PoolState::all_hosts).collect()
    }

    /// Returns whether the pool is tracked, in either address family.
    pub fn knows(&self, key: &PoolKey) -> bool {
        IpFamily::BOTH.into_iter().any(|family| self.pools.contains_key(&PoolKey { family, ..key.clone() }))
    }

    /// Records that connections to a pool on an HTTP port carry another protocol.
    pub fn not_http(&mut self, key: &PoolKey) -> bool {
        self.observed.not_http.insert(key.both_families())
    }

    /// Returns the operator overrides in effect.
    pub fn overrides(&self) -> &Overrides {
        &self.overrides
    }

    /// Executes an override command, and returns a message for the operator.
    pub fn execute(&mut self, command: &OverrideCommand, now: SystemTime) -> Result<String, String> {
        let message = self.overrides.take(command, now)?;
        self.apply_overrides();
        Ok(message)
    }

    /// Removes expired overrides, and returns a message for the operator about each.
    pub fn expire_overrides(&mut self, now: SystemTime) -> Vec<String> {
        let ended = self.overrides.expire(now);
        if !ended.is_empty() {
            self.apply_overrides();
        }
        ended
    }

    fn apply_overrides(&mut self) {
        self.observed.ejected_everywhere = self.overrides.ejected().map(|(address, _)| *address).collect();
        self.observed.drained =
            self.overrides.drained().map(|drain| (drain.service.clone(), drain.region.clone())).collect();
    }

    /// Returns the state of each pool to persist for the next agent.
    pub fn snapshot(&self, now: Instant) -> BTreeMap<PoolKey, Vec<(SocketAddr, Saved)>> {
        let mut all = self.restored.clone();
        let since = self.restored_at.map_or(Duration::ZERO, |(at, away)| away + now.saturating_duration_since(at));
        for (_, saved) in all.values_mut().flatten() {
            saved.ejected = saved.ejected.map(|(ago, cause)| (ago.saturating_add(since), cause));
        }
        // Drop pools that have not appeared within the restore window.
        all.retain(|_, hosts| {
            hosts.iter().any(|(_, saved)| saved.ejected.is_some_and(|(ago, _)| ago < RESTORE_WINDOW))
        });
        for key in &self.busy {
            let detector = self.pools.get(key).and_then(|pool_state| pool_state.detector.as_ref());
            let saved = detector.map(|detector| detector.snapshot(now)).unwrap_or_default();
            if !saved.is_empty() {
                all.insert(key.clone(), saved);
            }
        }
        all
    }

    /// Restores the state that a previous agent persisted `away` ago.
    pub fn restore(
        &mut self,
        now: Instant,
        away: Duration,
        pools: BTreeMap<PoolKey, Vec<(SocketAddr, Saved)>>,
        overrides: Overrides,
    ) {
        (self.restored, self.restored_at, self.overrides) = (pools, Some((now, away)), overrides);
        self.apply_overrides();
    }

    /// Returns the number of ejections: in each pool, and by operators.
    pub fn ejected(&self) -> usize {
        self.observed.ejected.values().map(BTreeSet::len).sum::<usize>() + self.observed.ejected_everywhere.len()
    }
}

fn set<T>(map: &mut BTreeMap<PoolKey, T>, key: &PoolKey, value: T, is_empty: impl Fn(&T) -> bool) {
    if is_empty(&value) {
        map.remove(key);
    } else {
        map.insert(key.clone(), value);
    }
}

impl PoolState {
    /// Returns the endpoints of all services that use the pool, possibly with duplicates.
    fn all_hosts(&self) -> impl Iterator<Item = SocketAddr> {
        self.hosts.iter().flat_map(|(_, hosts)| hosts.iter().copied())
    }

    fn poll_timeout(&self) -> Option<Instant> {
        let detector = self.detector.as_ref().and_then(Detector::poll_timeout);
        let warming = self.warming.as_ref().and_then(|warming| warming.next);
        [detector, warming].into_iter().flatten().min()
    }
}
