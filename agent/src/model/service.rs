//! Services: names, addresses and ports.

use std::{fmt, net::IpAddr};

use serde::Serialize;

use super::NamespacedName;

/// The protocols of Service ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
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

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// The name by which EndpointSlices refer to it; empty for the only port.
    pub name: String,
    /// The port that clients dial.
    pub port: u16,
    /// Its protocol.
    pub protocol: Protocol,
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
}
