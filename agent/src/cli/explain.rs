//! The `portolan explain` subcommand.

use std::{path::PathBuf, process::ExitCode, str::FromStr};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use comfy_table::CellAlignment;
use portolan_core::{
    model::NamespacedName,
    policy,
    report::explain::{EndpointExplanation, Explanation, PortExplanation, RouteExplanation, concerns},
};

use super::{
    AdminArgs, At, DecodeArgs, block_on,
    offline::Offline,
    output::{self, Format, OutputArgs},
};
use crate::admin;

/// Explain why each endpoint of a service has its share, step by step: which rule from which object routed, filtered,
/// ranked, weighted and ejected.
///
/// Queries the running agent. With --config, reads the objects itself and needs no agent, root or BPF.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  portolan explain default/reviews\n  \
                  portolan explain default/reviews:9080 --config mesh/ --cluster c1 --node n1")]
pub(super) struct ExplainArgs {
    /// Service to explain; with PORT, only that port
    #[arg(value_name = "NAMESPACE/NAME[:PORT]")]
    service: Which,
    /// Read the objects from this directory instead of querying the running agent
    #[arg(long, value_name = "DIR", requires = "cluster")]
    config: Option<PathBuf>,
    #[command(flatten)]
    reader: DecodeArgs,
    /// With --config: ID of the cluster that the clients run in
    #[arg(long, value_name = "ID", requires = "config")]
    cluster: Option<String>,
    #[command(flatten)]
    at: At,
    /// With --config: assume that this endpoint (ADDRESS or ADDRESS:PORT) is ejected (repeatable)
    #[arg(long, value_name = "ADDRESS", requires = "config")]
    eject: Vec<String>,
    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// A service, and optionally one of its ports: `NAMESPACE/NAME[:PORT]`.
#[derive(Clone, Debug)]
struct Which {
    name: NamespacedName,
    port: Option<u16>,
}

impl FromStr for Which {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, port) = text.split_once(':').map_or((text, None), |(name, port)| (name, Some(port)));
        let invalid = |_| format!("{text:?} is not NAMESPACE/NAME[:PORT]");
        Ok(Self {
            name: name.parse().map_err(invalid)?,
            port: port.map(str::parse).transpose().map_err(|_| invalid(String::new()))?,
        })
    }
}

pub(super) fn run(args: &ExplainArgs) -> Result<ExitCode> {
    let Which { name, port } = &args.service;
    let explanation = match (&args.config, &args.cluster) {
        (Some(root), Some(cluster)) => {
            let offline = Offline::read(root, args.reader.reader())?;
            let (client, findings) = offline.client(cluster, &args.at.place());
            let snapshot = offline.store.snapshot();
            let service = policy::service_named(snapshot, &client, name)
                .with_context(|| format!("clients of cluster {cluster} have no service {name}"))?;
            let observed = offline.ejected(&client, &args.eject)?;
            let mut output = policy::explain(snapshot, &client, &observed, &service);
            output.findings.extend(offline.store.findings());
            output.findings.extend(findings);
            output.findings.retain(|finding| concerns(finding, &service));
            offline.add_sources(&client, &mut output.findings);
            output.findings.sort();
            output.findings.dedup();
            Explanation::new(&client, &output, *port)
        }
        _ => {
            let port = port.map(|port| format!("&port={port}")).unwrap_or_default();
            let path = format!("/v1/explain?namespace={}&name={}{port}", name.namespace, name.name);
            block_on(admin::get(&args.admin.admin, &path))?
        }
    };
    ensure!(!explanation.ports.is_empty() || port.is_none(), "{name} has no TCP port {}", port.unwrap_or_default());
    match args.output.output {
        Format::Table => output::write(&text(&explanation))?,
        format => output::print_value(format, &explanation)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn text(explanation: &Explanation) -> String {
    let mut text = output::client(&explanation.client);
    for port in &explanation.ports {
        text += &self::port(port);
    }
    if explanation.ports.is_empty() {
        text += "Portolan handles no address of this service\n";
    }
    text + &output::findings("Findings", &explanation.findings)
}

fn port(port: &PortExplanation) -> String {
    let mut text = format!("{}, {}, dialed at {}\n", port.service, port.host, port.frontends.join(", "));
    for route in &port.routes {
        text += &self::route(route);
    }
    text
}

fn route(route: &RouteExplanation) -> String {
    let mut text = format!("\n  to {}\n", route.destination);
    let mut steps = output::new_table(&["STEP", "BY", "RESULT"]);
    for step in &route.steps {
        steps.add_row(vec![
            step.step.clone(),
            step.object.clone().unwrap_or_else(|| "-".to_owned()),
            step.says.clone(),
        ]);
    }
    text += &indented(&output::render(&steps, |_| None));
    if !route.endpoints.is_empty() {
        let mut table = output::new_table(&["ENDPOINT", "CLUSTER", "LOCALITY", "PRIORITY", "HEALTH", "SHARE", "WHY"]);
        for endpoint in &route.endpoints {
            table.add_row(row(endpoint));
        }
        if let Some(share) = table.column_mut(5) {
            share.set_cell_alignment(CellAlignment::Right);
        }
        text += "\n";
        text += &indented(&output::render(&table, |i| output::style_of(&route.endpoints.get(i)?.endpoint.health)));
    }
    if !route.left_out.is_empty() {
        let mut table = output::new_table(&["EXCLUDED", "CLUSTER", "WHY"]);
        for left_out in &route.left_out {
            table.add_row(vec![left_out.address.clone(), left_out.cluster.clone(), left_out.why.clone()]);
        }
        text += "\n";
        text += &indented(&output::render(&table, |_| None));
    }
    text
}

fn row(explained: &EndpointExplanation) -> Vec<String> {
    let endpoint = &explained.endpoint;
    let until = endpoint.ejected_until.as_ref().map(|until| format!(" until {until}")).unwrap_or_default();
    vec![
        endpoint.address.clone(),
        endpoint.cluster.clone(),
        output::or_unknown(&endpoint.locality).to_owned(),
        endpoint.priority.to_string(),
        endpoint.health.clone(),
        output::percent(endpoint.share),
        format!("{}{until}", explained.why),
    ]
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {line}\n")).collect()
}
