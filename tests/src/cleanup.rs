//! Cleanup after runs that could not clean up themselves: runs that were killed, and one that is interrupted.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Once,
    thread,
    time::Duration,
};

use anyhow::Result;
use rustix::process::{Pid, Signal, kill_process};

use crate::{cgroup, wait_until};

/// Removes what runs that no longer exist left behind.
/// Only the first call in a process does anything.
pub(crate) fn sweep_dead_runs() {
    static ONCE: Once = Once::new();
    // A zombie has an empty command line.
    let is_dead = |run: u32| fs::read(format!("/proc/{run}/cmdline")).map_or(true, |command| command.is_empty());
    ONCE.call_once(|| sweep(is_dead));
}

/// Installs a Ctrl-C handler that removes everything this run created, then exits with status 130.
///
/// # Errors
/// Returns an error if the handler's runtime or thread cannot be created.
pub fn cleanup_on_interrupt() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("interrupt".to_owned()).spawn(move || {
        if runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
            eprintln!("\ninterrupted: cleaning up");
            sweep(|run| run == std::process::id());
            std::process::exit(130);
        }
    })?;
    Ok(())
}

/// Returns the process ID of the run that created this name (see [`crate::unique`]); `None` for any other name.
fn run_of(name: &str) -> Option<u32> {
    name.strip_prefix("ptl")?.split('-').next()?.parse().ok()
}

fn sweep(of: impl Fn(u32) -> bool) {
    let ours = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        entries.filter(|path| run_of(&name(path)).is_some_and(&of)).collect()
    };
    for namespace in ours(Path::new("/run/netns")) {
        let name = namespace.file_name().unwrap_or_default();
        let pids = Command::new("ip").args(["netns", "pids"]).arg(name).output();
        let pids = pids.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        for pid in pids.lines().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)) {
            // It may have exited already.
            let _ = kill_process(pid, Signal::KILL);
        }
        warn_on_error(Command::new("ip").args(["netns", "delete"]).arg(name).status().map(drop), &namespace);
    }
    for pins in ours(Path::new("/sys/fs/bpf")) {
        warn_on_error(fs::remove_dir_all(&pins), &pins);
    }
    for folder in ours(&std::env::temp_dir()) {
        warn_on_error(fs::remove_dir_all(&folder), &folder);
    }
    for cgroup in cgroup::root().map(|root| ours(&root)).unwrap_or_default() {
        let removed = fs::write(cgroup.join("cgroup.kill"), "1")
            .map_err(Into::into)
            .and_then(|()| wait_until("the cgroup to be empty", Duration::from_secs(5), || cgroup::remove(&cgroup)));
        warn_on_error(removed, &cgroup);
    }
}

fn warn_on_error<E: std::fmt::Display>(result: Result<(), E>, what: &Path) {
    if let Err(error) = result {
        eprintln!("cannot remove {}: {error}", what.display());
    }
}
