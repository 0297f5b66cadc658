//! `portolan plan`

use std::{collections::BTreeSet, net::IpAddr, net::SocketAddr, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::Args;

use super::{
    ConfigArgs, FAILED, PlaceArgs, SelectArgs,
    output::{self, OutputArgs, Rows},
};
use crate::{
    model::Finding,
    policy::{Ejections, assign},
    report::Report,
    source::{Reader, Update, file::Directory},
    store::Store,
};

/// Shows, for a client in one place, which endpoint gets which share of new connections, and what is wrong with the objects.
///
/// The shares are computed by the same code that the agent uses, so they are what the kernel gives. Exit status 1 where a finding
/// is an error.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  portolan plan --config mesh/ --cluster c1 --node n1 --service default/reviews -o json"
)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    place: PlaceArgs,
    /// A label of the client
    #[arg(long = "label", value_name = "K=V")]
    labels: Vec<String>,
    #[command(flatten)]
    select: SelectArgs,
    /// What would be if this endpoint (ADDRESS or ADDRESS:PORT) were ejected
    #[arg(long, value_name = "ADDRESS")]
    eject: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) fn run(args: &PlanArgs) -> Result<ExitCode> {
    let reader = Reader { allow_loopback: args.config.allow_loopback_endpoints };
    let root = &args.config.config;
    let updates = Directory::new(root.clone(), reader)
        .scan(&BTreeSet::new())
        .with_context(|| format!("--config {}: cannot be read", root.display()))?;
    let mut store = Store::default();
    for update in updates.into_iter().chain([Update::Synced]) {
        store.apply(update);
    }
    let snapshot = store.snapshot();
    let mut findings = Vec::new();
    let client = args.place.at.place().client(&args.place.cluster, &snapshot, &mut findings);
    for label in &args.labels {
        let message = "no rule that looks at labels of clients is honoured yet, so this changes nothing";
        findings.push(Finding::warning(format!("--label {label}"), message));
    }
    let everywhere = ejected(&args.eject, |ejections| assign(&snapshot, &client, ejections))?;
    let mut verdict = assign(&snapshot, &client, &Ejections { everywhere, ..Ejections::default() });
    verdict.findings.splice(0..0, findings);
    let mut report = Report::new(&client, store.fingerprint(), &verdict);
    let failed = report.has_errors();
    args.select.apply(&mut report)?;
    output::print(args.output.output, &report, Rows::Endpoints)?;
    Ok(ExitCode::from(if failed { FAILED } else { 0 }))
}

/// The endpoints that `--eject` means: one with this port, or with this address and any port.
fn ejected(
    texts: &[String],
    verdict: impl FnOnce(&Ejections) -> crate::policy::Verdict,
) -> Result<BTreeSet<SocketAddr>> {
    if texts.is_empty() {
        return Ok(BTreeSet::new());
    }
    let verdict = verdict(&Ejections::default());
    let known: BTreeSet<SocketAddr> = verdict
        .assignments
        .iter()
        .flat_map(|assignment| &assignment.routes)
        .flat_map(|route| &route.pool.endpoints)
        .map(|endpoint| endpoint.address)
        .collect();
    let mut ejected = BTreeSet::new();
    for text in texts {
        let meant: Vec<SocketAddr> = match (text.parse::<SocketAddr>(), text.parse::<IpAddr>()) {
            (Ok(address), _) => known.iter().filter(|known| **known == address).copied().collect(),
            (_, Ok(ip)) => known.iter().filter(|known| known.ip() == ip).copied().collect(),
            _ => anyhow::bail!("--eject {text}: not ADDRESS or ADDRESS:PORT"),
        };
        anyhow::ensure!(!meant.is_empty(), "--eject {text}: no service of this client has such an endpoint");
        ejected.extend(meant);
    }
    Ok(ejected)
}
