//! What the policy takes and gives: the client, what is observed of endpoints, and the assignment of each port.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use portolan_common::{LbPolicy, TrackFlags};

use super::schedule::Schedule;
use crate::model::{
    Algorithm, ClusterLocal, ConnectionPool, DestinationRule, Finding, Labels, Locality, NamespacedName,
    OutlierDetection, Probe, Protocol, ServiceId, SuccessCriterion, Warmup,
};

/// Whether an endpoint may be chosen, and if not, why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointHealth {
    /// It may.
    Healthy,
    /// Its conditions say that it is not ready.
    Unhealthy,
    /// It is going away, and chosen only because no other is ready.
    Draining,
    /// The agent's own probes of it fail.
    Failing,
    /// Connections to it failed.
    Ejected,
}

impl EndpointHealth {
    /// Whether it may be chosen.
    pub fn is_usable(self) -> bool {
        matches!(self, Self::Healthy | Self::Draining)
    }

    /// As the contract names it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Unhealthy | Self::Failing => "unhealthy",
            Self::Draining => "draining",
            Self::Ejected => "ejected",
        }
    }
}

/// An endpoint of a pool.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its cluster.
    pub cluster: Arc<str>,
    /// Where it is.
    pub locality: Arc<Locality>,
    /// 1, unless an object says otherwise.
    pub weight: u32,
    /// Whether it may be chosen.
    pub health: EndpointHealth,
    /// Its level, once that is decided; 0 is the nearest.
    pub priority: u32,
}

/// An endpoint that the pool does not have, and why; for `explain`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Excluded {
    /// The endpoint.
    pub address: IpAddr,
    /// Its cluster.
    pub cluster: Arc<str>,
    /// The rule that left it out.
    pub why: &'static str,
}

/// Where a locality setting comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SettingSource {
    /// The DestinationRule's.
    DestinationRule,
    /// `trafficDistribution` of the Service.
    TrafficDistribution,
    /// The mesh's.
    Mesh,
}

/// For whom the policy is asked: a node has one place in the world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// Id of its cluster.
    pub cluster: Arc<str>,
    /// Its node, where it is on one.
    pub node: Option<String>,
    /// Where it is.
    pub locality: Locality,
    /// Its labels: those of the node, with its place, cluster and network among them.
    pub labels: Labels,
    /// Whether the settings are not known that say what must stay in its cluster, so that everything does of which nothing else is said.
    pub default_cluster_local: bool,
}

impl Default for Client {
    fn default() -> Self {
        Self {
            cluster: Arc::from(""),
            node: None,
            locality: Locality::default(),
            labels: Labels::new(),
            default_cluster_local: false,
        }
    }
}

/// Name of a pool: the endpoints of one port of a service, or of a subset of it. Ejections belong to a pool.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolKey {
    /// The service.
    pub service: ServiceId,
    /// Its port.
    pub port: u16,
    /// The port's protocol.
    pub protocol: Protocol,
    /// Its subset.
    pub subset: Option<String>,
    /// Whether it is the IPv6 endpoints: those of a pod in both families are two, and each family counts its own.
    pub v6: bool,
}

impl PoolKey {
    /// The same for both address families: limits are common to them, and so is what is spoken.
    pub fn both_families(&self) -> Self {
        Self { v6: false, ..self.clone() }
    }
}

impl fmt::Display for PoolKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.service, self.port)?;
        if self.protocol != Protocol::Tcp {
            write!(f, "/{}", self.protocol)?;
        }
        self.subset.as_ref().map_or(Ok(()), |subset| write!(f, " subset {subset}"))?;
        f.write_str(if self.v6 { " (IPv6)" } else { "" })
    }
}

/// What has been seen of endpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HealthView {
    /// Those that are ejected, by the pool that ejected them.
    pub ejected: BTreeMap<PoolKey, BTreeSet<SocketAddr>>,
    /// Those that count as ejected in every pool (`plan --eject`, `portolan eject`).
    pub ejected_everywhere: BTreeSet<SocketAddr>,
    /// Those whose probes fail, by the pool that asks for them.
    pub failing: BTreeMap<PoolKey, BTreeSet<SocketAddr>>,
    /// Pools on HTTP ports whose connections carry something else than HTTP/1.
    pub not_http: BTreeSet<PoolKey>,
    /// Regions that services leave (`portolan drain`).
    pub drained: BTreeSet<(NamespacedName, String)>,
    /// How long those have been there that have not been there long, by pool.
    pub ages: BTreeMap<PoolKey, HashMap<SocketAddr, Duration>>,
}

