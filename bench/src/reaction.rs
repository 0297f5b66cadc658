//! Reaction to the death of an endpoint: failed requests, and time until the last one.
//! Also requests during agent restarts and upgrades.

use std::{
    net::SocketAddr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use portolan_bench::task::{Measurement, Task};
use portolan_tests::{
    Directory, TestBed,
    objects::{destination_rule, node},
};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use serde_json::json;

use crate::{
    figures::Median,
    progress,
    proxies::{self, CONNECT_TIMEOUT, ENVOY, FAILURES},
    served::dialed,
    world::{SERVICE, SERVICE_PORT, Worker, World, client},
};

const ENDPOINTS: [[u8; 4]; 2] = [[10, 0, 0, 3], [10, 0, 0, 4]];
/// Requests per second if connects hang. A higher rate would need more threads, since every request can hang.
pub(crate) const RATE: f64 = 1_000.0;
/// Requests per second if connects are refused: three failures take only a few milliseconds.
pub(crate) const REFUSED_RATE: f64 = 2_000.0;
/// Seconds of load before the endpoint dies.
const BEFORE: f64 = 0.8;
/// Seconds of load in total.
const SECONDS: f64 = 2.5;

/// How an endpoint dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Death {
    /// Its process exits, and connects are refused.
    Refused,
    /// Its machine drops packets, and connects time out.
    Blackholed,
}

/// Figures for one balancer and one kind of death, over all repetitions.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Reaction {
    pub(crate) who: &'static str,
    pub(crate) death: Death,
    /// Requests that failed after the death.
    pub(crate) failed: Median,
    /// Milliseconds from the death to the start of the last request that failed.
    pub(crate) last: Median,
    /// Requests that failed before the death, over all repetitions; expected to be 0.
    pub(crate) before: usize,
    /// Largest delay of a request behind its scheduled start, in milliseconds.
    pub(crate) late: Median,
}

/// Figures of one repetition.
struct Seen {
    /// Requests that failed before the death.
    before: usize,
    failed: usize,
    last: f64,
    late: f64,
}

/// Requests that were made while the agent was restarted over and over.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Away {
    pub(crate) what: &'static str,
    pub(crate) requests: usize,
    pub(crate) failed: usize,
}

/// Repeats each kind of death `times` times, for Portolan and, if available, for Envoy.
pub(crate) fn run(times: usize, envoy: Option<&Path>) -> Result<Vec<Reaction>> {
    let mut all = Vec::new();
    for death in [Death::Refused, Death::Blackholed] {
        let (mut portolan, mut envoy_runs) = (Vec::new(), Vec::new());
        for time in 1..=times {
            progress(&format!("an endpoint dies ({death:?}), {time} of {times}"));
            portolan.push(once(death, None)?);
            if let Some(program) = envoy {
                envoy_runs.push(once(death, Some(program))?);
            }
        }
        for (who, seen) in [("Portolan", portolan), ("Envoy", envoy_runs)] {
            let before = seen.iter().map(|seen| seen.before).sum();
            let of = |figure: fn(&Seen) -> f64| Median::of(seen.iter().map(figure));
            let figures = of(|seen| seen.failed as f64).zip(of(|seen| seen.last)).zip(of(|seen| seen.late));
            all.extend(figures.map(|((failed, last), late)| Reaction { who, death, failed, last, late, before }));
        }
    }
    Ok(all)
}

/// A node, two servers as endpoints, and outlier detection rules equal to Envoy's configuration.
struct Stage {
    bed: TestBed,
    directory: Directory,
    world: World,
    servers: Vec<Worker>,
}

