//! The reports for users and scripts: the JSON contract of `plan`, `get` and `explain`.

pub mod diff;
pub mod explain;

use std::{collections::BTreeMap, net::SocketAddr};

use serde::{Deserialize, Serialize};

use crate::{
    model::{ClusterLocal, Finding, Severity},
    policy::{Assignment, Client, Endpoint, PolicyOutput, Route},
};

/// The response of `plan` and `get`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The client that the report applies to.
    pub client: ClientReport,
    /// A fingerprint of the objects.
    /// If `plan` and the agent show the same value, the agent has loaded what is in the directory.
    pub config: String,
    /// One entry for each port and address family of a service, and for each destination of its route.
    pub services: Vec<ServiceReport>,
    /// The findings about the configuration.
    pub findings: Vec<Finding>,
}

/// The client that a report applies to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClientReport {
    /// The id of the client's cluster.
    pub cluster: String,
    /// The name of the client's node, if it is on one.
    pub node: Option<String>,
    /// The client's locality, as `region/zone/subzone`.
    pub locality: String,
}

impl ClientReport {
    /// Describes a client.
    pub fn new(client: &Client) -> Self {
        Self { cluster: client.cluster.to_string(), node: client.node.clone(), locality: client.locality.to_string() }
    }
}

/// One port of a service, and one destination of its connections.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceReport {
    /// The namespace of the service that clients dial.
    pub namespace: String,
    /// The name of the service that clients dial.
    pub name: String,
    /// `ServiceEntry` for a ServiceEntry; absent for a Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// The service's host name, such as `reviews.default.svc.cluster.local`.
    pub host: String,
    /// The port number that clients dial.
    pub port: u16,
    /// The port's protocol: `TCP` or `UDP`.
    pub protocol: String,
    /// The subset that the route selects, if any.
    pub subset: Option<String>,
    /// The destination as `namespace/name:port`, if the route leads to another service or port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<String>,
    /// The addresses and ports that clients dial.
    pub frontends: Vec<String>,
    /// The locality mode: `none`, `failover` or `distribute`.
    pub mode: String,
    /// Whether connections stay in the client's cluster (`clusterLocal`).
    pub cluster_local: bool,
    /// The `portolan.io` annotations in effect (docs/reference/annotations.md).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extensions: Vec<String>,
    /// The load-balancing algorithm, such as `ROUND_ROBIN`.
    pub algorithm: String,
    /// The behavior without an eligible endpoint: `refuse`, or `pass` if connections keep their original destination.
    pub on_empty: String,
    /// The fraction of new connections that this destination of a traffic split refuses because it has no eligible
    /// endpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused_share: Option<f64>,
    /// The priority levels, nearest first.
    pub priorities: Vec<PriorityReport>,
    /// The localities, ordered by priority and name.
    pub localities: Vec<LocalityReport>,
    /// The endpoints, ordered by address.
    pub endpoints: Vec<EndpointReport>,
    /// The kernel's state for this port.
    /// Only from a running agent, and only for the first of several destinations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<FrontendKernel>,
}

/// One priority level of a pool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PriorityReport {
    /// The level's index; 0 is the nearest.
    pub priority: u32,
    /// The number of endpoints on the level.
    pub hosts: u64,
    /// The number of eligible endpoints on the level.
    pub healthy: u64,
    /// The level's percentage of connections (Envoy's priority load).
    pub load: u32,
    /// Whether the level is in panic mode, so that unhealthy endpoints are used as well.
    pub panic: bool,
}

/// One locality of a priority level.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LocalityReport {
    /// The locality, as `region/zone/subzone`.
    pub locality: String,
    /// The index of the priority level; 0 is the nearest.
    pub priority: u32,
    /// The locality's weight, before health is taken into account.
    pub weight: u64,
    /// The locality's fraction of new connections, between 0 and 1.
    pub share: f64,
}

/// One endpoint of a pool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointReport {
    /// The endpoint's address and port.
    pub address: String,
    /// The id of the endpoint's cluster.
    pub cluster: String,
    /// The endpoint's locality, as `region/zone/subzone`.
    pub locality: String,
    /// The index of the endpoint's priority level; 0 is the nearest.
    pub priority: u32,
    /// The endpoint's weight, relative to others of its locality; 1 by default.
    pub weight: u32,
    /// The health state: `healthy`, `unhealthy`, `draining` or `ejected`.
    pub health: String,
    /// The endpoint's fraction of new connections, between 0 and 1.
    pub share: f64,
    /// The earliest end of the ejection (RFC 3339); only from a running agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ejected_until: Option<String>,
    /// The cause of the ejection; only from a running agent.
    /// Either the threshold that was reached, or `operator` with the operator's reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ejected_by: Option<String>,
    /// The kernel's counters for the endpoint; only from a running agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<EndpointKernel>,
}

impl EndpointReport {
    /// Describes an endpoint with the given share.
    pub fn new(endpoint: &Endpoint, share: f64) -> Self {
        Self {
            address: endpoint.address.to_string(),
            cluster: endpoint.cluster.to_string(),
            locality: endpoint.locality.to_string(),
            priority: endpoint.priority,
            weight: endpoint.weight,
            health: endpoint.health.as_str().to_owned(),
            share: rounded(share),
            ejected_until: None,
            ejected_by: None,
            kernel: None,
        }
    }
}

