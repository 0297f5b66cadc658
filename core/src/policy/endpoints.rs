//! Selects the endpoints of a pool.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{
    context::{Candidate, PolicyContext},
    locality::Labelled,
    service_view::{ServiceView, find},
    types::{Endpoint, EndpointHealth, Excluded, PoolKey},
};
use crate::{
    model::{ClusterLocal, EndpointSlice, Hints, Labels, Locality, SliceEndpoint, Target, Workload},
    store::Objects,
};

/// Criteria for the endpoints of a pool.
pub(super) struct Filter<'a> {
    pub(super) key: &'a PoolKey,
    /// Labels of the subset; `None` for all endpoints.
    pub(super) labels: Option<&'a Labels>,
    pub(super) cluster_local: ClusterLocal,
    /// Whether an Istio rule applies to the service.
    pub(super) has_istio_rule: bool,
    /// Whether endpoints that are not ready are excluded, instead of counted as unhealthy.
    pub(super) ready_only: bool,
    /// Whether ejections apply. A pool without outlier detection ejects no endpoint.
    pub(super) ejects: bool,
}

/// Intermediate result of the selection.
struct EndpointSearch<'a> {
    candidates: Vec<Candidate<'a>>,
    /// Index into `candidates` of each address.
    seen: HashMap<SocketAddr, usize>,
    left_out: Option<Vec<Excluded>>,
}

impl EndpointSearch<'_> {
    fn leave_out(&mut self, address: IpAddr, cluster: &Arc<str>, why: &'static str) {
        if let Some(left_out) = &mut self.left_out {
            left_out.push(Excluded { address, cluster: Arc::clone(cluster), why });
        }
    }
}

/// The endpoints that a pool includes, and those that it excludes.
#[derive(Default)]
pub(super) struct Selected<'a> {
    /// Endpoints of the pool, ordered by address.
    pub(super) candidates: Vec<Candidate<'a>>,
    /// Endpoints that are excluded only because they are terminating or not ready.
    pub(super) leaving: Vec<SocketAddr>,
    /// Excluded endpoints with the reasons; empty unless an explanation was requested.
    pub(super) left_out: Vec<Excluded>,
}

/// Selects the endpoints of the pool from EndpointSlices, ServiceEntries and WorkloadEntries.
pub(super) fn select<'a>(context: &PolicyContext<'a>, filter: &Filter<'_>) -> Selected<'a> {
    let mut found =
        EndpointSearch { candidates: Vec::new(), seen: HashMap::new(), left_out: context.explain.then(Vec::new) };
    let Some(view) = find(context.snapshot, &context.client.cluster, &filter.key.service) else {
        return Default::default();
    };
    let Some(port) = view.port(filter.key) else { return Default::default() };
    if !view.id.is_entry {
        slices(context, filter, &view, &port.name, &mut found);
    }
    workloads(context, filter, &view, port, &mut found);
    by_hints(context, filter, &view, &mut found);
    let EndpointSearch { candidates, mut left_out, .. } = found;
    // kube-proxy: if no endpoint is ready, fall back to those that are terminating but still serving.
    let is_ready =
        |candidate: &Candidate<'_>| candidate.ready && !candidate.lost && candidate.terminating != Some(true);
    let last_resort =
        !filter.has_istio_rule && !candidates.iter().any(|candidate| view.publish_not_ready || is_ready(candidate));
    let mut chosen = Vec::with_capacity(candidates.len());
    let mut leaving = Vec::new();
    for mut candidate in candidates {
        match health(filter, &view, last_resort, &candidate) {
            // The cluster is unreachable, so the current state of the endpoint is unknown.
            Ok(_) if candidate.lost => candidate.endpoint.health = EndpointHealth::Unhealthy,
            Ok(health) => candidate.endpoint.health = health,
            Err(why) => {
                leaving.push(candidate.endpoint.address);
                if let Some(left_out) = &mut left_out {
                    let Endpoint { address, cluster, .. } = &candidate.endpoint;
                    left_out.push(Excluded { address: address.ip(), cluster: Arc::clone(cluster), why });
                }
                continue;
            }
        }
        let Endpoint { address, locality, .. } = &candidate.endpoint;
        let out = context.observed.is_ejected(filter.key, address, filter.ejects)
            || context.observed.is_drained(&filter.key.service.name, &locality.region);
        if candidate.endpoint.health.is_usable() && out {
            candidate.endpoint.health = EndpointHealth::Ejected;
        } else if candidate.endpoint.health.is_usable() && context.observed.is_failing(filter.key, address) {
            candidate.endpoint.health = EndpointHealth::Failing;
        }
        chosen.push(candidate);
    }
    chosen.sort_by_key(|candidate| candidate.endpoint.address);
    Selected { candidates: chosen, leaving, left_out: left_out.unwrap_or_default() }
}

