//! Transport protocols.

use std::fmt;

use serde::{Deserialize, Serialize};

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
