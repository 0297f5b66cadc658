//! Inputs and outputs of the policy: the client, the observed endpoint health, and the assignment of each port.

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
    Algorithm, ClusterLocal, ConnectionPool, DestinationRule, Finding, IpFamily, Labels, Locality, NamespacedName,
    OutlierDetection, Probe, Protocol, ServiceId, SuccessCriterion, Warmup,
};

/// Whether an endpoint is eligible for new connections, and if not, why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointHealth {
    /// Eligible.
    Healthy,
    /// Not ready according to its conditions, or in a cluster that is unreachable.
    Unhealthy,
    /// Terminating but still serving; used as a last resort, because no endpoint is ready.
    Draining,
    /// Fails the agent's active health checks.
    Failing,
    /// Ejected by outlier detection or by an operator, or in a drained region.
    Ejected,
}

impl EndpointHealth {
    /// Returns whether the endpoint is eligible for new connections.
    pub fn is_usable(self) -> bool {
        matches!(self, Self::Healthy | Self::Draining)
    }

    /// Returns the stable name used in JSON output; a failing endpoint is reported as `unhealthy`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Unhealthy | Self::Failing => "unhealthy",
            Self::Draining => "draining",
            Self::Ejected => "ejected",
        }
    }
}

/// An endpoint of a pool, as the policy sees it for one client.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint {
    /// IP address and target port of the endpoint.
    pub address: SocketAddr,
    /// ID of the cluster that the endpoint belongs to.
    pub cluster: Arc<str>,
    /// Region, zone and subzone; empty if unknown.
    pub locality: Arc<Locality>,
    /// Load-balancing weight; 1 unless a ServiceEntry or WorkloadEntry sets another.
    pub weight: u32,
    /// Eligibility for new connections.
    pub health: EndpointHealth,
    /// Failover level, 0 being the nearest; also 0 until levels are assigned.
    pub priority: u32,
}

/// An endpoint that the pool excludes, with the reason; collected only for `explain`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Excluded {
    /// IP address without a port, since the endpoint may not have a matching one.
    pub address: IpAddr,
    /// ID of the cluster that the endpoint belongs to.
    pub cluster: Arc<str>,
    /// Human-readable reason, as a complete clause: `it is terminating`.
    pub why: &'static str,
}

/// The object that a locality setting comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SettingSource {
    /// `localityLbSetting` of the DestinationRule.
    DestinationRule,
    /// `spec.trafficDistribution` of the Service.
    TrafficDistribution,
    /// `localityLbSetting` of the mesh settings.
    Mesh,
}

/// The client that the policy is computed for. All pods of a node share its location.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// ID of the client's cluster.
    pub cluster: Arc<str>,
    /// Name of the client's node; `None` for a client that is given by locality alone.
    pub node: Option<String>,
    /// Region, zone and subzone of the client.
    pub locality: Locality,
    /// Labels of the node, including those for its locality, cluster and network.
    pub labels: Labels,
    /// Whether hosts without a known setting are cluster-local, because the mesh settings cannot be read.
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

/// Identifies a pool: the endpoints of one service port, or of a subset of them, in one address family.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolKey {
    /// Service that the endpoints belong to.
    pub service: ServiceId,
    /// Service port, not target port.
    pub port: u16,
    /// Transport protocol of the port.
    pub protocol: Protocol,
    /// Subset name from the DestinationRule; `None` for all endpoints.
    pub subset: Option<String>,
    /// Address family of the endpoints.
    pub family: IpFamily,
}

impl PoolKey {
    /// Returns the key that stands for both address families (that of IPv4): connection limits and detected protocols are
    /// common to them.
    pub fn both_families(&self) -> Self {
        Self { family: IpFamily::V4, ..self.clone() }
    }
}

impl fmt::Display for PoolKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.service, self.port)?;
        if self.protocol != Protocol::Tcp {
            write!(f, "/{}", self.protocol)?;
        }
        self.subset.as_ref().map_or(Ok(()), |subset| write!(f, " subset {subset}"))?;
        f.write_str(if self.family == IpFamily::V6 { " (IPv6)" } else { "" })
    }
}

