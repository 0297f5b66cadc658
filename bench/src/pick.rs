//! What the programs take inside the kernel, by its own count, whatever the number of services.

use std::{fs, net::SocketAddr, process::Command};

use anyhow::{Context as _, Result, ensure};
use portolan::table::{Sizes, Table};
use portolan_tests::{
    Bed, Foreign, Place,
    direct::{Direct, table},
    storm::{Load, Servers},
};

const SERVICES: [u32; 3] = [1, 100, 10_000];
const ENDPOINTS: u32 = 10;
/// Goals for connect4: nanoseconds of a hit, socket state included, and of a miss.
const GOALS: (f64, f64) = (300.0, 100.0);
const SETTING: &str = "/proc/sys/kernel/bpf_stats_enabled";

pub(super) fn run(connections: u64) -> Result<()> {
    println!(
        "\nin the kernel, mean of {connections} connections over all services in turn, the counting itself included:"
    );
    println!(
        "  {:>8} {:>9} {:>14} {:>14} {:>14} {:>14}",
        "services", "endpoints", "connect4 hit", "connect4 miss", "sock_ops hit", "nothing"
    );
    let mut worst = (0.0f64, 0.0f64);
    for services in SERVICES {
        let [hit, miss, outcome, nothing] = measure(services, connections)?;
        println!(
            "  {services:>8} {:>9} {hit:>11.0} ns {miss:>11.0} ns {outcome:>11.0} ns {nothing:>11.0} ns",
            services * ENDPOINTS
        );
        worst = (worst.0.max(hit), worst.1.max(miss));
    }
    let met = |is: bool| if is { "met" } else { "not met" };
    println!(
        "  goals: a hit ≤ {} ns: {}; a miss ≤ {} ns: {}",
        GOALS.0,
        met(worst.0 <= GOALS.0),
        GOALS.1,
        met(worst.1 <= GOALS.1)
    );
    Ok(())
}

/// Every number of services works, and every figure is one.
pub(super) fn smoke() -> Result<()> {
    for services in SERVICES {
        let figures = measure(services, 500)?;
        ensure!(figures.iter().all(|figure| figure.is_finite() && *figure > 0.0), "{services} services: {figures:?}");
    }
    Ok(())
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

/// Mean nanoseconds of connect4 on a hit and on a miss, of sock_ops on a hit, and of a program that does nothing: what the counting itself takes.
fn measure(count: u32, connections: u64) -> Result<[f64; 4]> {
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
        Ok([
            mean(start[0], hits[0]),
            mean(hits[0], misses[0]),
            mean(start[1], hits[1]),
            spent as f64 / runs.max(1) as f64,
        ])
    })();
    fs::write(SETTING, before)?;
    measured
}

/// Nanoseconds and runs so far, of connect4 and of sock_ops.
fn counted(bed: &Bed) -> Result<[(u64, u64); 2]> {
    let of = |name: &str| -> Result<(u64, u64)> {
        let link = show(&["link", "show", "pinned"], &bed.pins().join("links").join(name).display().to_string())?;
        let id = link["prog_id"].as_u64().context("no program in the link")?;
        let program = show(&["prog", "show", "id"], &id.to_string())?;
        let field = |name: &str| program[name].as_u64().unwrap_or(0);
        Ok((field("run_time_ns"), field("run_cnt")))
    };
    Ok([of("connect4")?, of("sock_ops")?])
}

fn show(what: &[&str], which: &str) -> Result<serde_json::Value> {
    // Debian has it among the programs of administrators.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let shown = Command::new("bpftool").env("PATH", path).arg("-j").args(what).arg(which).output()?;
    ensure!(shown.status.success(), "bpftool: {}", String::from_utf8_lossy(&shown.stderr));
    Ok(serde_json::from_slice(&shown.stdout)?)
}
