//! Helpers to find and run other programs.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

/// Returns the root directory of the repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_owned()
}

/// Returns a command for the cargo that runs xtask, in the repository's root.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).args(arguments);
    // What `cargo run` sets for xtask. Build scripts depend on some of it (ring's on CARGO_MANIFEST_DIR), so that cargo would
    // compile their crates and all that use them again, each time that xtask and a shell take turns.
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            command.env_remove(name);
        }
    }
    command
}

/// Returns cargo's target directory.
pub(crate) fn cargo_target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), Into::into)
}

/// Runs a program with inherited output, and fails if it exits with an error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let name = show(command);
    let status = command.status().with_context(|| format!("cannot start {name}"))?;
    ensure!(status.success(), "{name} failed with {status}");
    Ok(())
}

/// Runs a program and returns its stdout; stderr becomes part of the error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let name = show(command);
    let output = command.output().with_context(|| format!("cannot start {name}"))?;
    if !output.status.success() {
        bail!("{name} failed with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Searches a program on PATH, in the sbin directories, and in Debian's directories for PostgreSQL.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let versions = versions.map(|version| version.path().join("bin"));
    let folders = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).chain(versions);
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// Fails unless the process runs as root. `what` is the subject of the message.
pub(crate) fn need_root(what: &str) -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "{what} loads eBPF programs and creates network namespaces: run it as root"
    );
    Ok(())
}

fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
