//! Health from what really happens to connections: one outlier detector for each pool that asks for one, the age of endpoints where new ones
//! get less, and what somebody has ordered by hand.

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
    model::{Probe, ServiceId},
    policy::{Assignment, HealthView, Pool, PoolKey},
};

pub use self::{
    active::{Target, Wanted},
    outlier::{Cause, Detector, DetectorEvent, DetectorEventKind, Ejection, Saved, Signal, Threshold},
    overrides::{Drain, Override, OverrideCommand, Overrides},
};

/// What a former agent has left of a pool that is not seen is kept for so long after the ejection.
const RESTORE_WINDOW: Duration = Duration::from_secs(24 * 3_600);

/// All pools.
#[derive(Clone, Debug, Default)]
pub struct Health {
    pools: BTreeMap<PoolKey, PoolState>,
    /// The pools that the assignments of a service use.
    used: HashMap<ServiceId, Box<[PoolKey]>>,
    /// Pools in which something is under way: failures that count, ejections, endpoints that warm up.
    busy: BTreeSet<PoolKey>,
    /// Pools that count failures of an endpoint.
    counting: HashMap<SocketAddr, BTreeSet<PoolKey>>,
    observed: HealthView,
    /// Services of which the policy has to be asked once more: endpoints have begun to warm up, or a former agent had ejected some.
    services_to_recompute: BTreeSet<ServiceId>,
    /// What a former agent has left, for pools that have not been seen yet, and how long ago.
    restored: BTreeMap<PoolKey, Vec<(SocketAddr, Saved)>>,
    restored_at: Option<(Instant, Duration)>,
    overrides: Overrides,
    probing: Probing,
}

/// A pool that somebody looks after.
#[derive(Clone, Debug, Default)]
struct PoolState {
    /// The endpoints in order, by the service whose assignments use the pool: it may be reached by several frontends, in both families.
    hosts: Vec<(ServiceId, Box<[SocketAddr]>)>,
    detector: Option<Detector>,
    warming: Option<Warming>,
    probe: Option<Arc<Probe>>,
    /// The pool's `connectTimeout`.
    connect_timeout: Option<Duration>,
    /// Whose connections have failed since the last success.
    clients: HashMap<SocketAddr, FailingClients>,
}

/// Network namespaces whose connections to an endpoint have failed in a row.
#[derive(Clone, Copy, Debug)]
struct FailingClients {
    /// Cookie of the first of them; 0 where it is not known.
    first: u64,
    /// Whether there was another.
    several: bool,
}

/// A threshold that an endpoint has reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThresholdReached {
    /// Which endpoint.
    pub address: SocketAddr,
    /// Which threshold.
    pub cause: Cause,
    /// The one network namespace whose connections failed (0: it is not known); `None` where there were several.
    pub client: Option<u64>,
}