/// Observed endpoint state that the policy takes into account.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HealthView {
    /// Endpoints ejected by outlier detection, by pool.
    pub ejected: BTreeMap<PoolKey, BTreeSet<SocketAddr>>,
    /// Endpoints ejected from every pool (`plan --eject`, `portolan eject`).
    pub ejected_everywhere: BTreeSet<SocketAddr>,
    /// Endpoints whose active health checks fail, by the pool that requests the probe.
    pub failing: BTreeMap<PoolKey, BTreeSet<SocketAddr>>,
    /// Pools on HTTP ports whose connections carry something other than HTTP/1, as [`PoolKey::both_families`].
    pub not_http: BTreeSet<PoolKey>,
    /// Drained regions, as pairs of service and region (`portolan drain`).
    pub drained: BTreeSet<(NamespacedName, String)>,
    /// Ages of endpoints that are still warming up, by pool.
    pub ages: BTreeMap<PoolKey, HashMap<SocketAddr, Duration>>,
}

impl HealthView {
    /// Returns whether the endpoint is ejected from the pool.
    pub fn is_ejected(&self, pool: &PoolKey, address: &SocketAddr, pool_ejects: bool) -> bool {
        let by_pool = || self.ejected.get(pool).is_some_and(|ejected| ejected.contains(address));
        self.ejected_everywhere.contains(address) || (pool_ejects && by_pool())
    }

    /// Returns whether the active health check that the pool requests fails for the endpoint.
    pub fn is_failing(&self, pool: &PoolKey, address: &SocketAddr) -> bool {
        self.failing.get(pool).is_some_and(|failing| failing.contains(address))
    }

    /// Returns whether the service is drained from the region.
    pub fn is_drained(&self, service: &NamespacedName, region: &str) -> bool {
        self.drained.iter().any(|(drained, from)| drained == service && from == region)
    }

    /// Returns the age of an endpoint that is still warming up; `None` for any other endpoint.
    pub fn age(&self, pool: &PoolKey, address: &SocketAddr) -> Option<Duration> {
        self.ages.get(pool)?.get(address).copied()
    }
}

/// A weighted destination of a frontend.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// Weight relative to the sum over the routes of the assignment.
    pub weight: u32,
    /// Pool that receives the connections.
    pub pool: Pool,
}

/// The policy output for one port of a service, for frontends of one address family that share a route.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// Service that clients dial.
    pub service: ServiceId,
    /// Fully qualified host name of the service.
    pub host: String,
    /// Service port that clients dial.
    pub port: u16,
    /// Transport protocol of the port.
    pub protocol: Protocol,
    /// Addresses and port that clients dial.
    pub frontends: Vec<SocketAddr>,
    /// VirtualService whose route applies; `None` without one.
    pub routed_by: Option<NamespacedName>,
    /// Destinations of the connections; more than one only if a VirtualService splits them.
    pub routes: Vec<Route>,
    /// Whether connections keep their original destination (`PASSTHROUGH`).
    pub passthrough: bool,
    /// Order in which endpoints are selected; an empty schedule refuses all connections.
    pub schedule: Arc<Schedule>,
    /// `sessionAffinity: ClientIP`: how long a client returns to the same endpoint; `None` without affinity.
    pub affinity: Option<Duration>,
}

/// The policy output for all services that the client can dial.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PolicyOutput {
    /// Ordered by service, port and address family.
    pub assignments: Vec<Arc<Assignment>>,
    /// Problems that operators should know about.
    pub findings: Vec<Finding>,
}

/// How locality influences endpoint selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalityMode {
    /// Locality is ignored: all endpoints are on one level.
    None,
    /// The nearest level comes first, and farther levels take over as it loses endpoints.
    Failover,
    /// Each locality gets a percentage (`distribute`).
    Distribute,
}

impl LocalityMode {
    /// Returns the stable name used in JSON output.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Failover => "failover",
            Self::Distribute => "distribute",
        }
    }
}

