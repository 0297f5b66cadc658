//! One pool: its endpoints, their levels, and the share of each group of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use num_integer::Integer as _;

use super::{
    Client, Endpoint, LeftOut, Observed, PoolKey, RuleBook, Share,
    cluster_local::retention,
    endpoints::{self, Candidate, EndpointHealth, Filter},
    load::{Level, OVERPROVISIONING_FACTOR, loads},
    locality::{SettingSource, compacted, distribute_weights, effective_setting, failover_levels, levels},
    service,
    warmup::warmup_factor,
};
use crate::{
    model::{
        Algorithm, Code, ConnectionPool, DestinationRule, Finding, Locality, LocalitySetting, OutlierDetection,
        Retention, Warmup,
    },
    store::Snapshot,
};

/// Everything that a pool is computed from.
pub(super) struct Scene<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) client: &'a Client,
    pub(super) rules: &'a RuleBook,
    pub(super) observed: &'a Observed,
    /// Which address family the frontend has; endpoints of the other one cannot be dialled from it.
    pub(super) family: fn(&IpAddr) -> bool,
    /// The place of what is nowhere.
    pub(super) nowhere: &'a Arc<Locality>,
    /// Whether somebody wants to know what was left out.
    pub(super) explain: bool,
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
    /// Where the locality setting comes from; none counts where it is absent.
    pub setting: Option<SettingSource>,
    /// Whether connections stay in the client's own cluster.
    pub retention: Retention,
    /// The pattern that says so.
    pub retained_by: Option<String>,
    /// The DestinationRule in force.
    pub rule: Option<Arc<DestinationRule>>,
    /// Host choice, as the kernel makes it.
    pub algorithm: Algorithm,
    /// When endpoints are ejected.
    pub outlier: Option<OutlierDetection>,
    /// What new endpoints get.
    pub warmup: Option<Warmup>,
    /// Limits on connections.
    pub limits: ConnectionPool,
    /// Levels, nearest first.
    pub priorities: Vec<Priority>,
    /// In order of level and name.
    pub localities: Vec<LocalityShare>,
    /// In order of their addresses.
    pub endpoints: Vec<Endpoint>,
    /// How many groups share the connections; 0: refuse.
    pub groups: usize,
    /// Endpoints that it does not have, where somebody wants to know.
    pub left_out: Vec<LeftOut>,
}

/// The pool, and who gets which share of its connections; nobody: refuse.
pub(super) fn build(scene: &Scene<'_>, key: PoolKey, routed: bool, findings: &mut Vec<Finding>) -> (Pool, Vec<Group>) {
    let rule = scene.rules.destination_rule(&key.service);
    let policy = rule.map(|rule| scene.rules.traffic_policy(rule, &key)).unwrap_or_default();
    let view = service::find(scene.snapshot, &scene.client.cluster, &key.service);
    let distribution = view.as_ref().and_then(|view| view.distribution);
    let effective = effective_setting(policy.locality(), distribution, &scene.rules.mesh.locality);
    let host = scene.rules.host_of(&key.service).unwrap_or_default();
    let (retention, retained_by) = retention(&scene.rules.mesh, &host);
    let threshold = policy.outlier.as_ref().map_or(0, |outlier| outlier.min_health_percent);
    let subset =
        rule.zip(key.subset.as_ref()).and_then(|(rule, name)| rule.subsets.iter().find(|subset| subset.name == *name));

    let filter = Filter {
        key: &key,
        labels: subset.map(|subset| &subset.labels),
        retention,
        ruled: rule.is_some() || routed,
        ready_only: threshold > 0 && distribution.is_none(),
        ejects: policy.outlier.is_some(),
    };
    let (mut candidates, left_out) = if let (Some(name), None) = (&key.subset, subset) {
        let message =
            format!("subset {name:?} of {} is defined by no DestinationRule: its connections are refused", key.service);
        findings.push(Finding::new(Code::UnknownSubset, key.service.object(), message));
        Default::default()
    } else {
        endpoints::select(scene, &filter)
    };
    check_ejection_limit(&key, policy.outlier.as_ref(), candidates.len(), findings);

    let balancer = policy.balancer.unwrap_or_default();
    let warmup = balancer.warmup.as_ref();
    let (setting, source) = effective.unzip();
    let mode = mode(setting.as_ref(), source, policy.outlier.is_some(), retention);
    let spread = Spread { scene, warmup, threshold, key: &key };
    let (priorities, weights, groups) = match (&setting, mode) {
        (Some(setting), Mode::Distribute) if setting.distribute_with_failover => {
            spread.distribute_with_failover(setting, &mut candidates)
        }
        _ => {
            let default = LocalitySetting::default();
            let setting = setting.as_ref().unwrap_or(&default);
            let distribution = source == Some(SettingSource::TrafficDistribution);
            let by_distance = distribution || (source.is_some() && policy.outlier.is_some());
            let weights = place(scene.client, mode, setting, by_distance, retention, &mut candidates);
            let explicit = !(setting.failover.is_empty() && setting.failover_priority.is_empty());
            let ejects = policy.outlier.is_some();
            let by_locality = mode == Mode::Distribute || (mode == Mode::Failover && explicit && ejects);
            let (priorities, groups) = spread.by_level(&candidates, &weights, by_locality);
            (priorities, weights, groups)
        }
    };
    if mode == Mode::Distribute && retention == Retention::Prefer {
        let message = format!(
            "port {}: distribute says where connections go; that the own cluster is preferred has no effect",
            key.port
        );
        findings.push(Finding::new(Code::NotTogether, key.service.object(), message));
    }
    let localities = weights
        .into_iter()
        .map(|((priority, locality), weight)| LocalityShare { locality, priority, weight })
        .collect();
    let mut limits = policy.pool.unwrap_or_default();
    limits.connect_timeout = limits.connect_timeout.or(scene.rules.mesh.connect_timeout);
    let pool = Pool {
        mode,
        setting: source,
        retention,
        retained_by,
        rule: rule.cloned(),
        algorithm: algorithm(balancer.algorithm, &key, retention, findings),
        outlier: policy.outlier,
        warmup: balancer.warmup,
        limits,
        priorities,
        localities,
        endpoints: candidates.into_iter().map(|candidate| candidate.endpoint).collect(),
        groups: groups.len(),
        left_out,
        key,
    };
    (pool, groups)
}

