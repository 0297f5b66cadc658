//! Run time of the eBPF programs by the kernel's own statistics, for several numbers of Services.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use portolan_bench::task::Task;
use portolan_core::table::{Sizes, Table};
use portolan_tests::{
    CountingServer, Foreign, ForeignProgram, ProcessContext, TestBed,
    direct::{Direct, table},
    storm::{Load, Servers},
};
use serde::Serialize;

use crate::{
    progress,
    served::{ActiveEndpoints, bpftool},
    world::{SERVICE, SERVICE_PORT, client},
};

const ENDPOINTS: u32 = 10;

/// Mean run time of the programs in nanoseconds, from the kernel's statistics (`BPF_STATS_RUN_TIME`).
#[derive(Clone, Debug, Serialize)]
pub(crate) struct InKernel {
    pub(crate) services: u32,
    pub(crate) endpoints: u32,
    /// Threads that dial concurrently.
    pub(crate) threads: usize,
    /// `connect4` for a connect to a Service address.
    pub(crate) hit: f64,
    /// `connect4` for a connect to any other address.
    pub(crate) miss: f64,
    /// `sock_ops`, per event, for connections to a Service address.
    pub(crate) outcome: f64,
    /// An empty program: the overhead of the statistics, which is included in all other figures.
    pub(crate) nothing: f64,
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
const PROGRAMS: [&str; 4] = ["connect4", "sock_ops", "sendmsg4", "recvmsg4"];

/// Measures every combination with this many connections.
///
/// One Service is dialed by 1, 2 and 4 threads, which share its cursor. Larger tables are dialed in turn by 4 threads.
pub(crate) fn run(services: &[u32], connections: u64) -> Result<Vec<InKernel>> {
    let single_service = [1, 2, 4].map(|threads| (1, threads));
    let larger_tables = services.iter().filter(|services| **services > 1).map(|services| (*services, 4));
    let measured = |(services, threads)| {
        progress(&format!("in the kernel, {services} services, {threads} threads"));
        measure(services, threads, connections)
    };
    single_service.into_iter().chain(larger_tables).map(measured).collect()
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

fn measure(count: u32, threads: usize, connections: u64) -> Result<InKernel> {
    let bed = TestBed::named("kernel")?;
    // One server listens on all of 10.0.0.0/8, which is local to the node.
    bed.namespace.ip(&["route", "add", "local", "10.0.0.0/8", "dev", "lo"])?;
    let everywhere = SocketAddr::from(([0, 0, 0, 0], 9080));
    let _server =
        Servers::start(ProcessContext { namespace: Some(&bed.namespace), cgroup: None }, &[(everywhere, 0, 0)])?;
    let (frontends, table) = services(count);
    // Attached before Portolan, because the program that runs first pays for cold caches.
    let nothing = ForeignProgram::attach(&bed.cgroup, Foreign::Allow)?;
    let mut direct = Direct::new(&bed, Sizes::default())?;
    direct.publish(&table)?;
    let _counting = CountingServer::begin()?;
    let dial = |to: &[SocketAddr]| -> Result<()> {
        let summary = Load::start_with(bed.place(), to, connections, None, threads)?.finish()?;
        ensure!(summary.bad == 0 && summary.good == connections, "{summary:?}");
        Ok(())
    };
    let (start, outcomes) = (counted(&bed, "connect4")?, counted(&bed, "sock_ops")?);
    dial(&frontends)?;
    let (hits, outcomes_of_hits) = (counted(&bed, "connect4")?, counted(&bed, "sock_ops")?);
    dial(&[SocketAddr::from(([10, 0, 0, 1], 9080))])?;
    let misses = counted(&bed, "connect4")?;
    Ok(InKernel {
        services: count,
        endpoints: count * ENDPOINTS,
        threads,
        hit: mean(start, hits),
        miss: mean(hits, misses),
        outcome: mean(outcomes, outcomes_of_hits),
        nothing: mean((0, 0), nothing.counted()?),
    })
}

/// Returns the total run time in nanoseconds and the number of runs of a pinned program.
fn counted(bed: &TestBed, name: &str) -> Result<(u64, u64)> {
    let link = bpftool(&["link", "show", "pinned"], bed.pins().join("links").join(name).as_os_str())?;
    let id = link["prog_id"].as_u64().context("bpftool reports no program for the link")?;
    let program = bpftool(&["prog", "show", "id"], id.to_string().as_ref())?;
    let field = |name: &str| program[name].as_u64().unwrap_or(0);
    Ok((field("run_time_ns"), field("run_cnt")))
}
