//! Endpoints, and the objects that locate them: nodes, pods, and namespaces.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use super::{locality::Locality, name::NamespacedName, protocol::Protocol};

/// Kubernetes labels, as key/value pairs in key order.
pub type Labels = BTreeMap<String, String>;

/// A port of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// The name of the Service port that this port serves; empty for an unnamed port.
    pub name: String,
    /// The port that the endpoints listen on.
    pub port: u16,
    /// The transport protocol; TCP if the slice does not set one.
    pub protocol: Protocol,
}

/// An endpoint as its slice lists it: one address and its conditions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// The first entry of `addresses`, in canonical form (an IPv4-mapped IPv6 address becomes IPv4).
    pub address: IpAddr,
    /// `conditions.ready`. An absent condition means ready.
    pub ready: bool,
    /// `conditions.serving`. An absent condition means the same as `ready`.
    pub serving: bool,
    /// `conditions.terminating`.
    /// If it is absent, Kubernetes assumes false and Istio assumes true.
    pub terminating: Option<bool>,
    /// `nodeName`: the node that runs the endpoint.
    pub node: Option<Box<str>>,
    /// The name of the pod in `targetRef`, in the namespace of the slice.
    /// Subsets select endpoints by the labels of this pod.
    pub pod: Option<Box<str>>,
    /// `hints`: the clients that topology-aware routing intends the endpoint for.
    pub hints: Option<Box<Hints>>,
}

/// The nodes and zones whose clients an endpoint is intended for (topology-aware routing).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// `forNodes`: node names.
    pub nodes: Vec<String>,
    /// `forZones`: zone names.
    pub zones: Vec<String>,
}

/// A subset of the endpoints of one Service in one cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// The namespace and name of the slice itself.
    pub name: NamespacedName,
    /// The Service that owns the slice (label `kubernetes.io/service-name`, in the namespace of the slice).
    pub service: NamespacedName,
    /// The ports of the slice; each endpoint serves all of them.
    pub ports: Vec<SlicePort>,
    /// The endpoints that passed validation.
    pub endpoints: Vec<SliceEndpoint>,
}

/// An endpoint outside Kubernetes, from a ServiceEntry or a WorkloadEntry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// The IP address, in canonical form.
    pub address: IpAddr,
    /// The ports that the workload listens on, by the name of the service port.
    pub ports: BTreeMap<String, u16>,
    /// The labels that subsets and selectors match.
    pub labels: Labels,
    /// The network of the workload; empty for the network of its cluster.
    pub network: String,
    /// The locality that the entry declares.
    pub locality: Arc<Locality>,
    /// The load-balancing weight relative to the other endpoints; at least 1.
    pub weight: u32,
}

/// A WorkloadEntry: one endpoint outside Kubernetes that services select by label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadEntry {
    /// The namespace and name of the WorkloadEntry.
    pub name: NamespacedName,
    /// The endpoint that the entry describes.
    pub workload: Workload,
}

/// A node: the only source of the locality of pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The name of the Node object.
    pub name: String,
    /// The locality, from the topology labels of the node.
    pub locality: Arc<Locality>,
    /// All labels of the node.
    pub labels: Labels,
}

/// A pod: the only source of the labels of a Kubernetes endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// The namespace and name of the pod.
    pub name: NamespacedName,
    /// The labels of the pod.
    /// Pods with equal labels, such as the replicas of a Deployment, share one allocation.
    pub labels: Arc<Labels>,
}

/// A namespace, of which only the labels matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// The name of the Namespace object.
    pub name: String,
    /// The labels of the namespace.
    /// Those of `istio-system` name the network of the cluster.
    pub labels: Labels,
}
