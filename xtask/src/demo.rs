//! `cargo xtask demo`

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Args;
use portolan_tests::demo::{self, Options};

use crate::{
    command::{cargo, cargo_target, need_root, run as run_command},
    packages, toolchain,
};

/// How to play.
#[derive(Debug, Args)]
#[command(after_help = plays())]
pub(crate) struct DemoArgs {
    /// Only the plays whose name contains this
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Have the agents read from API servers (a stand-in for each cluster), in place of files
    #[arg(long)]
    kubernetes: bool,
    /// Leave the last clusters running to look at, until interrupted
    #[arg(long)]
    keep: bool,
    /// All steps as JSON at the end
    #[arg(long)]
    json: bool,
}

fn plays() -> String {
    let plays = demo::plays().map(|(name, about)| format!("  {name:<20} {about}\n"));
    format!("Plays:\n{}", plays.collect::<String>())
}

pub(crate) fn run(args: &DemoArgs) -> Result<ExitCode> {
    need_root("the demo")?;
    if let Some(only) = &args.only {
        let names: Vec<&str> = demo::plays().map(|(name, _)| name).collect();
        ensure!(
            names.iter().any(|name| name.contains(only.as_str())),
            "--only {only}: the plays are {}",
            names.join(", ")
        );
    }
    eprintln!("setting up: toolchain, packages, build");
    prepare()?;
    demo::run(&Options { only: args.only.clone(), keep: args.keep, kubernetes: args.kubernetes, json: args.json })
}

/// Everything that clusters are made of.
pub(crate) fn prepare() -> Result<()> {
    toolchain::ensure(false)?;
    packages::ensure_programs(&packages::BENCH)?;
    run_command(&mut cargo(&["build", "--quiet", "--package", "portolan", "--package", "portolan-tests", "--bins"]))
}

/// An agent with another schema of the maps, which tests upgrade to: `portolan-next`, beside the real one.
pub(crate) fn prepare_next() -> Result<()> {
    run_command(&mut cargo(&["build", "--quiet", "--package", "portolan", "--features", "next-schema"]))?;
    let built = cargo_target().join("debug");
    // By another process: were it written here, it could not be run while a child of another thread holds it open.
    run_command(std::process::Command::new("cp").arg(built.join("portolan")).arg(built.join("portolan-next")))?;
    // The real one again, which was not built anew but has to be put back.
    run_command(&mut cargo(&["build", "--quiet", "--package", "portolan"]))
}
