//! Endpoints, and what they need to be placed: nodes, pods, namespaces.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use super::{locality::Locality, name::NamespacedName, service::Protocol};

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// A port of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// The name of the Service port that it serves.
    pub name: String,
    /// The port that endpoints listen on.
    pub port: u16,
    /// Its protocol.
    pub protocol: Protocol,
}

/// One endpoint of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// Its address.
    pub address: IpAddr,
    /// `conditions.ready`; absent means ready.
    pub ready: bool,
    /// `conditions.serving`; absent means the same as ready.
    pub serving: bool,
    /// `conditions.terminating`. Absent, Kubernetes reads it as false, and Istio as true.
    pub terminating: Option<bool>,
    /// The node that it runs on.
    pub node: Option<Box<str>>,
    /// The pod behind it, in the namespace of the slice; subsets look at its labels.
    pub pod: Option<Box<str>>,
    /// `hints`: for whom it is meant.
    pub hints: Option<Box<Hints>>,
}

/// For clients of which nodes and zones an endpoint is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// `forNodes`
    pub nodes: Vec<String>,
    /// `forZones`
    pub zones: Vec<String>,
}

/// Some of the endpoints of a Service in one cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Its own name.
    pub name: NamespacedName,
    /// The Service that it belongs to.
    pub service: NamespacedName,
    /// Its ports: all endpoints have all of them.
    pub ports: Vec<SlicePort>,
    /// Its endpoints.
    pub endpoints: Vec<SliceEndpoint>,
}

/// An endpoint outside Kubernetes: of a ServiceEntry, or a WorkloadEntry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Its address.
    pub address: IpAddr,
    /// Ports that it listens on, by the name of the service port.
    pub ports: BTreeMap<String, u16>,
    /// Its labels.
    pub labels: Labels,
    /// Its network; empty: that of its cluster.
    pub network: String,
    /// Where it is.
    pub locality: Arc<Locality>,
    /// Its share among its like.
    pub weight: u32,
}

/// A WorkloadEntry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadEntry {
    /// Its name.
    pub name: NamespacedName,
    /// The endpoint that it is.
    pub workload: Workload,
}

/// A node: the one source of locality.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// From its labels.
    pub locality: Arc<Locality>,
    /// Its labels.
    pub labels: Labels,
}

/// A pod: the one source of endpoint labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub name: NamespacedName,
    /// Its labels, which as a rule it shares with its like.
    pub labels: Arc<Labels>,
}

/// A namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its name.
    pub name: String,
    /// Its labels; those of Istio's own namespace name the cluster's network.
    pub labels: Labels,
}