impl Health {
    /// Takes the pools of one service, their endpoints and their settings from its assignments. What is ejected stays so, as long as it
    /// is there.
    pub fn configure(&mut self, now: Instant, service: &ServiceId, assignments: &[Arc<Assignment>]) {
        let mut wanted: BTreeMap<&PoolKey, Vec<&Pool>> = BTreeMap::new();
        for pool in assignments.iter().flat_map(|assignment| &assignment.routes).map(|route| &route.pool) {
            if pool.outlier.is_some() || pool.warmup.is_some() || pool.probe.is_some() {
                wanted.entry(&pool.key).or_default().push(pool);
            }
        }
        // In order, as a set is.
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

    /// Brings everything that is kept about a pool into line with its endpoints.
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
            if let Some(left) = self.restored.remove(key)
                && let Some((at, away)) = self.restored_at
            {
                detector.restore(now, away + now.saturating_duration_since(at), left);
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

    /// Forgets whose connections have failed to endpoints of which nothing is counted any more.
    fn reset_clients(&mut self, key: &PoolKey) {
        let Some(pool_state) = self.pools.get_mut(key) else { return };
        let detector = pool_state.detector.as_ref();
        let counts = |host: &SocketAddr| detector.is_some_and(|detector| detector.is_counting_failures(host));
        let over: Vec<SocketAddr> =
            pool_state.clients.extract_if(|host, _| !counts(host)).map(|(host, _)| host).collect();
        self.index_counting(key, &over);
    }

    /// Takes down of these endpoints whether the pool counts failures of them.
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

    /// Takes down what a pool has to say.
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

    /// What has changed in who is to be probed, since this was last asked.
    pub fn probes_wanted(&mut self) -> Vec<Wanted> {
        self.probing.news()
    }

    /// What probes have found of an endpoint: why it fails, or that it is well again. The pools that it is for.
    pub fn record_probe(&mut self, target: &Target, number: u64, failing: Option<String>) -> BTreeSet<PoolKey> {
        let pools = self.probing.take(target, number, failing);
        for key in &pools {
            set(&mut self.observed.failing, key, self.probing.failing(key), BTreeSet::is_empty);
        }
        pools
    }

    /// Endpoints that are probed, those whose probes fail, and probes in a second that are asked for.
    pub fn probes(&self) -> (usize, usize, f64) {
        self.probing.extent()
    }

    /// How long connects to endpoints of a pool are waited for, where that is limited.
    pub fn connect_timeout_of(&self, key: &PoolKey) -> Option<Duration> {
        self.pools.get(key)?.connect_timeout
    }

    /// How endpoints of a pool are probed.
    pub fn probe_of(&self, key: &PoolKey) -> Option<&Arc<Probe>> {
        self.pools.get(key)?.probe.as_ref()
    }

    /// Takes a sign of an endpoint of one of these pools, which a client in this network namespace has seen (0: it is not known); the thresholds
    /// that it has reached.
    pub fn observe(
        &mut self,
        pools: &[PoolKey],
        address: SocketAddr,
        signal: Signal,
        client: u64,
    ) -> Vec<(PoolKey, ThresholdReached)> {
        let mut all = Vec::new();
        for key in pools {
            let Some(pool_state) = self.pools.get_mut(key) else { continue };
            let Some(detector) = pool_state.detector.as_mut() else { continue };
            let counted = detector.is_counting_failures(&address);
            let causes = detector.observe(address, signal);
            let counts = detector.is_counting_failures(&address);
            if counts || !causes.is_empty() {
                let known =
                    pool_state.clients.entry(address).or_insert(FailingClients { first: client, several: false });
                if known.first == 0 {
                    known.first = client;
                }
                known.several |= signal.is_failure() && client != 0 && known.first != client;
            }
            if !causes.is_empty() {
                let clients = pool_state.clients.get(&address).copied();
                let client = clients.filter(|clients| !clients.several).map(|clients| clients.first);
                all.extend(causes.into_iter().map(|cause| (key.clone(), ThresholdReached { address, cause, client })));
            }
            if !counts {
                pool_state.clients.remove(&address);
            }
            if counted != counts {
                self.index_counting(key, &[address]);
            }
        }
        all
    }

    /// Ejects an endpoint that has reached a threshold, where the limit allows it; nothing where it is out already, or not there any more.
    pub fn eject(&mut self, now: Instant, key: &PoolKey, address: SocketAddr, cause: Cause) -> Option<DetectorEvent> {
        let event = self.pools.get_mut(key)?.detector.as_mut()?.eject(now, address, cause)?;
        self.observe_pool(now, key);
        Some(event)
    }

    /// Whether some pool counts failures of the endpoint, so that a success would change something.
    pub fn is_counting_failures(&self, address: &SocketAddr) -> bool {
        self.counting.contains_key(address)
    }

    /// The pools that may eject an endpoint. Looks at all of them.
    pub fn pools_of(&self, address: &SocketAddr) -> Vec<PoolKey> {
        let has = |pool_state: &PoolState| {
            pool_state.detector.is_some()
                && pool_state.hosts.iter().any(|(_, hosts)| hosts.binary_search(address).is_ok())
        };
        self.pools.iter().filter(|(_, pool_state)| has(pool_state)).map(|(key, _)| key.clone()).collect()
    }

    /// When [`Self::handle_timeout`] wants to be called, if nothing changes. Overrides expire by the wall clock.
    pub fn poll_timeout(&self, now: Instant, wall: SystemTime) -> Option<Instant> {
        let pools = self.busy.iter().filter_map(|key| self.pools.get(key)?.poll_timeout()).min();
        let overrides = self.overrides.left(wall).map(|left| now + left);
        [pools, overrides].into_iter().flatten().min()
    }

    /// The sweeps that are due, and the pools whose endpoints are to get more by now.
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
            // Whoever is released begins anew.
            self.reset_clients(&key);
            self.observe_pool(now, &key);
        }
        (events, warmer)
    }

