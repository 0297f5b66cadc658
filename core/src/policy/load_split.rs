//! Splits the connections of a pool among its endpoints: over levels by health, over localities by remaining capacity.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc};

use num_integer::Integer as _;

use super::{
    context::{Candidate, PolicyContext, Weights},
    levels::{endpoint_weights, failover},
    locality::{densify, distribute_weights, failover_levels},
    priority_load::{Level, OVERPROVISIONING_FACTOR, loads},
    share::{Group, Share},
    types::{Endpoint, EndpointHealth, PoolKey, Priority},
    warmup::warmup_factor,
};
use crate::model::{Locality, LocalitySetting, Warmup};

/// Splits the connections of a pool among its endpoints.
pub(super) struct LoadSplit<'a> {
    pub(super) context: &'a PolicyContext<'a>,
    pub(super) warmup: Option<&'a Warmup>,
    /// Panic threshold in percent; 0 disables panic mode.
    pub(super) threshold: u32,
    pub(super) key: &'a PoolKey,
}

impl LoadSplit<'_> {
    /// Splits over levels by health; within a level by locality weight if `by_locality` is set, otherwise by endpoint
    /// weight.
    pub(super) fn by_level(
        &self,
        candidates: &[Candidate<'_>],
        weights: &Weights,
        by_locality: bool,
    ) -> (Vec<Priority>, Vec<Group>) {
        let mut on: Vec<Vec<&Endpoint>> = Vec::new();
        for endpoint in candidates.iter().map(|candidate| &candidate.endpoint) {
            let level = endpoint.priority as usize;
            on.resize_with(on.len().max(level + 1), Vec::new);
            on[level].push(endpoint);
        }
        let (mut priorities, mut groups) = (Vec::new(), Vec::new());
        for ((level, all), (priority, chosen)) in (0..).zip(&on).zip(self.levels(&on)) {
            let load = Share::new(u128::from(priority.load), 100);
            if priority.load > 0 && !chosen.is_empty() {
                if by_locality && !priority.panic {
                    groups.extend(self.by_weight(level, load, weights, &chosen, all));
                } else {
                    groups.push(Group { share: load, members: self.members(chosen) });
                }
            }
            priorities.push(priority);
        }
        (priorities, groups)
    }

    /// Returns the load of each level, and the endpoints on it that receive connections.
    fn levels<'e>(&self, on: &[Vec<&'e Endpoint>]) -> Vec<(Priority, Vec<&'e Endpoint>)> {
        let usable = |endpoints: &[&Endpoint]| endpoints.iter().filter(|endpoint| endpoint.health.is_usable()).count();
        let levels: Vec<Level> =
            on.iter().map(|endpoints| Level::new(endpoints.len() as u64, usable(endpoints) as u64)).collect();
        let loads = loads(&levels, self.threshold, OVERPROVISIONING_FACTOR);
        let chosen = |endpoints: &[&'e Endpoint], panic: bool| {
            // Panic mode revives endpoints that are ejected or fail their probes. Those that are not ready stay out.
            let revived = |health| matches!(health, EndpointHealth::Ejected | EndpointHealth::Failing);
            let may = |endpoint: &&&Endpoint| endpoint.health.is_usable() || (panic && revived(endpoint.health));
            endpoints.iter().filter(may).copied().collect::<Vec<_>>()
        };
        let levels = levels.iter().zip(on).zip(loads.load.iter().zip(&loads.panic));
        levels
            .map(|((level, endpoints), (load, panic))| {
                let priority = Priority { hosts: level.hosts, healthy: level.healthy, load: *load, panic: *panic };
                (priority, chosen(endpoints, *panic))
            })
            .collect()
    }

    /// Splits the level's load by the effective weights of its localities.
    fn by_weight(
        &self,
        level: u32,
        load: Share,
        weights: &Weights,
        chosen: &[&Endpoint],
        all: &[&Endpoint],
    ) -> Vec<Group> {
        let localities: BTreeSet<&Arc<Locality>> = chosen.iter().map(|endpoint| &endpoint.locality).collect();
        let count = |endpoints: &[&Endpoint], locality: &Locality| {
            endpoints.iter().filter(|endpoint| *endpoint.locality == *locality).count() as u64
        };
        let mut parts = Vec::new();
        for locality in &localities {
            let weight = weights.get(&(level, Arc::clone(locality))).copied().unwrap_or_default();
            parts.push((weight, count(all, locality), count(chosen, locality)));
        }
        let weights = effective_weights(&parts, OVERPROVISIONING_FACTOR);
        let total: u128 = weights.iter().sum();
        let parts = localities.into_iter().zip(weights).filter(|(_, weight)| *weight > 0);
        let group = |(locality, weight): (&Arc<Locality>, u128)| {
            let own = chosen.iter().copied().filter(|endpoint| endpoint.locality == *locality);
            Group { share: load * Share::new(weight, total), members: self.members(own) }
        };
        parts.map(group).collect()
    }

    /// Applies `portolan.io/distribute-with-failover`, an extension to Istio.
    pub(super) fn distribute_with_failover(
        &self,
        setting: &LocalitySetting,
        candidates: &mut [Candidate<'_>],
    ) -> (Vec<Priority>, Weights, Vec<Group>) {
        let client = self.context.client;
        let from_client = failover(client, setting, candidates);
        let Some(rule) = setting.distribute.iter().find(|rule| rule.from.matches(&client.locality)) else {
            for (candidate, level) in candidates.iter_mut().zip(from_client) {
                candidate.endpoint.priority = level;
            }
            let weights = endpoint_weights(candidates);
            let (priorities, groups) = self.by_level(candidates, &weights, false);
            return (priorities, weights, groups);
        };
        let of =
            |candidate: &Candidate<'_>| rule.to.iter().position(|(to, _)| to.matches(&candidate.endpoint.locality));
        let targets: Vec<Option<usize>> = candidates.iter().map(of).collect();
        for (candidate, target) in candidates.iter_mut().zip(&targets) {
            candidate.endpoint.priority = u32::from(target.is_none());
        }
        // Approximate loads for reports; the groups carry the exact shares.
        let mut shares = [0.0; 2];
        let (mut groups, mut panics) = (Vec::new(), [false; 2]);
        for (i, (pattern, percent)) in rule.to.iter().enumerate() {
            // Order as seen from the target: the target first, then all others in failover order.
            let by_place = |endpoints: &[&Locality]| failover_levels(&pattern.place(), endpoints, &setting.failover);
            let others: Vec<usize> = (0..candidates.len()).filter(|&at| targets[at] != Some(i)).collect();
            let order = if setting.failover_priority.is_empty() {
                by_place(&others.iter().map(|&at| &*candidates[at].endpoint.locality).collect::<Vec<_>>())
            } else {
                densify(others.iter().map(|&at| from_client[at]).collect())
            };
            let mut on = vec![Vec::new(); 1 + order.iter().max().map_or(0, |level| *level as usize + 1)];
            on[0].extend(
                candidates.iter().zip(&targets).filter(|(_, target)| **target == Some(i)).map(|(own, _)| &own.endpoint),
            );
            for (at, level) in others.into_iter().zip(order) {
                on[1 + level as usize].push(&candidates[at].endpoint);
            }
            for (priority, chosen) in self.levels(&on) {
                let share = Share::new(u128::from(*percent) * u128::from(priority.load), 10_000);
                if share == Share::from(0) || chosen.is_empty() {
                    continue;
                }
                for level in 0..2 {
                    let part = chosen.iter().filter(|endpoint| endpoint.priority == level).count() as u128;
                    let load = f64::from(*percent) * f64::from(priority.load) / 100.0;
                    shares[level as usize] += load * part as f64 / chosen.len() as f64;
                    panics[level as usize] |= priority.panic && part > 0;
                }
                groups.push(Group { share, members: self.members(chosen) });
            }
        }
        let own = endpoint_weights(candidates);
        let given: Vec<(&Locality, u64)> = own.iter().map(|((_, locality), weight)| (&**locality, *weight)).collect();
        let given = distribute_weights(&client.locality, &given, &setting.distribute).unwrap_or_default();
        let weights: Weights =
            own.iter().zip(given).map(|((key, own), given)| (key.clone(), given.unwrap_or(*own))).collect();
        let priorities = (0..2u32).map(|level| {
            let on = || candidates.iter().filter(|candidate| candidate.endpoint.priority == level);
            let healthy = on().filter(|candidate| candidate.endpoint.health.is_usable()).count() as u64;
            let load = shares[level as usize].round() as u32;
            Priority { hosts: on().count() as u64, healthy, load, panic: panics[level as usize] }
        });
        let mut priorities: Vec<Priority> = priorities.collect();
        while priorities.last().is_some_and(|last| last.hosts == 0) {
            priorities.pop();
        }
        (priorities, weights, groups)
    }

    /// Returns endpoints with their weights, which are reduced during warmup.
    fn members<'e>(&self, endpoints: impl IntoIterator<Item = &'e Endpoint>) -> Vec<(SocketAddr, u32)> {
        let endpoints: Vec<&Endpoint> = endpoints.into_iter().collect();
        let factor = |endpoint: &Endpoint| {
            let age = self.context.observed.age(self.key, &endpoint.address)?;
            Some(warmup_factor(self.warmup?, age)).filter(|factor| *factor < 1.0)
        };
        if self.warmup.is_none() || !endpoints.iter().any(|endpoint| factor(endpoint).is_some()) {
            return endpoints.into_iter().map(|endpoint| (endpoint.address, endpoint.weight)).collect();
        }
        let weight = |endpoint: &Endpoint| {
            let full = u64::from(endpoint.weight) * WARMUP_STEPS;
            let part = factor(endpoint).map_or(full, |factor| ((full as f64 * factor).round() as u64).max(1));
            u32::try_from(part).unwrap_or(u32::MAX)
        };
        endpoints.into_iter().map(|endpoint| (endpoint.address, weight(endpoint))).collect()
    }
}

/// Resolution of warmup: each unit of endpoint weight is divided into this many parts.
const WARMUP_STEPS: u64 = 100;

/// Returns the effective weight of each locality, given its weight, hosts and healthy hosts.
pub fn effective_weights(localities: &[(u64, u64, u64)], factor: u64) -> Vec<u128> {
    // Health is a fraction, which is an integer in multiples of 1/unit.
    let unit = localities
        .iter()
        .try_fold(100u128, |unit, (_, hosts, _)| {
            Some(unit.lcm(&(100 * u128::from((*hosts).max(1))))).filter(|unit| *unit <= 10_000_000_000)
        })
        .unwrap_or(10_000_000_000);
    let weight = |(weight, hosts, healthy): &(u64, u64, u64)| {
        let health = unit * u128::from(factor) * u128::from(*healthy) / (100 * u128::from((*hosts).max(1)));
        health.min(unit) * u128::from(*weight)
    };
    localities.iter().map(weight).collect()
}
