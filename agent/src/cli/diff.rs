//! What a change of the objects does to the shares.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;

use super::output::{self, Format};
use crate::{
    model::{Finding, Severity},
    report::{ClientReport, Report, ServiceReport},
};

/// The difference of two sets of reports.
#[derive(Debug, Serialize)]
pub(super) struct Diff {
    /// One for each client that sends otherwise than before.
    clients: Vec<ClientDiff>,
    /// Errors and warnings that were not there before.
    findings: Findings,
}

#[derive(Debug, Default, Serialize)]
struct Findings {
    added: Vec<Finding>,
    removed: Vec<Finding>,
}

#[derive(Debug, Serialize)]
struct ClientDiff {
    client: ClientReport,
    changes: Vec<Change>,
}

/// An endpoint, or a refusal, whose share changes.
#[derive(Debug, Serialize)]
struct Change {
    /// `namespace/name:port`, with the kind, the family and the addresses where they are needed to tell it from others.
    service: String,
    /// `null`: the part of the connections that is refused.
    endpoint: Option<String>,
    cluster: String,
    locality: String,
    before: f64,
    after: f64,
}

type Shares = BTreeMap<(String, Option<String>), (f64, String, String)>;

impl Diff {
    /// Of the same clients, before and after. A client that is in one of them only sends nothing in the other.
    pub(super) fn new(before: &[Report], after: &[Report]) -> Self {
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
                ((before - after).abs() > 1e-9).then_some(Change {
                    service,
                    endpoint,
                    cluster,
                    locality,
                    before,
                    after,
                })
            };
            let changes: Vec<Change> = keys.into_iter().filter_map(change).collect();
            if !changes.is_empty() {
                clients.push(ClientDiff { client, changes });
            }
        }
        // Positions may have moved without anything else having changed.
        let of = |reports: &[Report]| -> BTreeSet<Finding> {
            let findings = reports.iter().flat_map(|report| &report.findings).cloned();
            findings.map(|finding| Finding { position: None, ..finding }).collect()
        };
        let (old, new) = (of(before), of(after));
        let findings = Findings {
            added: new.difference(&old).cloned().collect(),
            removed: old.difference(&new).cloned().collect(),
        };
        Self { clients, findings }
    }

    /// Whether everything goes on as it was, and no error came.
    pub(super) fn is_empty(&self) -> bool {
        let errors = self.findings.added.iter().any(|finding| finding.severity == Severity::Error);
        self.clients.is_empty() && !errors
    }
}

/// What to call services. As a rule, one name has one set of addresses of a family; where routes tell addresses apart, they are named.
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

    /// The shares of endpoints by service, and the share of each service that is refused.
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

/// Kind, where it is no Service, name, port, and family, where it is IPv6.
fn short(service: &ServiceReport) -> String {
    let v6 = service.frontends.first().is_some_and(|address| address.starts_with('['));
    let kind = service.kind.as_ref().map(|kind| format!("{kind} ")).unwrap_or_default();
    format!("{kind}{}/{}:{}{}", service.namespace, service.name, service.port, if v6 { " (IPv6)" } else { "" })
}

pub(super) fn print(format: Format, diff: &Diff) -> Result<()> {
    match format {
        Format::Table => output::write(&table(diff)),
        format => output::print_value(format, diff),
    }
}

fn table(diff: &Diff) -> String {
    let mut text = String::new();
    for ClientDiff { client, changes } in &diff.clients {
        text += &output::client(client);
        let mut table: Table =
            output::new_table(&["SERVICE", "ENDPOINT", "CLUSTER", "LOCALITY", "BEFORE", "AFTER", "CHANGE"]);
        for change in changes {
            table.add_row(vec![
                change.service.clone(),
                change.endpoint.clone().unwrap_or_else(|| "(refused)".to_owned()),
                change.cluster.clone(),
                change.locality.clone(),
                output::percent(change.before),
                output::percent(change.after),
                format!("{:+.2}", (change.after - change.before) * 100.0),
            ]);
        }
        for column in 4..7 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        text += &output::render(&table, |_| None);
        text.push('\n');
    }
    if diff.clients.is_empty() {
        text += "no share changes\n";
    }
    for (title, findings) in [("New findings", &diff.findings.added), ("Findings that go", &diff.findings.removed)] {
        text += &output::findings(title, findings);
    }
    text
}
