//! The policy: what Istio's and Kubernetes' objects mean for a client in one place of the world.
//!
//! Pure: no I/O, no clock, no state. The same snapshot, client and ejections give the same verdict, whatever the order in
//! which things became known. One path leads through the files, in this order:
//!
//! | step | file |
//! |---|---|
//! | which rules are for a host | `rules` |
//! | whether it is kept in its cluster | `cluster_local` |
//! | which endpoints there are | `endpoints` |
//! | their priority, or the weight of their locality | `locality` |
//! | the load of each priority | `load` |
//! | the share of each group of endpoints | `pool` |
//! | the order of turns | `schedule` |

mod cluster_local;
mod endpoints;
mod load;
mod locality;
mod pool;
mod rules;
mod schedule;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

pub use self::{
    cluster_local::is_cluster_local,
    endpoints::{Endpoint, EndpointHealth},
    load::{Level, Loads, OVERPROVISIONING_FACTOR, loads},
    locality::{distribute_weights, failover_levels},
    pool::{Group, LocalityShare, Mode, Pool, Priority},
    rules::RuleBook,
    schedule::{Run, Schedule, Share, Turn, edf_order},
};
use crate::{
    model::{Finding, Locality, NamespacedName, Protocol, Service, ServicePort},
    store::Snapshot,
};

/// For whom the policy is asked: a node has one place in the world.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Client {
    /// Id of its cluster.
    pub cluster: String,
    /// Its node, where it is on one.
    pub node: Option<String>,
    /// Where it is.
    pub locality: Locality,
}

/// Name of a pool: the endpoints of one port of a service, or of a subset of it. Ejections belong to a pool.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolKey {
    /// The service.
    pub service: NamespacedName,
    /// Its port.
    pub port: u16,
    /// Its subset.
    pub subset: Option<String>,
}

impl fmt::Display for PoolKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.service, self.port)?;
        self.subset.as_ref().map_or(Ok(()), |subset| write!(f, " subset {subset}"))
    }
}

/// Which endpoints are ejected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ejections {
    /// By the pool that ejected them.
    pub by_pool: BTreeMap<PoolKey, BTreeSet<SocketAddr>>,
    /// In every pool (`plan --eject`).
    pub everywhere: BTreeSet<SocketAddr>,
}

impl Ejections {
    /// Whether the pool has ejected the endpoint.
    pub fn contains(&self, pool: &PoolKey, address: &SocketAddr) -> bool {
        self.everywhere.contains(address) || self.by_pool.get(pool).is_some_and(|ejected| ejected.contains(address))
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

/// The verdict for one port of a service, for one address family.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// The service that clients dial.
    pub service: NamespacedName,
    /// Its host name.
    pub host: String,
    /// The port that clients dial.
    pub port: u16,
    /// Its protocol.
    pub protocol: Protocol,
    /// The addresses that clients dial.
    pub frontends: Vec<SocketAddr>,
    /// Where connections go: one, unless a VirtualService splits them.
    pub routes: Vec<Route>,
    /// The turns in which endpoints are taken; empty: refuse.
    pub schedule: Schedule,
    /// Limit for the connect.
    pub connect_timeout: Option<Duration>,
}

/// The whole verdict.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdict {
    /// In order of service, port, family.
    pub assignments: Vec<Assignment>,
    /// What people should know.
    pub findings: Vec<Finding>,
}

