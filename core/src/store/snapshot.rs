//! All inputs at one point in time, indexed for the policy.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::Changes;
use crate::model::{
    DestinationRule, EndpointSlice, MeshConfig, Namespace, NamespacedName, Node, Object, ObjectKey, Pod, Scope,
    Service, ServiceEntry, ServiceId, VirtualService, WorkloadEntry,
};

/// The label of the namespace `istio-system` that names the network of the cluster.
pub const NETWORK: &str = "topology.istio.io/network";

/// Istio's root namespace.
pub(super) const SYSTEM: &str = "istio-system";

/// The objects of one cluster, or those of the mesh, by kind.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    /// Services by namespace and name.
    pub services: BTreeMap<NamespacedName, Arc<Service>>,
    /// EndpointSlices by the Service that owns them, then by their own name.
    pub slices: BTreeMap<NamespacedName, BTreeMap<String, Arc<EndpointSlice>>>,
    /// Nodes by name.
    pub nodes: BTreeMap<String, Arc<Node>>,
    /// Pods by namespace and name.
    pub pods: BTreeMap<NamespacedName, Arc<Pod>>,
    /// Namespaces by name.
    pub namespaces: BTreeMap<String, Arc<Namespace>>,
    /// ServiceEntries by namespace and name.
    pub service_entries: BTreeMap<NamespacedName, Arc<ServiceEntry>>,
    /// WorkloadEntries by namespace and name.
    pub workload_entries: BTreeMap<NamespacedName, Arc<WorkloadEntry>>,
    /// DestinationRules by namespace and name.
    pub destination_rules: BTreeMap<NamespacedName, Arc<DestinationRule>>,
    /// VirtualServices by namespace and name.
    pub virtual_services: BTreeMap<NamespacedName, Arc<VirtualService>>,
    /// The MeshConfig; `None` if there is none in this scope.
    pub mesh_config: Option<Arc<MeshConfig>>,
}

impl Objects {
    /// Returns the network of the pods in the cluster; empty if no label names one.
    pub fn network(&self) -> &str {
        let system = self.namespaces.get(SYSTEM);
        system.and_then(|namespace| namespace.labels.get(NETWORK)).map(String::as_str).unwrap_or_default()
    }

    fn is_empty(&self) -> bool {
        let Self { services, slices, nodes, pods, namespaces, .. } = self;
        services.is_empty()
            && slices.is_empty()
            && nodes.is_empty()
            && pods.is_empty()
            && namespaces.is_empty()
            && self.service_entries.is_empty()
            && self.workload_entries.is_empty()
            && self.destination_rules.is_empty()
            && self.virtual_services.is_empty()
            && self.mesh_config.is_none()
    }
}

/// All inputs at one point in time. The objects are shared with the store, not copied.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Objects that belong to the mesh.
    pub mesh: Objects,
    /// Objects by cluster ID. A cluster without objects has no entry.
    pub clusters: BTreeMap<Arc<str>, Objects>,
    /// Clusters that have been unreachable for so long that their endpoints count as unhealthy.
    pub lost: BTreeSet<Arc<str>>,
}

impl Snapshot {
    pub(super) fn insert(&mut self, key: &ObjectKey, object: Object) {
        let into = match &key.scope {
            Scope::Mesh => &mut self.mesh,
            Scope::Cluster(id) => self.clusters.entry(Arc::from(id.as_str())).or_default(),
        };
        let name = key.name.clone();
        match object {
            Object::Service(it) => drop(into.services.insert(name, it)),
            Object::EndpointSlice(it) => {
                into.slices.entry(it.service.clone()).or_default().insert(name.name, it);
            }
            Object::Node(it) => drop(into.nodes.insert(name.name, it)),
            Object::Pod(it) => drop(into.pods.insert(name, it)),
            Object::Namespace(it) => drop(into.namespaces.insert(name.name, it)),
            Object::ServiceEntry(it) => drop(into.service_entries.insert(name, it)),
            Object::WorkloadEntry(it) => drop(into.workload_entries.insert(name, it)),
            Object::DestinationRule(it) => drop(into.destination_rules.insert(name, it)),
            Object::VirtualService(it) => drop(into.virtual_services.insert(name, it)),
            Object::MeshConfig(it) => into.mesh_config = Some(it),
        }
    }

