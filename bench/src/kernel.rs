//! What the programs take inside the kernel, by its own count, whatever the number of services.

use std::{fs, net::SocketAddr};

use anyhow::{Context as _, Result, ensure};
use portolan::table::{Sizes, Table};
use portolan_tests::{
    Bed, Foreign, Place,
    direct::{Direct, table},
    storm::{Load, Servers},
};
use serde::Serialize;

use crate::{progress, served::bpftool};

const ENDPOINTS: u32 = 10;
const SETTING: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Mean nanoseconds, by the kernel's own count.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct InKernel {
    pub(crate) services: u32,
    pub(crate) endpoints: u32,
    /// connect4 where a Service is dialled.
    pub(crate) hit: f64,
    /// connect4 where something else is dialled.
    pub(crate) miss: f64,
    /// sock_ops, each of its events, where a Service is dialled.
    pub(crate) outcome: f64,
    /// A program that does nothing: what the counting itself takes, and is in all the others.
    pub(crate) nothing: f64,
}

/// With each number of services so many connections, over all of them in turn.
pub(crate) fn run(services: &[u32], connections: u64) -> Result<Vec<InKernel>> {
    let measured = |services: &u32| {
        progress(&format!("in the kernel, {services} services"));
        measure(*services, connections)
    };
    services.iter().map(measured).collect()
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

fn measure(count: u32, connections: u64) -> Result<InKernel> {
    let bed = Bed::named("pick")?;
    // All of 10.0.0.0/8 is this node's own, and one server listens on all of it.
    bed.namespace.ip(&["route", "add", "local", "10.0.0.0/8", "dev", "lo"])?;
    let everywhere = SocketAddr::from(([0, 0, 0, 0], 9080));
    let _server = Servers::start(Place { namespace: Some(&bed.namespace), cgroup: None }, &[(everywhere, 0, 0)])?;
    let (frontends, table) = services(count);
    // Before Portolan: what runs first pays for what is in no cache.
    let nothing = Foreign::attach(&bed.cgroup)?;
    let mut direct = Direct::new(&bed, Sizes::default())?;
    direct.publish(&table)?;
    let before = fs::read_to_string(SETTING)?;
    fs::write(SETTING, "1")?;
    let measured = (|| {
        let dial = |to: &[SocketAddr]| -> Result<()> {
            let load = Load::start(bed.place(), to, connections, None)?;
            let summary = load.finish()?;
            ensure!(summary.bad == 0 && summary.good == connections, "{summary:?}");
            Ok(())
        };
        let start = counted(&bed)?;
        dial(&frontends)?;
        let hits = counted(&bed)?;
        dial(&[SocketAddr::from(([10, 0, 0, 1], 9080))])?;
        let misses = counted(&bed)?;
        let (spent, runs) = nothing.counted()?;
        let mean = |from: (u64, u64), to: (u64, u64)| (to.0 - from.0) as f64 / (to.1 - from.1).max(1) as f64;
        Ok(InKernel {
            services: count,
            endpoints: count * ENDPOINTS,
            hit: mean(start[0], hits[0]),
            miss: mean(hits[0], misses[0]),
            outcome: mean(start[1], hits[1]),
            nothing: spent as f64 / runs.max(1) as f64,
        })
    })();
    fs::write(SETTING, before)?;
    measured
}

/// Nanoseconds and runs so far, of connect4 and of sock_ops.
fn counted(bed: &Bed) -> Result<[(u64, u64); 2]> {
    let of = |name: &str| -> Result<(u64, u64)> {
        let link = bpftool(&["link", "show", "pinned"], bed.pins().join("links").join(name).as_os_str())?;
        let id = link["prog_id"].as_u64().context("no program in the link")?;
        let program = bpftool(&["prog", "show", "id"], id.to_string().as_ref())?;
        let field = |name: &str| program[name].as_u64().unwrap_or(0);
        Ok((field("run_time_ns"), field("run_cnt")))
    };
    Ok([of("connect4")?, of("sock_ops")?])
}
