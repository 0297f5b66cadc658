//! The command line.

mod agent;
mod cleanup;
mod diff;
mod doctor;
mod events;
mod explain;
mod get;
mod offline;
mod output;
mod overrides;
mod plan;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Args, CommandFactory as _, Parser, Subcommand, error::ErrorKind};
use portolan_core::{
    decode::{ClusterRanges, DecodeOptions},
    model::{Labels, Locality, NamespacedName},
    policy::client::ClientLocation,
    report::Report,
};
use portolan_datapath::{HELPER_VERB, HelperArgs, Unsupported};

use crate::probe::self_probe;

/// Gives every connection on a node to the right endpoint, in the kernel.
///
/// Reads Kubernetes and Istio objects, computes what they mean for this node, and has eBPF programs rewrite each connection to a
/// Service address once, at connect().
#[derive(Debug, Parser)]
#[command(name = "portolan", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print without colours (they are left out as well where NO_COLOR is set, or where no terminal is)
    #[arg(long, global = true)]
    no_color: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves the connections of this node (needs root)
    Agent(Box<agent::AgentArgs>),
    /// Shows how connections would be shared, from objects in files; needs no root and no kernel
    Plan(Box<plan::PlanArgs>),
    /// Shows why each endpoint of a service has its share
    Explain(Box<explain::ExplainArgs>),
    /// Shows what the running agent intends and what the kernel holds
    Get(get::GetArgs),
    /// Takes an endpoint out by hand
    Eject(overrides::EjectArgs),
    /// Has a service leave a region by hand, before maintenance
    Drain(overrides::DrainArgs),
    /// Takes back what was ordered by hand
    Restore(overrides::RestoreArgs),
    /// Shows what has happened: ejections, releases, failed connections, changes
    Events(events::EventsArgs),
    /// Looks at this machine: what is right, what is wrong, and what to do about it
    Doctor(doctor::DoctorArgs),
    /// Takes everything of Portolan off the kernel; connections are no longer served
    Cleanup(cleanup::CleanupArgs),
    /// The client of the agent's own probe
    #[command(name = self_probe::VERB, hide = true)]
    SelfProbe {
        /// The cgroup that is served
        cgroup: PathBuf,
    },
    /// The part of the agent that keeps its privileges
    #[command(name = HELPER_VERB, hide = true)]
    Helper(HelperArgs),
    /// Shows the version
    FrontendVersion,
    /// Prints a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Exit status where something does not work.
