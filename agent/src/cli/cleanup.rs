//! `portolan cleanup`

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Args;

use crate::datapath;

/// Detaches the programs and removes the maps, and says what it removed. The agent must have ended before.
#[derive(Debug, Args)]
pub(super) struct CleanupArgs {
    /// Folder of the pins
    #[arg(long, value_name = "PATH", default_value = "/sys/fs/bpf/portolan", env = "PORTOLAN_BPFFS")]
    bpffs: PathBuf,
}

pub(super) fn run(args: &CleanupArgs) -> Result<ExitCode> {
    let mut removed = 0;
    datapath::cleanup(&args.bpffs, |pin| {
        removed += 1;
        anstream::println!("removed {}", pin.display());
    })?;
    if removed == 0 {
        anstream::println!("nothing of Portolan is pinned below {}", args.bpffs.display());
    }
    Ok(ExitCode::SUCCESS)
}
