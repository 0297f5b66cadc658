//! Location of the clients.

use super::types::Client;
use crate::{
    model::{Code, Finding, Labels, Locality, ObjectRef},
    store::{NETWORK, Store},
};

/// Location of the clients: a node, or an explicit locality.
#[derive(Clone, Debug, Default)]
pub struct ClientLocation {
    /// Name of the node, whose Node object supplies locality and labels; `None` without a node.
    pub node: Option<String>,
    /// Explicit locality, which overrides that of the Node object.
    pub locality: Option<Locality>,
    /// Additional labels, which override those of the Node object.
    pub labels: Labels,
}

impl ClientLocation {
    /// Returns the client that the policy is computed for.
    pub fn client(&self, cluster: &str, store: &Store, findings: &mut Vec<Finding>) -> Client {
        let snapshot = store.snapshot();
        let unknown = store.first_unread(cluster).filter(|(_, settings)| *settings).map(|(unread, _)| unread);
        if let Some(unread) = unknown {
            let message = format!(
                "{}, so clusterLocal settings are unknown: until it can be read, connections stay in the client's \
                 cluster, unless known settings say otherwise for the host",
                unread.what
            );
            findings.push(Finding::new(Code::SettingsUnknown, ObjectRef::global("Cluster", cluster), message));
        }
        let own = snapshot.clusters.get(cluster);
        let node = self.node.as_ref().map(|name| (name, own.and_then(|own| own.nodes.get(name))));
        if let (Some((name, None)), None) = (node, &self.locality) {
            let message = format!(
                "cluster {cluster} has no such Node: the locality of its clients is unknown, so every endpoint is far"
            );
            findings.push(Finding::new(Code::UnknownNode, ObjectRef::global("Node", name), message));
        }
        let node = node.and_then(|(_, node)| node);
        let locality = self.locality.clone().or_else(|| Some((*node?.locality).clone())).unwrap_or_default();
        let mut labels = node.map(|node| node.labels.clone()).unwrap_or_default();
        let places = [
            ("topology.istio.io/cluster", cluster),
            (NETWORK, own.map(|own| own.network()).unwrap_or_default()),
            ("topology.kubernetes.io/region", &locality.region),
            ("topology.kubernetes.io/zone", &locality.zone),
            ("topology.istio.io/subzone", &locality.subzone),
            ("kubernetes.io/hostname", self.node.as_deref().unwrap_or_default()),
        ];
        for (label, value) in places.into_iter().filter(|(_, value)| !value.is_empty()) {
            labels.insert(label.to_owned(), value.to_owned());
        }
        labels.extend(self.labels.clone());
        Client {
            cluster: cluster.into(),
            node: self.node.clone(),
            locality,
            labels,
            default_cluster_local: unknown.is_some(),
        }
    }
}
