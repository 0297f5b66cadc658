//! Chores of the repository. Each does all its own set-up.

mod bench;
mod command;
mod demo;
mod manifests;
mod packages;
mod python;
mod test;
mod toolchain;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

/// Chores of the repository. Each does all its own set-up on a fresh Debian machine with Rust.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Finds or installs what the eBPF programs are built with
    Toolchain {
        /// Begin anew, even if there is one
        #[arg(long)]
        force: bool,
    },
    /// Plays the users' scenarios on two clusters made of network namespaces (needs root)
    Demo(demo::DemoArgs),
    /// Runs everything that must hold: format, lints, unit tests, the chart, tests in the kernel, a smoke run of the benchmark, the demo (needs root)
    Test(test::TestArgs),
    /// Runs the tests in the kernel in this one and in Debian's 6.1 and 6.12, booted in QEMU (needs root)
    Vm(vm::VmArgs),
    /// Measures what Portolan costs, beside what stands in its place (needs root)
    Bench(bench::BenchArgs),
    /// Renders deploy/manifests from the chart, and checks both
    Manifests(manifests::ManifestArgs),
}

fn main() -> ExitCode {
    match run(Task::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    match task {
        Task::Toolchain { force } => toolchain::ensure(force).map(|()| ExitCode::SUCCESS),
        Task::Demo(args) => demo::run(&args),
        Task::Test(args) => test::run(&args),
        Task::Vm(args) => vm::run(&args),
        Task::Manifests(args) => manifests::run(&args).map(|()| ExitCode::SUCCESS),
        Task::Bench(args) => bench::run(&args).map(|()| ExitCode::SUCCESS),
    }
}
