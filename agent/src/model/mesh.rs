//! Settings of the whole mesh.

use std::time::Duration;

use super::LocalitySetting;

/// One pattern of `serviceSettings`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterLocalRule {
    /// A host name, `*.namespace.svc.domain`, or `*`.
    pub host: String,
    /// Whether traffic to it stays in its cluster.
    pub cluster_local: bool,
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