/// A frontend's state in the kernel, summed over the addresses of its port.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendKernel {
    /// The number of slots in the schedule.
    pub slots: u32,
    /// The generation of the last published version; it increases with every publication of any frontend.
    pub generation: u32,
    /// Connections that got an endpoint.
    pub connections: u64,
    /// Connections refused for lack of an eligible endpoint, or at the connection limit.
    pub refused: u64,
}

/// The kernel's counters for an endpoint, over all services that it belongs to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointKernel {
    /// Connections established, plus UDP flows.
    pub connections: u64,
    /// Connections open now, including those being established.
    pub active: u64,
    /// Connects that failed: refused, reset, unreachable or timed out.
    pub failures: u64,
    /// HTTP/1 responses, if their status is tracked.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub responses: u64,
    /// Responses with status 500 or above.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub server_errors: u64,
    /// Responses with status 502, 503 or 504.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gateway_errors: u64,
    /// The smoothed time from SYN to established, in microseconds; absent unless outlier detection is on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connect_micros: Option<f64>,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Report {
    /// Builds the report from the policy's output.
    pub fn new(client: &Client, config: String, output: &PolicyOutput) -> Self {
        Self {
            client: ClientReport::new(client),
            config,
            services: output.assignments.iter().flat_map(|assignment| services(assignment)).collect(),
            findings: output.findings.clone(),
        }
    }

    /// Returns whether any finding is an error.
    pub fn has_errors(&self) -> bool {
        self.findings.iter().any(|finding| finding.severity == Severity::Error)
    }
}

/// Returns the share of each endpoint, for each route of an assignment.
pub(crate) fn route_shares(assignment: &Assignment) -> Vec<BTreeMap<SocketAddr, f64>> {
    let mut shares: Vec<BTreeMap<SocketAddr, f64>> = vec![BTreeMap::new(); assignment.schedule.runs.len()];
    for (run, address, share) in assignment.schedule.shares() {
        *shares[run].entry(address).or_default() += share;
    }
    let mut runs = shares.into_iter();
    let routes = assignment.routes.iter().map(|route| {
        // A route without an eligible endpoint has one empty run.
        let own = runs.by_ref().take(route.pool.groups.max(1));
        own.fold(BTreeMap::new(), |mut sum, run| {
            for (address, share) in run {
                *sum.entry(address).or_default() += share;
            }
            sum
        })
    });
    routes.collect()
}

fn services(assignment: &Assignment) -> Vec<ServiceReport> {
    let routes = assignment.routes.iter().zip(route_shares(assignment));
    let share =
        |shares: &BTreeMap<SocketAddr, f64>, address: SocketAddr| shares.get(&address).copied().unwrap_or_default();
    routes.map(|(route, shares)| service(assignment, route, &|address| share(&shares, address))).collect()
}

fn service(assignment: &Assignment, route: &Route, share: &dyn Fn(SocketAddr) -> f64) -> ServiceReport {
    let pool = &route.pool;
    let elsewhere = pool.key.service != assignment.service || pool.key.port != assignment.port;
    let endpoints: Vec<EndpointReport> = pool
        .endpoints
        .iter()
        .map(|endpoint| {
            EndpointReport::new(endpoint, if assignment.passthrough { 0.0 } else { share(endpoint.address) })
        })
        .collect();
    let localities = pool.localities.iter().map(|locality| {
        let here = pool
            .endpoints
            .iter()
            .filter(|endpoint| endpoint.priority == locality.priority && endpoint.locality == locality.locality);
        LocalityReport {
            locality: locality.locality.to_string(),
            priority: locality.priority,
            weight: locality.weight,
            share: if assignment.passthrough {
                0.0
            } else {
                rounded(here.map(|endpoint| share(endpoint.address)).sum())
            },
        }
    });
    let priorities = pool.priorities.iter().zip(0..).map(|(level, priority)| PriorityReport {
        priority,
        hosts: level.hosts,
        healthy: level.healthy,
        load: level.load,
        panic: level.panic,
    });
    ServiceReport {
        namespace: assignment.service.name.namespace.clone(),
        name: assignment.service.name.name.clone(),
        kind: assignment.service.is_entry.then(|| "ServiceEntry".to_owned()),
        host: assignment.host.clone(),
        port: assignment.port,
        protocol: assignment.protocol.to_string(),
        subset: pool.key.subset.clone(),
        destination: elsewhere.then(|| format!("{}:{}", pool.key.service, pool.key.port)),
        frontends: assignment.frontends.iter().map(SocketAddr::to_string).collect(),
        mode: pool.mode.as_str().to_owned(),
        cluster_local: pool.cluster_local == ClusterLocal::Strict,
        extensions: pool.extensions().into_iter().map(str::to_owned).collect(),
        algorithm: pool.algorithm.to_string(),
        on_empty: if assignment.passthrough { "pass" } else { "refuse" }.to_owned(),
        refused_share: refused_share(assignment, route),
        priorities: priorities.collect(),
        localities: localities.collect(),
        endpoints,
        kernel: None,
    }
}

/// Returns the share of a traffic split that is refused for lack of an endpoint.
/// `None` if the whole service refuses.
fn refused_share(assignment: &Assignment, route: &Route) -> Option<f64> {
    let total: f64 = assignment.routes.iter().map(|route| f64::from(route.weight)).sum();
    let split = route.pool.groups == 0 && !assignment.schedule.is_empty();
    split.then(|| rounded(f64::from(route.weight) / total))
}

/// Rounds to 12 digits, to hide floating-point noise in sums of fractions.
fn rounded(share: f64) -> f64 {
    (share * 1e12).round() / 1e12
}
