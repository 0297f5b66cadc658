//! The `portolan` command line: subcommands, shared arguments, and exit codes.

mod agent;
mod cleanup;
mod diff;
mod doctor;
mod events;
mod explain;
mod findings;
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

use crate::probe::{self_probe, self_probe_client};

/// Load-balances Service connections in the kernel, at connect().
///
/// Reads Kubernetes and Istio objects, computes the policy for this node, and loads eBPF programs that rewrite each
/// connection to a Service address once, at connect().
#[derive(Debug, Parser)]
#[command(name = "portolan", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print without colors (also disabled by NO_COLOR, and when the output is not a terminal)
    #[arg(long, global = true)]
    no_color: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the node agent (needs root)
    Agent(Box<agent::AgentArgs>),
    /// Show each endpoint's share of new connections, computed from files; needs neither root nor BPF
    Plan(Box<plan::PlanArgs>),
    /// Explain why each endpoint of a service has its share
    Explain(Box<explain::ExplainArgs>),
    /// Show what the running agent intends and what the kernel holds
    Get(get::GetArgs),
    /// Eject an endpoint manually
    Eject(overrides::EjectArgs),
    /// Drain a service from a region, for example before maintenance
    Drain(overrides::DrainArgs),
    /// Revert a manual ejection or drain
    Restore(overrides::RestoreArgs),
    /// Show events: ejections, releases, failed connections, published changes
    Events(events::EventsArgs),
    /// Explain finding codes
    Findings(findings::FindingsArgs),
    /// Run node preflight checks and suggest fixes
    Doctor(doctor::DoctorArgs),
    /// Detach the programs and remove all pinned state; connections then bypass Portolan
    Cleanup(cleanup::CleanupArgs),
    /// Run the client process of the agent's self-probe
    #[command(name = self_probe::VERB, hide = true)]
    SelfProbe {
        /// cgroup whose connections the agent handles
        cgroup: PathBuf,
    },
    /// Run the privileged helper process of the agent
    #[command(name = HELPER_VERB, hide = true)]
    Helper(HelperArgs),
    /// Print the version
    Version,
    /// Print a shell completion script
    Completions {
        /// Shell to print the script for
        shell: clap_complete::Shell,
    },
}

/// Returns the definition of the command line, for generated documentation.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Exit code for a failed operation.
const FAILED: u8 = 1;
/// Exit code for a usage error, or for a machine that lacks a required feature.
const UNSUPPORTED: u8 = 2;

