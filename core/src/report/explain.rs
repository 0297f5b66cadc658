//! Explains the share of each endpoint of a service: the steps of the policy, each with the rule that decided it.

use std::{collections::BTreeMap, fmt::Write as _, net::SocketAddr};

use portolan_common::LbPolicy;
use serde::{Deserialize, Serialize};

use super::{ClientReport, EndpointReport, route_shares};
use crate::{
    model::{Algorithm, ClusterLocal, Code, Finding, Locality, MeshConfig, ObjectRef, ServiceId, SuccessCriterion},
    policy::{
        Assignment, Client, Endpoint, EndpointHealth, LocalityMode, OVERPROVISIONING_FACTOR, PolicyOutput, Pool,
        Priority, Route, SettingSource,
    },
};

/// The response of `portolan explain`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// The client that the explanation applies to.
    pub client: ClientReport,
    /// One entry for each port, address family, and set of addresses that routes treat differently.
    pub ports: Vec<PortExplanation>,
    /// The findings that concern the service.
    pub findings: Vec<Finding>,
}

/// The explanation for one port of a service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortExplanation {
    /// `namespace/name:port` of the service that clients dial.
    pub service: String,
    /// The service's host name, such as `reviews.default.svc.cluster.local`.
    pub host: String,
    /// The addresses and ports that clients dial.
    pub frontends: Vec<String>,
    /// The destinations of connections: one, unless a VirtualService splits them.
    pub routes: Vec<RouteExplanation>,
}

/// The explanation for one destination of a route.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteExplanation {
    /// The pool, as `namespace/name:port` with the subset, if any.
    pub destination: String,
    /// The steps of the policy, in the order of evaluation.
    pub steps: Vec<Step>,
    /// The endpoints of the pool, ordered by address.
    pub endpoints: Vec<EndpointExplanation>,
    /// The endpoints of the service that the pool excludes.
    pub left_out: Vec<ExcludedExplanation>,
}

/// One step of the policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// `route`, `cluster`, `policy`, `subset`, `endpoints`, `locality`, `load`, `ejection`, `probe` or `order`.
    pub step: String,
    /// The object that decided the step; absent for a default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// The result of the step, as text.
    pub says: String,
}

/// An endpoint, its share, and the reason for the share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndpointExplanation {
    /// The endpoint as `plan` shows it.
    #[serde(flatten)]
    pub endpoint: EndpointReport,
    /// The reason for the share, as text.
    pub why: String,
}

/// An endpoint of the service that the pool excludes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExcludedExplanation {
    /// The endpoint's IP address, without a port.
    pub address: String,
    /// The id of the endpoint's cluster.
    pub cluster: String,
    /// The rule that excludes the endpoint, as text.
    pub why: String,
}

impl Explanation {
    /// Builds the explanation from an output of [`crate::policy::explain`], for one port or for all of them.
    pub fn new(client: &Client, output: &PolicyOutput, port: Option<u16>) -> Self {
        let assignments =
            output.assignments.iter().filter(|assignment| port.is_none_or(|port| port == assignment.port));
        Self {
            client: ClientReport::new(client),
            ports: assignments.map(|assignment| explain_port(client, assignment)).collect(),
            findings: output.findings.clone(),
        }
    }

    /// Returns all destinations, ordered by port and route.
    pub fn routes_mut(&mut self) -> impl Iterator<Item = &mut RouteExplanation> {
        self.ports.iter_mut().flat_map(|port| &mut port.routes)
    }
}

fn explain_port(client: &Client, assignment: &Assignment) -> PortExplanation {
    let routes = assignment.routes.iter().zip(route_shares(assignment));
    PortExplanation {
        service: format!("{}:{}", assignment.service, assignment.port),
        host: assignment.host.clone(),
        frontends: assignment.frontends.iter().map(SocketAddr::to_string).collect(),
        routes: routes.map(|(route, shares)| explain_route(client, assignment, route, &shares)).collect(),
    }
}

