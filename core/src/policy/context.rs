//! What a pool is computed from.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use super::{
    locality::Labelled,
    rule_index::RuleIndex,
    types::{Client, Endpoint, HealthView},
};
use crate::{
    model::{Hints, Labels, Locality},
    store::{NETWORK, Snapshot},
};

/// An endpoint with all that decides about it.
#[derive(Clone)]
pub(super) struct Candidate<'a> {
    pub(super) endpoint: Endpoint,
    pub(super) ready: bool,
    pub(super) serving: bool,
    pub(super) terminating: Option<bool>,
    /// Whether its cluster is out of reach.
    pub(super) lost: bool,
    pub(super) hints: Option<&'a Hints>,
    pub(super) labels: Option<&'a Labels>,
    pub(super) network: &'a str,
    pub(super) node: Option<&'a str>,
}

impl Labelled for Candidate<'_> {
    /// A label of the workload, or one of those that Istio adds to each.
    fn label(&self, key: &str) -> &str {
        let locality = &self.endpoint.locality;
        let own = || self.labels.and_then(|labels| labels.get(key)).map(String::as_str).unwrap_or_default();
        match key {
            "topology.istio.io/cluster" => &self.endpoint.cluster,
            // Places come from the node and the network from the cluster, whatever the pod claims.
            "topology.kubernetes.io/region" => &locality.region,
            "topology.kubernetes.io/zone" => &locality.zone,
            "topology.istio.io/subzone" => &locality.subzone,
            "kubernetes.io/hostname" => self.node.unwrap_or_default(),
            NETWORK => self.network,
            _ => own(),
        }
    }
}

/// Everything that a pool is computed from.
pub(super) struct PolicyContext<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) client: &'a Client,
    pub(super) rules: &'a RuleIndex,
    pub(super) observed: &'a HealthView,
    /// Which address family the frontend has; endpoints of the other one cannot be dialled from it.
    pub(super) family: fn(&IpAddr) -> bool,
    /// The place of what is nowhere.
    pub(super) unknown_locality: &'a Arc<Locality>,
    /// Whether somebody wants to know what was left out.
    pub(super) explain: bool,
}

pub(super) type Weights = BTreeMap<(u32, Arc<Locality>), u64>;
