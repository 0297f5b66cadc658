//! Endpoints, and what they need to be placed: nodes and pods.

use std::{collections::BTreeMap, net::IpAddr};

use super::{Locality, NamespacedName, Protocol};

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
    /// `conditions.terminating`.
    pub terminating: bool,
    /// The node that it runs on.
    pub node: Option<String>,
    /// The pod behind it, whose labels subsets look at.
    pub pod: Option<NamespacedName>,
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

/// A node: the one source of locality.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// From its labels.
    pub locality: Locality,
}

/// A pod: the one source of endpoint labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub name: NamespacedName,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}
