//! Output of the subcommands: tables for people, JSON and YAML for scripts.

use std::{
    collections::BTreeSet,
    io::{IsTerminal as _, Write as _},
};

use anstyle::{AnsiColor, Style};
use anyhow::Result;
use clap::{Args, ValueEnum};
use comfy_table::{CellAlignment, Table, presets};
use portolan_core::{
    model::{Finding, Position, Severity},
    report::{ClientReport, Report, ServiceReport},
};
use serde::Serialize;

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(super) enum Format {
    /// Human-readable table
    #[default]
    Table,
    /// JSON
    Json,
    /// YAML
    Yaml,
}

#[derive(Debug, Args)]
pub(super) struct OutputArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    pub(super) output: Format,
}

/// Granularity of the rows in a report table.
#[derive(Clone, Copy)]
pub(super) enum Rows {
    Services,
    Endpoints,
}

pub(super) fn print(format: Format, report: &Report, rows: Rows) -> Result<()> {
    match format {
        Format::Table => {
            write(&(client(&report.client) + &table(report, rows) + &findings("Findings", &report.findings)))
        }
        format => print_value(format, report),
    }
}

/// Prints several reports. Clients with identical tables share one table.
pub(super) fn print_all(format: Format, reports: &[Report], rows: Rows) -> Result<()> {
    if !matches!(format, Format::Table) {
        return print_value(format, &reports);
    }
    let mut groups: Vec<(String, String)> = Vec::new();
    for report in reports {
        let table = table(report, rows);
        let head = client(&report.client);
        match groups.iter_mut().find(|(_, other)| *other == table) {
            Some((heads, _)) => {
                heads.truncate(heads.trim_end().len());
                heads.push('\n');
                heads.push_str(&head);
            }
            None => groups.push((head, table)),
        }
    }
    let text: Vec<String> = groups.into_iter().map(|(heads, table)| heads + &table).collect();
    let all: BTreeSet<Finding> = reports.iter().flat_map(|report| &report.findings).cloned().collect();
    write(&(text.join("\n") + &findings("Findings", &all.into_iter().collect::<Vec<_>>())))
}

/// Prints a value as YAML, or as JSON for any other format.
pub(super) fn print_value(format: Format, value: &impl Serialize) -> Result<()> {
    match format {
        Format::Yaml => write(&serde_saphyr::to_string(value)?),
        _ => write(&(serde_json::to_string_pretty(value)? + "\n")),
    }
}

/// Writes to standard output. A broken pipe is not an error: the reader has closed it early.
pub(super) fn write(text: &str) -> Result<()> {
    match anstream::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

/// Shows the progress of a long operation, if standard error is a terminal.
pub(super) fn progress(what: &str, done: usize, all: usize) {
    let mut stderr = std::io::stderr();
    if all > 1 && stderr.is_terminal() {
        let end = if done == all { "\r\x1b[K" } else { "" };
        // Best effort.
        let _ = write!(stderr, "\r{what} {done} of {all}{end}");
    }
}

/// Formats the header line that names the client of a table.
pub(super) fn client(client: &ClientReport) -> String {
    let node = client.node.as_ref().map(|node| format!(" node {node}")).unwrap_or_default();
    let at = if client.locality.is_empty() { "an unknown locality" } else { &client.locality };
    format!("Client: cluster {}{node} at {at}\n\n", client.cluster)
}

pub(super) fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.to_vec());
    table
}

/// Renders a table with a bold header. `style` returns the style of a row by its index, without the header.
pub(super) fn render(table: &Table, style: impl Fn(usize) -> Option<Style>) -> String {
    let line = |(i, line): (usize, String)| {
        let style = i.checked_sub(1).map_or(Some(Style::new().bold()), &style).unwrap_or_default();
        format!("{style}{}{style:#}\n", line.trim_end())
    };
    table.lines().enumerate().map(line).collect()
}

/// Returns the style that highlights an endpoint's health; `None` for plain text.
pub(super) fn style_of(health: &str) -> Option<Style> {
    match health {
        "ejected" => Some(AnsiColor::Red.on_default()),
        "unhealthy" | "draining" => Some(AnsiColor::Yellow.on_default()),
        _ => None,
    }
}

fn table(report: &Report, rows: Rows) -> String {
    let live = report.services.iter().any(|service| service.kernel.is_some());
    match rows {
        Rows::Services => services(report, live),
        Rows::Endpoints => endpoints(report, live),
    }
}

