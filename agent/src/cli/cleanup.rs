//! `portolan cleanup`

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use super::PinsArgs;
use crate::datapath;

/// Detaches the programs and removes the maps, and says what it removed. The agent must have ended before.
#[derive(Debug, Args)]
pub(super) struct CleanupArgs {
    #[command(flatten)]
    pins: PinsArgs,
}

pub(super) fn run(args: &CleanupArgs) -> Result<ExitCode> {
    let mut removed = 0;
    datapath::cleanup(&args.pins.bpffs, |pin| {
        removed += 1;
        anstream::println!("removed {}", pin.display());
    })?;
    if removed == 0 {
        anstream::println!("nothing of Portolan is pinned below {}", args.pins.bpffs.display());
    }
    Ok(ExitCode::SUCCESS)
}
