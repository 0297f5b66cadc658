//! Services: names, addresses and ports.

use std::{fmt, net::IpAddr, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    endpoint::{Labels, Workload},
    name::NamespacedName,
};

/// The protocols of Service ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// As Kubernetes writes it; absent means TCP.
    pub fn parse(text: Option<&str>) -> Result<Self, String> {
        match text {
            None | Some("TCP" | "") => Ok(Self::Tcp),
            Some("UDP") => Ok(Self::Udp),
            Some("SCTP") => Ok(Self::Sctp),
            Some(other) => Err(format!("protocol {other:?} is none of TCP, UDP, SCTP")),
        }
    }

    /// Whether Portolan gives its connections endpoints.
    pub const fn is_balanced(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp)
    }

    /// The IP protocol number.
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

/// One port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// The name by which endpoints refer to it; empty for the only port.
    pub name: String,
    /// The port that clients dial.
    pub port: u16,
    /// Its protocol.
    pub protocol: Protocol,
    /// Where workloads listen that name no port of their own. (EndpointSlices have it resolved.)
    pub target: Target,
    /// Whether its name or `appProtocol` says that HTTP is spoken there.
    pub http: bool,
    /// Whether that is HTTP/1, so that the status of a response can be seen.
    pub http1: bool,
}

/// `targetPort`: the port itself, if nothing else is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// This port.
    Number(u16),
    /// The port that a workload has under this name.
    Name(String),
}

/// `trafficDistribution`: whom clients of a service prefer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrafficDistribution {
    /// Endpoints in the client's zone.
    PreferSameZone,
    /// Endpoints on the client's node, or else in its zone.
    PreferSameNode,
}

/// A Service of one cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name, the same in every cluster that has it.
    pub name: NamespacedName,
    /// Its addresses in its own cluster; empty for a headless one.
    pub addresses: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// `internalTrafficPolicy: Local`: only endpoints on the client's node.
    pub node_local: bool,
    /// `publishNotReadyAddresses`: endpoints that are not ready count as ready.
    pub publish_not_ready: bool,
    /// `trafficDistribution`
    pub distribution: Option<TrafficDistribution>,
    /// `sessionAffinity: ClientIP`, with its timeout.
    pub affinity: Option<Duration>,
    /// `selector`: labels of WorkloadEntries that serve it as well.
    pub selector: Labels,
}

/// A ServiceEntry: a service that is described by hand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceEntry {
    /// Its name.
    pub name: NamespacedName,
    /// Its host names; rules are found by the first.
    pub hosts: Vec<String>,
    /// The addresses that clients dial.
    pub addresses: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// Its endpoints, where they are listed.
    pub endpoints: Vec<Workload>,
    /// Labels of the WorkloadEntries that are its endpoints, where they are not listed.
    pub selector: Option<Labels>,
}

/// Which service: Services and ServiceEntries have names of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceId {
    /// Namespace and name of the object.
    pub name: NamespacedName,
    /// Whether it is a ServiceEntry.
    pub is_entry: bool,
}

impl ServiceId {
    /// A Service.
    pub fn service(name: NamespacedName) -> Self {
        Self { name, is_entry: false }
    }

    /// A ServiceEntry.
    pub fn entry(name: NamespacedName) -> Self {
        Self { name, is_entry: true }
    }

    /// As findings name the object.
    pub fn object(&self) -> String {
        format!("{} {}", if self.is_entry { "ServiceEntry" } else { "Service" }, self.name)
    }
}

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)
    }
}