    pub(super) fn remove(&mut self, key: &ObjectKey, object: &Object) {
        let from = match &key.scope {
            Scope::Mesh => Some(&mut self.mesh),
            Scope::Cluster(id) => self.clusters.get_mut(id.as_str()),
        };
        let Some(from) = from else { return };
        let name = &key.name;
        match object {
            Object::Service(_) => drop(from.services.remove(name)),
            Object::EndpointSlice(slice) => {
                if let Some(slices) = from.slices.get_mut(&slice.service) {
                    slices.remove(&name.name);
                    if slices.is_empty() {
                        from.slices.remove(&slice.service);
                    }
                }
            }
            Object::Node(_) => drop(from.nodes.remove(&name.name)),
            Object::Pod(_) => drop(from.pods.remove(name)),
            Object::Namespace(_) => drop(from.namespaces.remove(&name.name)),
            Object::ServiceEntry(_) => drop(from.service_entries.remove(name)),
            Object::WorkloadEntry(_) => drop(from.workload_entries.remove(name)),
            Object::DestinationRule(_) => drop(from.destination_rules.remove(name)),
            Object::VirtualService(_) => drop(from.virtual_services.remove(name)),
            Object::MeshConfig(_) => from.mesh_config = None,
        }
        if let Scope::Cluster(id) = &key.scope
            && from.is_empty()
        {
            self.clusters.remove(id.as_str());
        }
    }

    /// Adds the services whose endpoints the object affects to `changes`.
    pub(super) fn concerned(&self, key: &ObjectKey, object: &Object, changes: &mut Changes) {
        if changes.everything {
            return;
        }
        let namespace = &key.name.namespace;
        let services = &mut changes.services;
        let all = || std::iter::once(&self.mesh).chain(self.clusters.values());
        let entries = || all().flat_map(|objects| objects.service_entries.values());
        let selected = |labels: &crate::model::Labels, selector: &crate::model::Labels| {
            selector.iter().all(|(key, value)| labels.get(key) == Some(value))
        };
        match object {
            Object::Service(service) => drop(services.insert(ServiceId::service(service.name.clone()))),
            Object::ServiceEntry(entry) => drop(services.insert(ServiceId::entry(entry.name.clone()))),
            Object::EndpointSlice(slice) => {
                services.insert(ServiceId::service(slice.service.clone()));
            }
            Object::Pod(pod) => {
                let Scope::Cluster(id) = &key.scope else { return };
                let slices = self.clusters.get(id.as_str()).map(|objects| &objects.slices);
                let Some(slices) = slices else { return };
                let first = NamespacedName::new(namespace, "");
                let of_namespace = slices.range(first..).take_while(|(service, _)| service.namespace == *namespace);
                let behind = |slices: &BTreeMap<String, Arc<EndpointSlice>>| {
                    let mut endpoints = slices.values().flat_map(|slice| &slice.endpoints);
                    endpoints.any(|endpoint| endpoint.pod.as_deref() == Some(pod.name.name.as_str()))
                };
                let behind = of_namespace.filter(|(_, slices)| behind(slices));
                services.extend(behind.map(|(service, _)| ServiceId::service(service.clone())));
            }
            Object::WorkloadEntry(entry) => {
                let labels = &entry.workload.labels;
                let of_services = all().flat_map(|objects| objects.services.values()).filter(|service| {
                    service.name.namespace == *namespace
                        && !service.selector.is_empty()
                        && selected(labels, &service.selector)
                });
                services.extend(of_services.map(|service| ServiceId::service(service.name.clone())));
                let of_entries = entries().filter(|entry| {
                    entry.name.namespace == *namespace
                        && entry.selector.as_ref().is_some_and(|own| selected(labels, own))
                });
                services.extend(of_entries.map(|entry| ServiceId::entry(entry.name.clone())));
            }
            // A change of these objects affects all services; see `changes_everything`.
            Object::Node(_)
            | Object::Namespace(_)
            | Object::DestinationRule(_)
            | Object::VirtualService(_)
            | Object::MeshConfig(_) => {}
        }
    }
}
