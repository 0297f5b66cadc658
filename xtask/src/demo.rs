//! `cargo xtask demo`: builds what the demo needs, and runs its scenarios.

use std::{
    process::{ExitCode, Output, Stdio},
    thread,
};

use anyhow::{Result, anyhow, ensure};
use clap::Args;
use portolan_tests::demo::{self, Options};

use crate::{
    command::{cargo, cargo_target, need_root, run as run_command},
    packages, toolchain,
};

/// Options of the demo.
#[derive(Debug, Args)]
#[command(after_help = list_scenarios())]
pub(crate) struct DemoArgs {
    /// Run only the scenarios whose name contains this
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Have the agents read from API servers (one stand-in per cluster) instead of files
    #[arg(long)]
    kubernetes: bool,
    /// Keep the last clusters running for inspection, until interrupted
    #[arg(long)]
    keep: bool,
    /// Print all steps as JSON at the end
    #[arg(long)]
    json: bool,
}

fn list_scenarios() -> String {
    let scenarios = demo::plays().map(|(name, about)| format!("  {name:<20} {about}\n"));
    format!("Scenarios:\n{}", scenarios.collect::<String>())
}

pub(crate) fn run(args: &DemoArgs) -> Result<ExitCode> {
    need_root("the demo")?;
    if let Some(only) = &args.only {
        let names: Vec<&str> = demo::plays().map(|(name, _)| name).collect();
        ensure!(
            names.iter().any(|name| name.contains(only.as_str())),
            "--only {only} matches no scenario; available: {}",
            names.join(", ")
        );
    }
    eprintln!("setting up: toolchain, packages, build");
    prepare()?;
    demo::run(&Options { only: args.only.clone(), keep: args.keep, kubernetes: args.kubernetes, json: args.json })
}

/// Runs the demo on files and on API servers, at the same time: both mostly wait.
pub(crate) fn both() -> Result<()> {
    let run = |arguments: &'static [&'static str]| {
        thread::spawn(move || -> Result<Output> {
            // Not the program that runs: the unit tests before may have built it again, and replaced its file.
            let mut demo = cargo(&["run", "--quiet", "--package", "xtask", "--", "demo"]);
            Ok(demo.args(arguments).stdin(Stdio::null()).output()?)
        })
    };
    let runs = [("files", run(&[])), ("API servers", run(&["--kubernetes"]))];
    let mut failed = Vec::new();
    for (name, run) in runs {
        let output = run.join().map_err(|_| anyhow!("the demo on {name} panicked"))??;
        let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        println!("--- demo on {name}: {}\n{}\n{}", output.status, out.trim(), err.trim());
        if !output.status.success() {
            failed.push(name);
        }
    }
    ensure!(failed.is_empty(), "demo steps failed on {}; see the output above", failed.join(" and "));
    Ok(())
}

/// Sets up the toolchain and packages, and builds the agent and the test programs.
pub(crate) fn prepare() -> Result<()> {
    toolchain::ensure(false)?;
    packages::ensure_programs(&packages::BENCH)?;
    run_command(&mut cargo(&["build", "--quiet", "--package", "portolan", "--package", "portolan-tests", "--bins"]))
}

/// Builds an agent with another map schema as `portolan-next` next to the real one, for tests of upgrades.
pub(crate) fn prepare_next() -> Result<()> {
    run_command(&mut cargo(&["build", "--quiet", "--package", "portolan", "--features", "next-schema"]))?;
    let built = cargo_target().join("debug");
    // Copy in another process: a child that another thread forks meanwhile could inherit the file opened for writing,
    // and running it would then fail with ETXTBSY.
    run_command(std::process::Command::new("cp").arg(built.join("portolan")).arg(built.join("portolan-next")))?;
    // Put the real agent back in place. It is cached, so this compiles nothing.
    run_command(&mut cargo(&["build", "--quiet", "--package", "portolan"]))
}
