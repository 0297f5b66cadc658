//! `cargo xtask bench`: measures the cost and speed of Portolan next to its alternatives, on one machine in one run.

mod agents;
mod api;
mod connections;
mod dnat;
mod failing;
mod figures;
mod files;
mod kernel;
mod machine;
mod paths;
mod proxies;
mod reaction;
mod report;
mod served;
mod tables;
mod world;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};

use crate::{
    connections::Effort,
    machine::Machine,
    report::{Baseline, Report},
};

/// Measures the cost and speed of Portolan next to its alternatives, and writes a report (needs root).
///
/// All arms run in every round, so unrelated load on the machine affects all of them alike.
/// Ratios compare arms of the same round.
/// All traffic stays inside network namespaces that the benchmark creates.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
struct Options {
    /// Run only these parts
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Smoke run, under a minute: few rounds and small tables. Shows that every arm runs; the figures mean nothing
    #[arg(long)]
    quick: bool,
    /// Number of rounds; every arm runs once per round
    #[arg(long, default_value_t = 21, value_parser = clap::value_parser!(u16).range(10..))]
    rounds: u16,
    /// Table sizes to measure, as numbers of Services
    #[arg(long, value_delimiter = ',', default_values_t = [1, 100, 1_000, 10_000], value_parser = clap::value_parser!(u32).range(1..=50_000))]
    services: Vec<u32>,
    /// Numbers of clients that dial one Service at the same time, for the run time of the programs. Default: 1, 2, 4… up to
    /// all CPUs
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=1_024))]
    threads: Vec<u16>,
    /// The report.json of an earlier run: says which figures are better or worse than there
    #[arg(long, value_name = "FILE", conflicts_with = "quick")]
    compare: Option<PathBuf>,
    /// Output directory for the report
    #[arg(long, default_value = "bench-report")]
    report: PathBuf,
    /// Path to the Envoy executable; if absent, the report lists Envoy as missing
    #[arg(long, value_name = "PATH")]
    envoy: Option<PathBuf>,
    /// Why --envoy is absent; shown in the report
    #[arg(long, hide = true, default_value = "--envoy was not given")]
    no_envoy: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Connections, requests and datagrams, by arm and table size; cost of idle agents
    Connections,
    /// Run time of the eBPF programs, by the kernel's own statistics
    Kernel,
    /// Compilation of objects into tables, and their publication in the BPF maps
    Tables,
    /// An agent that reads from an API server: initial sync, and propagation of single changes
    Api,
    /// Failure of one endpoint and of many at once; agent restarts and upgrades
    Reaction,
    /// Run time and memory of `plan` and `explain` on a large configuration directory
    Files,
}

fn main() -> Result<()> {
    let options = Options::parse();
    portolan_tests::cleanup_on_interrupt()?;
    let wanted = |part| options.only.is_empty() || options.only.contains(&part);
    let quick = options.quick;
    let mut services = if quick { vec![1, 100] } else { options.services.clone() };
    services.sort_unstable();
    services.dedup();
    let effort = Effort {
        rounds: if quick { 2 } else { options.rounds.into() },
        connects: if quick { 100 } else { 2_000 },
        requests: if quick { 50 } else { 500 },
        bulk: if quick { 4 << 20 } else { 128 << 20 },
        services: services.clone(),
    };
    let envoy = options.envoy.as_deref();
    let baseline = options.compare.as_deref().map(Baseline::read).transpose()?;
    let mut report = Report::new(Machine::look(envoy), quick, baseline);
    // Save after each part, so that a later failure does not discard earlier results.
    let save = |report: &mut Report| report.save(&options.report);
    if wanted(Part::Connections) {
        let measured = connections::run(&effort, envoy.ok_or(options.no_envoy.as_str()))?;
        report.arms = measured.arms;
        report.agents = agents::run(&measured.served, if quick { 1.0 } else { 10.0 })?;
        save(&mut report)?;
        report.programs = kernel::programs(&measured.served[0].1, if quick { 50 } else { 20_000 })?;
        save(&mut report)?;
    }
    if wanted(Part::Kernel) {
        let (rounds, connections) = if quick { (2, 500) } else { (effort.rounds, 20_000) };
        let threads = if options.threads.is_empty() {
            up_to_all_cpus()
        } else {
            options.threads.iter().copied().map(usize::from).collect()
        };
        report.kernel = kernel::run(&services, &threads, rounds, connections)?;
        save(&mut report)?;
        report.ways = paths::run(rounds, if quick { 500 } else { 8_000 })?;
        save(&mut report)?;
        report.loads = paths::loads()?;
        save(&mut report)?;
    }
    if wanted(Part::Tables) {
        report.tables = tables::run(&services, if quick { 20 } else { 2_000 })?;
        save(&mut report)?;
    }
    if wanted(Part::Api) {
        let most = services.iter().copied().max().unwrap_or(1);
        report.on_api = Some(api::run(most, if quick { 20 } else { 2_000 })?);
        save(&mut report)?;
    }
    if wanted(Part::Reaction) {
        report.reaction = reaction::run(if quick { 1 } else { 10 }, envoy)?;
        save(&mut report)?;
        report.failing = Some(failing::run(if quick { 20 } else { 1_000 })?);
        save(&mut report)?;
        report.away = reaction::away(if quick { 3.0 } else { 12.0 })?;
        save(&mut report)?;
    }
    if wanted(Part::Files) {
        report.files = files::run(services.iter().copied().max().unwrap_or(1).max(10))?;
        save(&mut report)?;
    }
    print!("{}", report.text());
    let invalid = report.not_finite();
    ensure!(invalid.is_empty(), "missing or invalid figures for: {}", invalid.join(", "));
    println!("\nreport written to {}: report.md, report.json, index.html and charts", options.report.display());
    Ok(())
}

/// Returns the powers of two up to the number of CPUs, and that number.
fn up_to_all_cpus() -> Vec<usize> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let mut all: Vec<usize> =
        std::iter::successors(Some(1), |count| Some(count * 2)).take_while(|it| *it < cpus).collect();
    all.push(cpus);
    all
}

/// Reports progress on stderr.
fn progress(what: &str) {
    eprintln!("bench: {what}");
}
