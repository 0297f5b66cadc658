//! `cargo xtask bench`: what Portolan costs, printed.

mod connect;
mod pick;
mod policy;

use anyhow::Result;
use clap::{Parser, ValueEnum};

/// What to measure, and for how long.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
struct Options {
    /// Every arm runs, few times: shows that the benchmark works, not how fast anything is
    #[arg(long)]
    smoke: bool,
    /// Only this part
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// connect: rounds; in each, every arm has its turn
    #[arg(long, default_value_t = 60)]
    rounds: usize,
    /// connect: connections of an arm in a round
    #[arg(long, default_value_t = 2_000)]
    connections: usize,
    /// pick: connections for each number of services
    #[arg(long, default_value_t = 100_000)]
    picks: u64,
    /// policy: services, each with ten endpoints
    #[arg(long, default_value_t = 10_000)]
    services: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// connect() through Portolan, beside connect() to the endpoint itself (needs root)
    Connect,
    /// Time inside the kernel with 1, 100 and 10,000 services (needs root)
    Pick,
    /// The policy on many services: everything from nothing, one endpoint that changes, `plan` and `explain` on files
    Policy,
}

fn main() -> Result<()> {
    let args = Options::parse();
    if args.smoke {
        return smoke();
    }
    let wanted = |part| args.only.is_none_or(|only| only == part);
    if wanted(Part::Connect) {
        connect::run(args.rounds, args.connections)?;
    }
    if wanted(Part::Pick) {
        pick::run(args.picks)?;
    }
    if wanted(Part::Policy) {
        policy::run(args.services)?;
    }
    Ok(())
}

/// Every arm runs, and every figure is one.
fn smoke() -> Result<()> {
    connect::smoke()?;
    pick::smoke()?;
    policy::smoke()
}
