//! One pool: its endpoints, their levels, and the share of each group of them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use portolan_common::{Choice, Watch};

use super::{
    Client, Endpoint, LeftOut, Observed, PoolKey, RuleBook, Share,
    cluster_local::retention,
    endpoints::{self, Candidate, Filter, Selected},
    locality::{SettingSource, compacted, distribute_weights, effective_setting, levels},
    maglev, service,
    spread::Spread,
};
use crate::{
    model::{
        Algorithm, Code, ConnectionPool, DestinationRule, Finding, JudgedBy, Locality, LocalitySetting,
        OutlierDetection, Probe, Protocol, Retention, ServiceId, Warmup,
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
    pub locality: Arc<Locality>,
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
    /// Whether what a locality in `distribute` cannot carry goes where failover leads.
    pub distributes_with_failover: bool,
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
    /// After which time without traffic connections to its endpoints that get no new ones are closed.
    pub close_idle_elsewhere: Option<Duration>,
    /// How the agent probes its endpoints by itself.
    pub probe: Option<Arc<Probe>>,
    /// What proves that an endpoint is well.
    pub judged_by: JudgedBy,
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
    /// Endpoints that are going away or not ready, where such ones are left out: they keep the connections that they have.
    pub leaving: Vec<SocketAddr>,
    /// How many groups share the connections; 0: refuse.
    pub groups: usize,
    /// Endpoints that it does not have, where somebody wants to know.
    pub left_out: Vec<LeftOut>,
}

impl Pool {
    /// How the kernel takes one of its endpoints.
    pub fn choice(&self) -> Choice {
        match self.algorithm {
            Algorithm::RoundRobin | Algorithm::Passthrough => Choice::RoundRobin,
            Algorithm::LeastRequest => Choice::LeastRequest,
            Algorithm::Random => Choice::Random,
            Algorithm::ConsistentHash => Choice::Hash,
        }
    }

    /// What the kernel looks at for it (bits of `Watch`).
    pub fn watch(&self) -> u32 {
        let Some(outlier) = &self.outlier else { return 0 };
        let bits = [
            (Watch::USE, true),
            (Watch::STATUS, self.judged_by == JudgedBy::Status),
            (Watch::ANSWER, outlier.count_early_resets),
        ];
        bits.into_iter().filter(|(_, on)| *on).map(|(bit, _)| bit).sum()
    }

    /// What Portolan's own annotations have made of it.
    pub fn extensions(&self) -> Vec<&'static str> {
        let one = self.outlier.as_ref().is_some_and(|outlier| outlier.always_eject_one);
        let early = self.outlier.as_ref().is_some_and(|outlier| outlier.count_early_resets);
        let all = [
            ("distribute-with-failover", self.distributes_with_failover),
            ("always-eject-one", one),
            ("count-early-resets", early),
            ("prefer-cluster-local", self.retention == Retention::Prefer),
            ("probe", self.probe.is_some()),
            ("close-idle-elsewhere", self.close_idle_elsewhere.is_some()),
        ];
        all.into_iter().filter(|(_, on)| *on).map(|(name, _)| name).collect()
    }
}

/// Whether it is the service by which pods reach their API server.
fn is_api_server(service: &ServiceId) -> bool {
    !service.is_entry && service.name.namespace == "default" && service.name.name == "kubernetes"
}

