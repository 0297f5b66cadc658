//! The `portolan plan` and `portolan plan diff` subcommands.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Args, Subcommand};
use portolan_core::report::Report;

use super::{
    At, DecodeArgs, FAILED, PlaceArgs, SelectArgs, UNSUPPORTED, diff,
    offline::Offline,
    output::{self, OutputArgs, Rows},
};

/// Show each endpoint's share of new connections for clients at one location, and findings about the objects.
///
/// The agent uses the same code, so these are the shares that the kernel applies.
/// Exit status 1 if a finding is an error.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Examples:\n  portolan plan --config mesh/ --cluster c1 --node n1 --service default/reviews -o json\n  \
                  portolan plan --config mesh/ --cluster c1 --all-nodes\n  \
                  portolan plan diff mesh/ mesh-new/ --cluster c1 --node n1"
)]
pub(super) struct PlanArgs {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// Directory with the objects: DIR/*.yaml for the mesh, DIR/<cluster-id>/**/*.yaml for each cluster
    #[arg(long, value_name = "DIR", env = "PORTOLAN_CONFIG", required = true)]
    config: Option<PathBuf>,
    #[command(flatten)]
    reader: DecodeArgs,
    /// ID of the cluster that the clients run in
    #[arg(long, value_name = "ID", env = "PORTOLAN_CLUSTER", required = true)]
    cluster: Option<String>,
    #[command(flatten)]
    at: At,
    /// Show every node of the cluster
    #[arg(long)]
    all_nodes: bool,
    #[command(flatten)]
    select: SelectArgs,
    /// Assume that this endpoint (ADDRESS or ADDRESS:PORT) is ejected (repeatable)
    #[arg(long, value_name = "ADDRESS")]
    eject: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show how a change of the objects would affect the shares, before it is applied
    ///
    /// Exit status 0: no share changes; 1: some shares change, or the new directory has additional findings that are
    /// errors; 2: the directories cannot be compared.
    Diff(DiffArgs),
}

#[derive(Debug, Args)]
struct DiffArgs {
    /// Directory with the current objects
    #[arg(value_name = "DIR_A")]
    before: PathBuf,
    /// Directory with the changed objects
    #[arg(value_name = "DIR_B")]
    after: PathBuf,
    #[command(flatten)]
    reader: DecodeArgs,
    #[command(flatten)]
    place: PlaceArgs,
    /// Show every node of the cluster
    #[arg(long)]
    all_nodes: bool,
    #[command(flatten)]
    select: SelectArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) fn run(args: &PlanArgs) -> Result<ExitCode> {
    if let Some(Verb::Diff(args)) = &args.verb {
        return run_diff(args).or_else(|error| {
            // Exit status 1 would mean a difference.
            anstream::eprintln!("portolan: {error:#}");
            Ok(ExitCode::from(UNSUPPORTED))
        });
    }
    let root = args.config.clone().unwrap_or_default();
    let cluster = args.cluster.clone().unwrap_or_default();
    let offline = Offline::read(&root, args.reader.reader())?;
    let mut reports = reports(&offline, &cluster, (&args.at, args.all_nodes), &args.eject)?;
    let failed = reports.iter().any(Report::has_errors);
    args.select.apply_to_all(&mut reports)?;
    if args.all_nodes {
        output::print_all(args.output.output, &reports, Rows::Endpoints)?;
    } else if let Some(report) = reports.first() {
        output::print(args.output.output, report, Rows::Endpoints)?;
    }
    Ok(ExitCode::from(if failed { FAILED } else { 0 }))
}

/// Builds one report for the given location, or one per node of the cluster.
fn reports(offline: &Offline, cluster: &str, (at, all_nodes): (&At, bool), eject: &[String]) -> Result<Vec<Report>> {
    let places = match all_nodes {
        true => offline.nodes(cluster, &at.labels())?,
        false => vec![at.place()],
    };
    let mut reports = Vec::new();
    for (i, at) in places.iter().enumerate() {
        output::progress("node", i, places.len());
        let (client, findings) = offline.client(cluster, at);
        let observed = offline.ejected(&client, eject)?;
        reports.push(offline.report(&client, findings, &observed));
    }
    output::progress("node", places.len(), places.len());
    Ok(reports)
}

fn run_diff(args: &DiffArgs) -> Result<ExitCode> {
    let mut sides = Vec::new();
    for root in [&args.before, &args.after] {
        let offline = Offline::read(root, args.reader.reader())?;
        let mut reports = reports(&offline, &args.place.cluster, (&args.place.at, args.all_nodes), &[])?;
        args.select.keep_in_all(&mut reports);
        sides.push(reports);
    }
    if sides.iter().flatten().all(|report| report.services.is_empty()) {
        args.select.found_nothing()?;
    }
    let diff = portolan_core::report::diff::Diff::new(&sides[0], &sides[1]);
    diff::print(args.output.output, &diff)?;
    Ok(ExitCode::from(if diff.is_empty() { 0 } else { FAILED }))
}