/// What the kernel does of what was asked for (the reader has said what is not built yet).
fn algorithm(asked: Option<Algorithm>, key: &PoolKey, retention: Retention, findings: &mut Vec<Finding>) -> Algorithm {
    if asked != Some(Algorithm::Passthrough) {
        return Algorithm::RoundRobin;
    }
    if retention == Retention::Strict {
        let message =
            "PASSTHROUGH would let connections leave their cluster, which clusterLocal forbids; ROUND_ROBIN is used";
        findings.push(Finding::new(Code::NotTogether, key.service.object(), message));
        return Algorithm::RoundRobin;
    }
    Algorithm::Passthrough
}

/// `distribute` needs nothing else; failover, whether asked for or Istio's default, needs outlier detection, unless it is Kubernetes'
/// `trafficDistribution` or a preference for the own cluster.
fn mode(setting: Option<&LocalitySetting>, source: Option<SettingSource>, ejects: bool, retention: Retention) -> Mode {
    match setting {
        Some(setting) if !setting.distribute.is_empty() => Mode::Distribute,
        Some(_) if ejects || source == Some(SettingSource::TrafficDistribution) => Mode::Failover,
        _ if retention == Retention::Prefer => Mode::Failover,
        _ => Mode::None,
    }
}

type Weights = BTreeMap<(u32, Locality), u64>;

/// Gives each endpoint its level, drops those that `distribute` leaves out, and returns the weight of each locality.
fn place(
    client: &Client,
    mode: Mode,
    setting: &LocalitySetting,
    by_distance: bool,
    retention: Retention,
    candidates: &mut Vec<Candidate<'_>>,
) -> Weights {
    if mode == Mode::Failover {
        let mut levels = if by_distance { failover(client, setting, candidates) } else { vec![0; candidates.len()] };
        if retention == Retention::Prefer {
            // However far inside the own cluster, it is nearer than any other.
            let outside = levels.iter().max().map_or(0, |level| level + 1);
            for (level, candidate) in levels.iter_mut().zip(&*candidates) {
                *level += if candidate.endpoint.cluster == client.cluster { 0 } else { outside };
            }
        }
        for (candidate, level) in candidates.iter_mut().zip(compacted(levels)) {
            candidate.endpoint.priority = level;
        }
    }
    let mut weights = own_weights(candidates);
    if mode == Mode::Distribute {
        let own: Vec<(&Locality, u64)> = weights.iter().map(|((_, locality), weight)| (locality, *weight)).collect();
        if let Some(given) = distribute_weights(&client.locality, &own, &setting.distribute) {
            let keys: Vec<_> = weights.keys().cloned().collect();
            weights = keys.into_iter().zip(given).filter_map(|(key, weight)| Some((key, weight?))).collect();
            candidates.retain(|candidate| weights.contains_key(&(0, (*candidate.endpoint.locality).clone())));
        }
    }
    weights
}