/// Parses the arguments of this process, runs the subcommand, and returns the exit code.
pub fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            anstream::eprintln!("portolan: {error:#}");
            let unsupported = error.chain().any(|cause| {
                let of_agent = cause.downcast_ref().is_some_and(crate::error::Error::is_unsupported);
                of_agent
                    || cause.downcast_ref().is_some_and(portolan_datapath::Error::is_unsupported)
                    || cause.is::<Unsupported>()
            });
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
        Command::Findings(args) => findings::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Cleanup(args) => cleanup::run(&args),
        Command::SelfProbe { cgroup } => Ok(self_probe_client::run(&cgroup).map(|()| ExitCode::SUCCESS)?),
        Command::Helper(args) => agent::run_helper(&args),
        Command::Version => {
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

/// Configuration directory, and options for decoding it.
#[derive(Debug, Args)]
struct ConfigArgs {
    /// Directory with the objects: DIR/*.yaml for the mesh, DIR/<cluster-id>/**/*.yaml for each cluster
    #[arg(long, value_name = "DIR", env = "PORTOLAN_CONFIG")]
    config: PathBuf,
    #[command(flatten)]
    reader: DecodeArgs,
}

/// Options for decoding objects.
#[derive(Debug, Args)]
struct DecodeArgs {
    /// Accept endpoints and Service addresses in loopback and link-local ranges
    #[arg(long, env = "PORTOLAN_ALLOW_LOOPBACK_ENDPOINTS")]
    allow_loopback_endpoints: bool,
    /// Address ranges that the endpoints of a cluster must be in; a cluster that is not listed may have any. Repeatable
    /// (in the environment, separate values with ";")
    #[arg(long, value_name = "CLUSTER=CIDR[,CIDR…]", env = "PORTOLAN_CLUSTER_RANGES", value_delimiter = ';')]
    cluster_ranges: Vec<ClusterRanges>,
}

impl DecodeArgs {
    fn reader(&self) -> DecodeOptions {
        // Leaked once per process, so that `DecodeOptions` stays `Copy`.
        let ranges = Vec::leak(self.cluster_ranges.clone());
        DecodeOptions { allow_loopback: self.allow_loopback_endpoints, ranges }
    }
}

/// Cluster and location of the clients.
#[derive(Debug, Args)]
struct PlaceArgs {
    /// ID of the cluster that the clients run in
    #[arg(long, value_name = "ID", env = "PORTOLAN_CLUSTER")]
    cluster: String,
    #[command(flatten)]
    at: At,
}

#[derive(Debug, Args)]
struct At {
    /// Node that the clients run on; its Node object gives the locality and labels
    #[arg(long, value_name = "NAME", env = "PORTOLAN_NODE")]
    node: Option<String>,
    /// Locality of the clients; overrides the locality of the Node object
    #[arg(long, value_name = "REGION/ZONE/SUBZONE", env = "PORTOLAN_LOCALITY")]
    locality: Option<Locality>,
    /// Client label for failoverPriority, in addition to the labels of the node (repeatable)
    #[arg(long = "label", value_name = "K=V", value_parser = label, env = "PORTOLAN_LABELS", value_delimiter = ',')]
    labels: Vec<(String, String)>,
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or("expected KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

impl At {
    fn place(&self) -> ClientLocation {
        if self.node.is_none() && self.locality.is_none() {
            let message =
                "the location of the clients is missing: pass --node or --locality (or --all-nodes with plan)\n";
            // Print the usage of the invoked subcommand, not of the whole program.
            let verb = std::env::args().nth(1).unwrap_or_default();
            let mut command = Cli::command();
            command.build();
            let subcommand = command.find_subcommand_mut(&verb).cloned();
            subcommand.unwrap_or(command).error(ErrorKind::MissingRequiredArgument, message).exit();
        }
        ClientLocation { node: self.node.clone(), locality: self.locality.clone(), labels: self.labels() }
    }

    fn labels(&self) -> Labels {
        self.labels.iter().cloned().collect()
    }
}

/// Location of the pinned maps and links.
#[derive(Debug, Args)]
struct PinsArgs {
    /// Directory for pinned maps and links, on a bpffs
    #[arg(long, value_name = "PATH", default_value = "/sys/fs/bpf/portolan", env = "PORTOLAN_BPFFS")]
    bpffs: PathBuf,
}

/// Location of the agent's state file.
#[derive(Debug, Args)]
struct StateArgs {
    /// File for state that outlives the agent: ejections and manual overrides
    #[arg(long, value_name = "FILE", default_value = "/var/lib/portolan/state.json", env = "PORTOLAN_STATE")]
    state: PathBuf,
}

/// Location of the running agent's admin socket.
#[derive(Debug, Args)]
struct AdminArgs {
    /// Path of the agent's admin socket
    #[arg(long, value_name = "SOCKET", default_value = "/run/portolan/admin.sock", env = "PORTOLAN_ADMIN")]
    admin: PathBuf,
}

/// Filters for the services to show.
#[derive(Debug, Args)]
struct SelectArgs {
    /// Show only this service
    #[arg(long, value_name = "NAMESPACE/NAME")]
    service: Option<NamespacedName>,
    /// Show only this port
    #[arg(long)]
    port: Option<u16>,
}

impl SelectArgs {
    /// Removes all services from the report that do not match. Fails if a filter is set and nothing matches.
    fn apply(&self, report: &mut Report) -> Result<()> {
        self.retain_matching(report);
        if report.services.is_empty() { self.found_nothing() } else { Ok(()) }
    }

    /// Filters every report. Fails if a filter is set and nothing matches in any of them.
    fn apply_to_all(&self, reports: &mut [Report]) -> Result<()> {
        self.keep_in_all(reports);
        if reports.iter().all(|report| report.services.is_empty()) { self.found_nothing() } else { Ok(()) }
    }

    fn keep_in_all(&self, reports: &mut [Report]) {
        reports.iter_mut().for_each(|report| self.retain_matching(report));
    }

    fn retain_matching(&self, report: &mut Report) {
        report.services.retain(|service| {
            let named = |name: &NamespacedName| name.namespace == service.namespace && name.name == service.name;
            self.port.is_none_or(|port| port == service.port) && self.service.as_ref().is_none_or(named)
        });
    }

    fn found_nothing(&self) -> Result<()> {
        let is_filtered = self.service.is_some() || self.port.is_some();
        anyhow::ensure!(!is_filtered, "no service of this client matches --service and --port");
        Ok(())
    }
}

/// Runs a future on a single-threaded runtime, for subcommands that only query the agent.
fn block_on<T, E: Into<anyhow::Error>>(work: impl Future<Output = Result<T, E>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clap_definition_is_valid() {
        Cli::command().debug_assert();
    }
}