/// Envoy's connect timeout where none is set; it decides when a connect counts as failed.
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Computes everything for one client.
pub fn assign(snapshot: &Snapshot, client: &Client, ejections: &Ejections) -> Verdict {
    let mut findings = snapshot.findings.clone();
    let rules = RuleBook::new(snapshot, client, &mut findings);
    endpoints::check(snapshot, &mut findings);
    let mut verdict = Verdict::default();
    let mut taken: BTreeMap<(IpAddr, u16), NamespacedName> = BTreeMap::new();
    let own = snapshot.clusters.get(&client.cluster);
    if own.is_none() {
        let message =
            format!("the configuration has no cluster {:?}: there is nothing to do for its clients", client.cluster);
        findings.push(Finding::error(format!("Cluster {}", client.cluster), message));
    }
    for service in own.into_iter().flat_map(|objects| objects.services.values()) {
        for port in &service.ports {
            if port.protocol != Protocol::Tcp {
                let message =
                    format!("port {}: {} is not handled yet; such traffic is left alone", port.port, port.protocol);
                findings.push(Finding::warning(format!("Service {}", service.name), message));
                continue;
            }
            let addresses = free_addresses(service, port, &mut taken, &mut findings);
            for family in [IpAddr::is_ipv4 as fn(&IpAddr) -> bool, IpAddr::is_ipv6] {
                let frontends: Vec<_> =
                    addresses.iter().filter(|ip| family(ip)).map(|ip| SocketAddr::new(*ip, port.port)).collect();
                if !frontends.is_empty() {
                    let scene = pool::Scene { snapshot, client, rules: &rules, ejections, family };
                    verdict.assignments.push(assign_port(&scene, service, port, frontends, &mut findings));
                }
            }
        }
    }
    for finding in findings.iter_mut().filter(|finding| finding.source.is_empty()) {
        finding.source = snapshot.origin(&client.cluster, &finding.object).cloned().unwrap_or_default();
    }
    findings.sort();
    findings.dedup();
    verdict.findings = findings;
    verdict
}

/// The addresses of the service on which no other service sits.
fn free_addresses(
    service: &Service,
    port: &ServicePort,
    taken: &mut BTreeMap<(IpAddr, u16), NamespacedName>,
    findings: &mut Vec<Finding>,
) -> Vec<IpAddr> {
    let mut free = Vec::new();
    for address in &service.addresses {
        match taken.get(&(*address, port.port)) {
            Some(other) => findings.push(Finding::error(
                format!("Service {}", service.name),
                format!(
                    "spec.clusterIPs: {address} port {} belongs to Service {other}, which comes first by its name",
                    port.port
                ),
            )),
            None => {
                taken.insert((*address, port.port), service.name.clone());
                free.push(*address);
            }
        }
    }
    free
}

fn assign_port(
    scene: &pool::Scene<'_>,
    service: &Service,
    port: &ServicePort,
    frontends: Vec<SocketAddr>,
    findings: &mut Vec<Finding>,
) -> Assignment {
    let host = scene.rules.host_of(&service.name);
    let mut routes = Vec::new();
    for destination in scene.rules.destinations(service, port.port, findings) {
        let ruled = destination.by_rule;
        routes.push(Route { weight: destination.weight, pool: pool::build(scene, destination.key, ruled, findings) });
    }
    let schedule = schedule(&routes);
    for route in routes.iter().filter(|route| route.pool.groups.is_empty()) {
        let why = endpoints::why_nobody(scene, &route.pool);
        let message = format!("port {}: connections to {} are refused: {why}", port.port, route.pool.key);
        findings.push(Finding::warning(format!("Service {}", service.name), message));
    }
    let pools = || routes.iter().map(|route| &route.pool);
    let connect_timeout = pools().filter_map(|pool| pool.connect_timeout).min().or_else(|| {
        // Without a limit of its own a connect that nobody answers would count as failed after two minutes only.
        pools().any(|pool| pool.outlier.is_some()).then_some(DEFAULT_CONNECT_TIMEOUT)
    });
    Assignment {
        service: service.name.clone(),
        host,
        port: port.port,
        protocol: port.protocol,
        frontends,
        routes,
        schedule,
        connect_timeout,
    }
}

/// The turns over all routes. A route that leads to nobody keeps its turns, and they refuse: its connections were not meant for
/// the others.
fn schedule(routes: &[Route]) -> Schedule {
    if routes.iter().all(|route| route.pool.groups.is_empty()) {
        return Schedule::default();
    }
    let total: u128 = routes.iter().map(|route| u128::from(route.weight)).sum();
    let mut groups = Vec::new();
    for route in routes {
        let part = Share::new(u128::from(route.weight), total.max(1));
        if route.pool.groups.is_empty() {
            groups.push((part, Vec::new()));
        }
        groups.extend(route.pool.groups.iter().map(|group| (group.share * part, group.members.clone())));
    }
    Schedule::new(groups)
}
