//! Active health checks of endpoints (`portolan.io/probe`).

use std::{fmt, net::SocketAddr, time::Duration};

/// A probe of each endpoint that the agent makes by itself (`portolan.io/probe`, which is written as Kubernetes writes a container's).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Probe {
    /// What is asked.
    pub kind: ProbeKind,
    /// The port; the endpoint's own where absent.
    pub port: Option<u16>,
    /// From one to the next.
    pub period: Duration,
    /// How long an answer is waited for.
    pub timeout: Duration,
    /// Failures in a row that take an endpoint out.
    pub failures: u32,
    /// Successes in a row that take it in again.
    pub successes: u32,
}

impl Probe {
    /// Where an endpoint is probed.
    pub fn dialled(&self, endpoint: SocketAddr) -> SocketAddr {
        SocketAddr::new(endpoint.ip(), self.port.unwrap_or(endpoint.port()))
    }
}

/// What a probe asks.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProbeKind {
    /// Whether a connection is accepted.
    Tcp,
    /// Whether this path is answered with a status from 200 to 399.
    Http {
        /// The path.
        path: String,
        /// Headers to send.
        headers: Vec<(String, String)>,
    },
    /// Whether gRPC's health service says SERVING.
    Grpc {
        /// Of which service; empty: of the whole server.
        service: String,
    },
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            ProbeKind::Tcp => write!(f, "tcpSocket")?,
            ProbeKind::Http { path, .. } => write!(f, "httpGet {path}")?,
            ProbeKind::Grpc { service } if service.is_empty() => write!(f, "grpc")?,
            ProbeKind::Grpc { service } => write!(f, "grpc {service}")?,
        }
        self.port.map_or(Ok(()), |port| write!(f, " on port {port}"))
    }
}