fn name(service: &ServiceReport) -> String {
    let subset = service.subset.as_ref().map(|subset| format!(" [{subset}]")).unwrap_or_default();
    let destination = service.destination.as_ref().map(|to| format!(" > {to}")).unwrap_or_default();
    format!("{}/{}:{}{destination}{subset}", service.namespace, service.name, service.port)
}

/// Formats the mode of a service, with the annotations that extend it.
fn mode(service: &ServiceReport) -> String {
    let with = |name: &str, says: &'static str| service.extensions.iter().any(|it| it == name).then_some(says);
    let parts = [
        with("distribute-with-failover", " with failover"),
        with("prefer-cluster-local", ", own cluster first"),
        with("always-eject-one", ", ejects one"),
    ];
    parts.into_iter().flatten().fold(service.mode.clone(), |mode, part| mode + part)
}

fn services(report: &Report, live: bool) -> String {
    let mut header = vec!["SERVICE", "FRONTENDS", "MODE", "LOCAL", "LOCALITIES", "HEALTHY"];
    if live {
        header.extend(["SLOTS", "CONNECTIONS", "REFUSED"]);
    }
    let mut table = new_table(&header);
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
            mode(service),
            if service.cluster_local { "yes" } else { "no" }.to_owned(),
            match (service.on_empty.as_str(), shares.is_empty()) {
                ("pass", _) => "passthrough".to_owned(),
                (_, true) => "refused".to_owned(),
                (_, false) => shares.join(", "),
            },
            format!("{healthy}/{hosts}"),
        ];
        if live {
            let kernel = service.kernel.clone().unwrap_or_default();
            row.extend([kernel.slots.to_string(), kernel.connections.to_string(), kernel.refused.to_string()]);
        }
        table.add_row(row);
    }
    if report.services.is_empty() { "no services\n".to_owned() } else { render(&table, |_| None) }
}

fn endpoints(report: &Report, live: bool) -> String {
    let mut header = vec!["SERVICE", "MODE", "ENDPOINT", "CLUSTER", "LOCALITY", "PRIORITY", "HEALTH", "SHARE"];
    if live {
        header.extend(["CONNECTIONS", "ACTIVE", "FAILURES", "EJECTED UNTIL"]);
    }
    let mut table = new_table(&header);
    let mut styles = Vec::new();
    for service in &report.services {
        if service.endpoints.is_empty() || service.on_empty == "pass" {
            let what = if service.on_empty == "pass" { "passthrough" } else { "no endpoints: refused" };
            table.add_row(vec![name(service), mode(service), what.to_owned()]);
            styles.push(None);
            continue;
        }
        for endpoint in &service.endpoints {
            let mut row = vec![
                name(service),
                mode(service),
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
            styles.push(style_of(&endpoint.health));
        }
    }
    if let Some(share) = table.column_mut(7) {
        share.set_cell_alignment(CellAlignment::Right);
    }
    if styles.is_empty() { "no endpoints\n".to_owned() } else { render(&table, |i| styles.get(i).copied().flatten()) }
}

pub(super) fn or_unknown(locality: &str) -> &str {
    if locality.is_empty() { "(unknown)" } else { locality }
}

pub(super) fn percent(share: f64) -> String {
    format!("{:.2}%", share * 100.0)
}

pub(super) fn findings(title: &str, findings: &[Finding]) -> String {
    let lines: String = findings.iter().map(finding).collect();
    if lines.is_empty() { lines } else { format!("\n{title}:\n{lines}") }
}

/// Formats one finding, with an excerpt of the line in the file that it refers to.
fn finding(finding: &Finding) -> String {
    let (severity, style) = match finding.severity {
        Severity::Error => ("error  ", AnsiColor::Red.on_default()),
        Severity::Warning => ("warning", AnsiColor::Yellow.on_default()),
    };
    let Finding { code, object, field, message, source, position, .. } = finding;
    let at = position.as_ref().map(|position| format!(":{}:{}", position.line, position.column)).unwrap_or_default();
    let source = if source.is_empty() { String::new() } else { format!(" ({source}{at})") };
    let field = if field.is_empty() { String::new() } else { format!(" {field}") };
    let mut text = format!("{style}{severity}{style:#} {code} {object}{field}{source}: {message}\n");
    if let Some(Position { line, column, text: excerpt }) = position {
        let number = line.to_string();
        let gap = " ".repeat(number.len());
        let mark = " ".repeat(column.saturating_sub(1));
        text += &format!("        {number} | {excerpt}\n        {gap} | {mark}{style}^{style:#}\n");
    }
    text
}
