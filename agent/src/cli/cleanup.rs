//! The `portolan cleanup` subcommand.

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

/// Detach the programs, remove the maps and everything else that an agent leaves on the machine, and list what was
/// removed. Stop the agent first.
#[derive(Debug, Args)]
pub(super) struct CleanupArgs {
    #[command(flatten)]
    pins: PinsArgs,
    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    state: StateArgs,
    /// cgroup whose connections the agent handled [default: the cgroup v2 root]
    #[arg(long, value_name = "PATH", env = "PORTOLAN_CGROUP")]
    cgroup: Option<PathBuf>,
    /// Keep running after the cleanup, until terminated: prevents a DaemonSet from restarting its pods
    #[arg(long)]
    stay: bool,
}

pub(super) fn run(args: &CleanupArgs) -> Result<ExitCode> {
    let mut removed = 0;
    let mut log_removed = |path: &Path| {
        removed += 1;
        anstream::println!("removed {}", path.display());
    };
    portolan_datapath::cleanup(&args.pins.bpffs, &mut log_removed)?;
    let admin = &args.admin.admin;
    if UnixStream::connect(admin).is_ok() {
        // That agent uses other pins, and may use this state file.
        anstream::println!("an agent is listening on {}: kept its socket and the --state file", admin.display());
    } else {
        let is_socket = fs::symlink_metadata(admin).is_ok_and(|metadata| metadata.file_type().is_socket());
        let own = is_socket.then(|| admin.clone());
        let files: Vec<PathBuf> = own.into_iter().chain(PersistedState::files(&args.state.state)).collect();
        for file in files {
            match fs::remove_file(&file) {
                Ok(()) => log_removed(&file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).with_context(|| format!("cannot remove {}", file.display())),
            }
        }
    }
    // The client creates it only where the cgroup itself cannot hold processes.
    // A running agent recreates it at its next self-probe.
    if let Ok(cgroup) = portolan_datapath::cgroup(args.cgroup.as_deref()) {
        let probe = cgroup.join(self_probe::CGROUP);
        if fs::remove_dir(&probe).is_ok() {
            log_removed(&probe);
        }
    }
    portolan_datapath::remove_locks(&mut log_removed)?;
    if removed == 0 {
        anstream::println!("nothing to remove: no Portolan state left; no pins below {}", args.pins.bpffs.display());
    }
    if args.stay {
        // As PID 1 of a container, the process ignores SIGTERM unless it handles the signal.
        block_on(async {
            signal(SignalKind::terminate())?.recv().await;
            anyhow::Ok(())
        })?;
    }
    Ok(ExitCode::SUCCESS)
}