impl HealthView {
    /// Whether an endpoint of the pool is ejected; `counts` says whether the pool ejects at all.
    pub fn is_ejected(&self, pool: &PoolKey, address: &SocketAddr, counts: bool) -> bool {
        let by_pool = || self.ejected.get(pool).is_some_and(|ejected| ejected.contains(address));
        self.ejected_everywhere.contains(address) || (counts && by_pool())
    }

    /// Whether probes of an endpoint fail that the pool asks for.
    pub fn is_failing(&self, pool: &PoolKey, address: &SocketAddr) -> bool {
        self.failing.get(pool).is_some_and(|failing| failing.contains(address))
    }

    /// Whether the service leaves the region.
    pub fn is_drained(&self, service: &NamespacedName, region: &str) -> bool {
        self.drained.iter().any(|(of, left)| of == service && left == region)
    }

    /// How long an endpoint of the pool has been there, if that is not long.
    pub fn age(&self, pool: &PoolKey, address: &SocketAddr) -> Option<Duration> {
        self.ages.get(pool)?.get(address).copied()
    }
}

/// A destination of a frontend.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// Relative to the sum over the routes.
    pub weight: u32,
    /// Where it leads.
    pub pool: Pool,
}

/// The verdict for one port of a service, for addresses of one family.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// The service that clients dial.
    pub service: ServiceId,
    /// Its host name.
    pub host: String,
    /// The port that clients dial.
    pub port: u16,
    /// Its protocol.
    pub protocol: Protocol,
    /// The addresses that clients dial.
    pub frontends: Vec<SocketAddr>,
    /// The VirtualService whose route is taken.
    pub routed_by: Option<NamespacedName>,
    /// Where connections go: one, unless a VirtualService splits them.
    pub routes: Vec<Route>,
    /// Whether connections go where they were going (`PASSTHROUGH`).
    pub passthrough: bool,
    /// The turns in which endpoints are taken; empty: refuse.
    pub schedule: Arc<Schedule>,
    /// `sessionAffinity: ClientIP`: how long a client comes back to its endpoint.
    pub affinity: Option<Duration>,
}

/// The whole verdict.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PolicyOutput {
    /// In order of service, port, family.
    pub assignments: Vec<Arc<Assignment>>,
    /// What people should know.
    pub findings: Vec<Finding>,
}

/// How localities count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalityMode {
    /// They do not: all endpoints are one pool.
    None,
    /// Nearest first.
    Failover,
    /// By percentage.
    Distribute,
}

impl LocalityMode {
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

/// The verdict for one pool.
#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    /// Which pool.
    pub key: PoolKey,
    /// How localities count.
    pub mode: LocalityMode,
    /// Where the locality setting comes from; none counts where it is absent.
    pub setting: Option<SettingSource>,
    /// Whether what a locality in `distribute` cannot carry goes where failover leads.
    pub distributes_with_failover: bool,
    /// Whether connections stay in the client's own cluster.
    pub cluster_local: ClusterLocal,
    /// The pattern that says so.
    pub cluster_local_by: Option<String>,
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
    pub success_criterion: SuccessCriterion,
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
    pub excluded: Vec<Excluded>,
}

impl Pool {
    /// How the kernel takes one of its endpoints.
    pub fn choice(&self) -> LbPolicy {
        match self.algorithm {
            Algorithm::RoundRobin | Algorithm::Passthrough => LbPolicy::RoundRobin,
            Algorithm::LeastRequest => LbPolicy::LeastRequest,
            Algorithm::Random => LbPolicy::Random,
            Algorithm::ConsistentHash => LbPolicy::Hash,
        }
    }

    /// What the kernel looks at for it (bits of `TrackFlags`).
    pub fn watch(&self) -> u32 {
        let Some(outlier) = &self.outlier else { return 0 };
        let bits = [
            (TrackFlags::USE, true),
            (TrackFlags::STATUS, self.success_criterion == SuccessCriterion::HttpStatus),
            (TrackFlags::ANSWER, outlier.count_early_resets),
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
            ("prefer-cluster-local", self.cluster_local == ClusterLocal::Prefer),
            ("probe", self.probe.is_some()),
            ("close-idle-elsewhere", self.close_idle_elsewhere.is_some()),
        ];
        all.into_iter().filter(|(_, on)| *on).map(|(name, _)| name).collect()
    }
}
