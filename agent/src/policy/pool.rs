//! One pool: its endpoints, their levels, and the share of each group of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use num_integer::Integer as _;

use super::{
    Client, Ejections, Endpoint, PoolKey, RuleBook, Share,
    cluster_local::is_cluster_local,
    endpoints::{self, Filter},
    load::{Level, OVERPROVISIONING_FACTOR, loads},
    locality::{distribute_weights, failover_levels},
};
use crate::{
    model::{Algorithm, Finding, Locality, LocalitySetting, OutlierDetection, TrafficPolicy},
    store::Snapshot,
};

/// Everything that a pool is computed from.
pub(super) struct Scene<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) client: &'a Client,
    pub(super) rules: &'a RuleBook,
    pub(super) ejections: &'a Ejections,
    /// Which address family the frontend has; endpoints of the other one cannot be dialled from it.
    pub(super) family: fn(&IpAddr) -> bool,
}

/// How localities count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// They do not: all endpoints are one pool.
    None,
    /// Nearest first.
    Failover,
    /// By percentage.
    Distribute,
}

impl Mode {
    /// As the contract names it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Failover => "failover",
            Self::Distribute => "distribute",
        }
    }
}

/// A level of endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Priority {
    /// Endpoints in it.
    pub hosts: u64,
    /// Those that may be chosen.
    pub healthy: u64,
    /// Percent of the connections.
    pub load: u32,
    /// Whether all endpoints are used, healthy or not.
    pub panic: bool,
}

/// The endpoints of one locality on one level.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalityShare {
    /// Which locality.
    pub locality: Locality,
    /// On which level.
    pub priority: u32,
    /// Its weight before health: from `distribute`, or the sum of its endpoints'.
    pub weight: u64,
}

/// Endpoints that share what the group gets.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Fraction of the pool's connections.
    pub share: Share,
    /// Addresses and weights of those that may be chosen.
    pub members: Vec<(SocketAddr, u32)>,
}

/// The verdict for one pool.
#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    /// Which pool.
    pub key: PoolKey,
    /// How localities count.
    pub mode: Mode,
    /// Whether only the client's own cluster serves.
    pub cluster_local: bool,
    /// Host choice.
    pub algorithm: Algorithm,
    /// When endpoints are ejected.
    pub outlier: Option<OutlierDetection>,
    /// Limit for the connect, where a rule sets one.
    pub connect_timeout: Option<Duration>,
    /// Levels, nearest first.
    pub priorities: Vec<Priority>,
    /// In order of level and name.
    pub localities: Vec<LocalityShare>,
    /// In order of their addresses.
    pub endpoints: Vec<Endpoint>,
    /// Who gets which share; empty: refuse.
    pub groups: Vec<Group>,
}

pub(super) fn build(scene: &Scene<'_>, key: PoolKey, routed: bool, findings: &mut Vec<Finding>) -> Pool {
    let rule = scene.rules.destination_rule(&key.service);
    let policy = rule.map(|rule| scene.rules.traffic_policy(rule, &key)).unwrap_or_default();
    let setting = policy.locality.as_ref().unwrap_or(&scene.rules.mesh.locality);
    let subset =
        rule.zip(key.subset.as_ref()).and_then(|(rule, name)| rule.subsets.iter().find(|subset| subset.name == *name));
    let cluster_local = is_cluster_local(&scene.rules.mesh, &scene.rules.host_of(&key.service));
    let threshold = policy.outlier.as_ref().map_or(0, |outlier| outlier.min_health_percent);

    let filter = Filter {
        key: &key,
        labels: subset.map(|subset| &subset.labels),
        cluster_local,
        ruled: rule.is_some() || routed,
        panic_possible: threshold > 0,
    };
    let mut endpoints = if let (Some(name), None) = (&key.subset, subset) {
        let message =
            format!("subset {name:?} of {} is defined by no DestinationRule: its connections are refused", key.service);
        findings.push(Finding::error(format!("Service {}", key.service), message));
        Vec::new()
    } else {
        endpoints::select(scene, &filter)
    };
    check_ejection_limit(&key, &policy, endpoints.len(), findings);

    let mode = mode(setting, &policy);
    let weights = place(scene.client, mode, setting, &mut endpoints);
    let explicit = mode == Mode::Failover && !setting.failover.is_empty();
    let (priorities, groups) = share(&endpoints, &weights, threshold, mode == Mode::Distribute || explicit);
    let localities = weights
        .into_iter()
        .map(|((priority, locality), weight)| LocalityShare { locality, priority, weight })
        .collect();
    Pool {
        key,
        mode,
        cluster_local,
        algorithm: policy.algorithm.unwrap_or(Algorithm::RoundRobin),
        outlier: policy.outlier,
        connect_timeout: policy.connect_timeout.or(scene.rules.mesh.connect_timeout),
        priorities,
        localities,
        endpoints,
        groups,
    }
}

/// `distribute` needs nothing else; failover, whether asked for or Istio's default, needs outlier detection.
fn mode(setting: &LocalitySetting, policy: &TrafficPolicy) -> Mode {
    if !setting.enabled {
        Mode::None
    } else if !setting.distribute.is_empty() {
        Mode::Distribute
    } else if policy.outlier.is_some() {
        Mode::Failover
    } else {
        Mode::None
    }
}

type Weights = BTreeMap<(u32, Locality), u64>;