    /// The services of which the policy has to be asked once more: in whose pools endpoints have begun to warm up, or were ejected by a former
    /// agent.
    pub fn services_to_recompute(&mut self) -> BTreeSet<ServiceId> {
        std::mem::take(&mut self.services_to_recompute)
    }

    /// The ejections in force and the ages of new endpoints, for the policy.
    pub fn observed(&self) -> &HealthView {
        &self.observed
    }

    /// The ejection of an endpoint, if its pool has ejected it.
    pub fn ejection(&self, pool: &PoolKey, address: &SocketAddr) -> Option<Ejection> {
        self.pools.get(pool)?.detector.as_ref()?.ejection(address)
    }

    /// The endpoints of a pool.
    pub fn hosts_of(&self, key: &PoolKey) -> Vec<SocketAddr> {
        self.pools.get(key).into_iter().flat_map(PoolState::all_hosts).collect()
    }

    /// Whether somebody looks after the pool, in either family.
    pub fn knows(&self, key: &PoolKey) -> bool {
        [false, true].into_iter().any(|v6| self.pools.contains_key(&PoolKey { v6, ..key.clone() }))
    }

    /// Connections to the pool's port, which is HTTP, carry something else: they are judged by themselves from now on. Whether that is new.
    pub fn not_http(&mut self, key: &PoolKey) -> bool {
        self.observed.not_http.insert(key.both_families())
    }

    /// What was ordered by hand.
    pub fn overrides(&self) -> &Overrides {
        &self.overrides
    }

    /// Takes an order by hand.
    ///
    /// # Errors
    /// It says why there is nothing to be done.
    pub fn execute(&mut self, order: &OverrideCommand, now: SystemTime) -> Result<String, String> {
        let said = self.overrides.take(order, now)?;
        self.apply_overrides();
        Ok(said)
    }

    /// The orders whose time is up; they are in force no longer.
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

    /// What the next agent shall know of each pool.
    pub fn snapshot(&self, now: Instant) -> BTreeMap<PoolKey, Vec<(SocketAddr, Saved)>> {
        let mut all = self.restored.clone();
        let since = self.restored_at.map_or(Duration::ZERO, |(at, away)| away + now.saturating_duration_since(at));
        for (_, saved) in all.values_mut().flatten() {
            saved.ejected = saved.ejected.map(|(ago, cause)| (ago.saturating_add(since), cause));
        }
        // Of pools that have not come back for so long nothing is known any more.
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

    /// Takes what a former agent has left, so long ago. It comes into force with each pool that is seen.
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

    /// How many endpoints are ejected.
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
    /// The endpoints of all services that use the pool; one may be there more than once.
    fn all_hosts(&self) -> impl Iterator<Item = SocketAddr> {
        self.hosts.iter().flat_map(|(_, hosts)| hosts.iter().copied())
    }

    fn poll_timeout(&self) -> Option<Instant> {
        let detector = self.detector.as_ref().and_then(Detector::poll_timeout);
        let warming = self.warming.as_ref().and_then(|warming| warming.next);
        [detector, warming].into_iter().flatten().min()
    }
}
