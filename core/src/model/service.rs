//! Services: names, addresses, and ports.

use std::{fmt, net::IpAddr, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    endpoint::{Labels, Workload},
    name::NamespacedName,
};

/// The transport protocol of a Service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// Balanced per connection.
    Tcp,
    /// Balanced per datagram flow.
    Udp,
    /// Not supported; reported as a finding.
    Sctp,
}

impl Protocol {
    /// Parses the protocol of a Kubernetes object. An absent or empty value means TCP.
    ///
    /// # Errors
    ///
    /// Returns a message if the protocol is unknown.
    pub fn parse(text: Option<&str>) -> Result<Self, String> {
        match text {
            None | Some("TCP" | "") => Ok(Self::Tcp),
            Some("UDP") => Ok(Self::Udp),
            Some("SCTP") => Ok(Self::Sctp),
            Some(other) => Err(format!("unknown protocol {other:?}; use TCP, UDP, or SCTP")),
        }
    }

    /// Returns whether Portolan load-balances this protocol.
    pub const fn is_balanced(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp)
    }

    /// Returns the IP protocol number.
    pub const fn number(self) -> u32 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

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
    pub fn object(&self) -> String {
        format!("{} {}", if self.is_entry { "ServiceEntry" } else { "Service" }, self.name)
    }
}

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)
    }
}
