//! Mesh-wide settings.

use std::time::Duration;

use super::istio::LocalitySetting;

/// Whether connections to a service stay in the cluster of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterLocal {
    /// Connections may use all clusters, as locality and routing rules decide.
    Off,
    /// Endpoints in the client's own cluster are preferred; the others are fallbacks (a Portolan extension).
    Prefer,
    /// Connections never leave the cluster; without a usable endpoint there, they are refused (Istio's `clusterLocal`).
    Strict,
}

/// A cluster-local setting for the hosts that match a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterLocalRule {
    /// A full host name, `*.namespace.svc.domain`, or `*`.
    pub host: String,
    /// The setting for these hosts.
    pub cluster_local: ClusterLocal,
}

/// Istio's MeshConfig, reduced to what affects endpoint selection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshConfig {
    /// The root namespace, whose rules apply to all namespaces; `istio-system` by default.
    pub root_namespace: String,
    /// The domain suffix of Service host names; `cluster.local`.
    pub domain: String,
    /// The locality setting for destinations that set none.
    pub locality: LocalitySetting,
    /// The cluster-local settings in the order of the MeshConfig, then those of the annotation.
    pub cluster_local: Vec<ClusterLocalRule>,
    /// The connect timeout for destinations that set none.
    pub connect_timeout: Option<Duration>,
}

impl Default for MeshConfig {
    /// Returns Istio's defaults.
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
