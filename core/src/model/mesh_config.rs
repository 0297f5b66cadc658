//! Settings of the whole mesh.

use std::time::Duration;

use super::istio::LocalitySetting;

/// Whether connections to a service stay in the client's cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterLocal {
    /// They go where the other rules say.
    Off,
    /// Endpoints of the client's cluster come first, the others after them (Portolan's own).
    Prefer,
    /// They stay; without an endpoint there, they are refused (Istio's `clusterLocal`).
    Strict,
}

/// What is said of the hosts of one pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterLocalRule {
    /// A host name, `*.namespace.svc.domain`, or `*`.
    pub host: String,
    /// Whether traffic to it stays in its cluster.
    pub cluster_local: ClusterLocal,
}

/// Istio's MeshConfig, as far as it matters for the choice of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshConfig {
    /// The namespace whose rules are for all.
    pub root_namespace: String,
    /// The domain of Service host names.
    pub domain: String,
    /// Locality setting for destinations without one of their own.
    pub locality: LocalitySetting,
    /// In the order in which they were written.
    pub cluster_local: Vec<ClusterLocalRule>,
    /// Connect timeout for destinations without one of their own.
    pub connect_timeout: Option<Duration>,
}

impl Default for MeshConfig {
    /// What Istio assumes where nothing is configured.
    fn default() -> Self {
        Self {
            root_namespace: "istio-system".to_owned(),
            domain: "cluster.local".to_owned(),
            locality: LocalitySetting::default(),
            cluster_local: Vec::new(),
            connect_timeout: None,
        }
    }
}
