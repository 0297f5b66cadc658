//! Any object that counts, and its identity.

use std::{fmt, sync::Arc};

use super::{
    endpoint::{EndpointSlice, Namespace, Node, Pod, WorkloadEntry},
    istio::{DestinationRule, VirtualService},
    mesh_config::MeshConfig,
    name::NamespacedName,
    service::{Service, ServiceEntry},
};

/// Whose object it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// The whole mesh's.
    Mesh,
    /// One cluster's, by its id.
    Cluster(String),
}

/// The kinds that count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `Service`
    Service,
    /// `EndpointSlice`
    EndpointSlice,
    /// `Node`
    Node,
    /// `Pod`
    Pod,
    /// `Namespace`
    Namespace,
    /// `ServiceEntry`
    ServiceEntry,
    /// `WorkloadEntry`
    WorkloadEntry,
    /// `DestinationRule`
    DestinationRule,
    /// `VirtualService`
    VirtualService,
    /// The ConfigMap `istio`, which holds the MeshConfig.
    MeshConfig,
}

impl Kind {
    /// All of them.
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

/// What tells one object from all others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// Whose it is.
    pub scope: Scope,
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: NamespacedName,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// An object that was read and is sound. Shared: a clone is another name for the same object.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A Service.
    Service(Arc<Service>),
    /// An EndpointSlice.
    EndpointSlice(Arc<EndpointSlice>),
    /// A Node.
    Node(Arc<Node>),
    /// A Pod.
    Pod(Arc<Pod>),
    /// A Namespace.
    Namespace(Arc<Namespace>),
    /// A ServiceEntry.
    ServiceEntry(Arc<ServiceEntry>),
    /// A WorkloadEntry.
    WorkloadEntry(Arc<WorkloadEntry>),
    /// A DestinationRule.
    DestinationRule(Arc<DestinationRule>),
    /// A VirtualService.
    VirtualService(Arc<VirtualService>),
    /// The mesh's settings.
    MeshConfig(Arc<MeshConfig>),
}
