//! Evaluates the policy from files, without an agent.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::Path,
};

use anyhow::{Context as _, Result, bail, ensure};
use portolan_core::{
    decode::DecodeOptions,
    model::Finding,
    plan_for_client,
    policy::{Client, HealthView, assign, client::ClientLocation},
    report::Report,
    store::{Changes, Store},
};

use crate::source::file::Directory;

/// The objects of a configuration directory, at the time it was read.
pub(super) struct Offline {
    pub(super) store: Store,
}

impl Offline {
    /// Reads all objects below `root`.
    ///
    /// # Errors
    /// Returns an error if `root` itself cannot be read. A problem with a single file becomes a finding.
    pub(super) fn read(root: &Path, reader: DecodeOptions) -> Result<Self> {
        let updates = Directory::new(root.to_owned(), reader)
            .scan(&BTreeSet::new())
            .with_context(|| format!("cannot read the configuration directory {}", root.display()))?;
        let mut store = Store::default();
        for update in updates {
            store.apply(update, &mut Changes::default());
        }
        Ok(Self { store })
    }

    /// Returns the client at a location, and findings about that location.
    pub(super) fn client(&self, cluster: &str, place: &ClientLocation) -> (Client, Vec<Finding>) {
        let mut findings = Vec::new();
        (place.client(cluster, &self.store, &mut findings), findings)
    }

    /// Computes the shares of a client's new connections, and all findings.
    pub(super) fn report(&self, client: &Client, findings: Vec<Finding>, observed: &HealthView) -> Report {
        plan_for_client(&self.store, client, findings, observed)
    }

    /// Sets the source file of each finding.
    pub(super) fn add_sources(&self, client: &Client, findings: &mut [Finding]) {
        for finding in findings {
            self.store.add_source(&client.cluster, finding);
        }
    }

    /// Returns the locations of all nodes of a cluster. Fails if there is no node.
    pub(super) fn nodes(&self, cluster: &str, labels: &portolan_core::model::Labels) -> Result<Vec<ClientLocation>> {
        let nodes: BTreeMap<_, _> =
            self.store.snapshot().clusters.get(cluster).map(|own| own.nodes.clone()).unwrap_or_default();
        ensure!(!nodes.is_empty(), "--all-nodes: the configuration has no Node objects of cluster {cluster}");
        let place = |name: &String| ClientLocation { node: Some(name.clone()), locality: None, labels: labels.clone() };
        Ok(nodes.keys().map(place).collect())
    }

    /// Resolves the values of `--eject`: ADDRESS:PORT selects one endpoint, ADDRESS selects all of its ports.
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
            let matching: Vec<SocketAddr> = match (text.parse::<SocketAddr>(), text.parse::<IpAddr>()) {
                (Ok(address), _) => known.iter().filter(|known| **known == address).copied().collect(),
                (_, Ok(ip)) => known.iter().filter(|known| known.ip() == ip).copied().collect(),
                _ => bail!("--eject {text}: expected ADDRESS or ADDRESS:PORT"),
            };
            ensure!(!matching.is_empty(), "--eject {text}: no service of this client has such an endpoint");
            observed.ejected_everywhere.extend(matching);
        }
        Ok(observed)
    }
}