/// Returns the health according to the conditions of the endpoint, or the reason why the pool excludes it.
fn health(
    filter: &Filter<'_>,
    view: &ServiceView<'_>,
    last_resort: bool,
    candidate: &Candidate<'_>,
) -> Result<EndpointHealth, &'static str> {
    let ready = candidate.ready || view.publish_not_ready;
    // Without `terminating`, Kubernetes assumes false; Istio assumes true for an endpoint that is not ready.
    let going = candidate.terminating.unwrap_or(filter.has_istio_rule && !ready);
    match (ready, going) {
        (true, _) if view.publish_not_ready => Ok(EndpointHealth::Healthy),
        (_, true) if last_resort && candidate.serving => Ok(EndpointHealth::Draining),
        (_, true) => Err("it is terminating"),
        (true, false) => Ok(EndpointHealth::Healthy),
        (false, false) if filter.ready_only => {
            Err("it is not ready, and minHealthPercent allows panic mode, which must not revive it")
        }
        (false, false) => Ok(EndpointHealth::Unhealthy),
    }
}

fn slices<'a>(
    context: &PolicyContext<'a>,
    filter: &Filter<'_>,
    view: &ServiceView<'a>,
    port: &str,
    found: &mut EndpointSearch<'a>,
) {
    // The client's own cluster comes first: if clusters disagree about an address, it takes precedence.
    let own = context.snapshot.clusters.get_key_value(&context.client.cluster);
    let others = context.snapshot.clusters.iter().filter(|(cluster, _)| **cluster != context.client.cluster);
    for (cluster, objects) in own.into_iter().chain(others) {
        let Some(slices) = objects.slices.get(&view.id.name) else { continue };
        let own = *cluster == context.client.cluster;
        // A cluster adds endpoints only to services that it has itself.
        let outside = if !own && filter.cluster_local == ClusterLocal::Strict {
            Some("it is in another cluster, and clusterLocal keeps connections in the client's cluster")
        } else if !own && view.node_local {
            Some("it is on another node, and internalTrafficPolicy is Local")
        } else if !objects.services.contains_key(&view.id.name) {
            Some("its cluster has no such Service")
        } else {
            None
        };
        let network = objects.network();
        let lost = !own && context.snapshot.lost.contains(cluster);
        for slice in slices.values() {
            let serves = slice.ports.iter().find(|own| own.name == port && own.protocol == filter.key.protocol);
            for endpoint in &slice.endpoints {
                // Endpoints belong to a service port by its name, whatever the numbers are.
                let (why, number) = match (outside, serves) {
                    (Some(why), _) => (Some(why), 0),
                    (None, None) => (Some("its EndpointSlice has no port of that name"), 0),
                    (None, Some(port)) => (None, port.port),
                };
                let candidate = Candidate {
                    endpoint: Endpoint {
                        address: SocketAddr::new(endpoint.address, number),
                        cluster: Arc::clone(cluster),
                        locality: locality_of(context, objects, endpoint),
                        weight: 1,
                        health: EndpointHealth::Healthy,
                        priority: 0,
                    },
                    ready: endpoint.ready,
                    serving: endpoint.serving,
                    terminating: endpoint.terminating,
                    lost,
                    hints: endpoint.hints.as_deref(),
                    labels: pod_labels(objects, slice, endpoint),
                    network,
                    node: endpoint.node.as_deref(),
                };
                add(context, filter, view, candidate, why, found);
            }
        }
    }
}

/// Adds endpoints without an EndpointSlice: those of a ServiceEntry, and WorkloadEntries that it or a Service selects.
fn workloads<'a>(
    context: &PolicyContext<'a>,
    filter: &Filter<'_>,
    view: &ServiceView<'a>,
    port: &crate::model::ServicePort,
    found: &mut EndpointSearch<'a>,
) {
    let own = context.snapshot.clusters.get(&context.client.cluster);
    let namespace = &view.id.name.namespace;
    let selected = |workload: &Workload| {
        view.selector
            .is_some_and(|selector| selector.iter().all(|(key, value)| workload.labels.get(key) == Some(value)))
    };
    let entries =
        [Some(&context.snapshot.mesh), own].into_iter().flatten().flat_map(|objects| objects.workload_entries.values());
    let entries = entries.filter(|entry| entry.name.namespace == *namespace && selected(&entry.workload));
    let network = own.map(Objects::network).unwrap_or_default();
    for workload in view.workloads.iter().chain(entries.map(|entry| &entry.workload)) {
        // Istio: the workload's own port of that name, otherwise the target port; the workload resolves a named target
        // port.
        let own = |name: &str| workload.ports.get(name).copied();
        let number = own(&port.name).or_else(|| match &port.target {
            Target::Number(number) => Some(*number),
            Target::Name(name) => own(name),
        });
        let why = number.is_none().then_some("it does not define the port that the service's targetPort names");
        let number = number.unwrap_or_default();
        let candidate = Candidate {
            endpoint: Endpoint {
                address: SocketAddr::new(workload.address, number),
                // Each control plane assigns such endpoints to its own cluster.
                cluster: Arc::clone(&context.client.cluster),
                locality: Arc::clone(&workload.locality),
                weight: workload.weight,
                health: EndpointHealth::Healthy,
                priority: 0,
            },
            ready: true,
            serving: true,
            terminating: Some(false),
            lost: false,
            hints: None,
            labels: Some(&workload.labels),
            network: if workload.network.is_empty() { network } else { &workload.network },
            node: None,
        };
        add(context, filter, view, candidate, why, found);
    }
}

