//! `cargo xtask bench`: sets up, and runs the benchmark, which is a crate of its own.

use std::ffi::OsString;

use anyhow::Result;
use clap::Args;

use crate::{
    command::{cargo, cargo_target, need_root, run as run_command},
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
    need_root("the benchmark")?;
    toolchain::ensure(false)?;
    packages::ensure_programs(&packages::BENCH)?;
    let packages = ["portolan", "portolan-bench", "portolan-tests"].map(|name| ["--package", name]);
    run_command(cargo(&["build", "--quiet", "--release", "--bins"]).args(packages.as_flattened()))?;
    run_command(std::process::Command::new(cargo_target().join("release/bench")).args(&args.arguments))
}

/// Every arm runs, and every figure is one.
pub(crate) fn smoke() -> Result<()> {
    run(&BenchArgs { arguments: vec!["--smoke".into()] })
}
