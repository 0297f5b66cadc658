//! Tables for people, JSON and YAML for machines.

use std::io::Write as _;

use anyhow::Result;
use clap::{Args, ValueEnum};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::{
    model::{Finding, Severity},
    report::{Report, ServiceReport},
};

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(super) enum Format {
    /// For people
    #[default]
    Table,
    /// For machines
    Json,
    /// For machines
    Yaml,
}

#[derive(Debug, Args)]
pub(super) struct OutputArgs {
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    pub(super) output: Format,
}

/// Which rows a table of a report has.
#[derive(Clone, Copy)]
pub(super) enum Rows {
    Services,
    Endpoints,
}

pub(super) fn print(format: Format, report: &Report, rows: Rows) -> Result<()> {
    let text = match format {
        Format::Json => serde_json::to_string_pretty(report)? + "\n",
        Format::Yaml => to_yaml(report)?,
        Format::Table => table(report, rows) + &findings(&report.findings),
    };
    // A reader that has seen enough closes the pipe, which is no error.
    match anstream::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

fn to_yaml(value: &impl Serialize) -> Result<String> {
    Ok(serde_saphyr::to_string(value)?)
}

fn table(report: &Report, rows: Rows) -> String {
    let client = &report.client;
    let node = client.node.as_ref().map(|node| format!(" node {node}")).unwrap_or_default();
    let at = if client.locality.is_empty() { "an unknown place" } else { &client.locality };
    let head = format!("Client: cluster {}{node} at {at}\n\n", client.cluster);
    let live = report.services.iter().any(|service| service.kernel.is_some());
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    match rows {
        Rows::Services => services(&mut table, report, live),
        Rows::Endpoints => endpoints(&mut table, report, live),
    }
    if table.is_empty() {
        return head + "nothing\n";
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim_end().to_owned() + "\n").collect();
    head + &lines.concat()
}

fn name(service: &ServiceReport) -> String {
    let subset = service.subset.as_ref().map(|subset| format!(" [{subset}]")).unwrap_or_default();
    let destination = service.destination.as_ref().map(|to| format!(" > {to}")).unwrap_or_default();
    format!("{}/{}:{}{destination}{subset}", service.namespace, service.name, service.port)
}

fn services(table: &mut Table, report: &Report, live: bool) {
    let mut header = vec!["SERVICE", "FRONTENDS", "MODE", "LOCAL", "LOCALITIES", "HEALTHY"];
    if live {
        header.extend(["SLOTS", "CONNECTIONS", "REFUSED"]);
    }
    table.set_header(header);
    for service in &report.services {
        let shares = service.localities.iter().filter(|locality| locality.share > 0.0);
        let shares: Vec<_> =
            shares.map(|locality| format!("{} {}", or_unknown(&locality.locality), percent(locality.share))).collect();
        let (hosts, healthy) = service
            .priorities
            .iter()
            .fold((0, 0), |(hosts, healthy), level| (hosts + level.hosts, healthy + level.healthy));
        let mut row = vec![
            name(service),
            service.frontends.join(", "),
            service.mode.clone(),
            if service.cluster_local { "yes" } else { "no" }.to_owned(),
            if shares.is_empty() { "refused".to_owned() } else { shares.join(", ") },
            format!("{healthy}/{hosts}"),
        ];
        if live {
            let kernel = service.kernel.clone().unwrap_or_default();
            row.extend([kernel.slots.to_string(), kernel.connections.to_string(), kernel.refused.to_string()]);
        }
        table.add_row(row);
    }
}

fn endpoints(table: &mut Table, report: &Report, live: bool) {
    let mut header = vec!["SERVICE", "MODE", "ENDPOINT", "CLUSTER", "LOCALITY", "PRIORITY", "HEALTH", "SHARE"];
    if live {
        header.extend(["CONNECTIONS", "ACTIVE", "FAILURES", "EJECTED UNTIL"]);
    }
    table.set_header(header);
    for service in &report.services {
        if service.endpoints.is_empty() {
            table.add_row(vec![name(service), service.mode.clone(), "none: refused".to_owned()]);
        }
        for endpoint in &service.endpoints {
            let mut row = vec![
                name(service),
                service.mode.clone(),
                endpoint.address.clone(),
                endpoint.cluster.clone(),
                or_unknown(&endpoint.locality).to_owned(),
                endpoint.priority.to_string(),
                endpoint.health.clone(),
                percent(endpoint.share),
            ];
            if live {
                let kernel = endpoint.kernel.clone().unwrap_or_default();
                row.extend([kernel.connections.to_string(), kernel.active.to_string(), kernel.failures.to_string()]);
                row.push(endpoint.ejected_until.clone().unwrap_or_default());
            }
            table.add_row(row);
        }
    }
    if let Some(share) = table.column_mut(7) {
        share.set_cell_alignment(CellAlignment::Right);
    }
}

fn or_unknown(locality: &str) -> &str {
    if locality.is_empty() { "(unknown)" } else { locality }
}

fn percent(share: f64) -> String {
    format!("{:.2}%", share * 100.0)
}

fn findings(findings: &[Finding]) -> String {
    let lines = findings.iter().map(|finding| {
        let severity = match finding.severity {
            Severity::Error => "error  ",
            Severity::Warning => "warning",
        };
        let source = if finding.source.is_empty() { String::new() } else { format!(" ({})", finding.source) };
        format!("{severity}  {}{source}: {}\n", finding.object, finding.message)
    });
    let lines: String = lines.collect();
    if lines.is_empty() { lines } else { format!("\nFindings:\n{lines}") }
}
