//! Services: names, addresses, and ports.

use std::{fmt, net::IpAddr, time::Duration};

use super::{
    endpoint::{Labels, Workload},
    name::NamespacedName,
    object_ref::ObjectRef,
    protocol::Protocol,
};

/// A port of a Service or ServiceEntry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// The name that endpoints refer to; empty for the only port of a Service.
    pub name: String,
    /// The port that clients connect to.
    pub port: u16,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The port of workloads that do not name one. Not used with EndpointSlices, which contain the resolved port.
    pub target: Target,
    /// Whether `appProtocol`, the port name, or the ServiceEntry protocol declares HTTP of any version.
    pub http: bool,
    /// Whether that is HTTP/1, where Portolan can read the status of responses.
    pub http1: bool,
}

/// `targetPort`; defaults to the port itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A port number.
    Number(u16),
    /// A port name, resolved per workload.
    Name(String),
}

/// `trafficDistribution`: the endpoints that clients prefer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrafficDistribution {
    /// Endpoints in the client's zone.
    PreferSameZone,
    /// Endpoints on the client's node, then those in its zone.
    PreferSameNode,
}

/// A Service of one cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// The namespace and name, which identify the Service across all clusters.
    pub name: NamespacedName,
    /// The cluster IPs in its own cluster; empty for a headless Service.
    pub addresses: Vec<IpAddr>,
    /// The ports; port number and protocol are unique.
    pub ports: Vec<ServicePort>,
    /// `internalTrafficPolicy: Local`: clients use only endpoints on their own node.
    pub node_local: bool,
    /// `publishNotReadyAddresses`: endpoints count as ready regardless of their conditions.
    pub publish_not_ready: bool,
    /// `trafficDistribution`, or Istio's annotation; `None` for no preference.
    pub distribution: Option<TrafficDistribution>,
    /// `sessionAffinity: ClientIP` with its timeout; `None` for no affinity.
    pub affinity: Option<Duration>,
    /// `selector`: labels of the WorkloadEntries that serve the Service in addition to its EndpointSlices.
    pub selector: Labels,
}

/// A ServiceEntry with static resolution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceEntry {
    /// The namespace and name of the ServiceEntry.
    pub name: NamespacedName,
    /// The host names; rules apply to the first one only.
    pub hosts: Vec<String>,
    /// The virtual IPs that clients connect to; may be empty.
    pub addresses: Vec<IpAddr>,
    /// The ports; numbers and names are unique.
    pub ports: Vec<ServicePort>,
    /// `endpoints`; empty if `selector` is set.
    pub endpoints: Vec<Workload>,
    /// `workloadSelector`: labels of the WorkloadEntries that serve it; excludes `endpoints`.
    pub selector: Option<Labels>,
}

/// The identity of a service. Services and ServiceEntries have separate name spaces.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceId {
    /// The namespace and name of the object.
    pub name: NamespacedName,
    /// Whether the object is a ServiceEntry; otherwise it is a Service.
    pub is_entry: bool,
}

impl ServiceId {
    /// Returns the ID of a Service.
    pub fn service(name: NamespacedName) -> Self {
        Self { name, is_entry: false }
    }

    /// Returns the ID of a ServiceEntry.
    pub fn entry(name: NamespacedName) -> Self {
        Self { name, is_entry: true }
    }

    /// Returns `Kind namespace/name`, the form that findings use.
    pub fn object(&self) -> ObjectRef {
        ObjectRef::new(if self.is_entry { "ServiceEntry" } else { "Service" }, &self.name)
    }
}

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)
    }
}
