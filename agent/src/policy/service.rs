//! What a Service and a ServiceEntry have in common.

use std::{net::IpAddr, sync::Arc};

use crate::{
    model::{Labels, Protocol, ServiceId, ServicePort, TrafficDistribution, Workload},
    store::{Objects, Snapshot},
};

/// A service as clients see it.
pub(super) struct ServiceView<'a> {
    pub(super) id: ServiceId,
    pub(super) addresses: &'a [IpAddr],
    pub(super) ports: &'a [ServicePort],
    /// The protocol that is balanced.
    pub(super) protocol: Protocol,
    pub(super) node_local: bool,
    pub(super) publish_not_ready: bool,
    pub(super) distribution: Option<TrafficDistribution>,
    /// Labels of workloads that belong to it.
    pub(super) selector: Option<&'a Labels>,
    /// Endpoints that it names itself.
    pub(super) workloads: &'a [Workload],
}

impl ServiceView<'_> {
    /// The port of this number.
    pub(super) fn port(&self, number: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|port| port.port == number && port.protocol == self.protocol)
    }
}

/// The service as the client's own cluster has it, or else, for a Service, any cluster.
pub(super) fn find<'a>(snapshot: &'a Snapshot, cluster: &Arc<str>, id: &ServiceId) -> Option<ServiceView<'a>> {
    let own = snapshot.clusters.get(cluster);
    if id.is_entry {
        let scopes = [own, Some(&snapshot.mesh)];
        let entry = scopes.into_iter().flatten().find_map(|objects: &Objects| objects.service_entries.get(&id.name))?;
        return Some(ServiceView {
            id: id.clone(),
            addresses: &entry.addresses,
            ports: &entry.ports,
            protocol: Protocol::Tcp,
            node_local: false,
            publish_not_ready: false,
            distribution: None,
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
        protocol: Protocol::Tcp,
        node_local: service.node_local,
        publish_not_ready: service.publish_not_ready,
        distribution: service.distribution,
        selector: Some(&service.selector).filter(|selector| !selector.is_empty()),
        workloads: &[],
    })
}
