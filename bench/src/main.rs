//! `cargo xtask bench`: what Portolan costs and how fast it is, beside what a user would run in its place, on this machine, in one run.

mod agents;
mod api;
mod connections;
mod dnat;
mod failing;
mod figures;
mod files;
mod kernel;
mod machine;
mod proxies;
mod reaction;
mod report;
mod served;
mod tables;
mod world;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};

use crate::{connections::Effort, machine::Machine, report::Report};

/// Measures what Portolan costs and how fast it is, side by side with what would stand in its place, and writes a report (needs root).
///
/// Arms take turns, round after round, so that whatever else this machine does hits all of them; ratios are between arms of the same round. Nothing is sent
/// anywhere but into network namespaces that the benchmark makes.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
struct Options {
    /// Only these parts
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<WeightedGroup>,
    /// Few rounds and small tables, under a minute: shows that every arm runs, not how fast anything is
    #[arg(long)]
    quick: bool,
    /// Rounds; in each, every arm has its turn
    #[arg(long, default_value_t = 21, value_parser = clap::value_parser!(u16).range(10..))]
    rounds: u16,
    /// Sizes of the tables
    #[arg(long, value_delimiter = ',', default_values_t = [1, 100, 1_000, 10_000])]
    services: Vec<u32>,
    /// Where the report goes
    #[arg(long, default_value = "bench-report")]
    report: PathBuf,
    /// Envoy's executable; without it, Envoy is listed as missing
    #[arg(long, value_name = "PATH")]
    envoy: Option<PathBuf>,
    /// Why there is none
    #[arg(long, hide = true, default_value = "no --envoy was given")]
    no_envoy: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum WeightedGroup {
    /// Connections, requests and datagrams, by arm and by size of the table; agents at rest
    Connections,
    /// Time inside the kernel's hooks
    Kernel,
    /// From objects to the kernel's maps
    Tables,
    /// An agent on an API server: from nothing, and one change
    Api,
    /// An endpoint dies, or many at once; an agent comes and goes
    Reaction,
    /// `plan` and `explain` on many files
    Files,
}

fn main() -> Result<()> {
    let options = Options::parse();
    portolan_tests::sweep_on_interrupt()?;
    let wanted = |part| options.only.is_empty() || options.only.contains(&part);
    let quick = options.quick;
    let services = if quick { vec![1, 100] } else { options.services.clone() };
    let effort = Effort {
        rounds: if quick { 2 } else { options.rounds.into() },
        connects: if quick { 100 } else { 2_000 },
        requests: if quick { 50 } else { 500 },
        bulk: if quick { 4 << 20 } else { 128 << 20 },
        services: services.clone(),
    };
    let envoy = options.envoy.as_deref();
    let mut report = Report::new(Machine::look(envoy), quick);
    // Written after each part: what was measured is not lost with a part that breaks off.
    let keep = |report: &mut Report| {
        report.judge();
        report.write(&options.report)
    };
    if wanted(WeightedGroup::Connections) {
        let measured = connections::run(&effort, envoy.ok_or(options.no_envoy.as_str()))?;
        report.arms = measured.arms;
        report.agents = agents::run(&measured.served, if quick { 1.0 } else { 10.0 })?;
        keep(&mut report)?;
        report.programs = kernel::programs(&measured.served[0].1, if quick { 50 } else { 20_000 })?;
        keep(&mut report)?;
    }
    if wanted(WeightedGroup::Kernel) {
        report.kernel = kernel::run(&services, if quick { 500 } else { 100_000 })?;
        keep(&mut report)?;
    }
    if wanted(WeightedGroup::Tables) {
        report.tables = tables::run(&services, if quick { 20 } else { 2_000 })?;
        keep(&mut report)?;
    }
    if wanted(WeightedGroup::Api) {
        let most = services.iter().copied().max().unwrap_or(1);
        report.on_api = Some(api::run(most, if quick { 20 } else { 2_000 })?);
        keep(&mut report)?;
    }
    if wanted(WeightedGroup::Reaction) {
        report.reaction = reaction::run(if quick { 1 } else { 10 }, envoy)?;
        keep(&mut report)?;
        report.failing = Some(failing::run(if quick { 20 } else { 1_000 })?);
        keep(&mut report)?;
        report.away = reaction::away(if quick { 3.0 } else { 12.0 })?;
        keep(&mut report)?;
    }
    if wanted(WeightedGroup::Files) {
        report.files = files::run(services.iter().copied().max().unwrap_or(1).max(10))?;
        keep(&mut report)?;
    }
    print!("{}", report.text());
    let wrong = report.not_finite();
    ensure!(wrong.is_empty(), "these did not run, or their figures are none: {}", wrong.join(", "));
    println!("\nthe report is in {}: report.md, report.json, index.html, and charts", options.report.display());
    Ok(())
}

/// Says what is done now.
fn progress(what: &str) {
    eprintln!("bench: {what}");
}
