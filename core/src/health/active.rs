//! Endpoints that the agent probes by itself: which pools want that of whom, and whose probes fail.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use crate::{model::Probe, policy::PoolKey};

/// An endpoint is to be probed from now on, under this number, or no longer.
pub type Wanted = (Target, Option<u64>);

/// All pools that want probes.
#[derive(Clone, Debug, Default)]
pub(super) struct Probing {
    targets: BTreeMap<Target, State>,
    of_pools: BTreeMap<PoolKey, BTreeSet<Target>>,
    /// What has to be told to the one who probes.
    news: Vec<Wanted>,
    last_number: u64,
}

#[derive(Clone, Debug, Default)]
struct State {
    /// The pools that want it: one probe is for all of them.
    pools: BTreeSet<PoolKey>,
    number: u64,
    /// Why it is failing.
    failing: Option<String>,
}

impl Probing {
    /// The endpoints of a pool, and how they are to be probed.
    pub(super) fn set(&mut self, key: &PoolKey, hosts: &BTreeSet<SocketAddr>, probe: Option<&Arc<Probe>>) {
        let of = |probe: &Arc<Probe>| {
            let target = |host: &SocketAddr| Target { endpoint: *host, probe: Arc::clone(probe) };
            hosts.iter().map(target).collect()
        };
        let wanted: BTreeSet<Target> = probe.map(of).unwrap_or_default();
        let before = self.of_pools.remove(key).unwrap_or_default();
        for target in before.difference(&wanted) {
            if let Some(state) = self.targets.get_mut(target) {
                state.pools.remove(key);
                if state.pools.is_empty() {
                    self.targets.remove(target);
                    self.news.push((target.clone(), None));
                }
            }
        }
        for target in wanted.difference(&before) {
            let state = self.targets.entry(target.clone()).or_default();
            if state.pools.is_empty() {
                self.last_number += 1;
                state.number = self.last_number;
                self.news.push((target.clone(), Some(state.number)));
            }
            state.pools.insert(key.clone());
        }
        if !wanted.is_empty() {
            self.of_pools.insert(key.clone(), wanted);
        }
    }

    /// What was found of an endpoint; the pools that it is for.
    pub(super) fn take(&mut self, target: &Target, number: u64, failing: Option<String>) -> BTreeSet<PoolKey> {
        // It may have been wanted no more by then.
        let state = self.targets.get_mut(target).filter(|state| state.number == number);
        let Some(state) = state else { return BTreeSet::new() };
        state.failing = failing;
        state.pools.clone()
    }

    pub(super) fn failing(&self, key: &PoolKey) -> BTreeSet<SocketAddr> {
        let targets = self.of_pools.get(key).into_iter().flatten();
        let failing = targets.filter(|target| self.targets.get(target).is_some_and(|state| state.failing.is_some()));
        failing.map(|target| target.endpoint).collect()
    }

    pub(super) fn news(&mut self) -> Vec<Wanted> {
        std::mem::take(&mut self.news)
    }

    /// Endpoints that are probed, those that fail, and probes in a second that this makes.
    pub(super) fn extent(&self) -> (usize, usize, f64) {
        let failing = self.targets.values().filter(|state| state.failing.is_some()).count();
        let per_second = self.targets.keys().map(|target| target.probe.period.as_secs_f64().recip()).sum();
        (self.targets.len(), failing, per_second)
    }
}

/// An endpoint, and how it is probed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// Address of the endpoint.
    pub endpoint: SocketAddr,
    /// How.
    pub probe: Arc<Probe>,
}
