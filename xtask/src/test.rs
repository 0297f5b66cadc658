//! `cargo xtask test`: runs all checks of the repository.

use std::{process::ExitCode, time::Instant};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use portolan_tests::demo as scenarios;

use crate::{
    command::{cargo, need_root, run as run_command},
    demo, manifests, packages,
};

/// Options of `cargo xtask test`.
#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    /// Run only this part
    #[arg(long, value_enum)]
    only: Option<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// `cargo fmt --check`
    Format,
    /// `cargo clippy`, with warnings as errors
    Lint,
    /// Unit tests, property tests and test vectors of the pure parts
    Unit,
    /// The Helm chart, and the manifests rendered from it
    Deploy,
    /// Tests with real eBPF programs on this kernel
    Kernel,
    /// Smoke run of the benchmark: every arm runs, and every figure is valid
    Bench,
    /// The demo, as with `cargo xtask demo`: once with files, once with API servers
    Demo,
}

pub(crate) fn run(args: &TestArgs) -> Result<ExitCode> {
    need_root("the test")?;
    part("set-up", demo::prepare)?;
    for selected in Part::value_variants() {
        if args.only.is_none_or(|only| only == *selected) {
            let name = selected.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
            part(&name, || run_part(*selected))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs all tests even if some fail, and shows the output of those that pass, which includes figures.
const KERNEL: [&str; 6] = ["test", "--no-fail-fast", "--package", "portolan-tests", "--", "--show-output"];

fn run_part(part: Part) -> Result<()> {
    match part {
        Part::Format => run_command(&mut cargo(&["fmt", "--all", "--check"])),
        Part::Lint => run_command(&mut cargo(&["clippy", "--quiet", "--all-targets", "--", "--deny", "warnings"])),
        Part::Unit => run_command(&mut cargo(&[
            "test",
            "--quiet",
            "--package",
            "portolan-core",
            "--package",
            "portolan-common",
            "--package",
            "portolan-datapath",
            "--package",
            "portolan",
            "--package",
            "xtask",
        ])),
        Part::Deploy => manifests::run(&manifests::ManifestArgs { check: true }),
        Part::Kernel => {
            packages::ensure_programs(&[packages::CLIENTS.as_slice(), &packages::CONTAINERS].concat())?;
            demo::prepare_next().and_then(|()| run_command(&mut cargo(&KERNEL)))
        }
        Part::Bench => crate::bench::smoke(),
        Part::Demo => {
            for kubernetes in [false, true] {
                if scenarios::run(&scenarios::Options { kubernetes, ..scenarios::Options::default() })?
                    != ExitCode::SUCCESS
                {
                    bail!("some demo steps failed; see the output above");
                }
            }
            Ok(())
        }
    }
}

fn part(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    println!("==> {name}");
    let began = Instant::now();
    work().map_err(|error| error.context(format!("{name} failed")))?;
    println!("==> {name}: passed in {:.0} s", began.elapsed().as_secs_f64());
    Ok(())
}
