//! The `portolan eject`, `drain` and `restore` subcommands: manual overrides.

use std::{net::SocketAddr, process::ExitCode, time::Duration};

use anyhow::Result;
use clap::Args;
use portolan_core::{health::OverrideCommand, model::NamespacedName};

use super::{AdminArgs, block_on};
use crate::admin;

/// Eject an endpoint manually: this node opens no new connections to it.
///
/// The override survives restarts of the agent and of the machine.
/// It ends when --for expires or `portolan restore` reverts it, and is reported as a finding while it is active.
/// Existing connections continue. Ejection limits do not apply.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  portolan eject 10.1.0.7:9080 --for 10m --reason 'disk is full'")]
pub(super) struct EjectArgs {
    /// Endpoint, as shown by `portolan get endpoints`
    #[arg(value_name = "ADDRESS:PORT")]
    endpoint: SocketAddr,
    /// Duration of the ejection [default: until it is restored]
    #[arg(long = "for", value_name = "DURATION", value_parser = humantime::parse_duration)]
    time: Option<Duration>,
    /// Reason, shown in findings and events
    #[arg(long, default_value = "")]
    reason: String,
    #[command(flatten)]
    admin: AdminArgs,
}

/// Drain a service from a region: its new connections from this node go where they would if all endpoints there had
/// failed.
///
/// Use it before maintenance of a region. The override lasts like that of `portolan eject`; revert it with
/// `portolan restore NAMESPACE/NAME --region REGION`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  portolan drain default/reviews --region cn-hangzhou --reason 'maintenance tonight'"
)]
pub(super) struct DrainArgs {
    /// Service to drain
    #[arg(value_name = "NAMESPACE/NAME")]
    service: NamespacedName,
    /// Region to drain the service from
    #[arg(long)]
    region: String,
    /// Reason, shown in findings and events
    #[arg(long, default_value = "")]
    reason: String,
    #[command(flatten)]
    admin: AdminArgs,
}

/// Revert a `portolan eject` or `portolan drain`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  portolan restore 10.1.0.7:9080\n  portolan restore default/reviews --region cn-hangzhou"
)]
pub(super) struct RestoreArgs {
    /// Endpoint to restore, or with --region the service
    #[arg(value_name = "ADDRESS:PORT|NAMESPACE/NAME")]
    what: String,
    /// Region that the service was drained from
    #[arg(long)]
    region: Option<String>,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) fn eject(args: &EjectArgs) -> Result<ExitCode> {
    let for_ms = args.time.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    submit(&args.admin, &OverrideCommand::Eject { endpoint: args.endpoint, for_ms, reason: args.reason.clone() })
}

pub(super) fn drain(args: &DrainArgs) -> Result<ExitCode> {
    let (service, region, reason) = (args.service.clone(), args.region.clone(), args.reason.clone());
    submit(&args.admin, &OverrideCommand::Drain { service, region, reason })
}

pub(super) fn restore(args: &RestoreArgs) -> Result<ExitCode> {
    let command = match &args.region {
        Some(region) => {
            let service = args.what.parse().map_err(anyhow::Error::msg)?;
            OverrideCommand::Undrain { service, region: region.clone() }
        }
        None => {
            let endpoint = args.what.parse().map_err(|_| {
                anyhow::anyhow!("{:?} is not ADDRESS:PORT; to restore a drained service, name its --region", args.what)
            })?;
            OverrideCommand::Restore { endpoint }
        }
    };
    submit(&args.admin, &command)
}

fn submit(admin: &AdminArgs, command: &OverrideCommand) -> Result<ExitCode> {
    let message: String = block_on(admin::post(&admin.admin, "/v1/orders", command))?;
    anstream::println!("{message}");
    Ok(ExitCode::SUCCESS)
}