/// The level of each endpoint, as the setting orders them.
fn failover(client: &Client, setting: &LocalitySetting, candidates: &[Candidate<'_>]) -> Vec<u32> {
    let localities: Vec<&Locality> = candidates.iter().map(|candidate| &*candidate.endpoint.locality).collect();
    levels((&client.labels, &client.locality), setting, &localities, candidates)
}

/// The weight of each locality: the sum of its endpoints'.
fn own_weights(candidates: &[Candidate<'_>]) -> Weights {
    let mut weights = Weights::new();
    for Endpoint { priority, locality, weight, .. } in candidates.iter().map(|candidate| &candidate.endpoint) {
        *weights.entry((*priority, (**locality).clone())).or_default() += u64::from(*weight);
    }
    weights
}

/// Divides the connections among the endpoints of a pool.
struct Spread<'a> {
    scene: &'a Scene<'a>,
    warmup: Option<&'a Warmup>,
    /// Panic threshold in percent.
    threshold: u32,
    key: &'a PoolKey,
}

impl Spread<'_> {
    /// Over the levels by their health, inside a level by locality (where that is asked for) or evenly.
    fn by_level(
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

    /// The load of each level, and those on it that may be chosen.
    fn levels<'e>(&self, on: &[Vec<&'e Endpoint>]) -> Vec<(Priority, Vec<&'e Endpoint>)> {
        let usable = |endpoints: &[&Endpoint]| endpoints.iter().filter(|endpoint| endpoint.health.is_usable()).count();
        let levels: Vec<Level> =
            on.iter().map(|endpoints| Level::new(endpoints.len() as u64, usable(endpoints) as u64)).collect();
        let loads = loads(&levels, self.threshold, OVERPROVISIONING_FACTOR);
        let chosen = |endpoints: &[&'e Endpoint], panic: bool| {
            // What panic revives was ejected. What is not ready stays out.
            let may = |endpoint: &&&Endpoint| {
                endpoint.health.is_usable() || (panic && endpoint.health == EndpointHealth::Ejected)
            };
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

    /// The level's load, divided by the effective weights of its localities: a locality that lost more than its spare hosts weighs
    /// less (Envoy's locality weighted load balancing).
    fn by_weight(
        &self,
        level: u32,
        load: Share,
        weights: &Weights,
        chosen: &[&Endpoint],
        all: &[&Endpoint],
    ) -> Vec<Group> {
        let localities: BTreeSet<&Locality> = chosen.iter().map(|endpoint| &*endpoint.locality).collect();
        let count = |endpoints: &[&Endpoint], locality: &Locality| {
            endpoints.iter().filter(|endpoint| *endpoint.locality == *locality).count() as u64
        };
        let mut parts = Vec::new();
        for locality in &localities {
            let weight = weights.get(&(level, (*locality).clone())).copied().unwrap_or_default();
            parts.push((weight, count(all, locality), count(chosen, locality)));
        }
        let weights = effective_weights(&parts, OVERPROVISIONING_FACTOR);
        let total: u128 = weights.iter().sum();
        let parts = localities.into_iter().zip(weights).filter(|(_, weight)| *weight > 0);
        let group = |(locality, weight): (&Locality, u128)| {
            let own = chosen.iter().copied().filter(|endpoint| *endpoint.locality == *locality);
            Group { share: load * Share::new(weight, total), members: self.members(own) }
        };
        parts.map(group).collect()
    }

    /// Portolan's own: the shares of `distribute` hold, and what a locality cannot carry goes where failover leads from there.
    fn distribute_with_failover(
        &self,
        setting: &LocalitySetting,
        candidates: &mut [Candidate<'_>],
    ) -> (Vec<Priority>, Weights, Vec<Group>) {
        let client = self.scene.client;
        let from_client = failover(client, setting, candidates);
        let Some(rule) = setting.distribute.iter().find(|rule| rule.from.matches(&client.locality)) else {
            for (candidate, level) in candidates.iter_mut().zip(from_client) {
                candidate.endpoint.priority = level;
            }
            let weights = own_weights(candidates);
            let (priorities, groups) = self.by_level(candidates, &weights, false);
            return (priorities, weights, groups);
        };
        let of =
            |candidate: &Candidate<'_>| rule.to.iter().position(|(to, _)| to.matches(&candidate.endpoint.locality));
        let targets: Vec<Option<usize>> = candidates.iter().map(of).collect();
        for (candidate, target) in candidates.iter_mut().zip(&targets) {
            candidate.endpoint.priority = u32::from(target.is_none());
        }
        let mut shares: Vec<Share> = vec![Share::from(0); 2];
        let (mut groups, mut panics) = (Vec::new(), [false; 2]);
        for (i, (place, percent)) in rule.to.iter().enumerate() {
            // From here: the target itself, then all others in the order of failover.
            let by_place = |endpoints: &[&Locality]| failover_levels(&place.place(), endpoints, &setting.failover);
            let others: Vec<usize> = (0..candidates.len()).filter(|&at| targets[at] != Some(i)).collect();
            let order = if setting.failover_priority.is_empty() {
                by_place(&others.iter().map(|&at| &*candidates[at].endpoint.locality).collect::<Vec<_>>())
            } else {
                compacted(others.iter().map(|&at| from_client[at]).collect())
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
                    shares[level as usize] += share * Share::new(part, chosen.len() as u128);
                    panics[level as usize] |= priority.panic && part > 0;
                }
                groups.push(Group { share, members: self.members(chosen) });
            }
        }
        let own = own_weights(candidates);
        let given: Vec<(&Locality, u64)> = own.iter().map(|((_, locality), weight)| (locality, *weight)).collect();
        let given = distribute_weights(&client.locality, &given, &setting.distribute).unwrap_or_default();
        let weights: Weights =
            own.iter().zip(given).map(|((key, own), given)| (key.clone(), given.unwrap_or(*own))).collect();
        let priorities = (0..2u32).map(|level| {
            let on = || candidates.iter().filter(|candidate| candidate.endpoint.priority == level);
            let healthy = on().filter(|candidate| candidate.endpoint.health.is_usable()).count() as u64;
            let load = (shares[level as usize] * Share::from(100)).round().to_integer() as u32;
            Priority { hosts: on().count() as u64, healthy, load, panic: panics[level as usize] }
        });
        let mut priorities: Vec<Priority> = priorities.collect();
        while priorities.last().is_some_and(|last| last.hosts == 0) {
            priorities.pop();
        }
        (priorities, weights, groups)
    }

    /// Endpoints with their weights; those of the young ones are less.
    fn members<'e>(&self, endpoints: impl IntoIterator<Item = &'e Endpoint>) -> Vec<(SocketAddr, u32)> {
        let endpoints: Vec<&Endpoint> = endpoints.into_iter().collect();
        let factor = |endpoint: &Endpoint| {
            let age = self.scene.observed.age(self.key, &endpoint.address)?;
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

/// Parts of the weight of an endpoint in which warmup is counted.
const WARMUP_STEPS: u64 = 100;

/// Weights of localities by what is left of them: weight, hosts and healthy hosts of each. Whole numbers in the same proportion as
/// weight · min(1, factor · healthy / hosts), with the factor in percent.
pub fn effective_weights(localities: &[(u64, u64, u64)], factor: u64) -> Vec<u128> {
    // Health is a fraction; in units of this size it is a whole number, unless there are more localities of more sizes than
    // any schedule could show.
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

/// Envoy dropped "at least one" in 1.28, so a percentage of a small pool may be no host at all. People should know.
fn check_ejection_limit(key: &PoolKey, outlier: Option<&OutlierDetection>, hosts: usize, findings: &mut Vec<Finding>) {
    let Some(outlier) = outlier else { return };
    if hosts > 0 && outlier.thresholds() != [0, 0] && outlier.most_ejected(hosts) == 0 {
        let message = format!(
            "{} % of {hosts} endpoints of port {} is none, so none is ever ejected; raise it to {} or more, or set the annotation \
             portolan.io/always-eject-one: \"true\" on the DestinationRule",
            outlier.max_ejection_percent,
            key.port,
            100usize.div_ceil(hosts)
        );
        let finding = Finding::new(Code::EjectsNobody, key.service.object(), message);
        findings.push(finding.at("outlierDetection.maxEjectionPercent"));
    }
}
