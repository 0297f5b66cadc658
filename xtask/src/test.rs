//! `cargo xtask test`

use std::{process::ExitCode, time::Instant};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use portolan_tests::demo as plays;

use crate::{
    command::{cargo, need_root, run as run_command},
    demo, manifests, packages,
};

/// Which parts.
#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    /// Only this part
    #[arg(long, value_enum)]
    only: Option<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// cargo fmt
    Format,
    /// cargo clippy, and warnings are errors
    Lint,
    /// Pure parts: units, properties, vectors
    Unit,
    /// The chart, and the manifests that are rendered from it
    Deploy,
    /// Real programs in this kernel
    Kernel,
    /// A smoke run of the benchmark: every arm runs and every figure is one
    Bench,
    /// The demo, as `cargo xtask demo` plays it: on files, and on API servers
    Demo,
}

pub(crate) fn run(args: &TestArgs) -> Result<ExitCode> {
    need_root("the test")?;
    part("set-up", demo::prepare)?;
    for part_of in Part::value_variants() {
        if args.only.is_none_or(|only| only == *part_of) {
            let name = part_of.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
            part(&name, || run_part(*part_of))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// All of them, whatever fails; and what those that pass have to say: figures are a part of it.
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
                if plays::run(&plays::Options { kubernetes, ..plays::Options::default() })? != ExitCode::SUCCESS {
                    bail!("the demo has failed steps");
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
