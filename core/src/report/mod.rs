//! What people and scripts are told: the contract of `plan` and `get`.

pub mod diff;
pub mod explain;

use std::{collections::BTreeMap, net::SocketAddr};

use serde::{Deserialize, Serialize};

use crate::{
    model::{ClusterLocal, Finding, Severity},
    policy::{Assignment, Client, Endpoint, PolicyOutput, Route},
};

/// The answer of `plan` and `get`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// For whom it is.
    pub client: ClientReport,
    /// Fingerprint of the objects: where `plan` and the agent show the same, the agent has taken what is in the directory.
    pub config: String,
    /// One for each port and address family of a service, and each destination that its route names.
    pub services: Vec<ServiceReport>,
    /// What people should know.
    pub findings: Vec<Finding>,
}

/// For whom a report is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClientReport {
    /// Id of the cluster.
    pub cluster: String,
    /// The node, where there is one.
    pub node: Option<String>,
    /// `region/zone/subzone`
    pub locality: String,
}

impl ClientReport {
    /// Of a client.
    pub fn new(client: &Client) -> Self {
        Self { cluster: client.cluster.to_string(), node: client.node.clone(), locality: client.locality.to_string() }
    }
}

/// One port of a service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceReport {
    /// Namespace of the service that clients dial.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// `ServiceEntry`, where it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Its host name.
    pub host: String,
    /// The port that clients dial.
    pub port: u16,
    /// Its protocol.
    pub protocol: String,
    /// The subset that its route leads to.
    pub subset: Option<String>,
    /// The service that its route leads to, where that is another one: `namespace/name:port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<String>,
    /// The addresses that clients dial.
    pub frontends: Vec<String>,
    /// `none`, `failover` or `distribute`.
    pub mode: String,
    /// Whether only the client's own cluster serves.
    pub cluster_local: bool,
    /// Portolan's own annotations that are in force (docs/extensions.md).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extensions: Vec<String>,
    /// Host choice.
    pub algorithm: String,
    /// What happens where there is nobody to take: `refuse`; or `pass`, where connections go where they were going.
    pub on_empty: String,
    /// Fraction of new connections that this destination refuses, where a route splits them: its own share, if it has nobody to take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused_share: Option<f64>,
    /// Levels, nearest first.
    pub priorities: Vec<PriorityReport>,
    /// Localities, by level and name.
    pub localities: Vec<LocalityReport>,
    /// Endpoints, by address.
    pub endpoints: Vec<EndpointReport>,
    /// What the kernel holds for this port; from a running agent only, and with the first of several destinations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<FrontendKernel>,
}

/// A level.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PriorityReport {
    /// 0 is the nearest.
    pub priority: u32,
    /// Endpoints on it.
    pub hosts: u64,
    /// Those that may be chosen.
    pub healthy: u64,
    /// Percent of the connections.
    pub load: u32,
    /// Whether all endpoints are used, healthy or not.
    pub panic: bool,
}

/// A locality.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LocalityReport {
    /// `region/zone/subzone`
    pub locality: String,
    /// Its level.
    pub priority: u32,
    /// Its weight before health.
    pub weight: u64,
    /// Fraction of new connections.
    pub share: f64,
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointReport {
    /// Address and port.
    pub address: String,
    /// Its cluster.
    pub cluster: String,
    /// `region/zone/subzone`
    pub locality: String,
    /// Its level.
    pub priority: u32,
    /// Its weight.
    pub weight: u32,
    /// `healthy`, `unhealthy`, `draining` or `ejected`.
    pub health: String,
    /// Fraction of new connections.
    pub share: f64,
    /// When its ejection ends at the earliest (RFC 3339); from a running agent only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ejected_until: Option<String>,
    /// Why it is ejected: the threshold that was reached, or `hand` and the reason; from a running agent only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ejected_by: Option<String>,
    /// What the kernel has counted; from a running agent only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<EndpointKernel>,
}

impl EndpointReport {
    /// Of an endpoint and the share that it gets.
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

/// A frontend as the kernel holds it, summed over its addresses.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendKernel {
    /// Slots of its schedule.
    pub slots: u32,
    /// How often it was published.
    pub generation: u32,
    /// Connections that were given an endpoint.
    pub connections: u64,
    /// Connections that were refused because there was nobody to take.
    pub refused: u64,
}

/// What the kernel has counted for an endpoint, over all services that it belongs to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointKernel {
    /// Connections established.
    pub connections: u64,
    /// Connections open now.
    pub active: u64,
    /// Connects that failed.
    pub failures: u64,
    /// HTTP/1 responses, where their status is looked at.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub responses: u64,
    /// Those with a status of 500 and more.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub server_errors: u64,
    /// Those with a status of 502, 503 or 504.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gateway_errors: u64,
    /// From SYN to established, microseconds, smoothed over connections; absent where endpoints are not ejected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connect_micros: Option<f64>,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Report {
    /// From the policy's verdict.
    pub fn new(client: &Client, config: String, output: &PolicyOutput) -> Self {
        Self {
            client: ClientReport::new(client),
            config,
            services: output.assignments.iter().flat_map(|assignment| services(assignment)).collect(),
            findings: output.findings.clone(),
        }
    }

    /// Whether something does not work.
    pub fn has_errors(&self) -> bool {
        self.findings.iter().any(|finding| finding.severity == Severity::Error)
    }
}

/// The shares of endpoints, for each route of an assignment.
pub(crate) fn route_shares(assignment: &Assignment) -> Vec<BTreeMap<SocketAddr, f64>> {
    let mut shares: Vec<BTreeMap<SocketAddr, f64>> = vec![BTreeMap::new(); assignment.schedule.runs.len()];
    for (run, address, share) in assignment.schedule.shares() {
        *shares[run].entry(address).or_default() += share;
    }
    let mut runs = shares.into_iter();
    let routes = assignment.routes.iter().map(|route| {
        // A route that leads to nobody has a run as well, of nobody.
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

/// The part of a split that leads to nobody; of a service that refuses everything it need not be said.
fn refused_share(assignment: &Assignment, route: &Route) -> Option<f64> {
    let total: f64 = assignment.routes.iter().map(|route| f64::from(route.weight)).sum();
    let split = route.pool.groups == 0 && !assignment.schedule.is_empty();
    split.then(|| rounded(f64::from(route.weight) / total))
}

/// Without the last digits, in which sums of fractions differ from the fraction.
fn rounded(share: f64) -> f64 {
    (share * 1e12).round() / 1e12
}
