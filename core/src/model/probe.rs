//! Active health checks of endpoints (`portolan.io/probe`).

use std::{fmt, net::SocketAddr, time::Duration};

/// An active health check that the agent runs against each endpoint.
/// `portolan.io/probe` has the format of a Kubernetes container probe.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Probe {
    /// The request to make, and the response to expect.
    pub kind: ProbeKind,
    /// The port to probe; `None` for the port of the endpoint.
    pub port: Option<u16>,
    /// The time between two probes of an endpoint.
    pub period: Duration,
    /// The time to wait for a response; at most `period`.
    pub timeout: Duration,
    /// The number of consecutive failures that marks an endpoint unhealthy.
    pub failures: u32,
    /// The number of consecutive successes that marks it healthy again.
    pub successes: u32,
}

impl Probe {
    /// Returns the address to probe for an endpoint.
    pub fn dialed(&self, endpoint: SocketAddr) -> SocketAddr {
        SocketAddr::new(endpoint.ip(), self.port.unwrap_or(endpoint.port()))
    }
}

/// The request of a probe.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProbeKind {
    /// Succeeds if the endpoint accepts a connection.
    Tcp,
    /// Succeeds if a GET of the path returns a status from 200 to 399.
    Http {
        /// The path and query, starting with `/`.
        path: String,
        /// The request headers to add, as name and value.
        headers: Vec<(String, String)>,
    },
    /// Succeeds if the gRPC health service reports `SERVING`.
    Grpc {
        /// The service to check; empty for the whole server.
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
