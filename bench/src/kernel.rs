//! What the programs take inside the kernel, by its own count, whatever the number of services.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use portolan_bench::task::Task;
use portolan_core::table::{Sizes, Table};
use portolan_tests::{
    Bed, Counting, Foreign, Place,
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

/// Mean nanoseconds, by the kernel's own count.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct InKernel {
    pub(crate) services: u32,
    pub(crate) endpoints: u32,
    /// Threads that dial at once.
    pub(crate) threads: usize,
    /// connect4 where a Service is dialled.
    pub(crate) hit: f64,
    /// connect4 where something else is dialled.
    pub(crate) miss: f64,
    /// sock_ops, each of its events, where a Service is dialled.
    pub(crate) outcome: f64,
    /// A program that does nothing: what the counting itself takes, and is in all the others.
    pub(crate) nothing: f64,
}

/// One program, by the kernel's own count.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Program {
    pub(crate) program: &'static str,
    /// How often it ran.
    pub(crate) runs: u64,
    /// Mean nanoseconds.
    pub(crate) mean: f64,
}

/// Programs that run on requests and datagrams; getpeername takes a call of its own.
const PROGRAMS: [&str; 4] = ["connect4", "sock_ops", "sendmsg4", "recvmsg4"];

/// So many connections each: one service with 1, 2 and more threads, which share its cursor; and more services, over all of them in turn.
pub(crate) fn run(services: &[u32], connections: u64) -> Result<Vec<InKernel>> {
    let of_one = [1, 2, 4].map(|threads| (1, threads));
    let of_more = services.iter().filter(|services| **services > 1).map(|services| (*services, 4));
    let measured = |(services, threads)| {
        progress(&format!("in the kernel, {services} services, {threads} threads"));
        measure(services, threads, connections)
    };
    of_one.into_iter().chain(of_more).map(measured).collect()
}

/// What each program takes on so many requests and datagrams to a service of this node.
pub(crate) fn programs(node: &ActiveEndpoints, count: usize) -> Result<Vec<Program>> {
    progress("in the kernel, program by program");
    let bed = &node.bed;
    let mut client = client(&bed.namespace, Some(&bed.cgroup))?;
    let _counting = Counting::begin()?;
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

/// So many services, each with ten endpoints of its own.
fn services(count: u32) -> (Vec<SocketAddr>, Table) {
    let frontend = |i: u32| SocketAddr::from(([172, 16 + (i >> 16) as u8, (i >> 8) as u8, i as u8], 80));
    let endpoint = |i: u32| SocketAddr::from(([10, 1 + (i >> 16) as u8, (i >> 8) as u8, i as u8], 9080));
    let frontends: Vec<SocketAddr> = (0..count).map(frontend).collect();
    let all = (0..count).map(|i| (frontend(i), (0..ENDPOINTS).map(|e| endpoint(i * ENDPOINTS + e)).collect()));
    let table = table(all);
    (frontends, table)
}

fn measure(count: u32, threads: usize, connections: u64) -> Result<InKernel> {
    let bed = Bed::named("kernel")?;
    // All of 10.0.0.0/8 is this node's own, and one server listens on all of it.
    bed.namespace.ip(&["route", "add", "local", "10.0.0.0/8", "dev", "lo"])?;
    let everywhere = SocketAddr::from(([0, 0, 0, 0], 9080));
    let _server = Servers::start(Place { namespace: Some(&bed.namespace), cgroup: None }, &[(everywhere, 0, 0)])?;
    let (frontends, table) = services(count);
    // Before Portolan: what runs first pays for what is in no cache.
    let nothing = Foreign::attach(&bed.cgroup)?;
    let mut direct = Direct::new(&bed, Sizes::default())?;
    direct.publish(&table)?;
    let _counting = Counting::begin()?;
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

/// Nanoseconds and runs of a program so far.
fn counted(bed: &Bed, name: &str) -> Result<(u64, u64)> {
    let link = bpftool(&["link", "show", "pinned"], bed.pins().join("links").join(name).as_os_str())?;
    let id = link["prog_id"].as_u64().context("no program in the link")?;
    let program = bpftool(&["prog", "show", "id"], id.to_string().as_ref())?;
    let field = |name: &str| program[name].as_u64().unwrap_or(0);
    Ok((field("run_time_ns"), field("run_cnt")))
}