impl Stage {
    fn new() -> Result<Self> {
        let world = World::new()?;
        let servers =
            ENDPOINTS.iter().map(|address| world.serve(&[*address], Some(address[3]))).collect::<Result<_>>()?;
        let bed = TestBed::named("reaction")?;
        world.connect(&bed.namespace)?;
        let directory = Directory::new()?;
        let [service, slice] = dialed(SERVICE[3], &ENDPOINTS);
        let rule = json!({"trafficPolicy": {
            "connectionPool": {"tcp": {"connectTimeout": format!("{}ms", CONNECT_TIMEOUT.as_millis())}},
            "outlierDetection": {"consecutive5xxErrors": FAILURES, "interval": "10s", "baseEjectionTime": "30s", "maxEjectionPercent": 100}}});
        let name = service["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        directory.write("c1/all.yaml", &[node("node-0", "r0/z0"), service, slice, destination_rule(&name, &rule)])?;
        Ok(Self { bed, directory, world, servers })
    }
}

/// Runs load against two endpoints, one of which dies.
fn once(death: Death, envoy: Option<&Path>) -> Result<Seen> {
    // Every request can hang, so there are enough threads for those that start within about a second.
    let (rate, threads) = if death == Death::Refused { (REFUSED_RATE, 100) } else { (RATE, 1_200) };
    let mut stage = Stage::new()?;
    let (mut agent, mut proxy) = (None, None);
    let (mut client, to) = match envoy {
        None => {
            agent = Some(stage.bed.agent(&stage.directory, "c1", "node-0")?);
            (client(&stage.bed.namespace, Some(&stage.bed.cgroup))?, SocketAddr::from((SERVICE, SERVICE_PORT)))
        }
        Some(program) => {
            proxy = Some(proxies::envoy(&stage.bed.namespace, program, &ENDPOINTS)?);
            (client(&stage.bed.namespace, None)?, SocketAddr::from(([127, 0, 0, 1], ENVOY)))
        }
    };
    // Warm up: every endpoint is dialed once, and Envoy has its endpoints.
    client.ask(&Task::Request { to, count: 20 })?;
    client.begin(&Task::Watch { to, rate, seconds: SECONDS, threads })?;
    pause(BEFORE);
    let at = now();
    match death {
        Death::Refused => stage.servers[1].kill(),
        Death::Blackholed => {
            let address = format!("{}/32", std::net::Ipv4Addr::from(ENDPOINTS[1]));
            // The blackhole route drops packets silently. Without it, a kernel that forwards could answer with ICMP.
            stage.world.namespace.ip(&["route", "add", "blackhole", &address])?;
            stage.world.namespace.ip(&["address", "delete", &address, "dev", "lo"])?;
        }
    }
    let answer = client.answer()?;
    drop((agent, proxy));
    let failed = || answer.watched.iter().filter(|one| one.answer.is_none());
    let last = failed().map(|one| one.began.saturating_sub(at)).max().unwrap_or(0);
    let late = answer.watched.iter().map(|one| one.late).max().unwrap_or(0);
    let before = failed().filter(|one| one.began + one.took < at).count();
    Ok(Seen { before, failed: failed().count() - before, last: last as f64 / 1e6, late: late as f64 / 1e6 })
}

/// Restarts an agent over and over while requests run.
///
/// The second series alternates between map sizes, which takes the same path as an upgrade.
pub(crate) fn away(seconds: f64) -> Result<Vec<Away>> {
    let stage = Stage::new()?;
    let to = SocketAddr::from((SERVICE, SERVICE_PORT));
    let mut agent = stage.bed.agent(&stage.directory, "c1", "node-0")?;
    let mut client = client(&stage.bed.namespace, Some(&stage.bed.cgroup))?;
    let mut all = Vec::new();
    for (what, more) in [
        ("killed and restarted", &[][..]),
        ("replaced with new maps, as in an upgrade", &["--max-backends", "2000"][..]),
    ] {
        progress(&format!("requests while the agent is {what}"));
        client.begin(&Task::Watch { to, rate: RATE, seconds, threads: 100 })?;
        let end = Instant::now() + Duration::from_secs_f64(seconds);
        let (mut alternate, mut times) = (false, 0);
        while Instant::now() + Duration::from_secs(1) < end {
            agent.process.kill();
            alternate = !alternate;
            agent = stage.bed.agent_with(&stage.directory, "c1", "node-0", if alternate { more } else { &[] })?;
            times += 1;
        }
        let answer: Measurement = client.answer()?;
        ensure!(times > 0, "the agent was never restarted: the run is too short");
        let failed = answer.watched.iter().filter(|one| one.answer.is_none()).count();
        all.push(Away { what, requests: answer.count, failed });
    }
    Ok(all)
}

fn pause(seconds: f64) {
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        thread::park_timeout(left);
    }
}

fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}
