//! Cluster-local traffic: Istio's `clusterLocal`, and the preference for the client's cluster.

use crate::model::{ClusterLocal, MeshConfig};

/// Returns whether connections to a host stay in the client's cluster or prefer it, and the pattern that decides.
pub fn cluster_local(mesh: &MeshConfig, host: &str) -> (ClusterLocal, Option<String>) {
    let domain = &mesh.domain;
    let defaults =
        ["*.kube-system", "kubernetes.default", "istiod.istio-system"].map(|name| format!("{name}.svc.{domain}"));
    let defaults = defaults.iter().map(|pattern| (pattern.as_str(), ClusterLocal::Strict));
    let settings = mesh.cluster_local.iter().map(|rule| (rule.host.as_str(), rule.cluster_local));
    let mut best: Option<(bool, &str, ClusterLocal)> = None;
    for (pattern, cluster_local) in defaults.chain(settings) {
        let exact = pattern == host;
        let matches = exact || pattern.strip_prefix('*').is_some_and(|suffix| host.ends_with(suffix));
        if matches && best.is_none_or(|(before, other, _)| (exact, pattern.len()) >= (before, other.len())) {
            best = Some((exact, pattern, cluster_local));
        }
    }
    best.map_or((ClusterLocal::Off, None), |(_, pattern, cluster_local)| (cluster_local, Some(pattern.to_owned())))
}