/// Summary of one failover level.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Priority {
    /// Number of endpoints on the level, usable or not.
    pub hosts: u64,
    /// Number of usable endpoints.
    pub healthy: u64,
    /// Share of the pool's connections in percent.
    pub load: u32,
    /// Whether the level is in panic mode, in which it also uses ejected and failing endpoints.
    pub panic: bool,
}

/// The weight of one locality on one level.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalityShare {
    /// Region, zone and subzone.
    pub locality: Arc<Locality>,
    /// Failover level, 0 being the nearest.
    pub priority: u32,
    /// Weight before health is applied: from `distribute`, or the sum of the endpoint weights.
    pub weight: u64,
}

/// The policy output for one pool: its endpoints and effective settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    /// Identity of the pool; stable across recompilations.
    pub key: PoolKey,
    /// How locality influences endpoint selection.
    pub mode: LocalityMode,
    /// Object that the locality setting comes from; `None` if no setting applies.
    pub setting: Option<SettingSource>,
    /// Whether load that a locality in `distribute` cannot carry fails over to others.
    pub distributes_with_failover: bool,
    /// Whether connections must stay in the client's cluster, or prefer it.
    pub cluster_local: ClusterLocal,
    /// Host pattern that decides `cluster_local`; `None` if no pattern matches.
    pub cluster_local_by: Option<String>,
    /// DestinationRule that applies, with its duplicates merged; `None` without one.
    pub rule: Option<Arc<DestinationRule>>,
    /// Load-balancing algorithm that the kernel applies.
    pub algorithm: Algorithm,
    /// Outlier detection settings; `None` disables it.
    pub outlier: Option<OutlierDetection>,
    /// Idle time after which the agent closes connections to endpoints that no longer get new ones.
    pub close_idle_elsewhere: Option<Duration>,
    /// Active health check that the agent performs; `None` disables it.
    pub probe: Option<Arc<Probe>>,
    /// Signal that outlier detection counts as a success.
    pub success_criterion: SuccessCriterion,
    /// Slow-start settings for new endpoints; `None` disables warmup.
    pub warmup: Option<Warmup>,
    /// Connection limits and timeouts (`connectionPool.tcp`).
    pub limits: ConnectionPool,
    /// Failover levels, nearest first.
    pub priorities: Vec<Priority>,
    /// Locality weights, ordered by level and locality.
    pub localities: Vec<LocalityShare>,
    /// Endpoints, ordered by address.
    pub endpoints: Vec<Endpoint>,
    /// Terminating or not-ready endpoints that are excluded: they keep their existing connections.
    pub leaving: Vec<SocketAddr>,
    /// Number of endpoint groups that share the connections; 0 refuses all connections.
    pub groups: usize,
    /// Excluded endpoints with the reasons; empty unless an explanation was requested.
    pub excluded: Vec<Excluded>,
}

impl Pool {
    /// Returns how the kernel selects one of the endpoints.
    pub fn choice(&self) -> LbPolicy {
        match self.algorithm {
            Algorithm::RoundRobin | Algorithm::Passthrough => LbPolicy::RoundRobin,
            Algorithm::LeastRequest => LbPolicy::LeastRequest,
            Algorithm::Random => LbPolicy::Random,
            Algorithm::ConsistentHash => LbPolicy::Hash,
        }
    }

    /// Returns what the kernel tracks for the pool, as bits of `TrackFlags`; 0 without outlier detection.
    pub fn watch(&self) -> u32 {
        let Some(outlier) = &self.outlier else { return 0 };
        let bits = [
            (TrackFlags::USE, true),
            (TrackFlags::STATUS, self.success_criterion == SuccessCriterion::HttpStatus),
            (TrackFlags::ANSWER, outlier.count_early_resets),
        ];
        bits.into_iter().filter(|(_, on)| *on).map(|(bit, _)| bit).sum()
    }

    /// Returns the names of Portolan's own settings that are in effect, without the `portolan.io/` prefix.
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
