//! Which endpoints a pool has.

use std::{collections::BTreeSet, net::SocketAddr};

use super::{
    PoolKey,
    pool::{Pool, Scene},
};
use crate::{
    model::{EndpointSlice, Finding, Locality, Protocol, Service, SliceEndpoint},
    store::{Objects, Snapshot},
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
            Self::Unhealthy => "unhealthy",
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
    pub cluster: String,
    /// Where it is.
    pub locality: Locality,
    /// 1, unless an object says otherwise.
    pub weight: u32,
    /// Whether it may be chosen.
    pub health: EndpointHealth,
    /// Its level, once that is decided; 0 is the nearest.
    pub priority: u32,
}

/// What decides which endpoints belong to a pool.
pub(super) struct Filter<'a> {
    pub(super) key: &'a PoolKey,
    /// The subset's labels.
    pub(super) labels: Option<&'a std::collections::BTreeMap<String, String>>,
    pub(super) cluster_local: bool,
    /// Whether an Istio rule is in force for the service.
    pub(super) ruled: bool,
    /// Whether panic is possible: then endpoints that are not ready stay out altogether, so that it never revives them.
    pub(super) panic_possible: bool,
}

/// The endpoints of the pool, in order of their addresses.
pub(super) fn select(scene: &Scene<'_>, filter: &Filter<'_>) -> Vec<Endpoint> {
    let Some((service, port)) = definition(scene, filter.key) else { return Vec::new() };
    let mut found: Vec<(Endpoint, &SliceEndpoint)> = Vec::new();
    let mut seen = BTreeSet::new();
    for (cluster, objects) in &scene.snapshot.clusters {
        let own = *cluster == scene.client.cluster;
        if (filter.cluster_local || service.node_local) && !own {
            continue;
        }
        // A cluster adds endpoints to services that it has itself.
        if objects.services.contains_key(&service.name) {
            for slice in objects.slices.get(&service.name).into_iter().flat_map(|slices| slices.values()) {
                collect(scene, filter, service, port, (cluster, objects, slice), &mut seen, &mut found);
            }
        }
    }
    let ready = |endpoint: &SliceEndpoint| endpoint.ready || service.publish_not_ready;
    // kube-proxy: where nothing is ready, what is going away but still serves is better than nothing.
    let last_resort = !filter.ruled && !found.iter().any(|(_, endpoint)| ready(endpoint) && !endpoint.terminating);
    let mut endpoints: Vec<Endpoint> = found
        .into_iter()
        .filter_map(|(mut endpoint, conditions)| {
            endpoint.health = match (ready(conditions), conditions.terminating) {
                (_, true) if last_resort && conditions.serving => EndpointHealth::Draining,
                (_, true) => return None,
                (false, false) if filter.panic_possible => return None,
                (false, false) => EndpointHealth::Unhealthy,
                (true, false) => EndpointHealth::Healthy,
            };
            if endpoint.health.is_usable() && scene.ejections.contains(filter.key, &endpoint.address) {
                endpoint.health = EndpointHealth::Ejected;
            }
            Some(endpoint)
        })
        .collect();
    endpoints.sort_by_key(|endpoint| endpoint.address);
    endpoints
}

/// The Service as the client's own cluster has it, or else any cluster, and the name of the port.
fn definition<'a>(scene: &Scene<'a>, key: &PoolKey) -> Option<(&'a Service, &'a str)> {
    let own = scene.snapshot.clusters.get(&scene.client.cluster);
    let all = own.into_iter().chain(scene.snapshot.clusters.values());
    let service = all.filter_map(|objects| objects.services.get(&key.service)).next()?;
    let port = service.ports.iter().find(|port| port.port == key.port && port.protocol == Protocol::Tcp)?;
    Some((service, &port.name))
}

