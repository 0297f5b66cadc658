//! The effect of a configuration change on each endpoint's share of connections.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{ClientReport, Report, ServiceReport};
use crate::model::{Finding, Severity};

/// The difference between two sets of reports.
#[derive(Debug, Serialize)]
pub struct Diff {
    /// The clients for which some share changes.
    pub clients: Vec<ClientDiff>,
    /// The findings that the change adds and removes.
    pub findings: FindingsDiff,
}

/// The findings that differ, regardless of their positions in a file.
#[derive(Debug, Default, Serialize)]
pub struct FindingsDiff {
    /// Findings that exist only after the change.
    pub added: Vec<Finding>,
    /// Findings that exist only before the change.
    pub removed: Vec<Finding>,
}

/// The share changes of one client.
#[derive(Debug, Serialize)]
pub struct ClientDiff {
    /// The client after the change, or before it if the change removes the client.
    pub client: ClientReport,
    /// The shares that differ by more than 1e-9.
    pub changes: Vec<ShareChange>,
}

/// An endpoint whose share changes, or the refused share of a service.
#[derive(Debug, Serialize)]
pub struct ShareChange {
    /// `namespace/name:port`, with the kind, the family and the addresses where these are needed to identify the
    /// service.
    pub service: String,
    /// The endpoint's address and port; `None` for the share of connections that is refused.
    pub endpoint: Option<String>,
    /// The cluster of the endpoint; empty for the refused share.
    pub cluster: String,
    /// The locality of the endpoint, `region/zone/subzone`; empty for the refused share.
    pub locality: String,
    /// Fraction of new connections before the change, between 0 and 1.
    pub before: f64,
    /// Fraction of new connections after the change, between 0 and 1.
    pub after: f64,
}

type Shares = BTreeMap<(String, Option<String>), (f64, String, String)>;

impl Diff {
    /// Compares the reports of the same clients before and after a change.
    /// A client that is missing on one side counts as sending no connections there.
    pub fn new(before: &[Report], after: &[Report]) -> Self {
        let by_node = |reports: &[Report]| -> BTreeMap<Option<String>, Report> {
            reports.iter().map(|report| (report.client.node.clone(), report.clone())).collect()
        };
        let (old, new) = (by_node(before), by_node(after));
        let nodes: BTreeSet<_> = old.keys().chain(new.keys()).collect();
        let mut clients = Vec::new();
        for node in nodes {
            let Some(client) = new.get(node).or(old.get(node)).map(|report| report.client.clone()) else { continue };
            let names = Names::new(old.get(node).into_iter().chain(new.get(node)));
            let (was, is) = (names.shares(old.get(node)), names.shares(new.get(node)));
            let keys: BTreeSet<_> = was.keys().chain(is.keys()).collect();
            let change = |key: &(String, Option<String>)| {
                let (a, b) = (was.get(key), is.get(key));
                let (_, cluster, locality) = b.or(a)?.clone();
                let share = |side: Option<&(f64, String, String)>| side.map_or(0.0, |(share, ..)| *share);
                let (before, after) = (share(a), share(b));
                let (service, endpoint) = key.clone();
                ((before - after).abs() > 1e-9).then_some(ShareChange {
                    service,
                    endpoint,
                    cluster,
                    locality,
                    before,
                    after,
                })
            };
            let changes: Vec<ShareChange> = keys.into_iter().filter_map(change).collect();
            if !changes.is_empty() {
                clients.push(ClientDiff { client, changes });
            }
        }
        // Positions may move although nothing else has changed.
        let of = |reports: &[Report]| -> BTreeSet<Finding> {
            let findings = reports.iter().flat_map(|report| &report.findings).cloned();
            findings.map(|finding| Finding { position: None, ..finding }).collect()
        };
        let (old, new) = (of(before), of(after));
        let findings = FindingsDiff {
            added: new.difference(&old).cloned().collect(),
            removed: old.difference(&new).cloned().collect(),
        };
        Self { clients, findings }
    }

    /// Returns whether no share changes and no new finding is an error.
    pub fn is_empty(&self) -> bool {
        let errors = self.findings.added.iter().any(|finding| finding.severity == Severity::Error);
        self.clients.is_empty() && !errors
    }
}

/// Display names of services.
/// A name usually has one set of addresses per family; where routes split them, the addresses are part of the name.
struct Names {
    several: BTreeSet<String>,
}

impl Names {
    fn new<'a>(reports: impl Iterator<Item = &'a Report>) -> Self {
        let mut several = BTreeSet::new();
        for report in reports {
            let mut seen: BTreeMap<String, &[String]> = BTreeMap::new();
            for service in &report.services {
                let name = short(service);
                if *seen.entry(name.clone()).or_insert(&service.frontends) != service.frontends {
                    several.insert(name);
                }
            }
        }
        Self { several }
    }

    fn name(&self, service: &ServiceReport) -> String {
        let name = short(service);
        if self.several.contains(&name) { format!("{name} at {}", service.frontends.join(", ")) } else { name }
    }

    /// Returns the share of each endpoint, and the refused share of each service (`None` as endpoint).
    fn shares(&self, report: Option<&Report>) -> Shares {
        let mut shares = Shares::new();
        let mut given: BTreeMap<String, f64> = BTreeMap::new();
        for service in report.iter().flat_map(|report| &report.services) {
            let name = self.name(service);
            let sum = given.entry(name.clone()).or_default();
            if service.on_empty == "pass" {
                *sum = 1.0;
            }
            for endpoint in &service.endpoints {
                *sum += endpoint.share;
                let entry = shares.entry((name.clone(), Some(endpoint.address.clone())));
                let entry = entry.or_insert_with(|| (0.0, endpoint.cluster.clone(), endpoint.locality.clone()));
                entry.0 += endpoint.share;
            }
        }
        for (service, given) in given {
            shares.insert((service, None), ((1.0 - given).max(0.0), String::new(), String::new()));
        }
        shares
    }
}

/// Returns the kind (unless it is a Service), the name, the port, and the family if it is IPv6.
fn short(service: &ServiceReport) -> String {
    let v6 = service.frontends.first().is_some_and(|address| address.starts_with('['));
    let kind = service.kind.as_ref().map(|kind| format!("{kind} ")).unwrap_or_default();
    format!("{kind}{}/{}:{}{}", service.namespace, service.name, service.port, if v6 { " (IPv6)" } else { "" })
}