/// Adds a candidate, or records why it is excluded.
fn add<'a>(
    context: &PolicyContext<'_>,
    filter: &Filter<'_>,
    view: &ServiceView<'_>,
    candidate: Candidate<'a>,
    why: Option<&'static str>,
    found: &mut EndpointSearch<'a>,
) {
    let Endpoint { address, cluster, .. } = &candidate.endpoint;
    let on_node = || candidate.node.is_some() && candidate.node == context.client.node.as_deref();
    let has = |labels: &Labels| labels.iter().all(|(key, value)| candidate.label(key) == value);
    let why = if !context.family.contains(&address.ip()) {
        Some("it is of the other address family")
    } else if why.is_some() {
        why
    } else if view.node_local && !on_node() {
        Some("it is on another node, and internalTrafficPolicy is Local")
    } else if !filter.labels.is_none_or(has) {
        Some("it does not have the labels of the subset")
    } else {
        None
    };
    match why {
        Some(why) => found.leave_out(address.ip(), &Arc::clone(cluster), why),
        None => match found.seen.entry(*address) {
            Entry::Vacant(entry) => {
                entry.insert(found.candidates.len());
                found.candidates.push(candidate);
            }
            // While slices are updated, an endpoint may be in two of them, and be ready in only one.
            Entry::Occupied(entry) => {
                let first = &mut found.candidates[*entry.get()];
                let (address, cluster) = (address.ip(), Arc::clone(cluster));
                if first.endpoint.cluster == cluster && candidate.ready && !first.ready {
                    *first = candidate;
                }
                found.leave_out(address, &cluster, "it is a duplicate: it is listed more than once");
            }
        },
    }
}

/// Applies Kubernetes topology hints.
fn by_hints(context: &PolicyContext<'_>, filter: &Filter<'_>, view: &ServiceView<'_>, found: &mut EndpointSearch<'_>) {
    if filter.has_istio_rule || view.traffic_distribution.is_some() || view.node_local {
        return;
    }
    let zone = &context.client.locality.zone;
    let node = context.client.node.as_deref();
    let for_node = |hints: &Hints| hints.nodes.iter().any(|name| Some(name.as_str()) == node);
    let for_zone = |hints: &Hints| !zone.is_empty() && hints.zones.contains(zone);
    let counts = |given: &dyn Fn(&Hints) -> bool, meant: &dyn Fn(&Hints) -> bool| {
        let mut ready = found.candidates.iter().filter(|candidate| candidate.ready).peekable();
        let mut any = false;
        ready.peek().is_some()
            && ready.all(|candidate| {
                any |= candidate.hints.is_some_and(meant);
                candidate.hints.is_some_and(given)
            })
            && any
    };
    let meant: &dyn Fn(&Hints) -> bool = if counts(&|hints| !hints.nodes.is_empty(), &for_node) {
        &for_node
    } else if counts(&|hints| !hints.zones.is_empty(), &for_zone) {
        &for_zone
    } else {
        return;
    };
    let others = found.candidates.extract_if(.., |candidate| candidate.ready && !candidate.hints.is_some_and(meant));
    let others: Vec<_> = others.map(|other| (other.endpoint.address.ip(), other.endpoint.cluster)).collect();
    for (address, cluster) in others {
        found.leave_out(address, &cluster, "its topology hints name other nodes or zones");
    }
}

/// Returns the locality of the Node. Pod labels do not count, so a pod cannot make itself look near.
fn locality_of(context: &PolicyContext<'_>, objects: &Objects, endpoint: &SliceEndpoint) -> Arc<Locality> {
    let node = endpoint.node.as_deref().and_then(|name| objects.nodes.get(name));
    node.map_or_else(|| Arc::clone(context.unknown_locality), |node| Arc::clone(&node.locality))
}

fn pod_labels<'a>(objects: &'a Objects, slice: &EndpointSlice, endpoint: &SliceEndpoint) -> Option<&'a Labels> {
    if objects.pods.is_empty() {
        return None;
    }
    let pod = endpoint.pod.as_deref()?;
    let name = crate::model::NamespacedName::new(&slice.name.namespace, pod);
    objects.pods.get(&name).map(|pod| &*pod.labels)
}
