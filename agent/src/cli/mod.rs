//! The command line.

mod agent;
mod cleanup;
mod events;
mod get;
mod output;
mod plan;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Args, CommandFactory as _, Parser, Subcommand};

use crate::{datapath::Unsupported, model::Locality, reconcile::Place};

/// Gives every connection on a node to the right endpoint, in the kernel.
///
/// Reads Kubernetes and Istio objects, computes what they mean for this node, and has eBPF programs rewrite each connection to a
/// Service address once, at connect().
#[derive(Debug, Parser)]
#[command(name = "portolan", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves the connections of this node (needs root)
    Agent(Box<agent::AgentArgs>),
    /// Shows how connections would be shared, from objects in files; needs no root and no kernel
    Plan(plan::PlanArgs),
    /// Shows what the running agent intends and what the kernel holds
    Get(get::GetArgs),
    /// Shows what has happened: ejections, releases, failed connections, changes
    Events(events::EventsArgs),
    /// Takes everything of Portolan off the kernel; connections are no longer served
    Cleanup(cleanup::CleanupArgs),
    /// Shows the version
    Version,
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
    match cli.command {
        Command::Agent(args) => agent::run(*args),
        Command::Plan(args) => plan::run(&args),
        Command::Get(args) => get::run(&args),
        Command::Events(args) => events::run(&args),
        Command::Cleanup(args) => cleanup::run(&args),
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

/// The configuration directory, and how it is read.
#[derive(Debug, Args)]
struct ConfigArgs {
    /// Directory with the objects: DIR/*.yaml for the mesh, DIR/<cluster-id>/**/*.yaml for each cluster
    #[arg(long, value_name = "DIR", env = "PORTOLAN_CONFIG")]
    config: PathBuf,
    /// Accept endpoints and Service addresses in loopback and link-local ranges
    #[arg(long, env = "PORTOLAN_ALLOW_LOOPBACK_ENDPOINTS")]
    allow_loopback_endpoints: bool,
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
#[group(required = true, multiple = true)]
struct At {
    /// Name of the node that clients are on; its Node object says where that is
    #[arg(long, value_name = "NAME", env = "PORTOLAN_NODE")]
    node: Option<String>,
    /// Where clients are, in place of a node or of what its Node object says
    #[arg(long, value_name = "REGION/ZONE/SUBZONE", env = "PORTOLAN_LOCALITY")]
    locality: Option<Locality>,
}

impl At {
    fn place(&self) -> Place {
        Place { node: self.node.clone(), locality: self.locality.clone() }
    }
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
    service: Option<crate::model::NamespacedName>,
    /// Only this port
    #[arg(long)]
    port: Option<u16>,
}

impl SelectArgs {
    fn apply(&self, report: &mut crate::report::Report) -> Result<()> {
        report.services.retain(|service| {
            self.port.is_none_or(|port| port == service.port)
                && self
                    .service
                    .as_ref()
                    .is_none_or(|name| name.namespace == service.namespace && name.name == service.name)
        });
        let asked = self.service.is_some() || self.port.is_some();
        anyhow::ensure!(!asked || !report.services.is_empty(), "no service of this client is of that name and port");
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
