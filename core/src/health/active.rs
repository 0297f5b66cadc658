//! Active health checks: which endpoints pools want probed, and whose probes fail.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use crate::{model::Probe, policy::PoolKey};

/// A target to probe from now on, with the number of the probe, or to stop probing if the number is `None`.
pub type Wanted = (Target, Option<u64>);

/// The probes that all pools request.
#[derive(Clone, Debug, Default)]
pub(super) struct Probing {
    targets: BTreeMap<Target, State>,
    targets_of_pool: BTreeMap<PoolKey, BTreeSet<Target>>,
    /// Changes that [`Self::news`] has not returned yet.
    news: Vec<Wanted>,
    last_number: u64,
}

#[derive(Clone, Debug, Default)]
struct State {
    /// Pools that request the probe, which share its result.
    pools: BTreeSet<PoolKey>,
    number: u64,
    /// Reason of the last failure; `None` while the probe succeeds.
    failing: Option<String>,
}

impl Probing {
    /// Replaces the endpoints of a pool and its probe settings; `None` disables probing.
    pub(super) fn set(&mut self, key: &PoolKey, hosts: &BTreeSet<SocketAddr>, probe: Option<&Arc<Probe>>) {
        let of = |probe: &Arc<Probe>| {
            let target = |host: &SocketAddr| Target { endpoint: *host, probe: Arc::clone(probe) };
            hosts.iter().map(target).collect()
        };
        let wanted: BTreeSet<Target> = probe.map(of).unwrap_or_default();
        let before = self.targets_of_pool.remove(key).unwrap_or_default();
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
            self.targets_of_pool.insert(key.clone(), wanted);
        }
    }

    /// Records a probe result, and returns the pools that use it.
    pub(super) fn take(&mut self, target: &Target, number: u64, failing: Option<String>) -> BTreeSet<PoolKey> {
        // The probe may have been stopped or replaced in the meantime.
        let state = self.targets.get_mut(target).filter(|state| state.number == number);
        let Some(state) = state else { return BTreeSet::new() };
        state.failing = failing;
        state.pools.clone()
    }

    pub(super) fn failing(&self, key: &PoolKey) -> BTreeSet<SocketAddr> {
        let targets = self.targets_of_pool.get(key).into_iter().flatten();
        let failing = targets.filter(|target| self.targets.get(target).is_some_and(|state| state.failing.is_some()));
        failing.map(|target| target.endpoint).collect()
    }

    pub(super) fn news(&mut self) -> Vec<Wanted> {
        std::mem::take(&mut self.news)
    }

    /// Returns the number of probed endpoints, the number of failing ones, and the probes per second.
    pub(super) fn extent(&self) -> (usize, usize, f64) {
        let failing = self.targets.values().filter(|state| state.failing.is_some()).count();
        let per_second = self.targets.keys().map(|target| target.probe.period.as_secs_f64().recip()).sum();
        (self.targets.len(), failing, per_second)
    }
}

/// An endpoint, together with its probe settings.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// Address of the endpoint; the probe may name another port.
    pub endpoint: SocketAddr,
    /// Probe settings, which the endpoints of a pool share.
    pub probe: Arc<Probe>,
}
