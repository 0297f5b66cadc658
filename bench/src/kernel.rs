//! Run time of the eBPF programs by the kernel's own statistics, for several numbers of Services.

use std::net::{SocketAddr, SocketAddrV4};

use anyhow::{Context as _, Result, bail, ensure};
use portolan_bench::task::Task;
use portolan_core::table::{Sizes, Table};
use portolan_datapath::floor::Floor;
use portolan_tests::{
    CountingServer, Foreign, ForeignProgram, ProcessContext, TestBed,
    direct::{Direct, table},
    storm::{Load, Servers},
};
use serde::Serialize;

use crate::{
    figures::Median,
    progress,
    served::{ActiveEndpoints, bpftool},
    world::{SERVICE, SERVICE_PORT, client},
};

const ENDPOINTS: u32 = 10;

/// Run time of the programs in nanoseconds, from the kernel's statistics (`BPF_STATS_RUN_TIME`).
///
/// Each figure is the median over the rounds of the mean of a round, without the time that the statistics take:
/// that of an empty program in the same round.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct InKernel {
    pub(crate) services: u32,
    pub(crate) endpoints: u32,
    /// Threads that dial concurrently.
    pub(crate) threads: usize,
    /// `connect4` for a connect to a Service address.
    pub(crate) hit: Median,
    /// `connect4` for a connect to any other address.
    pub(crate) miss: Median,
    /// The same for the floor: a minimal program with the same services.
    pub(crate) floor_hit: Median,
    pub(crate) floor_miss: Median,
    /// Ratios of the same rounds, Portolan to the floor.
    pub(crate) hit_to_floor: Median,
    pub(crate) miss_to_floor: Median,
    /// All programs together, for one connection to a Service address that carries one answer.
    pub(crate) connection: Median,
    /// An empty program: the overhead of the statistics, which no other figure includes.
    pub(crate) nothing: Median,
}

/// The kernel's statistics of one program.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Program {
    pub(crate) program: &'static str,
    /// Number of runs.
    pub(crate) runs: u64,
    /// Mean run time in nanoseconds.
    pub(crate) mean: f64,
}

/// The programs that requests and datagrams trigger. `getpeername4` needs an explicit call, so it is not measured.
const PROGRAMS: [&str; 5] = ["connect4", "sock_ops", "sock_release", "sendmsg4", "recvmsg4"];

/// Measures every combination, in this many rounds of this many connections.
///
/// One Service is dialed by each of these numbers of threads, which share its cursor. Larger tables are dialed in turn by
/// one thread.
pub(crate) fn run(services: &[u32], threads: &[usize], rounds: usize, connections: u64) -> Result<Vec<InKernel>> {
    let single_service = threads.iter().map(|threads| (1, *threads));
    let larger_tables = services.iter().filter(|services| **services > 1).map(|services| (*services, 1));
    let measured = |(services, threads)| {
        progress(&format!("in the kernel, {services} services, {threads} threads"));
        measure(services, threads, rounds, connections)
    };
    single_service.chain(larger_tables).map(measured).collect()
}

/// Measures each program on this many requests and datagrams to a Service of this node.
pub(crate) fn programs(node: &ActiveEndpoints, count: usize) -> Result<Vec<Program>> {
    progress("in the kernel, per program");
    let bed = &node.bed;
    let mut client = client(&bed.namespace, Some(&bed.cgroup))?;
    let _counting = CountingServer::begin()?;
    let before = PROGRAMS.map(|name| counted(bed, name));
    client.ask(&Task::Request { to: SocketAddr::from((SERVICE, SERVICE_PORT)), count })?;
    let to = SocketAddr::from((SERVICE, 53));
    client.ask(&Task::Datagrams { to, count, connected: false })?;
    client.ask(&Task::Datagrams { to, count, connected: true })?;
    let of = |(program, before): (&'static str, Result<(u64, u64)>)| {
        let (before, after) = (before?, counted(bed, program)?);
        Ok(Program { program, runs: after.1 - before.1, mean: mean(before, after) })
    };
    PROGRAMS.into_iter().zip(before).map(of).collect()
}

fn mean(from: (u64, u64), to: (u64, u64)) -> f64 {
    (to.0 - from.0) as f64 / (to.1 - from.1).max(1) as f64
}

/// Returns the frontends of `count` Services, and a table in which each has ten endpoints of its own.
fn services(count: u32) -> (Vec<SocketAddr>, Table) {
    let frontend = |i: u32| SocketAddr::from(([172, 16 + (i >> 16) as u8, (i >> 8) as u8, i as u8], 80));
    let endpoint = |i: u32| SocketAddr::from(([10, 1 + (i >> 16) as u8, (i >> 8) as u8, i as u8], 9080));
    let frontends: Vec<SocketAddr> = (0..count).map(frontend).collect();
    let all = (0..count).map(|i| (frontend(i), (0..ENDPOINTS).map(|e| endpoint(i * ENDPOINTS + e)).collect()));
    let table = table(all);
    (frontends, table)
}

/// A node without an agent, all of whose 10.0.0.0/8 one server serves.
struct Node {
    // Detached in this order: programs before their cgroup is removed.
    nothing: ForeignProgram,
    _server: Servers,
    bed: TestBed,
}

