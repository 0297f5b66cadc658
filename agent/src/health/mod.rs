//! Health from what really happens to connections: one outlier detector for each pool that asks for one.

mod outlier;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    time::Instant,
};

pub use outlier::{Detector, Ejection, Event, EventKind, Verdict};

use crate::policy::{Assignment, Ejections, Pool, PoolKey};

/// All pools.
#[derive(Clone, Debug, Default)]
pub struct Health {
    pools: BTreeMap<PoolKey, Detector>,
    /// The pools that an endpoint is in.
    members: HashMap<SocketAddr, Vec<PoolKey>>,
}

impl Health {
    /// Takes the pools, their endpoints and their settings from the policy's verdict. What is ejected stays so, as long as it
    /// is there.
    pub fn configure(&mut self, now: Instant, assignments: &[Assignment]) {
        let mut wanted: BTreeMap<&PoolKey, Vec<&Pool>> = BTreeMap::new();
        for pool in assignments.iter().flat_map(|assignment| &assignment.routes).map(|route| &route.pool) {
            if pool.outlier.is_some() {
                wanted.entry(&pool.key).or_default().push(pool);
            }
        }
        self.pools.retain(|key, _| wanted.contains_key(key));
        self.members.clear();
        for (key, pools) in wanted {
            let Some(settings) = pools.iter().find_map(|pool| pool.outlier.as_ref()) else { continue };
            // A pool may be reached by several frontends, and in both address families.
            let hosts: BTreeSet<SocketAddr> =
                pools.iter().flat_map(|pool| &pool.endpoints).map(|endpoint| endpoint.address).collect();
            let detector = self.pools.entry(key.clone()).or_insert_with(|| Detector::new(settings.clone(), now));
            detector.configure(settings, now);
            detector.set_hosts(&hosts);
            for host in hosts {
                self.members.entry(host).or_default().push(key.clone());
            }
        }
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
            let event = self.pools.get_mut(key).and_then(|detector| detector.observe(now, address, verdict));
            events.extend(event.map(|event| (key.clone(), event)));
        }
        events
    }

    /// Whether some pool counts failures of the endpoint, so that a success would change something.
    pub fn counts(&self, address: &SocketAddr) -> bool {
        let pools = self.members.get(address).into_iter().flatten();
        pools.filter_map(|key| self.pools.get(key)).any(|detector| detector.counts(address))
    }

    /// When [`Self::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.pools.values().filter_map(Detector::poll_timeout).min()
    }

    /// The sweeps that are due.
    pub fn handle_timeout(&mut self, now: Instant) -> Vec<(PoolKey, Event)> {
        let due = self.pools.iter_mut().filter(|(_, detector)| detector.poll_timeout().is_some_and(|at| at <= now));
        due.flat_map(|(key, detector)| detector.handle_timeout(now).into_iter().map(|event| (key.clone(), event)))
            .collect()
    }

    /// The ejections in force, for the policy.
    pub fn ejections(&self) -> Ejections {
        let of = |detector: &Detector| detector.ejections().map(|(address, _)| address).collect::<BTreeSet<_>>();
        let by_pool = self.pools.iter().map(|(key, detector)| (key.clone(), of(detector)));
        let by_pool = by_pool.filter(|(_, ejected)| !ejected.is_empty());
        Ejections { by_pool: by_pool.collect(), everywhere: BTreeSet::new() }
    }

    /// The ejection of an endpoint, if it is ejected.
    pub fn ejection(&self, pool: &PoolKey, address: &SocketAddr) -> Option<Ejection> {
        self.pools.get(pool)?.ejections().find(|(ejected, _)| ejected == address).map(|(_, ejection)| ejection)
    }

    /// How many endpoints are ejected.
    pub fn ejected(&self) -> usize {
        self.pools.values().map(|detector| detector.ejections().count()).sum()
    }
}
