//! Objects of all supported kinds, and their identity.

use std::{fmt, sync::Arc};

use super::{
    endpoint::{EndpointSlice, Namespace, Node, Pod, WorkloadEntry},
    istio::{DestinationRule, VirtualService},
    mesh_config::MeshConfig,
    name::NamespacedName,
    object_ref::ObjectRef,
    service::{Service, ServiceEntry},
};

/// The owner of an object: the mesh or one cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// The object applies to the whole mesh.
    Mesh,
    /// The object belongs to the cluster with this ID.
    Cluster(String),
}

/// The supported kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `v1` `Service`.
    Service,
    /// `discovery.k8s.io` `EndpointSlice`.
    EndpointSlice,
    /// `v1` `Node`.
    Node,
    /// `v1` `Pod`.
    Pod,
    /// `v1` `Namespace`.
    Namespace,
    /// `networking.istio.io` `ServiceEntry`.
    ServiceEntry,
    /// `networking.istio.io` `WorkloadEntry`.
    WorkloadEntry,
    /// `networking.istio.io` `DestinationRule`.
    DestinationRule,
    /// `networking.istio.io` `VirtualService`.
    VirtualService,
    /// The ConfigMap `istio` in `istio-system`, which contains the MeshConfig.
    MeshConfig,
}

impl Kind {
    /// All supported kinds.
    pub const ALL: [Self; 10] = [
        Self::Service,
        Self::EndpointSlice,
        Self::Node,
        Self::Pod,
        Self::Namespace,
        Self::ServiceEntry,
        Self::WorkloadEntry,
        Self::DestinationRule,
        Self::VirtualService,
        Self::MeshConfig,
    ];
}

impl Kind {
    /// Returns the kind of a reference, if it is one that Portolan decodes.
    pub fn of(object: &ObjectRef) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.to_string() == object.kind)
    }
}

impl From<&ObjectKey> for ObjectRef {
    fn from(key: &ObjectKey) -> Self {
        Self::new(key.kind, &key.name)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::Pod => "Pod",
            Self::Namespace => "Namespace",
            Self::ServiceEntry => "ServiceEntry",
            Self::WorkloadEntry => "WorkloadEntry",
            Self::DestinationRule => "DestinationRule",
            Self::VirtualService => "VirtualService",
            Self::MeshConfig => "ConfigMap",
        })
    }
}

/// The identity of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// The mesh or the cluster that the object belongs to.
    pub scope: Scope,
    /// The kind of the object.
    pub kind: Kind,
    /// The name; its namespace is empty for cluster-scoped kinds.
    pub name: NamespacedName,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// A decoded and valid object. Clones are cheap: they share the object.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A Service of one cluster.
    Service(Arc<Service>),
    /// An EndpointSlice of one cluster.
    EndpointSlice(Arc<EndpointSlice>),
    /// A Node of one cluster.
    Node(Arc<Node>),
    /// A Pod of one cluster.
    Pod(Arc<Pod>),
    /// A Namespace of one cluster.
    Namespace(Arc<Namespace>),
    /// A ServiceEntry of a cluster or the mesh.
    ServiceEntry(Arc<ServiceEntry>),
    /// A WorkloadEntry of a cluster or the mesh.
    WorkloadEntry(Arc<WorkloadEntry>),
    /// A DestinationRule of a cluster or the mesh.
    DestinationRule(Arc<DestinationRule>),
    /// A VirtualService of a cluster or the mesh.
    VirtualService(Arc<VirtualService>),
    /// The MeshConfig of a cluster or the mesh.
    MeshConfig(Arc<MeshConfig>),
}
