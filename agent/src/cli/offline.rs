//! The policy without an agent: from the files to the verdict.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::Path,
};

use anyhow::{Context as _, Result, bail, ensure};
use portolan_core::{
    decode::DecodeOptions,
    model::Finding,
    policy::{Client, HealthView, PolicyOutput, assign, client::ClientLocation},
    report::Report,
    store::{Changes, Store},
};

use crate::source::file::Directory;

/// What a directory says now.
pub(super) struct Offline {
    pub(super) store: Store,
}

impl Offline {
    /// Reads it.
    ///
    /// # Errors
    /// The directory itself cannot be read.
    pub(super) fn read(root: &Path, reader: DecodeOptions) -> Result<Self> {
        let updates = Directory::new(root.to_owned(), reader)
            .scan(&BTreeSet::new())
            .with_context(|| format!("the configuration directory {} cannot be read", root.display()))?;
        let mut store = Store::default();
        for update in updates {
            store.apply(update, &mut Changes::default());
        }
        Ok(Self { store })
    }

    /// The client in a place, and what is wrong with it.
    pub(super) fn client(&self, cluster: &str, place: &ClientLocation) -> (Client, Vec<Finding>) {
        let mut findings = Vec::new();
        (place.client(cluster, &self.store, &mut findings), findings)
    }

    /// What connections of a client would find.
    pub(super) fn report(&self, client: &Client, findings: Vec<Finding>, observed: &HealthView) -> Report {
        let mut output: PolicyOutput = assign(self.store.snapshot(), client, observed);
        output.findings.extend(self.store.findings());
        output.findings.extend(findings);
        self.add_sources(client, &mut output.findings);
        output.findings.sort();
        output.findings.dedup();
        Report::new(client, self.store.fingerprint(), &output)
    }

    /// Adds to findings the files that their objects are in.
    pub(super) fn add_sources(&self, client: &Client, findings: &mut [Finding]) {
        for finding in findings {
            self.store.add_source(&client.cluster, finding);
        }
    }

    /// The places of all nodes of a cluster.
    pub(super) fn nodes(&self, cluster: &str, labels: &portolan_core::model::Labels) -> Result<Vec<ClientLocation>> {
        let nodes: BTreeMap<_, _> =
            self.store.snapshot().clusters.get(cluster).map(|own| own.nodes.clone()).unwrap_or_default();
        ensure!(!nodes.is_empty(), "--all-nodes: the configuration has no Node of cluster {cluster}");
        let place = |name: &String| ClientLocation { node: Some(name.clone()), locality: None, labels: labels.clone() };
        Ok(nodes.keys().map(place).collect())
    }

    /// The endpoints that `--eject` means: one with this port, or with this address and any port.
    pub(super) fn ejected(&self, client: &Client, texts: &[String]) -> Result<HealthView> {
        let mut observed = HealthView::default();
        if texts.is_empty() {
            return Ok(observed);
        }
        let output = assign(self.store.snapshot(), client, &observed);
        let routes = output.assignments.iter().flat_map(|assignment| &assignment.routes);
        let known: BTreeSet<SocketAddr> =
            routes.flat_map(|route| &route.pool.endpoints).map(|endpoint| endpoint.address).collect();
        for text in texts {
            let meant: Vec<SocketAddr> = match (text.parse::<SocketAddr>(), text.parse::<IpAddr>()) {
                (Ok(address), _) => known.iter().filter(|known| **known == address).copied().collect(),
                (_, Ok(ip)) => known.iter().filter(|known| known.ip() == ip).copied().collect(),
                _ => bail!("--eject {text}: not ADDRESS or ADDRESS:PORT"),
            };
            ensure!(!meant.is_empty(), "--eject {text}: no service of this client has such an endpoint");
            observed.ejected_everywhere.extend(meant);
        }
        Ok(observed)
    }
}
