//! Common view of Services and ServiceEntries.

use std::{net::IpAddr, sync::Arc, time::Duration};

use super::types::PoolKey;
use crate::{
    model::{Labels, ServiceId, ServicePort, TrafficDistribution, Workload},
    store::{Objects, Snapshot},
};

/// A Service or ServiceEntry as clients see it.
pub(super) struct ServiceView<'a> {
    pub(super) id: ServiceId,
    pub(super) addresses: &'a [IpAddr],
    pub(super) ports: &'a [ServicePort],
    pub(super) node_local: bool,
    pub(super) publish_not_ready: bool,
    pub(super) traffic_distribution: Option<TrafficDistribution>,
    pub(super) affinity: Option<Duration>,
    /// Labels that select workloads; `None` if the service selects none.
    pub(super) selector: Option<&'a Labels>,
    /// Endpoints listed in the ServiceEntry itself; empty for a Service.
    pub(super) workloads: &'a [Workload],
}

impl ServiceView<'_> {
    /// Returns the service port that the pool belongs to.
    pub(super) fn port(&self, key: &PoolKey) -> Option<&ServicePort> {
        self.ports.iter().find(|port| port.port == key.port && port.protocol == key.protocol)
    }
}

/// Looks up a service in the client's own cluster.
pub(super) fn find<'a>(snapshot: &'a Snapshot, cluster: &Arc<str>, id: &ServiceId) -> Option<ServiceView<'a>> {
    let own = snapshot.clusters.get(cluster);
    if id.is_entry {
        let scopes = [own, Some(&snapshot.mesh)];
        let entry = scopes.into_iter().flatten().find_map(|objects: &Objects| objects.service_entries.get(&id.name))?;
        return Some(ServiceView {
            id: id.clone(),
            addresses: &entry.addresses,
            ports: &entry.ports,
            node_local: false,
            publish_not_ready: false,
            traffic_distribution: None,
            affinity: None,
            selector: entry.selector.as_ref(),
            workloads: &entry.endpoints,
        });
    }
    let mut all = own.into_iter().chain(snapshot.clusters.values());
    let service = all.find_map(|objects| objects.services.get(&id.name))?;
    Some(ServiceView {
        id: id.clone(),
        addresses: &service.addresses,
        ports: &service.ports,
        node_local: service.node_local,
        publish_not_ready: service.publish_not_ready,
        traffic_distribution: service.distribution,
        affinity: service.affinity,
        selector: Some(&service.selector).filter(|selector| !selector.is_empty()),
        workloads: &[],
    })
}