/// The pool, and who gets which share of its connections; nobody: refuse.
pub(super) fn build(scene: &Scene<'_>, key: PoolKey, routed: bool, findings: &mut Vec<Finding>) -> (Pool, Vec<Group>) {
    let rule = scene.rules.destination_rule(&key.service);
    let policy = rule.map(|rule| scene.rules.traffic_policy(rule, &key)).unwrap_or_default();
    let view = service::find(scene.snapshot, &scene.client.cluster, &key.service);
    let distribution = view.as_ref().and_then(|view| view.distribution);
    let effective = effective_setting(policy.locality(), distribution, &scene.rules.mesh.locality);
    // Nor do shares by region leave any of them out: nothing says where they are.
    let effective = effective.filter(|_| !is_api_server(&key.service));
    let host = scene.rules.host_of(&key.service).unwrap_or_default();
    let (retention, retained_by) = retention(&scene.rules.mesh, &host);
    let threshold = policy.outlier.as_ref().map_or(0, |outlier| outlier.min_health_percent);
    // Whatever ejects its endpoints, the API server's own service keeps them: without it nobody would learn of others.
    let threshold = if is_api_server(&key.service) { threshold.max(1) } else { threshold };
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
    let Selected { mut candidates, leaving, left_out } = if let (Some(name), None) = (&key.subset, subset) {
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
    // Other protocols than TCP have no port of their own that could be probed.
    let own = |probe: &Arc<Probe>| key.protocol == Protocol::Tcp || probe.port.is_some();
    let probe = rule.and_then(|rule| rule.probe.clone()).filter(own);
    // Whoever finds out that endpoints fail lets others take over.
    let judged = policy.outlier.is_some() || probe.is_some();
    let mode = mode(setting.as_ref(), source, judged, retention);
    let spread = Spread { scene, warmup, threshold, key: &key };
    let (priorities, weights, groups) = match (&setting, mode) {
        (Some(setting), Mode::Distribute) if setting.distribute_with_failover => {
            spread.distribute_with_failover(setting, &mut candidates)
        }
        _ => {
            let default = LocalitySetting::default();
            let setting = setting.as_ref().unwrap_or(&default);
            let distribution = source == Some(SettingSource::TrafficDistribution);
            let by_distance = distribution || (source.is_some() && judged);
            let weights = place(scene.client, mode, setting, by_distance, retention, &mut candidates);
            let explicit = !(setting.failover.is_empty() && setting.failover_priority.is_empty());
            let by_locality = mode == Mode::Distribute || (mode == Mode::Failover && explicit && judged);
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
    let ejects = policy.outlier.is_some();
    limits.connect_timeout =
        limits.connect_timeout.or(scene.rules.mesh.connect_timeout).or(ejects.then_some(DEFAULT_CONNECT_TIMEOUT));
    let algorithm = algorithm(balancer.algorithm, &key, retention, findings);
    let groups = if algorithm == Algorithm::ConsistentHash { maglev::quotas(groups) } else { groups };
    let http = view.as_ref().and_then(|view| view.port(&key)).is_some_and(|port| port.http1);
    let judged_by = judged_by(policy.outlier.as_ref(), http && !scene.observed.not_http.contains(&key.both_families()));
    // Made in the place of the candidates, which are larger.
    let mut endpoints: Vec<Endpoint> = candidates.into_iter().map(|candidate| candidate.endpoint).collect();
    endpoints.shrink_to_fit();
    let pool = Pool {
        mode,
        judged_by,
        setting: source,
        distributes_with_failover: mode == Mode::Distribute
            && setting.as_ref().is_some_and(|setting| setting.distribute_with_failover),
        retention,
        retained_by,
        rule: rule.cloned(),
        algorithm,
        outlier: policy.outlier,
        probe,
        close_idle_elsewhere: rule.and_then(|rule| rule.close_idle_elsewhere),
        warmup: balancer.warmup,
        limits,
        priorities,
        localities,
        endpoints,
        leaving,
        groups: groups.len(),
        left_out,
        key,
    };
    (pool, groups)
}

/// Envoy's connect timeout where none is set; it decides when a connect counts as failed. Without one, a connect that nobody answers
/// would count as failed after two minutes only.
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// On a port that is HTTP/1 the responses say how an endpoint is, where a threshold counts them.
fn judged_by(outlier: Option<&OutlierDetection>, http: bool) -> JudgedBy {
    match outlier {
        Some(outlier) if http && (outlier.consecutive_errors > 0 || outlier.gateway_errors > 0) => JudgedBy::Status,
        Some(outlier) if outlier.count_early_resets => JudgedBy::Answer,
        _ => JudgedBy::Connect,
    }
}

/// Who decides among the endpoints.
fn algorithm(asked: Option<Algorithm>, key: &PoolKey, retention: Retention, findings: &mut Vec<Finding>) -> Algorithm {
    // Istio's own default is LEAST_REQUEST, which has to be asked for here: plain Services go round.
    let asked = asked.unwrap_or(Algorithm::RoundRobin);
    if asked == Algorithm::LeastRequest && key.protocol == Protocol::Udp {
        let message = "LEAST_REQUEST counts connections, and datagrams are none; RANDOM is used";
        findings.push(Finding::new(Code::NotTogether, key.service.object(), message));
        return Algorithm::Random;
    }
    if asked != Algorithm::Passthrough {
        return asked;
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

pub(super) type Weights = BTreeMap<(u32, Arc<Locality>), u64>;

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
        let own: Vec<(&Locality, u64)> = weights.iter().map(|((_, locality), weight)| (&**locality, *weight)).collect();
        if let Some(given) = distribute_weights(&client.locality, &own, &setting.distribute) {
            let keys: Vec<_> = weights.keys().cloned().collect();
            weights = keys.into_iter().zip(given).filter_map(|(key, weight)| Some((key, weight?))).collect();
            candidates.retain(|candidate| weights.contains_key(&(0, Arc::clone(&candidate.endpoint.locality))));
        }
    }
    weights
}

/// The level of each endpoint, as the setting orders them.
pub(super) fn failover(client: &Client, setting: &LocalitySetting, candidates: &[Candidate<'_>]) -> Vec<u32> {
    let localities: Vec<&Locality> = candidates.iter().map(|candidate| &*candidate.endpoint.locality).collect();
    levels((&client.labels, &client.locality), setting, &localities, candidates)
}

/// The weight of each locality: the sum of its endpoints'.
pub(super) fn own_weights(candidates: &[Candidate<'_>]) -> Weights {
    let mut weights = Weights::new();
    for Endpoint { priority, locality, weight, .. } in candidates.iter().map(|candidate| &candidate.endpoint) {
        *weights.entry((*priority, Arc::clone(locality))).or_default() += u64::from(*weight);
    }
    weights
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
