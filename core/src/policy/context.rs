//! Inputs to the computation of a pool.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    locality::Labelled,
    rule_index::RuleIndex,
    types::{Client, Endpoint, HealthView},
};
use crate::{
    model::{Hints, IpFamily, Labels, Locality},
    store::{NETWORK, Snapshot},
};

/// An endpoint with all inputs that decide whether and how the pool uses it.
#[derive(Clone)]
pub(super) struct Candidate<'a> {
    pub(super) endpoint: Endpoint,
    pub(super) ready: bool,
    pub(super) serving: bool,
    pub(super) terminating: Option<bool>,
    /// Whether the endpoint's cluster is unreachable.
    pub(super) lost: bool,
    pub(super) hints: Option<&'a Hints>,
    pub(super) labels: Option<&'a Labels>,
    pub(super) network: &'a str,
    pub(super) node: Option<&'a str>,
}

impl Labelled for Candidate<'_> {
    /// Returns a label of the workload, or one that Istio adds to every endpoint.
    fn label(&self, key: &str) -> &str {
        let locality = &self.endpoint.locality;
        let own = || self.labels.and_then(|labels| labels.get(key)).map(String::as_str).unwrap_or_default();
        match key {
            "topology.istio.io/cluster" => &self.endpoint.cluster,
            // Locality comes from the Node and the network from the cluster, whatever labels the pod has.
            "topology.kubernetes.io/region" => &locality.region,
            "topology.kubernetes.io/zone" => &locality.zone,
            "topology.istio.io/subzone" => &locality.subzone,
            "kubernetes.io/hostname" => self.node.unwrap_or_default(),
            NETWORK => self.network,
            _ => own(),
        }
    }
}

/// Everything that a pool is computed from, apart from its key.
pub(super) struct PolicyContext<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) client: &'a Client,
    pub(super) rules: &'a RuleIndex,
    pub(super) observed: &'a HealthView,
    /// Address family of the frontend.
    pub(super) family: IpFamily,
    /// Shared empty locality, for endpoints whose locality is unknown.
    pub(super) unknown_locality: &'a Arc<Locality>,
    /// Whether to record excluded endpoints with the reasons.
    pub(super) explain: bool,
}

/// Weights of localities, by level and locality.
pub(super) type Weights = BTreeMap<(u32, Arc<Locality>), u64>;
