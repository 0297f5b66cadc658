//! What connect() costs through Portolan, beside connect() to the endpoint itself, in one run.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use portolan_tests::{
    Bed, Directory, Place, Process, binary,
    objects::{node, service, slice},
};

const SERVICE: &str = "172.16.0.10:80";
const ENDPOINT: &str = "10.0.0.1:9080";
/// The goal for the median.
const GOAL: f64 = 1.05;

struct Arm {
    name: &'static str,
    about: &'static str,
    to: &'static str,
    served: bool,
    /// p50 and p99 of each round, nanoseconds.
    rounds: Vec<(f64, f64)>,
}

pub(super) fn run(rounds: usize, connections: usize) -> Result<()> {
    let arms = measure(rounds, connections)?;
    println!("\nconnect(), {rounds} rounds of {connections} connections for each arm, in turn:");
    let direct = &arms[0];
    for arm in &arms {
        let (p50, p99) =
            (median(arm.rounds.iter().map(|round| round.0)), median(arm.rounds.iter().map(|round| round.1)));
        println!("  {:<9} p50 {:>6.2} µs  p99 {:>6.2} µs  {}", arm.name, p50 / 1e3, p99 / 1e3, arm.about);
    }
    for arm in &arms[1..] {
        let ratios = |of: fn(&(f64, f64)) -> f64| {
            arm.rounds.iter().zip(&direct.rounds).map(move |(a, b)| of(a) / of(b)).collect()
        };
        let (p50, p99): (Vec<f64>, Vec<f64>) = (ratios(|round| round.0), ratios(|round| round.1));
        let (low, high) = interval(&p50);
        println!(
            "  {:<9} / direct: p50 {:.3} (95 %: {low:.3} to {high:.3}), p99 {:.3}",
            arm.name,
            median(p50.iter().copied()),
            median(p99.iter().copied())
        );
        if arm.name == "hit" {
            let met = if median(p50.iter().copied()) <= GOAL { "met" } else { "not met" };
            println!("  goal: hit / direct p50 ≤ {GOAL}: {met}");
        }
    }
    Ok(())
}

/// Every arm runs, and every figure is one.
pub(super) fn smoke() -> Result<()> {
    for arm in measure(3, 100)? {
        ensure!(arm.rounds.len() == 3, "{} ran {} rounds", arm.name, arm.rounds.len());
        let sound = arm.rounds.iter().all(|(p50, p99)| p50.is_finite() && *p50 > 0.0 && p99 >= p50);
        ensure!(sound, "{}: {:?}", arm.name, arm.rounds);
    }
    Ok(())
}

fn measure(rounds: usize, connections: usize) -> Result<Vec<Arm>> {
    let bed = Bed::named("bench")?;
    bed.namespace.add_address("10.0.0.1/32")?;
    let directory = Directory::new()?;
    directory.write(
        "c1/all.yaml",
        &[node("n1", "r1/z1"), service("web", &["172.16.0.10"], 80), slice("web", 9080, &[("10.0.0.1", "n1", "")])],
    )?;
    let _agent = bed.agent(&directory, "c1", "n1")?;
    let mut server = Helper::start(&["--listen", ENDPOINT], Place { namespace: Some(&bed.namespace), cgroup: None })?;
    server.ask("empty")?;
    let mut inside = Helper::start(&["--cpu", "0"], bed.place())?;
    let mut outside = Helper::start(&["--cpu", "0"], Place { namespace: Some(&bed.namespace), cgroup: None })?;
    let arm = |name, about, to, served| Arm { name, about, to, served, rounds: Vec::new() };
    let mut arms = vec![
        arm("direct", "the endpoint's address, no program on the way", ENDPOINT, false),
        arm("miss", "the endpoint's address, past Portolan's programs", ENDPOINT, true),
        arm("hit", "the Service address, rewritten", SERVICE, true),
    ];
    // The first round warms up and does not count.
    for round in 0..=rounds {
        for arm in &mut arms {
            let client = if arm.served { &mut inside } else { &mut outside };
            let times = client.time(arm.to, connections)?;
            server.ask("empty")?;
            if round > 0 {
                arm.rounds.push((percentile(&times, 0.5), percentile(&times, 0.99)));
            }
        }
    }
    Ok(arms)
}

/// A process of the benchmark: one line in, one line out.
struct Helper {
    tasks: ChildStdin,
    replies: BufReader<ChildStdout>,
    _process: Process,
}

impl Helper {
    fn start(arguments: &[&str], place: Place<'_>) -> Result<Self> {
        let mut command = Command::new(binary("bench-connect")?);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::spawn(command, place)?;
        let tasks = process.child().stdin.take().context("no stdin")?;
        let replies = BufReader::new(process.child().stdout.take().context("no stdout")?);
        Ok(Self { tasks, replies, _process: process })
    }

    fn ask(&mut self, task: &str) -> Result<String> {
        writeln!(self.tasks, "{task}")?;
        let mut line = String::new();
        ensure!(self.replies.read_line(&mut line)? > 0, "bench-connect has ended");
        Ok(line)
    }

    /// Nanoseconds of each connect, sorted.
    fn time(&mut self, to: &str, count: usize) -> Result<Vec<f64>> {
        let line = self.ask(&format!("{to} {count}"))?;
        let mut times = line.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>()?;
        ensure!(times.len() == count, "{} of {count} connections", times.len());
        times.sort_by(f64::total_cmp);
        Ok(times)
    }
}

fn percentile(sorted: &[f64], part: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * part).round() as usize]
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    percentile(&values, 0.5)
}

/// The 95 % interval of the median, from the order of the values (binomial).
fn interval(values: &[f64]) -> (f64, f64) {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let (n, reach) = (values.len() as f64, 0.98 * (values.len() as f64).sqrt());
    let at = |position: f64| values[(position.max(0.0) as usize).min(values.len() - 1)];
    (at(n / 2.0 - reach), at(n / 2.0 + reach))
}
