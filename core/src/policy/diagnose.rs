//! Why a port has no usable endpoint, and what is suspicious about those that it has.

use std::{collections::BTreeSet, sync::Arc};

use super::{context::PolicyContext, service_view::find, types::Pool};
use crate::{
    model::{ClusterLocal, Code, EndpointSlice, Finding, ServiceId},
    store::Snapshot,
};

/// Why a pool has nobody to take.
pub(super) fn explain_empty(context: &PolicyContext<'_>, pool: &Pool) -> String {
    if !pool.endpoints.is_empty() {
        return format!("none of its {} endpoints is healthy", pool.endpoints.len());
    }
    let Some(view) = find(context.snapshot, &context.client.cluster, &pool.key.service) else {
        return "there is no such service".to_owned();
    };
    let Some(port) = view.port(&pool.key) else {
        return format!("it has no {} port {}", pool.key.protocol, pool.key.port);
    };
    if view.id.is_entry {
        return "no endpoint of it can be dialled from here".to_owned();
    }
    let clusters = context.snapshot.clusters.values();
    let slices: Vec<_> =
        clusters.filter_map(|objects| objects.slices.get(&view.id.name)).flat_map(|slices| slices.values()).collect();
    let all = || slices.iter().flat_map(|slice| &slice.endpoints);
    let serves = |slice: &EndpointSlice| {
        slice.ports.iter().any(|candidate| candidate.name == port.name && candidate.protocol == port.protocol)
    };
    if all().next().is_none() {
        "it has no endpoints".to_owned()
    } else if !slices.iter().any(|slice| serves(slice)) {
        format!("no EndpointSlice has a {} port named {:?}, as this port of the Service is", port.protocol, port.name)
    } else if !all().any(|endpoint| (context.family)(&endpoint.address)) {
        "its endpoints are of the other address family".to_owned()
    } else if pool.key.subset.is_some() {
        "no Pod behind its endpoints has the labels of the subset".to_owned()
    } else if pool.cluster_local == ClusterLocal::Strict {
        "it is kept in its cluster, which has no endpoint of it".to_owned()
    } else {
        "none of its endpoints is left: they are terminating, in clusters without the Service, or not on this node"
            .to_owned()
    }
}

/// What does not fit together in the endpoints of one service: slices without a Service, endpoints on nodes that nobody knows.
pub(super) fn check(snapshot: &Snapshot, client: &Arc<str>, service: &ServiceId, findings: &mut Vec<Finding>) {
    if service.is_entry {
        return;
    }
    for (cluster, objects) in &snapshot.clusters {
        let other = if cluster == client { "" } else { &**cluster };
        let mut say = |code: Code, slice: &EndpointSlice, field: &str, message: String| {
            let finding = Finding::new(code, format!("EndpointSlice {}", slice.name), message);
            findings.push(finding.at(field).in_cluster(other));
        };
        let unknown = !objects.services.contains_key(&service.name);
        for slice in objects.slices.get(&service.name).into_iter().flat_map(|slices| slices.values()) {
            if unknown {
                let message = format!("cluster {cluster} has no Service {service}: these endpoints are not used");
                say(Code::SliceWithoutService, slice, "metadata.labels", message);
            }
            let mut told = BTreeSet::new();
            for node in slice.endpoints.iter().map(|endpoint| endpoint.node.as_deref()) {
                if node.is_some_and(|node| objects.nodes.contains_key(node)) || !told.insert(node) {
                    continue;
                }
                let what = node.map_or("an endpoint names no node".to_owned(), |node| {
                    format!("cluster {cluster} has no Node {node}")
                });
                let message = format!("{what}, so the locality is unknown and counts as far away");
                say(Code::EndpointWithoutPlace, slice, "endpoints.nodeName", message);
            }
        }
    }
}
