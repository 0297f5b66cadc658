//! `cargo xtask test`: runs all checks of the repository.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::{
    check::{self, part},
    command::need_root,
    demo, kernel, manifests, packages,
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
    /// The dependencies of the pure core
    Dependencies,
    /// `cargo clippy`, with warnings as errors
    Lint,
    /// `cargo doc`, with warnings as errors
    Docs,
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

fn run_part(part: Part) -> Result<()> {
    match part {
        Part::Format => check::format(),
        Part::Dependencies => check::pure_core(),
        Part::Lint => check::lint(),
        Part::Docs => check::docs(),
        Part::Unit => check::unit(),
        Part::Deploy => manifests::run(&manifests::ManifestArgs { check: true }),
        Part::Kernel => {
            packages::ensure_programs(&[packages::CLIENTS.as_slice(), &packages::CONTAINERS].concat())?;
            demo::prepare_next().and_then(|()| kernel::run())
        }
        Part::Bench => crate::bench::smoke(),
        Part::Demo => demo::both(),
    }
}
