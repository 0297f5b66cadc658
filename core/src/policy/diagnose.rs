//! Explains why a port has no usable endpoint, and reports inconsistencies among the endpoints.

use std::{collections::BTreeSet, sync::Arc};

use super::{context::PolicyContext, service_view::find, types::Pool};
use crate::{
    model::{ClusterLocal, Code, EndpointSlice, Finding, ObjectRef, ServiceId},
    store::Snapshot,
};

/// Returns why a pool has no usable endpoint, as a clause for a finding.
pub(super) fn explain_empty(context: &PolicyContext<'_>, pool: &Pool) -> String {
    if !pool.endpoints.is_empty() {
        return format!("none of its {} endpoints is healthy", pool.endpoints.len());
    }
    let Some(view) = find(context.snapshot, &context.client.cluster, &pool.key.service) else {
        return "the service does not exist".to_owned();
    };
    let Some(port) = view.port(&pool.key) else {
        return format!("the service has no {} port {}", pool.key.protocol, pool.key.port);
    };
    if view.id.is_entry {
        return "this client can reach none of its endpoints".to_owned();
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
        format!("no EndpointSlice has a {} port named {:?}, the name of the Service port", port.protocol, port.name)
    } else if !all().any(|endpoint| context.family.contains(&endpoint.address)) {
        "all of its endpoints are of the other address family".to_owned()
    } else if pool.key.subset.is_some() {
        "no Pod behind its endpoints has the labels of the subset".to_owned()
    } else if pool.cluster_local == ClusterLocal::Strict {
        "clusterLocal keeps connections in the client's cluster, which has no endpoint of this service".to_owned()
    } else {
        "all of its endpoints are excluded: they are terminating, in clusters without the Service, or not on this node"
            .to_owned()
    }
}

/// Reports inconsistencies among the endpoints of a service: slices without a Service, and endpoints on unknown nodes.
pub(super) fn check(snapshot: &Snapshot, client: &Arc<str>, service: &ServiceId, findings: &mut Vec<Finding>) {
    if service.is_entry {
        return;
    }
    for (cluster, objects) in &snapshot.clusters {
        let other = if cluster == client { "" } else { &**cluster };
        let mut report = |code: Code, slice: &EndpointSlice, field: &str, message: String| {
            let finding = Finding::new(code, ObjectRef::new("EndpointSlice", &slice.name), message);
            findings.push(finding.at(field).in_cluster(other));
        };
        let unknown = !objects.services.contains_key(&service.name);
        for slice in objects.slices.get(&service.name).into_iter().flat_map(|slices| slices.values()) {
            if unknown {
                let message = format!("cluster {cluster} has no Service {service}, so these endpoints are not used");
                report(Code::SliceWithoutService, slice, "metadata.labels", message);
            }
            let mut reported = BTreeSet::new();
            for node in slice.endpoints.iter().map(|endpoint| endpoint.node.as_deref()) {
                if node.is_some_and(|node| objects.nodes.contains_key(node)) || !reported.insert(node) {
                    continue;
                }
                let what = node.map_or("an endpoint has no nodeName".to_owned(), |node| {
                    format!("cluster {cluster} has no Node {node}")
                });
                let message = format!("{what}, so the locality is unknown and the endpoint counts as remote");
                report(Code::EndpointWithoutPlace, slice, "endpoints.nodeName", message);
            }
        }
    }
}
