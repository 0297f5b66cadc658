//! The policy: what Istio's and Kubernetes' objects mean for a client in one place of the world.
//!
//! Pure: no I/O, no clock. The same snapshot, client and observations give the same verdict, whatever the order in
//! which things became known. One path leads through the files, in this order:
//!
//! | step | file |
//! |---|---|
//! | which services are concerned by a change | `compile` |
//! | which rules are for a host | `rules` |
//! | whether it is kept in its cluster | `cluster_local` |
//! | which endpoints there are | `endpoints` |
//! | their priority, or the weight of their locality | `locality` |
//! | the load of each priority | `load` |
//! | what new endpoints get | `warmup` |
//! | the share of each group of endpoints | `spread`, for one `pool` |
//! | the order of turns | `schedule`; where a client's hash decides, `maglev` |

mod cluster_local;
mod compile;
mod endpoints;
mod load;
mod locality;
mod maglev;
mod pool;
mod rules;
mod schedule;
mod service;
mod spread;
mod warmup;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

pub use self::{
    cluster_local::retention,
    compile::{Compiler, Recompiled, assign, explain, service_named},
    endpoints::{Endpoint, EndpointHealth, LeftOut},
    load::{Level, Loads, OVERPROVISIONING_FACTOR, loads},
    locality::{Labelled, SettingSource, distribute_weights, effective_setting, failover_levels, label_levels, levels},
    pool::{Group, LocalityShare, Mode, Pool, Priority},
    rules::RuleBook,
    schedule::{Part, Run, Schedule, Share, Turn, edf_order},
    spread::effective_weights,
    warmup::warmup_factor,
};
use crate::model::{Finding, Labels, Locality, NamespacedName, Protocol, ServiceId};

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
    pub confined: bool,
}

impl Default for Client {
    fn default() -> Self {
        Self {
            cluster: Arc::from(""),
            node: None,
            locality: Locality::default(),
            labels: Labels::new(),
            confined: false,
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
pub struct Observed {
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

impl Observed {
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
pub struct Verdict {
    /// In order of service, port, family.
    pub assignments: Vec<Arc<Assignment>>,
    /// What people should know.
    pub findings: Vec<Finding>,
}