fn collect<'a>(
    scene: &Scene<'_>,
    filter: &Filter<'_>,
    service: &Service,
    port: &str,
    (cluster, objects, slice): (&str, &Objects, &'a EndpointSlice),
    seen: &mut BTreeSet<SocketAddr>,
    found: &mut Vec<(Endpoint, &'a SliceEndpoint)>,
) {
    // Endpoints belong to a Service port by its name, whatever the numbers are.
    let Some(slice_port) =
        slice.ports.iter().find(|candidate| candidate.name == port && candidate.protocol == Protocol::Tcp)
    else {
        return;
    };
    for endpoint in slice.endpoints.iter().filter(|endpoint| (scene.family)(&endpoint.address)) {
        if service.node_local && (endpoint.node.is_none() || endpoint.node != scene.client.node) {
            continue;
        }
        let locality = locality_of(objects, endpoint);
        if !filter.labels.is_none_or(|labels| has_labels(objects, endpoint, cluster, &locality, labels)) {
            continue;
        }
        let address = SocketAddr::new(endpoint.address, slice_port.port);
        // During a rollout of slices an endpoint may be in two of them.
        if seen.insert(address) {
            let health = EndpointHealth::Healthy;
            found.push((
                Endpoint { address, cluster: cluster.to_owned(), locality, weight: 1, health, priority: 0 },
                endpoint,
            ));
        }
    }
}

/// Locality comes from the Node only: pods cannot make themselves look near.
fn locality_of(objects: &Objects, endpoint: &SliceEndpoint) -> Locality {
    let node = endpoint.node.as_ref().and_then(|name| objects.nodes.get(name));
    node.map_or_else(Locality::default, |node| node.locality.clone())
}

/// The pod's labels, and those that Istio adds to each endpoint.
fn has_labels(
    objects: &Objects,
    endpoint: &SliceEndpoint,
    cluster: &str,
    locality: &Locality,
    wanted: &std::collections::BTreeMap<String, String>,
) -> bool {
    let pod = endpoint.pod.as_ref().and_then(|name| objects.pods.get(name));
    wanted.iter().all(|(key, value)| match key.as_str() {
        "topology.istio.io/cluster" => value == cluster,
        "topology.kubernetes.io/region" => *value == locality.region,
        "topology.kubernetes.io/zone" => *value == locality.zone,
        "topology.istio.io/subzone" => *value == locality.subzone,
        _ => pod.and_then(|pod| pod.labels.get(key)) == Some(value),
    })
}

/// Why a pool has nobody to take.
pub(super) fn why_nobody(scene: &Scene<'_>, pool: &Pool) -> String {
    if !pool.endpoints.is_empty() {
        return format!("none of its {} endpoints is healthy", pool.endpoints.len());
    }
    let Some((service, port)) = definition(scene, &pool.key) else {
        return format!("there is no such service, or it has no TCP port {}", pool.key.port);
    };
    let clusters = scene.snapshot.clusters.values();
    let slices: Vec<_> =
        clusters.filter_map(|objects| objects.slices.get(&service.name)).flat_map(|slices| slices.values()).collect();
    let all = || slices.iter().flat_map(|slice| &slice.endpoints);
    let serves = |slice: &EndpointSlice| slice.ports.iter().any(|candidate| candidate.name == port);
    if all().next().is_none() {
        "it has no endpoints".to_owned()
    } else if !slices.iter().any(|slice| serves(slice)) {
        format!("no EndpointSlice has a TCP port named {port:?}, as this port of the Service is")
    } else if !all().any(|endpoint| (scene.family)(&endpoint.address)) {
        "its endpoints are of the other address family".to_owned()
    } else if pool.key.subset.is_some() {
        "no Pod behind its endpoints has the labels of the subset".to_owned()
    } else if pool.cluster_local {
        "it is kept in its cluster, which has no endpoint of it".to_owned()
    } else {
        "none of its endpoints is left: they are terminating, in clusters without the Service, or not on this node"
            .to_owned()
    }
}

/// What does not fit together: slices without a Service, endpoints on nodes that nobody knows.
pub(super) fn check(snapshot: &Snapshot, findings: &mut Vec<Finding>) {
    for (cluster, objects) in &snapshot.clusters {
        for (service, slices) in &objects.slices {
            let unknown = !objects.services.contains_key(service);
            for slice in slices.values() {
                let object = format!("EndpointSlice {}", slice.name);
                let source = snapshot.origin(cluster, &object).cloned().unwrap_or_default();
                if unknown {
                    let message = format!("cluster {cluster} has no Service {service}: these endpoints are not used");
                    findings.push(Finding::warning(&object, message).from_source(&source));
                }
                let nodes: BTreeSet<_> = slice.endpoints.iter().map(|endpoint| endpoint.node.as_deref()).collect();
                for node in nodes.into_iter().filter(|node| !node.is_some_and(|node| objects.nodes.contains_key(node)))
                {
                    let what = node.map_or("an endpoint names no node".to_owned(), |node| {
                        format!("cluster {cluster} has no Node {node}")
                    });
                    let message =
                        format!("endpoints.nodeName: {what}, so the locality is unknown and counts as far away");
                    findings.push(Finding::warning(&object, message).from_source(&source));
                }
            }
        }
    }
}