fn explain_route(
    client: &Client,
    assignment: &Assignment,
    route: &Route,
    shares: &BTreeMap<SocketAddr, f64>,
) -> RouteExplanation {
    let pool = &route.pool;
    let share = |endpoint: &Endpoint| {
        if assignment.passthrough { 0.0 } else { shares.get(&endpoint.address).copied().unwrap_or_default() }
    };
    let endpoints = pool.endpoints.iter().map(|endpoint| EndpointExplanation {
        endpoint: EndpointReport::new(endpoint, share(endpoint)),
        why: why(client, pool, endpoint, share(endpoint)),
    });
    let left_out = pool.excluded.iter().map(|left_out| ExcludedExplanation {
        address: left_out.address.to_string(),
        cluster: left_out.cluster.to_string(),
        why: left_out.why.to_owned(),
    });
    RouteExplanation {
        destination: pool.key.to_string(),
        steps: steps(client, assignment, route),
        endpoints: endpoints.collect(),
        left_out: left_out.collect(),
    }
}

fn step(step: &str, object: Option<String>, says: impl Into<String>) -> Step {
    Step { step: step.to_owned(), object, says: says.into() }
}

fn steps(client: &Client, assignment: &Assignment, route: &Route) -> Vec<Step> {
    let pool = &route.pool;
    let rule = pool.rule.as_ref().map(|rule| format!("DestinationRule {}", rule.name));
    let mut steps = vec![routing(assignment, route), cluster_local(client, pool)];
    steps.push(match &rule {
        None => step("policy", None, "no DestinationRule matches this host: mesh-wide settings apply"),
        Some(object) => step("policy", Some(object.clone()), policy(pool)),
    });
    if let (Some(name), Some(rule)) = (&pool.key.subset, &pool.rule) {
        let labels = rule.subsets.iter().find(|subset| subset.name == *name).map(|subset| &subset.labels);
        let labels: Vec<String> = labels.into_iter().flatten().map(|(key, value)| format!("{key}={value}")).collect();
        steps.push(step(
            "subset",
            Some(format!("DestinationRule {}", rule.name)),
            format!("{name}: {}", labels.join(", ")),
        ));
    }
    let healthy = pool.endpoints.iter().filter(|endpoint| endpoint.health.is_usable()).count();
    let of = format!("{} endpoints, {healthy} healthy; {} excluded", pool.endpoints.len(), pool.excluded.len());
    steps.push(step("endpoints", None, of));
    steps.push(locality(pool, rule.as_deref()));
    steps.extend(pool.priorities.iter().zip(0..).map(|(priority, level)| load(pool, priority, level)));
    if let Some(outlier) = &pool.outlier {
        let most = outlier.most_ejected(pool.endpoints.len());
        let ejected = pool.endpoints.iter().filter(|endpoint| endpoint.health == EndpointHealth::Ejected).count();
        let thresholds: Vec<String> =
            outlier.thresholds().iter().filter(|count| **count > 0).map(ToString::to_string).collect();
        let after = if thresholds.is_empty() {
            "never".to_owned()
        } else {
            format!("after {} consecutive failures", thresholds.join(" or "))
        };
        let says = format!(
            "{after}; base ejection time {:?}; at most {most} of {} ejected at once ({}%); {ejected} ejected now",
            outlier.base_ejection_time,
            pool.endpoints.len(),
            outlier.max_ejection_percent
        );
        let says =
            if outlier.always_eject_one { says + "; one always allowed (portolan.io/always-eject-one)" } else { says };
        let says = says
            + match pool.success_criterion {
                SuccessCriterion::HttpStatus => "; HTTP responses with status 500 or above also count as failures",
                SuccessCriterion::FirstByte => {
                    "; connections broken before the first response byte also count (portolan.io/count-early-resets)"
                }
                SuccessCriterion::Connected => "",
            };
        steps.push(step("ejection", rule, says));
    }
    if let Some(probe) = &pool.probe {
        let failing = pool.endpoints.iter().filter(|endpoint| endpoint.health == EndpointHealth::Failing).count();
        let says = format!(
            "{probe} every {:?}; unhealthy after {} consecutive failures, healthy after {} successes; \
             {failing} of {} failing now",
            probe.period,
            probe.failures,
            probe.successes,
            pool.endpoints.len()
        );
        steps.push(step("probe", pool.rule.as_ref().map(|rule| format!("DestinationRule {}", rule.name)), says));
    }
    steps.push(order(assignment, pool));
    steps
}

