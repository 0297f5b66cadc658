//! Where the clients are.

use super::types::Client;
use crate::{
    model::{Code, Finding, Labels, Locality},
    store::{NETWORK, Store},
};

/// The clients of a node, or of a place that is none.
#[derive(Clone, Debug, Default)]
pub struct ClientLocation {
    /// The node, whose Node object says where it is.
    pub node: Option<String>,
    /// Where it is, whatever the Node object says.
    pub locality: Option<Locality>,
    /// Labels beside those of the Node object.
    pub labels: Labels,
}

impl ClientLocation {
    /// The client that the policy is asked for.
    pub fn client(&self, cluster: &str, store: &Store, findings: &mut Vec<Finding>) -> Client {
        let snapshot = store.snapshot();
        let unknown = store.doubt(cluster).filter(|(_, settings)| *settings).map(|(doubt, _)| doubt);
        if let Some(doubt) = unknown {
            let message = format!(
                "{}, and with it what must stay in its cluster: until it can be read, connections stay in theirs, unless settings that are \
                 known say otherwise of their host",
                doubt.what
            );
            findings.push(Finding::new(Code::SettingsUnknown, format!("Cluster {cluster}"), message));
        }
        let own = snapshot.clusters.get(cluster);
        let node = self.node.as_ref().map(|name| (name, own.and_then(|own| own.nodes.get(name))));
        if let (Some((name, None)), None) = (node, &self.locality) {
            let message = format!(
                "cluster {cluster} has no such Node: where its clients are is unknown, so everything is far away"
            );
            findings.push(Finding::new(Code::UnknownNode, format!("Node {name}"), message));
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
