//! Programs that come in packages of Python's registry, each in an environment of its own.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    command::{find, root, run as run_command},
    packages,
};

/// The folder of an environment with these packages; it is made where it is not there.
pub(crate) fn environment(name: &str, of: &[&str]) -> Result<PathBuf> {
    let folder = root().join(".toolchain").join(name);
    // Written last: an environment that was made by half is none.
    let whole = folder.join("whole");
    if whole.exists() {
        return Ok(folder);
    }
    let python = find("python3").context("there is no python3 (Debian: python3)")?;
    let make = |python: &Path| run_command(Command::new(python).args(["-m", "venv"]).arg(&folder));
    // Debian has that module in a package of its own.
    make(&python)
        .or_else(|_| packages::install(&["python3-venv"]).and_then(|()| make(Path::new("/usr/bin/python3"))))
        .with_context(|| format!("no environment for {name}"))?;
    let mut install = Command::new(folder.join("bin/pip"));
    run_command(install.args(["install", "--quiet", "--disable-pip-version-check"]).args(of))
        .with_context(|| format!("{name} cannot be fetched"))?;
    std::fs::write(whole, of.join("\n"))?;
    Ok(folder)
}
