//! `portolan eject`, `drain` and `restore`: orders by hand.

use std::{net::SocketAddr, process::ExitCode, time::Duration};

use anyhow::Result;
use clap::Args;
use portolan_core::{health::OverrideCommand, model::NamespacedName};

use super::{AdminArgs, block_on};
use crate::admin;

/// Takes an endpoint out by hand: no new connections go to it, from this node.
///
/// It holds over restarts of the agent and of the machine, until its time is up or `portolan restore` takes it back, and shows as a finding as long as
/// it does. Connections that there are go on. No limit on ejections is asked.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  portolan eject 10.1.0.7:9080 --for 10m --reason 'disk is full'")]
pub(super) struct EjectArgs {
    /// The endpoint, as `portolan get endpoints` shows it
    #[arg(value_name = "ADDRESS:PORT")]
    endpoint: SocketAddr,
    /// It may come back after this time [default: when it is restored]
    #[arg(long = "for", value_name = "DURATION", value_parser = humantime::parse_duration)]
    time: Option<Duration>,
    /// Why, for whoever sees it
    #[arg(long, default_value = "")]
    reason: String,
    #[command(flatten)]
    admin: AdminArgs,
}

/// Has a service leave a region by hand: its new connections from this node go where they would if all endpoints there had failed.
///
/// For maintenance of a region. It holds as `portolan eject` does; `portolan restore NAMESPACE/NAME --region REGION` takes it back.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  portolan drain default/reviews --region cn-hangzhou --reason 'maintenance tonight'"
)]
pub(super) struct DrainArgs {
    /// The service
    #[arg(value_name = "NAMESPACE/NAME")]
    service: NamespacedName,
    /// The region
    #[arg(long)]
    region: String,
    /// Why, for whoever sees it
    #[arg(long, default_value = "")]
    reason: String,
    #[command(flatten)]
    admin: AdminArgs,
}

/// Takes back what `portolan eject` or `portolan drain` has ordered.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  portolan restore 10.1.0.7:9080\n  portolan restore default/reviews --region cn-hangzhou"
)]
pub(super) struct RestoreArgs {
    /// The endpoint, or with --region the service
    #[arg(value_name = "ADDRESS:PORT|NAMESPACE/NAME")]
    what: String,
    /// The region that was drained
    #[arg(long)]
    region: Option<String>,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) fn eject(args: &EjectArgs) -> Result<ExitCode> {
    let for_ms = args.time.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    give(&args.admin, &OverrideCommand::Eject { endpoint: args.endpoint, for_ms, reason: args.reason.clone() })
}

pub(super) fn drain(args: &DrainArgs) -> Result<ExitCode> {
    let (service, region, reason) = (args.service.clone(), args.region.clone(), args.reason.clone());
    give(&args.admin, &OverrideCommand::Drain { service, region, reason })
}

pub(super) fn restore(args: &RestoreArgs) -> Result<ExitCode> {
    let order = match &args.region {
        Some(region) => {
            let service = args.what.parse().map_err(anyhow::Error::msg)?;
            OverrideCommand::Undrain { service, region: region.clone() }
        }
        None => {
            let endpoint = args.what.parse().map_err(|_| {
                anyhow::anyhow!(
                    "{:?} is not ADDRESS:PORT; for a service that was drained, name its --region",
                    args.what
                )
            })?;
            OverrideCommand::Restore { endpoint }
        }
    };
    give(&args.admin, &order)
}

fn give(admin: &AdminArgs, order: &OverrideCommand) -> Result<ExitCode> {
    let said: String = block_on(admin::post(&admin.admin, "/v1/orders", order))?;
    anstream::println!("{said}");
    Ok(ExitCode::SUCCESS)
}