fn routing(assignment: &Assignment, route: &Route) -> Step {
    let Some(rule) = &assignment.routed_by else {
        return step("route", None, "no VirtualService route matches: connections go to the service itself");
    };
    let total: u64 = assignment.routes.iter().map(|route| u64::from(route.weight)).sum();
    let says = format!("routes to {}, weight {} of {total}", route.pool.key, route.weight);
    step("route", Some(format!("VirtualService {rule}")), says)
}

fn cluster_local(client: &Client, pool: &Pool) -> Step {
    let object = pool.cluster_local_by.as_ref().map(|pattern| format!("serviceSettings {pattern:?}"));
    let says = match pool.cluster_local {
        ClusterLocal::Off => "connections may go to any cluster".to_owned(),
        ClusterLocal::Prefer => format!("endpoints in {} are preferred; other clusters follow", client.cluster),
        ClusterLocal::Strict => {
            format!("connections stay in {}; they are refused if it has no usable endpoint", client.cluster)
        }
    };
    step("cluster", object, says)
}

/// Summarizes which parts of a DestinationRule apply to the pool.
fn policy(pool: &Pool) -> String {
    let Some(rule) = &pool.rule else { return String::new() };
    let subset = rule.subsets.iter().find(|subset| Some(&subset.name) == pool.key.subset.as_ref());
    let by_port = |policy: &crate::model::TrafficPolicy| policy.ports.contains_key(&pool.key.port);
    let mut says = format!("host {:?}", rule.host);
    if by_port(&rule.policy) {
        let _ = write!(says, "; portLevelSettings for port {} replace all other settings", pool.key.port);
    }
    if let Some(subset) = subset {
        let own = if by_port(&subset.policy) { "it with its portLevelSettings" } else { "it block by block" };
        let _ = write!(says, "; subset {:?} overrides {own}", subset.name);
    }
    let _ = write!(says, "; outlierDetection {}", if pool.outlier.is_some() { "on" } else { "off" });
    says
}

fn locality(pool: &Pool, rule: Option<&str>) -> Step {
    let object = match pool.setting {
        Some(SettingSource::DestinationRule) => rule.map(str::to_owned),
        Some(SettingSource::TrafficDistribution) => Some(pool.key.service.object().to_string()),
        Some(SettingSource::Mesh) => Some("MeshConfig".to_owned()),
        None => None,
    };
    let says = match (pool.mode, pool.setting) {
        (LocalityMode::Distribute, _) if pool.distributes_with_failover => {
            "distribute with failover: each locality gets its percentage; load it cannot absorb fails over"
        }
        (LocalityMode::Distribute, _) => {
            "distribute: each locality gets its percentage; unlisted localities get nothing"
        }
        (LocalityMode::Failover, Some(SettingSource::TrafficDistribution)) => {
            "trafficDistribution: nearest first; load spills over when nearer levels lack capacity"
        }
        (LocalityMode::Failover, None) => "locality load balancing is off; the client's own cluster comes first",
        (LocalityMode::Failover, Some(SettingSource::Mesh)) => {
            "failover (enabled by outlierDetection): nearest first; load spills over when nearer levels lack capacity"
        }
        (LocalityMode::Failover, Some(SettingSource::DestinationRule)) => {
            "failover: nearest first; load spills over when nearer levels lack capacity"
        }
        (LocalityMode::None, None) => "locality load balancing is off: locality is ignored",
        (LocalityMode::None, Some(_)) => {
            "locality is ignored: failover needs outlierDetection, and distribute is not set"
        }
    };
    step("locality", object, says)
}

fn load(pool: &Pool, priority: &Priority, level: u32) -> Step {
    let Priority { hosts, healthy, load, panic } = priority;
    let health = (OVERPROVISIONING_FACTOR * healthy).checked_div(*hosts).unwrap_or(0).min(100);
    let threshold = pool.outlier.as_ref().map_or(0, |outlier| outlier.min_health_percent);
    let mut says = format!(
        "priority {level}: {healthy} of {hosts} healthy, health \
         min(100, {OVERPROVISIONING_FACTOR} x {healthy} / {hosts}) = {health}, load {load}%"
    );
    if *panic {
        let _ = write!(says, "; panic: fewer than {threshold}% are healthy, so ejected endpoints are used as well");
    }
    step("load", None, says)
}