impl Node {
    fn new(name: &str) -> Result<Self> {
        let bed = TestBed::named(name)?;
        bed.namespace.ip(&["route", "add", "local", "10.0.0.0/8", "dev", "lo"])?;
        let everywhere = SocketAddr::from(([0, 0, 0, 0], 9080));
        let place = ProcessContext { namespace: Some(&bed.namespace), cgroup: None };
        let server = Servers::start(place, &[(everywhere, 0, 0)])?;
        // Attached first, because the program that runs first pays for cold caches.
        let nothing = ForeignProgram::attach(&bed.cgroup, Foreign::Allow)?;
        Ok(Self { nothing, _server: server, bed })
    }

    fn dial(&self, to: &[SocketAddr], connections: u64, threads: usize) -> Result<()> {
        let summary = Load::start_with(self.bed.place(), to, connections, None, threads)?.finish()?;
        ensure!(summary.bad == 0 && summary.good == connections, "{summary:?}");
        Ok(())
    }
}

/// The figures of one round.
struct Round {
    hit: f64,
    miss: f64,
    floor_hit: f64,
    floor_miss: f64,
    connection: f64,
    nothing: f64,
}

fn measure(count: u32, threads: usize, rounds: usize, connections: u64) -> Result<InKernel> {
    let (frontends, table) = services(count);
    let (ours, theirs) = (Node::new("kernel")?, Node::new("floor")?);
    let mut direct = Direct::new(&ours.bed, Sizes::default())?;
    direct.publish(&table)?;
    let endpoint = |i: usize| SocketAddr::from(([10, 1, (i >> 8) as u8, i as u8], 9080));
    let pairs = frontends.iter().enumerate().map(|(i, frontend)| Ok((v4(*frontend)?, v4(endpoint(i))?)));
    let mut floor = Floor::attach(theirs.bed.cgroup.path(), &pairs.collect::<Result<Vec<_>>>()?)?;
    let direct_address = [SocketAddr::from(([10, 0, 0, 1], 9080))];
    let _counting = CountingServer::begin()?;
    // Every service once, so that no round pays for the first use of its memory.
    let warm = u64::from(count).max(1_000);
    ours.dial(&frontends, warm, threads)?;
    theirs.dial(&frontends, warm, threads)?;
    let mut all = Vec::new();
    for _ in 0..rounds {
        let nothing_before = ours.nothing.counted()?;
        let before = HOOKS.map(|name| counted(&ours.bed, name));
        ours.dial(&frontends, connections, threads)?;
        let after = HOOKS.map(|name| counted(&ours.bed, name));
        ours.dial(&direct_address, connections, threads)?;
        let missed = counted(&ours.bed, HOOKS[0])?;
        let nothing = mean(nothing_before, ours.nothing.counted()?);
        let floor_before = floor.counted()?;
        theirs.dial(&frontends, connections, threads)?;
        let floor_after = floor.counted()?;
        theirs.dial(&direct_address, connections, threads)?;
        let floor_missed = floor.counted()?;
        let mut connection = 0.0;
        for (before, after) in before.iter().zip(&after) {
            let (Ok(before), Ok(after)) = (before, after) else { bail!("a program has no statistics") };
            connection += (after.0 - before.0) as f64 - nothing * (after.1 - before.1) as f64;
        }
        let (Ok(start), Ok(hits)) = (&before[0], &after[0]) else { bail!("connect4 has no statistics") };
        all.push(Round {
            hit: mean(*start, *hits) - nothing,
            miss: mean(*hits, missed) - nothing,
            floor_hit: mean(floor_before, floor_after) - nothing,
            floor_miss: mean(floor_after, floor_missed) - nothing,
            connection: connection / connections as f64,
            nothing,
        });
    }
    let median = |of: fn(&Round) -> f64| Median::of(all.iter().map(of)).context("no rounds");
    Ok(InKernel {
        services: count,
        endpoints: count * ENDPOINTS,
        threads,
        hit: median(|round| round.hit)?,
        miss: median(|round| round.miss)?,
        floor_hit: median(|round| round.floor_hit)?,
        floor_miss: median(|round| round.floor_miss)?,
        hit_to_floor: median(|round| round.hit / round.floor_hit)?,
        miss_to_floor: median(|round| round.miss / round.floor_miss)?,
        connection: median(|round| round.connection)?,
        nothing: median(|round| round.nothing)?,
    })
}

/// The programs that run for a TCP connection over IPv4.
const HOOKS: [&str; 3] = ["connect4", "sock_ops", "sock_release"];

fn v4(address: SocketAddr) -> Result<SocketAddrV4> {
    match address {
        SocketAddr::V4(address) => Ok(address),
        SocketAddr::V6(_) => bail!("{address} is not IPv4"),
    }
}

/// Returns the total run time in nanoseconds and the number of runs of a pinned program.
fn counted(bed: &TestBed, name: &str) -> Result<(u64, u64)> {
    let link = bpftool(&["link", "show", "pinned"], bed.pins().join("links").join(name).as_os_str())?;
    let id = link["prog_id"].as_u64().context("bpftool reports no program for the link")?;
    let program = bpftool(&["prog", "show", "id"], id.to_string().as_ref())?;
    let field = |name: &str| program[name].as_u64().unwrap_or(0);
    Ok((field("run_time_ns"), field("run_cnt")))
}
