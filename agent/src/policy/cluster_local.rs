//! Traffic that stays in its cluster (Istio's `clusterLocal`).

use crate::model::MeshConfig;

/// Whether connections to this host may only go to endpoints in the client's own cluster.
///
/// The exact host comes first, then the longest pattern that matches; of two identical ones the last. Istio's own
/// defaults are the first in the list, so that settings may override them.
pub fn is_cluster_local(mesh: &MeshConfig, host: &str) -> bool {
    let domain = &mesh.domain;
    let defaults =
        ["*.kube-system", "kubernetes.default", "istiod.istio-system"].map(|name| format!("{name}.svc.{domain}"));
    let defaults = defaults.iter().map(|pattern| (pattern.as_str(), true));
    let settings = mesh.cluster_local.iter().map(|rule| (rule.host.as_str(), rule.cluster_local));
    let mut best: Option<(bool, usize, bool)> = None;
    for (pattern, local) in defaults.chain(settings) {
        let candidate = (pattern == host, pattern.len());
        let matches = candidate.0 || pattern.strip_prefix('*').is_some_and(|suffix| host.ends_with(suffix));
        if matches && best.is_none_or(|(exact, length, _)| candidate >= (exact, length)) {
            best = Some((candidate.0, candidate.1, local));
        }
    }
    best.is_some_and(|(_, _, local)| local)
}
