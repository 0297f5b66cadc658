//! `portolan cleanup`

use std::{
    fs, io,
    os::unix::{fs::FileTypeExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::{AdminArgs, PinsArgs, StateArgs, block_on};
use crate::{controller::state_file::PersistedState, probe::self_probe};

/// Detaches the programs and removes the maps, and whatever else an agent leaves on the machine, and says what it removed. The agent must have
/// ended before.
#[derive(Debug, Args)]
pub(super) struct CleanupArgs {
    #[command(flatten)]
    pins: PinsArgs,
    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    state: StateArgs,
    /// The cgroup that was served [default: the cgroup v2 root]
    #[arg(long, value_name = "PATH", env = "PORTOLAN_CGROUP")]
    cgroup: Option<PathBuf>,
    /// Stay when all is done, until ended: for a DaemonSet, whose pods would be started again and again
    #[arg(long)]
    stay: bool,
}

pub(super) fn run(args: &CleanupArgs) -> Result<ExitCode> {
    let mut removed = 0;
    let mut tell = |path: &Path| {
        removed += 1;
        anstream::println!("removed {}", path.display());
    };
    portolan_datapath::cleanup(&args.pins.bpffs, &mut tell)?;
    let admin = &args.admin.admin;
    if UnixStream::connect(admin).is_ok() {
        // It has other pins, and may have this file.
        anstream::println!("an agent answers on {}: its socket and its --state were left", admin.display());
    } else {
        let is_socket = fs::symlink_metadata(admin).is_ok_and(|metadata| metadata.file_type().is_socket());
        let own = is_socket.then(|| admin.clone());
        let files: Vec<PathBuf> = own.into_iter().chain(PersistedState::files(&args.state.state)).collect();
        for file in files {
            match fs::remove_file(&file) {
                Ok(()) => tell(&file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).with_context(|| format!("cannot remove {}", file.display())),
            }
        }
    }
    // Made only where the cgroup has no processes of its own; an agent that is at work has it back at its next probe.
    if let Ok(cgroup) = portolan_datapath::cgroup(args.cgroup.as_deref()) {
        let probe = cgroup.join(self_probe::CGROUP);
        if fs::remove_dir(&probe).is_ok() {
            tell(&probe);
        }
    }
    portolan_datapath::remove_locks(&mut tell)?;
    if removed == 0 {
        anstream::println!("nothing of Portolan is left; its pins would be below {}", args.pins.bpffs.display());
    }
    if args.stay {
        // The first process of a container is ended by no signal that it does not wait for.
        block_on(async {
            signal(SignalKind::terminate())?.recv().await;
            Ok(())
        })?;
    }
    Ok(ExitCode::SUCCESS)
}