const FAILED: u8 = 1;
/// Exit status where the command line is wrong or the machine lacks something.
const UNSUPPORTED: u8 = 2;

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            anstream::eprintln!("portolan: {error:#}");
            let unsupported = error.chain().any(|cause| cause.is::<Unsupported>());
            ExitCode::from(if unsupported { UNSUPPORTED } else { FAILED })
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    if cli.no_color {
        anstream::ColorChoice::Never.write_global();
    }
    match cli.command {
        Command::Agent(args) => agent::run(*args),
        Command::Plan(args) => plan::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Get(args) => get::run(&args),
        Command::Eject(args) => overrides::eject(&args),
        Command::Drain(args) => overrides::drain(&args),
        Command::Restore(args) => overrides::restore(&args),
        Command::Events(args) => events::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Cleanup(args) => cleanup::run(&args),
        Command::SelfProbe { cgroup } => self_probe::run_client(&cgroup).map(|()| ExitCode::SUCCESS),
        Command::Helper(args) => agent::run_helper(&args),
        Command::FrontendVersion => {
            let schema = portolan_common::SCHEMA_VERSION;
            anstream::println!("portolan {} (map schema v{schema})", env!("CARGO_PKG_VERSION"));
            Ok(ExitCode::SUCCESS)
        }
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "portolan", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// The configuration directory, and how it is read.
#[derive(Debug, Args)]
struct ConfigArgs {
    /// Directory with the objects: DIR/*.yaml for the mesh, DIR/<cluster-id>/**/*.yaml for each cluster
    #[arg(long, value_name = "DIR", env = "PORTOLAN_CONFIG")]
    config: PathBuf,
    #[command(flatten)]
    reader: DecodeArgs,
}

/// How objects are read.
#[derive(Debug, Args)]
struct DecodeArgs {
    /// Accept endpoints and Service addresses in loopback and link-local ranges
    #[arg(long, env = "PORTOLAN_ALLOW_LOOPBACK_ENDPOINTS")]
    allow_loopback_endpoints: bool,
    /// Where the endpoints of a cluster may be, whatever its objects say; anywhere, for one that is not named. May be given several times (in the
    /// environment with ";" between them)
    #[arg(long, value_name = "CLUSTER=CIDR[,CIDR…]", env = "PORTOLAN_CLUSTER_RANGES", value_delimiter = ';')]
    cluster_ranges: Vec<ClusterRanges>,
}

impl DecodeArgs {
    fn reader(&self) -> DecodeOptions {
        // Once for each process.
        let ranges = Vec::leak(self.cluster_ranges.clone());
        DecodeOptions { allow_loopback: self.allow_loopback_endpoints, ranges }
    }
}

/// Where the client is.
#[derive(Debug, Args)]
struct PlaceArgs {
    /// Id of the cluster that clients are in
    #[arg(long, value_name = "ID", env = "PORTOLAN_CLUSTER")]
    cluster: String,
    #[command(flatten)]
    at: At,
}

#[derive(Debug, Args)]
struct At {
    /// Name of the node that clients are on; its Node object says where that is
    #[arg(long, value_name = "NAME", env = "PORTOLAN_NODE")]
    node: Option<String>,
    /// Where clients are, in place of a node or of what its Node object says
    #[arg(long, value_name = "REGION/ZONE/SUBZONE", env = "PORTOLAN_LOCALITY")]
    locality: Option<Locality>,
    /// A label of the clients, beside those of the node, for failoverPriority
    #[arg(long = "label", value_name = "K=V", value_parser = label, env = "PORTOLAN_LABELS", value_delimiter = ',')]
    labels: Vec<(String, String)>,
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or("not KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

impl At {
    fn place(&self) -> ClientLocation {
        if self.node.is_none() && self.locality.is_none() {
            let message =
                "where are the clients? --node or --locality says it (of plan, --all-nodes asks for every node)\n";
            // Of the verb that was asked, not of all of them.
            let verb = std::env::args().nth(1).unwrap_or_default();
            let mut command = Cli::command();
            command.build();
            let asked = command.find_subcommand_mut(&verb).cloned();
            asked.unwrap_or(command).error(ErrorKind::MissingRequiredArgument, message).exit();
        }
        ClientLocation { node: self.node.clone(), locality: self.locality.clone(), labels: self.labels() }
    }

    fn labels(&self) -> Labels {
        self.labels.iter().cloned().collect()
    }
}

/// Where things are pinned.
#[derive(Debug, Args)]
struct PinsArgs {
    /// Folder for the pins, on a bpffs
    #[arg(long, value_name = "PATH", default_value = "/sys/fs/bpf/portolan", env = "PORTOLAN_BPFFS")]
    bpffs: PathBuf,
}

/// What outlives the agent.
#[derive(Debug, Args)]
struct StateArgs {
    /// File for what outlives the agent: ejections, and orders by hand
    #[arg(long, value_name = "FILE", default_value = "/var/lib/portolan/state.json", env = "PORTOLAN_STATE")]
    state: PathBuf,
}

/// The socket of the running agent.
#[derive(Debug, Args)]
struct AdminArgs {
    /// Admin socket of the agent
    #[arg(long, value_name = "SOCKET", default_value = "/run/portolan/admin.sock", env = "PORTOLAN_ADMIN")]
    admin: PathBuf,
}

/// Which services to show.
#[derive(Debug, Args)]
struct SelectArgs {
    /// Only this service
    #[arg(long, value_name = "NAMESPACE/NAME")]
    service: Option<NamespacedName>,
    /// Only this port
    #[arg(long)]
    port: Option<u16>,
}

impl SelectArgs {
    /// Leaves only these.
    fn apply(&self, report: &mut Report) -> Result<()> {
        self.keep(report);
        if report.services.is_empty() { self.found_nothing() } else { Ok(()) }
    }

    /// Leaves only these in each; one of them at least must have some.
    fn apply_to_all(&self, reports: &mut [Report]) -> Result<()> {
        self.keep_in_all(reports);
        if reports.iter().all(|report| report.services.is_empty()) { self.found_nothing() } else { Ok(()) }
    }

    fn keep_in_all(&self, reports: &mut [Report]) {
        reports.iter_mut().for_each(|report| self.keep(report));
    }

    fn keep(&self, report: &mut Report) {
        report.services.retain(|service| {
            let named = |name: &NamespacedName| name.namespace == service.namespace && name.name == service.name;
            self.port.is_none_or(|port| port == service.port) && self.service.as_ref().is_none_or(named)
        });
    }

    fn found_nothing(&self) -> Result<()> {
        let asked = self.service.is_some() || self.port.is_some();
        anyhow::ensure!(!asked, "no service of this client is of that name and port");
        Ok(())
    }
}

/// A runtime for the verbs that only ask.
fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
