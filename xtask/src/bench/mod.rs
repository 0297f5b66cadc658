//! `cargo xtask bench`: what Portolan costs, printed.

mod connect;
mod policy;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};

/// What to measure, and for how long.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Only this part
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// connect: rounds; in each, every arm has its turn
    #[arg(long, default_value_t = 60)]
    rounds: usize,
    /// connect: connections of an arm in a round
    #[arg(long, default_value_t = 2_000)]
    connections: usize,
    /// policy: services, each with ten endpoints
    #[arg(long, default_value_t = 10_000)]
    services: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// connect() through Portolan, beside connect() to the endpoint itself (needs root)
    Connect,
    /// The policy on many services: everything from nothing, one endpoint that changes, `plan` and `explain` on files
    Policy,
}

pub(crate) fn run(args: &BenchArgs) -> Result<ExitCode> {
    if args.only != Some(Part::Policy) {
        connect::run(args.rounds, args.connections)?;
    }
    if args.only != Some(Part::Connect) {
        policy::run(args.services)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Every arm runs, and every figure is one.
pub(crate) fn smoke() -> Result<()> {
    connect::smoke()?;
    policy::smoke()
}