fn order(assignment: &Assignment, pool: &Pool) -> Step {
    let schedule = &assignment.schedule;
    let says = if assignment.passthrough {
        "PASSTHROUGH: connections keep their original destination and bypass Portolan".to_owned()
    } else if pool.groups == 0 {
        "no eligible endpoint: connections are refused".to_owned()
    } else {
        let (turns, groups) = (schedule.turns.len(), schedule.runs.len());
        let cycle = format!("a cycle of {turns} turns over {groups} groups, earliest deadline first (EDF)");
        let places = || {
            schedule.runs.iter().filter(|run| run.choice == LbPolicy::Hash).map(|run| run.members.len()).sum::<usize>()
        };
        match pool.algorithm {
            Algorithm::RoundRobin | Algorithm::Passthrough => format!("{cycle}; shares are exact in every cycle"),
            Algorithm::LeastRequest => format!(
                "{cycle}; of two random endpoints of a group, the one with fewer active connections gets picked"
            ),
            Algorithm::Random => format!("{cycle}; a turn and an endpoint of its group are drawn at random"),
            Algorithm::ConsistentHash => format!(
                "a Maglev table of {} entries, divided among the endpoints by share; a pod's hash selects its entry",
                places()
            ),
        }
    };
    let says = match assignment.affinity {
        Some(affinity) if pool.groups > 0 => {
            format!("{says}; a pod returns to its endpoint within {} s (sessionAffinity)", affinity.as_secs())
        }
        _ => says,
    };
    step("order", None, says)
}

/// Describes in one sentence why an endpoint has its share.
fn why(client: &Client, pool: &Pool, endpoint: &Endpoint, share: f64) -> String {
    let place = match pool.mode {
        LocalityMode::None => String::new(),
        LocalityMode::Failover | LocalityMode::Distribute => format!("{}; ", distance(client, endpoint)),
    };
    let priority = pool.priorities.get(endpoint.priority as usize);
    let load = priority.map_or(0, |priority| priority.load);
    let health = match endpoint.health {
        EndpointHealth::Healthy => "healthy",
        EndpointHealth::Unhealthy => "not ready",
        EndpointHealth::Draining => "terminating, used because no other endpoint is ready",
        EndpointHealth::Failing => "failing active probes (portolan.io/probe)",
        EndpointHealth::Ejected => "ejected by outlier detection or by an operator",
    };
    let result = if share > 0.0 {
        format!("one of the endpoints that share the {load}% of priority {}", endpoint.priority)
    } else if !endpoint.health.is_usable() {
        "gets no connections".to_owned()
    } else if load == 0 {
        format!("priority {} has no load: nearer priorities absorb all of it", endpoint.priority)
    } else {
        "gets no connections".to_owned()
    };
    format!("{place}{health}; {result}")
}

fn distance(client: &Client, endpoint: &Endpoint) -> &'static str {
    let (here, there): (&Locality, &Locality) = (&client.locality, &endpoint.locality);
    if there.region != here.region {
        "another region"
    } else if there.zone != here.zone {
        "the same region"
    } else if there.subzone != here.subzone {
        "the same zone"
    } else {
        "the same locality"
    }
}

/// Returns whether a finding may concern a service.
/// It does if it is about the service, one of its slices, a rule of its namespace or of the mesh, or a file whose
/// objects are unknown.
pub fn concerns(finding: &Finding, service: &ServiceId) -> bool {
    let ObjectRef { kind, namespace, name } = &finding.object;
    let own = &service.name;
    match kind.as_str() {
        "" => true,
        "Service" | "ServiceEntry" => finding.object == service.object(),
        "EndpointSlice" => *namespace == own.namespace && name.starts_with(own.name.as_str()),
        "DestinationRule" | "VirtualService" => {
            // A rule for another host does not concern this service.
            let elsewhere = matches!(finding.code, Code::UnknownHost | Code::ForeignHost);
            (*namespace == own.namespace || *namespace == MeshConfig::default().root_namespace) && !elsewhere
        }
        "WorkloadEntry" => *namespace == own.namespace,
        "ConfigMap" | "Cluster" => true,
        _ => false,
    }
}
