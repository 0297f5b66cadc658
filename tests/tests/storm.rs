//! The table changes while connections run: each connection goes where a table in effect at that time says.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{
    net::SocketAddr,
    os::unix::fs::MetadataExt as _,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use portolan_core::table::Sizes;
use portolan_tests::{
    ConnectionSlots, Dialer, Directory, ProcessContext, TestBed,
    direct::{Direct, table},
    patience,
    storm::{self, Load, Servers},
    wait_until,
};
use rustix::time::{ClockId, clock_gettime};

const SERVICES: u8 = 4;
const ENDPOINTS: u8 = 6;

fn frontend(service: u8) -> SocketAddr {
    SocketAddr::from(([172, 16, 1, service], 80))
}

fn endpoint(service: u8, endpoint: u8) -> SocketAddr {
    SocketAddr::from(([10, service, 0, endpoint + 1], 9080))
}

fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// Serializes the tests of this file, because they count the descriptors of the process.
static ALONE: Mutex<()> = Mutex::new(());

/// A published table, with the times from which it was in effect. Times are nanoseconds of CLOCK_MONOTONIC.
struct Published {
    /// Time from which it may have been in effect.
    from: u64,
    /// Time from which it was certainly in effect.
    sure: u64,
    /// The endpoints of each service, one bit for each.
    masks: [u8; SERVICES as usize],
}

/// Returns the number of connections, which `PORTOLAN_STORM_CONNECTIONS` overrides for emulated machines.
fn connections(usual: u64) -> u64 {
    std::env::var("PORTOLAN_STORM_CONNECTIONS").ok().and_then(|count| count.parse().ok()).unwrap_or(usual)
}

#[test]
fn every_connection_follows_a_table_in_effect() -> Result<()> {
    storm(connections(40_000), Duration::ZERO)
}

#[test]
fn million_connections_with_a_table_change_every_ten_milliseconds() -> Result<()> {
    storm(connections(1_000_000), Duration::from_millis(10))
}

/// Makes `count` connections while tables change at this pace, or as fast as possible if `pace` is zero.
fn storm(count: u64, pace: Duration) -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let bed = TestBed::new()?;
    let mut addresses = Vec::new();
    for service in 0..SERVICES {
        for number in 0..ENDPOINTS {
            bed.namespace.add_address(&format!("{}/32", endpoint(service, number).ip()))?;
            addresses.push((endpoint(service, number), service, number));
        }
    }
    let _servers = Servers::start(ProcessContext { namespace: Some(&bed.namespace), cgroup: None }, &addresses)?;
    // So small that every ID and slot is reused many times.
    let sizes = Sizes { frontends: 8, backends: 48, slots: 256, affinities: 1, connections: 1 << 14 };
    let mut direct = Direct::new(&bed, sizes)?;
    let desired = |masks: &[u8]| {
        let dialed = (0..SERVICES).map(|service| {
            let has = |number: &u8| masks[usize::from(service)] & (1 << number) != 0;
            (frontend(service), (0..ENDPOINTS).filter(has).map(|number| endpoint(service, number)).collect())
        });
        // Frontends without clients are added and removed, so that hash table entries move and IDs are reused.
        let others = (SERVICES..2 * SERVICES).filter(|other| masks[usize::from(other % SERVICES)] & 1 != 0);
        table(dialed.chain(others.map(|other| (frontend(other), vec![endpoint(other % SERVICES, 0)]))))
    };
    let mut published: Vec<Published> = Vec::new();
    let mut publish = |direct: &mut Direct, masks: [u8; SERVICES as usize]| -> Result<()> {
        let from = now();
        // If no space is left, wait until ranges can be reclaimed.
        while let Err(error) = direct.publish(&desired(&masks)) {
            ensure!(error.to_string().contains("do not fit"), "{error:#}");
            direct.reclaim().with_context(|| format!("{error:#}"))?;
        }
        published.push(Published { from, sure: now(), masks });
        Ok(())
    };
    publish(&mut direct, [0b1; SERVICES as usize])?;
    // Count only now that every file that a publication needs is open.
    let descriptors = || -> Result<usize> { Ok(std::fs::read_dir("/proc/thread-self/fd")?.count()) };
    let places = ConnectionSlots::open(bed.pins())?;
    let before = (direct.occupancy(), descriptors()?, places.taken());
    let record = Directory::new()?;
    let path = record.scratch("record");
    let frontends: Vec<SocketAddr> = (0..SERVICES).map(frontend).collect();
    let mut load = Load::start(bed.place(), &frontends, count, Some(&path))?;
    let (mut turn, began) = (0u32, Instant::now());
    while !load.has_ended()? {
        // Every table changes every service, and each service always has an endpoint.
        turn = turn.wrapping_add(1);
        publish(&mut direct, std::array::from_fn(|service| 1 + ((turn * 5 + service as u32 * 17) % 63) as u8))?;
        let next = began + pace * turn;
        while Instant::now() < next {
            std::thread::park_timeout(next.saturating_duration_since(Instant::now()));
        }
    }
    let (summary, took) = (load.stop()?, began.elapsed());
    // Restore the initial state.
    publish(&mut direct, [0b1; SERVICES as usize])?;
    wait_until("the maps to return to their initial contents", Duration::from_secs(20), || {
        direct.reclaim()?;
        let after = (direct.occupancy(), descriptors()?, places.taken());
        ensure!(after == before, "{after:?}, before {before:?}");
        Ok(())
    })?;
    assert_eq!((summary.good, summary.bad, summary.misrouted), (count, 0, 0), "{summary:?}");
    assert_eq!(direct.inconsistent()?, 0);

    let connections = storm::read(&path)?;
    assert_eq!(connections.len() as u64, count);
    for connection in &connections {
        // Tables in effect during the connect: those that were published before it ended, and were not certainly
        // replaced before it began.
        let first = published.partition_point(|table| table.sure <= connection.began).saturating_sub(1);
        let end = published.partition_point(|table| table.from <= connection.ended);
        let may = published[first..end]
            .iter()
            .any(|table| table.masks[usize::from(connection.service)] & (1 << connection.endpoint) != 0);
        assert!(may, "{connection:?} matches none of the {} tables in effect", end - first);
    }
    println!("{} tables, {} connections, {:.0} per second", published.len(), summary.good, summary.rate());
    // Writing a table takes about ten milliseconds, much longer under emulation.
    let fewest = took.as_nanos() / (4 * pace.max(Duration::from_millis(10)) * patience()).as_nanos();
    assert!(published.len() as u128 >= fewest, "only {} tables in {took:?}", published.len());
    Ok(())
}

