//! Run time of the eBPF programs by the kernel's own statistics, for several numbers of Services.

use std::net::{SocketAddr, SocketAddrV4};

use anyhow::{Context as _, Result, bail};
use portolan_bench::task::Task;
use portolan_core::table::{Sizes, Table};
use portolan_datapath::floor::Floor;
use portolan_tests::{
    Cgroup, CountingServer, Foreign, ForeignProgram, TestBed,
    direct::{Direct, table},
};
use serde::Serialize;

use crate::{
    figures::Median,
    progress,
    served::{ActiveEndpoints, bpftool},
    world::{SERVICE, SERVICE_PORT, Worker, client, client_on, last_cpu, serve_on},
};

/// Endpoints of each Service. Most Services have few, whose turns are beside the frontend.
const FEW: u32 = 4;
const MANY: u32 = 10;

/// Run time of the programs in nanoseconds, from the kernel's statistics (`BPF_STATS_RUN_TIME`).
///
/// Each figure is the median over the rounds of the mean of a round, without the time that the statistics take:
/// that of an empty program in the same round.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct InKernel {
    pub(crate) services: u32,
    pub(crate) endpoints: u32,
    /// Clients that dial at the same time, each on a CPU of its own.
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
    /// All programs together, for one connection to a Service address with one request, from connect to close.
    pub(crate) connection: Median,
    /// The same with the client and the server on one CPU, so that no cache line moves between two.
    pub(crate) connection_on_one_cpu: Median,
    /// How often the programs run for such a connection.
    pub(crate) connection_runs: Median,
    /// An empty program: the overhead of the statistics for each run, which no other figure includes.
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
/// One Service is dialed by each of these numbers of clients, which share its cursor. Larger tables are dialed in turn by
/// one client.
pub(crate) fn run(services: &[u32], threads: &[usize], rounds: usize, connections: u64) -> Result<Vec<InKernel>> {
    let single_service = threads.iter().map(|threads| (1, MANY, *threads));
    let larger_tables = services.iter().filter(|services| **services > 1);
    let larger_tables = larger_tables.flat_map(|services| [(*services, FEW, 1), (*services, MANY, 1)]);
    let measured = |(services, each, threads)| {
        progress(&format!("in the kernel, {services} services of {each} endpoints, {threads} threads"));
        measure(services, each, threads, rounds, connections)
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

pub(crate) fn mean(from: (u64, u64), to: (u64, u64)) -> f64 {
    (to.0 - from.0) as f64 / (to.1 - from.1).max(1) as f64
}

/// Returns the frontends of `count` Services, and a table in which each has `each` endpoints of its own, at this port.
fn services(count: u32, each: u32, port: u16) -> (Vec<SocketAddr>, Table) {
    let frontend = |i: u32| SocketAddr::from(([172, 16 + (i >> 16) as u8, (i >> 8) as u8, i as u8], 80));
    let endpoint = |i: u32| SocketAddr::from(([10, 1 + (i >> 16) as u8, (i >> 8) as u8, i as u8], port));
    let frontends: Vec<SocketAddr> = (0..count).map(frontend).collect();
    let all = (0..count).map(|i| (frontend(i), (0..each).map(|e| endpoint(i * MANY + e)).collect()));
    let table = table(all);
    (frontends, table)
}

/// Connections of one task: fewer than fit into the server's queue.
pub(crate) const AT_ONCE: usize = 4_000;
/// The first port of the server; the third one is [`QUIET`].
pub(crate) const FIRST: u16 = 9078;
/// The port whose connections the server does not accept until it is asked to, so that no wakeup disturbs the client.
pub(crate) const QUIET: u16 = FIRST + 2;

/// Returns the path of a container's cgroup, as the kubelet names it, below the cgroup of all pods.
pub(crate) fn container(pod: usize) -> String {
    format!("kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{pod}.slice/cri-{pod}.scope")
}

/// A node without an agent, all of whose 10.0.0.0/8 one server serves.
pub(crate) struct Node {
    // Detached in this order: programs before their cgroup is removed.
    pub(crate) nothing: ForeignProgram,
    pub(crate) clients: Vec<Worker>,
    pub(crate) server: Worker,
    /// Where a container's cgroup is on a cluster's node, below the served one.
    pub(crate) pod: Cgroup,
    pub(crate) bed: TestBed,
    /// The next address that is dialed.
    next: usize,
}

impl Node {
    pub(crate) fn new(name: &str, threads: usize) -> Result<Self> {
        let bed = TestBed::named(name)?;
        bed.namespace.ip(&["route", "add", "local", "10.0.0.0/8", "dev", "lo"])?;
        let server = serve_on(&bed.namespace, SocketAddr::from(([0, 0, 0, 0], FIRST)))?;
        // Attached first, because the program that runs first pays for cold caches.
        let nothing = ForeignProgram::attach(&bed.cgroup, Foreign::Allow)?;
        let pod = bed.cgroup.make_inside(&container(0))?;
        let clients = (0..threads).map(|cpu| client_on(cpu, &bed.namespace, &pod)).collect::<Result<_>>()?;
        Ok(Self { nothing, clients, server, pod, bed, next: 0 })
    }

    /// Connects to these addresses in turn, this often with all clients together.
    fn dial(&mut self, to: &[SocketAddr], connections: u64) -> Result<()> {
        let mut left = usize::try_from(connections)?;
        while left > 0 {
            let count = left.min(AT_ONCE) / self.clients.len();
            for client in &mut self.clients {
                client.begin(&Task::ConnectEach { to: to.to_vec(), first: self.next, count })?;
                self.next += count;
                left = left.saturating_sub(count.max(1));
            }
            for client in &mut self.clients {
                client.answer()?;
            }
            self.server.ask(&Task::Empty)?;
        }
        Ok(())
    }

    /// Dials these addresses in turn, and returns what a program took for each of its runs.
    fn cost(
        &mut self,
        to: &[SocketAddr],
        connections: u64,
        mut counted: impl FnMut(&Self) -> Result<(u64, u64)>,
    ) -> Result<Cost> {
        let (before, nothing_before) = (counted(self)?, self.nothing.counted()?);
        self.dial(to, connections)?;
        let nothing = mean(nothing_before, self.nothing.counted()?);
        Ok(Cost { net: mean(before, counted(self)?) - nothing, nothing })
    }

    /// Makes this many requests from the first client, to these addresses in turn, each on a connection of its own.
    fn request(&mut self, to: &[SocketAddr], count: u64) -> Result<()> {
        let count = usize::try_from(count)?;
        self.clients[0].ask(&Task::RequestEach { to: to.to_vec(), first: self.next, count })?;
        self.next += count;
        Ok(())
    }

    /// Returns the run time of all programs for each of this many requests, without that of the statistics, and their
    /// number of runs.
    fn cost_of_requests(&mut self, to: &[SocketAddr], count: u64) -> Result<[f64; 2]> {
        let all = |bed: &TestBed| HOOKS.map(|name| counted(bed, name)).into_iter().collect::<Result<Vec<_>>>();
        let (before, nothing_before) = (all(&self.bed)?, self.nothing.counted()?);
        self.request(to, count)?;
        let nothing = mean(nothing_before, self.nothing.counted()?);
        let (mut net, mut runs) = (0.0, 0.0);
        for (before, after) in before.iter().zip(all(&self.bed)?) {
            let of_hook = (after.1 - before.1) as f64;
            net += (after.0 - before.0) as f64 - nothing * of_hook;
            runs += of_hook;
        }
        Ok([net, runs].map(|sum| sum / count as f64))
    }
}

/// The mean run time of a program, without that of an empty program in the same calls.
struct Cost {
    net: f64,
    nothing: f64,
}

/// The figures of one round.
struct Round {
    hit: f64,
    miss: f64,
    floor_hit: f64,
    floor_miss: f64,
    nothing: f64,
}

fn measure(count: u32, each: u32, threads: usize, rounds: usize, connections: u64) -> Result<InKernel> {
    let (frontends, table) = services(count, each, QUIET);
    let (mut ours, mut theirs) = (Node::new("kernel", threads)?, Node::new("floor", threads)?);
    // Room for two tables: the second one is written before the first one is freed.
    let sizes =
        Sizes { frontends: (1 << 14).max(count * 2), backends: (1 << 17).max(count * each * 3), ..Sizes::default() };
    let mut direct = Direct::new(&ours.bed, sizes)?;
    direct.publish(&table)?;
    let endpoint = |i: usize| SocketAddr::from(([10, 1, (i >> 8) as u8, i as u8], QUIET));
    let pairs = frontends.iter().enumerate().map(|(i, frontend)| Ok((v4(*frontend)?, v4(endpoint(i))?)));
    let mut floor = Floor::attach(theirs.bed.cgroup.path(), &pairs.collect::<Result<Vec<_>>>()?)?;
    let direct_address = [SocketAddr::from(([10, 0, 0, 1], QUIET))];
    let _counting = CountingServer::begin()?;
    // Every service once, so that no round pays for the first use of its memory.
    let warm = u64::from(count).max(1_000);
    ours.dial(&frontends, warm)?;
    theirs.dial(&frontends, warm)?;
    let mut all = Vec::new();
    for _ in 0..rounds {
        let hit = ours.cost(&frontends, connections, |node| counted(&node.bed, HOOKS[0]))?;
        let miss = ours.cost(&direct_address, connections, |node| counted(&node.bed, HOOKS[0]))?;
        let floor_hit = theirs.cost(&frontends, connections, |_| Ok(floor.counted()?))?;
        let floor_miss = theirs.cost(&direct_address, connections, |_| Ok(floor.counted()?))?;
        all.push(Round {
            hit: hit.net,
            miss: miss.net,
            floor_hit: floor_hit.net,
            floor_miss: floor_miss.net,
            nothing: hit.nothing,
        });
    }
    // The same services, with a server that answers.
    direct.publish(&services(count, each, FIRST).1)?;
    direct.reclaim()?;
    ours.request(&frontends, u64::from(count))?;
    let mut with_requests = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        for (cpu, costs) in [last_cpu(), 0].into_iter().zip(&mut with_requests) {
            ours.server.move_to(cpu)?;
            costs.push(ours.cost_of_requests(&frontends, connections / 4)?);
        }
    }
    let of = |costs: &[[f64; 2]], i: usize| Median::of(costs.iter().map(|cost| cost[i])).context("no rounds");
    let [on_two_cpus, on_one_cpu] = with_requests;
    let median = |of: fn(&Round) -> f64| Median::of(all.iter().map(of)).context("no rounds");
    Ok(InKernel {
        services: count,
        endpoints: count * each,
        threads,
        hit: median(|round| round.hit)?,
        miss: median(|round| round.miss)?,
        floor_hit: median(|round| round.floor_hit)?,
        floor_miss: median(|round| round.floor_miss)?,
        hit_to_floor: median(|round| round.hit / round.floor_hit)?,
        miss_to_floor: median(|round| round.miss / round.floor_miss)?,
        connection: of(&on_two_cpus, 0)?,
        connection_on_one_cpu: of(&on_one_cpu, 0)?,
        connection_runs: of(&on_one_cpu, 1)?,
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
pub(crate) fn counted(bed: &TestBed, name: &str) -> Result<(u64, u64)> {
    let link = bpftool(&["link", "show", "pinned"], bed.pins().join("links").join(name).as_os_str())?;
    let id = link["prog_id"].as_u64().context("bpftool reports no program for the link")?;
    let program = bpftool(&["prog", "show", "id"], id.to_string().as_ref())?;
    let field = |name: &str| program[name].as_u64().unwrap_or(0);
    Ok((field("run_time_ns"), field("run_cnt")))
}