/// Gives each endpoint its level, drops those that `distribute` leaves out, and returns the weight of each locality.
fn place(client: &Client, mode: Mode, setting: &LocalitySetting, endpoints: &mut Vec<Endpoint>) -> Weights {
    if mode == Mode::Failover {
        let localities: Vec<&Locality> = endpoints.iter().map(|endpoint| &endpoint.locality).collect();
        let levels = failover_levels(&client.locality, &localities, &setting.failover);
        for (endpoint, level) in endpoints.iter_mut().zip(levels) {
            endpoint.priority = level;
        }
    }
    let mut weights = Weights::new();
    for endpoint in &*endpoints {
        *weights.entry((endpoint.priority, endpoint.locality.clone())).or_default() += u64::from(endpoint.weight);
    }
    if mode == Mode::Distribute {
        let own: Vec<(&Locality, u64)> = weights.iter().map(|((_, locality), weight)| (locality, *weight)).collect();
        if let Some(given) = distribute_weights(&client.locality, &own, &setting.distribute) {
            let keys: Vec<_> = weights.keys().cloned().collect();
            weights = keys.into_iter().zip(given).filter_map(|(key, weight)| Some((key, weight?))).collect();
            endpoints.retain(|endpoint| weights.contains_key(&(0, endpoint.locality.clone())));
        }
    }
    weights
}

/// Divides the connections: over the levels by their health, inside a level by locality (where that is asked for) or evenly.
fn share(endpoints: &[Endpoint], weights: &Weights, threshold: u32, by_locality: bool) -> (Vec<Priority>, Vec<Group>) {
    let count = endpoints.iter().map(|endpoint| endpoint.priority + 1).max().unwrap_or(0);
    let on = |level: u32| endpoints.iter().filter(move |endpoint| endpoint.priority == level);
    let usable = |endpoint: &&Endpoint| endpoint.health.is_usable();
    let levels: Vec<Level> = (0..count)
        .map(|level| Level { hosts: on(level).count() as u64, healthy: on(level).filter(usable).count() as u64 })
        .collect();
    let loads = loads(&levels, threshold, OVERPROVISIONING_FACTOR);

    let (mut priorities, mut groups) = (Vec::new(), Vec::new());
    for (level, hosts) in (0..count).zip(&levels) {
        let (load, panic) = (loads.load[level as usize], loads.panic[level as usize]);
        priorities.push(Priority { hosts: hosts.hosts, healthy: hosts.healthy, load, panic });
        let chosen: Vec<&Endpoint> = on(level).filter(|endpoint| panic || endpoint.health.is_usable()).collect();
        if load == 0 || chosen.is_empty() {
            continue;
        }
        let load = Share::new(u128::from(load), 100);
        if by_locality && !panic {
            groups.extend(by_weight(level, load, weights, &chosen, &on(level).collect::<Vec<_>>()));
        } else {
            groups.push(Group { share: load, members: members(chosen) });
        }
    }
    (priorities, groups)
}

/// The level's load, divided by the effective weights of its localities: a locality that lost more than its spare hosts weighs
/// less (Envoy's locality weighted load balancing).
fn by_weight(level: u32, load: Share, weights: &Weights, chosen: &[&Endpoint], all: &[&Endpoint]) -> Vec<Group> {
    let localities: BTreeSet<&Locality> = chosen.iter().map(|endpoint| &endpoint.locality).collect();
    let count = |endpoints: &[&Endpoint], locality: &Locality| {
        endpoints.iter().filter(|endpoint| endpoint.locality == *locality).count() as u128
    };
    // Health is a fraction; in units of this size it is a whole number, unless there are more localities of more sizes than
    // any schedule could show.
    let unit = localities
        .iter()
        .try_fold(10u128, |unit, locality| {
            Some(unit.lcm(&(10 * count(all, locality)))).filter(|unit| *unit <= 1_000_000_000)
        })
        .unwrap_or(1_000_000_000);
    let mut parts = Vec::new();
    for locality in localities {
        let health = (unit * 14 * count(chosen, locality) / (10 * count(all, locality))).min(unit);
        let weight = weights.get(&(level, locality.clone())).copied().unwrap_or_default();
        let own = chosen.iter().copied().filter(|endpoint| endpoint.locality == *locality);
        parts.push((health * u128::from(weight), members(own)));
    }
    let total: u128 = parts.iter().map(|(weight, _)| weight).sum();
    parts.retain(|(weight, _)| *weight > 0);
    parts.into_iter().map(|(weight, members)| Group { share: load * Share::new(weight, total), members }).collect()
}

fn members<'a>(endpoints: impl IntoIterator<Item = &'a Endpoint>) -> Vec<(SocketAddr, u32)> {
    endpoints.into_iter().map(|endpoint| (endpoint.address, endpoint.weight)).collect()
}

/// Envoy dropped "at least one" in 1.28, so a percentage of a small pool may be no host at all. People should know.
fn check_ejection_limit(key: &PoolKey, policy: &TrafficPolicy, hosts: usize, findings: &mut Vec<Finding>) {
    let Some(outlier) = &policy.outlier else { return };
    let percent = outlier.max_ejection_percent as usize;
    if hosts > 0 && outlier.consecutive_errors > 0 && hosts * percent / 100 == 0 {
        let message = format!(
            "outlierDetection.maxEjectionPercent: {percent} % of {hosts} endpoints of port {} is none, so none is ever ejected; \
             raise it to {} or more",
            key.port,
            100usize.div_ceil(hosts)
        );
        findings.push(Finding::warning(format!("Service {}", key.service), message));
    }
}