/// Processes in or below an opted-out cgroup are not rewritten. Others are served, whatever the names of their cgroups.
#[test]
fn opt_out_applies_at_any_cgroup_depth() -> Result<()> {
    const ENETUNREACH: i32 = 101;
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let bed = TestBed::new()?;
    bed.namespace.add_address("10.0.0.1/32")?;
    bed.serve("10.0.0.1:9080", "served")?;
    let mut direct =
        Direct::new(&bed, Sizes { frontends: 8, backends: 8, slots: 64, affinities: 8, connections: 1 << 14 })?;
    direct.publish(&table([("172.16.0.10:80".parse()?, vec!["10.0.0.1:9080".parse()?])]))?;
    let (deep, other) = (bed.cgroup.make_inside("a/b/c/d/e/f")?, bed.cgroup.make_inside("a/c")?);
    let start = |cgroup| Dialer::start(ProcessContext { namespace: Some(&bed.namespace), cgroup: Some(cgroup) });
    let (mut inside, mut beside) = (start(&deep)?, start(&other)?);
    let mut dial = |expected: [i32; 2]| -> Result<()> {
        let seen = [&mut inside, &mut beside].map(|client| client.dial("172.16.0.10:80", 1).map(|seen| seen.errnos()));
        let seen: Vec<i32> = seen.into_iter().collect::<Result<Vec<_>>>()?.concat();
        ensure!(seen == expected, "{seen:?}, not {expected:?}");
        Ok(())
    };
    let id = |path: &str| -> Result<u64> { Ok(std::fs::metadata(bed.cgroup.path().join(path))?.ino()) };
    dial([0, 0])?;
    direct.opt_out(&[id("a/b")?].into())?;
    dial([ENETUNREACH, 0])?;
    // So many cgroups that every bit of the filter is set.
    let many = (0..200).map(|i| u64::MAX - i).chain([id("a/b/c/d/e/f")?]).collect();
    direct.opt_out(&many)?;
    dial([ENETUNREACH, 0])?;
    direct.opt_out(&[id("a")?].into())?;
    dial([ENETUNREACH, ENETUNREACH])?;
    direct.opt_out(&[].into())?;
    dial([0, 0])
}
