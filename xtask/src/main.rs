//! Development tasks of the repository. Each does its own set-up.

mod bench;
mod check;
mod command;
mod demo;
mod kernel;
mod manifests;
mod packages;
mod python;
mod reference;
mod test;
mod toolchain;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

/// Development tasks of the repository. Each does its own set-up on a fresh Debian machine with Rust.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Finds or installs the toolchain for the eBPF programs
    Toolchain {
        /// Set up from scratch, even if a toolchain exists
        #[arg(long)]
        force: bool,
    },
    /// Runs the demo scenarios on two clusters made of network namespaces (needs root)
    Demo(demo::DemoArgs),
    /// Runs all checks: format, lints, unit tests, the chart, kernel tests, a smoke run of the benchmark, the demo
    /// (needs root)
    Test(test::TestArgs),
    /// Runs format, lints, docs and unit tests: no root, no eBPF toolchain, under two minutes when warm
    Check,
    /// Writes the generated pages of docs/reference (CLI, metrics, findings)
    Reference,
    /// Runs the kernel tests on this kernel, and on Debian's 6.1 and 6.12 in QEMU (needs root)
    Vm(vm::VmArgs),
    /// Measures the cost and speed of Portolan next to its alternatives (needs root)
    Bench(bench::BenchArgs),
    /// Renders deploy/manifests from the chart, and validates both
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
        Task::Check => check::run().map(|()| ExitCode::SUCCESS),
        Task::Reference => reference::run().map(|()| ExitCode::SUCCESS),
        Task::Vm(args) => vm::run(&args),
        Task::Manifests(args) => manifests::run(&args).map(|()| ExitCode::SUCCESS),
        Task::Bench(args) => bench::run(&args).map(|()| ExitCode::SUCCESS),
    }
}
