//! An endpoint dies: how many requests it takes with it, and for how long. And an agent that comes and goes.

use std::{
    net::SocketAddr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use portolan_bench::task::{Measurement, Task};
use portolan_tests::{
    Bed, Directory,
    objects::{destination_rule, node},
};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use serde_json::json;

use crate::{
    figures::Median,
    progress,
    proxies::{self, CONNECT_TIMEOUT, ENVOY, FAILURES},
    served::dialled,
    world::{SERVICE, SERVICE_PORT, Worker, World, client},
};

const ENDPOINTS: [[u8; 4]; 2] = [[10, 0, 0, 3], [10, 0, 0, 4]];
/// Requests a second where connects hang: more could not hang at once.
pub(crate) const RATE: f64 = 1_000.0;
/// Requests a second where connects are refused: three failures are but a millisecond.
pub(crate) const REFUSED_RATE: f64 = 2_000.0;
/// Seconds before the endpoint dies, and in all.
const BEFORE: f64 = 0.8;
const SECONDS: f64 = 2.5;

/// How an endpoint dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Death {
    /// Its process ends: connects are refused.
    Refused,
    /// Its machine is silent: connects are not answered.
    Blackholed,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Reaction {
    pub(crate) who: &'static str,
    pub(crate) death: Death,
    /// Requests that failed.
    pub(crate) failed: Median,
    /// Milliseconds from the death to the beginning of the last request that failed.
    pub(crate) last: Median,
    /// Requests that failed before anything died, in all: there should be none.
    pub(crate) before: usize,
    /// Milliseconds by which a request was begun too late, at the most.
    pub(crate) late: Median,
}

/// What came of one death.
struct Seen {
    /// Requests that failed before it.
    before: usize,
    failed: usize,
    last: f64,
    late: f64,
}

/// What came of an agent's coming and going.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Away {
    pub(crate) what: &'static str,
    pub(crate) requests: usize,
    pub(crate) failed: usize,
}

/// Each death so many times, for Portolan and for Envoy where there is one.
pub(crate) fn run(times: usize, envoy: Option<&Path>) -> Result<Vec<Reaction>> {
    let mut all = Vec::new();
    for death in [Death::Refused, Death::Blackholed] {
        let (mut portolan, mut of_envoy) = (Vec::new(), Vec::new());
        for time in 1..=times {
            progress(&format!("an endpoint dies ({death:?}), {time} of {times}"));
            portolan.push(once(death, None)?);
            if let Some(program) = envoy {
                of_envoy.push(once(death, Some(program))?);
            }
        }
        for (who, seen) in [("Portolan", portolan), ("Envoy", of_envoy)] {
            let before = seen.iter().map(|seen| seen.before).sum();
            let of = |figure: fn(&Seen) -> f64| Median::of(seen.iter().map(figure));
            let figures = of(|seen| seen.failed as f64).zip(of(|seen| seen.last)).zip(of(|seen| seen.late));
            all.extend(figures.map(|((failed, last), late)| Reaction { who, death, failed, last, late, before }));
        }
    }
    Ok(all)
}

/// A node with two endpoints, an agent with the rules that Envoy has as well, and their servers.
struct Stage {
    bed: Bed,
    directory: Directory,
    world: World,
    servers: Vec<Worker>,
}

impl Stage {
    fn new() -> Result<Self> {
        let world = World::new()?;
        let servers =
            ENDPOINTS.iter().map(|address| world.serve(&[*address], Some(address[3]))).collect::<Result<_>>()?;
        let bed = Bed::named("reaction")?;
        world.connect(&bed.namespace)?;
        let directory = Directory::new()?;
        let [service, slice] = dialled(SERVICE[3], &ENDPOINTS);
        let rule = json!({"trafficPolicy": {
            "connectionPool": {"tcp": {"connectTimeout": format!("{}ms", CONNECT_TIMEOUT.as_millis())}},
            "outlierDetection": {"consecutive5xxErrors": FAILURES, "interval": "10s", "baseEjectionTime": "30s", "maxEjectionPercent": 100}}});
        let name = service["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        directory.write("c1/all.yaml", &[node("node-0", "r0/z0"), service, slice, destination_rule(&name, &rule)])?;
        Ok(Self { bed, directory, world, servers })
    }
}

/// One of two endpoints dies.
fn once(death: Death, envoy: Option<&Path>) -> Result<Seen> {
    // Of those that hang there are as many as begin in a second.
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
    // Everything has been dialled once, and Envoy knows its endpoints.
    client.ask(&Task::Request { to, count: 20 })?;
    client.begin(&Task::Watch { to, rate, seconds: SECONDS, threads })?;
    pause(BEFORE);
    let at = now();
    match death {
        Death::Refused => stage.servers[1].kill(),
        Death::Blackholed => {
            let address = format!("{}/32", std::net::Ipv4Addr::from(ENDPOINTS[1]));
            // Nor is anybody told that it is gone, where this machine forwards packets.
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

/// An agent that is killed and started again while requests run; and one that is started with other sizes, which goes as an upgrade does.
pub(crate) fn away(seconds: f64) -> Result<Vec<Away>> {
    let stage = Stage::new()?;
    let to = SocketAddr::from((SERVICE, SERVICE_PORT));
    let mut agent = stage.bed.agent(&stage.directory, "c1", "node-0")?;
    let mut client = client(&stage.bed.namespace, Some(&stage.bed.cgroup))?;
    let mut all = Vec::new();
    for (what, more) in [
        ("killed and started again", &[][..]),
        ("replaced by one with other maps, as an upgrade does", &["--max-backends", "2000"][..]),
    ] {
        progress(&format!("an agent is {what}"));
        client.begin(&Task::Watch { to, rate: RATE, seconds, threads: 100 })?;
        let end = Instant::now() + Duration::from_secs_f64(seconds);
        let (mut turn, mut times) = (false, 0);
        while Instant::now() + Duration::from_secs(1) < end {
            agent.process.kill();
            turn = !turn;
            agent = stage.bed.agent_with(&stage.directory, "c1", "node-0", if turn { more } else { &[] })?;
            times += 1;
        }
        let answer: Measurement = client.answer()?;
        ensure!(times > 0, "the agent was not away");
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
