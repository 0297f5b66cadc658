//! Run time of the programs for each way that a connect or a datagram can take through them.
//!
//! Each step of the hit path costs what its way takes more than another one without that step.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use portolan_bench::task::Task;
use portolan_common::TrackFlags;
use portolan_core::{
    model::{ConnectionPool, IpFamily, NamespacedName, Protocol, ServiceId},
    policy::{PoolKey, Schedule, Share, WeightedGroup},
    table::{PoolSpec, Sizes, Table, key},
};
use portolan_tests::{
    CountingServer,
    direct::{Direct, table},
};
use serde::Serialize;

use crate::{
    figures::Median,
    kernel::{AT_ONCE, FIRST, Node, QUIET, container, counted, mean},
    progress,
    world::{Worker, client_on, serve_on},
};

/// Run time of the programs for one way through them, in nanoseconds, without that of the kernel's statistics.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Way {
    /// What is dialed.
    pub(crate) what: &'static str,
    /// The program that handles the call.
    pub(crate) hook: &'static str,
    /// Its run time for each call.
    pub(crate) call: Median,
    /// All programs together, until the socket is closed, for each call.
    pub(crate) all: Median,
    /// How often they run for each call.
    pub(crate) runs: Median,
}

/// How a client uses an address.
#[derive(Clone, Copy)]
enum Call {
    Connect,
    Refused,
    ConnectDatagram,
    Query,
    Send,
    SendByFour,
    Exchange,
}

/// What is measured.
struct Arrangement {
    what: &'static str,
    /// The program that handles the call.
    hook: &'static str,
    call: Call,
    address: &'static str,
}

const fn way(what: &'static str, hook: &'static str, call: Call, address: &'static str) -> Arrangement {
    Arrangement { what, hook, call, address }
}

/// The ways on a node whose table of connections is nearly empty.
const WAYS: [Arrangement; 13] = [
    way(OTHER, "connect4", Call::Connect, "10.0.0.1:9080"),
    way(REFUSED, "connect4", Call::Refused, "172.16.0.1:80"),
    way(LIST, "connect4", Call::Connect, "172.16.0.2:80"),
    way(OUTLIER_DETECTION, "connect4", Call::Connect, "172.16.0.3:80"),
    way(WEIGHTS, "connect4", Call::Connect, "172.16.0.4:80"),
    way(LIMIT, "connect4", Call::Connect, "172.16.0.5:80"),
    way(AFFINITY, "connect4", Call::Connect, "172.16.0.6:80"),
    way(V6, "connect6", Call::Connect, "[fd10::2]:80"),
    way(UDP, "connect4", Call::ConnectDatagram, "172.16.0.7:53"),
    way(RESOLVER, "connect4", Call::Query, "172.16.0.8:53"),
    way(EXCHANGE, "sendmsg4", Call::Exchange, "172.16.0.8:53"),
    way("UDP, send to another address, as a server that answers", "sendmsg4", Call::Send, "10.0.0.1:9081"),
    way("UDP, the same from one socket by four threads", "sendmsg4", Call::SendByFour, "10.0.0.1:9081"),
];
pub(crate) const OTHER: &str = "TCP, not a Service";
const REFUSED: &str = "TCP, Service without endpoints";
pub(crate) const LIST: &str = "TCP, list of endpoints";
const OUTLIER_DETECTION: &str = "TCP, outlier detection";
const WEIGHTS: &str = "TCP, weights that make no short list";
const LIMIT: &str = "TCP, maxConnections";
const AFFINITY: &str = "TCP, session affinity";
const V6: &str = "TCP over IPv6, list of endpoints";
pub(crate) const UDP: &str = "UDP, connected socket";
const RESOLVER: &str = "UDP, resolver: a new socket for each query and its answer";
const EXCHANGE: &str = "UDP, send to a Service and receive";
/// The way of a pod that has used up its share of the entries: at the SYN, `sock_ops` moves the state.
pub(crate) const STORAGE: &str = "TCP, list of endpoints, state in socket storage";

const HOOKS: [&str; 6] = ["connect4", "connect6", "sendmsg4", "recvmsg4", "sock_ops", "sock_release"];
const V6_ENDPOINT: &str = "fd00::1";

/// Measures every way, in this many rounds of this many calls.
pub(crate) fn run(rounds: usize, calls: usize) -> Result<Vec<Way>> {
    progress("in the kernel, each way through the programs");
    let (mut common, mut full) = (Node::new("ways", 1)?, Node::new("full", 1)?);
    let mut node = Direct::new(&common.bed, Sizes::default())?;
    node.publish(&frontends()?)?;
    common.bed.namespace.add_address(&format!("{V6_ENDPOINT}/128"))?;
    let at = SocketAddr::new(V6_ENDPOINT.parse()?, FIRST);
    let mut v6 = serve_on(&common.bed.namespace, at)?;
    // Connections that stay open use up the client's share, so that all further ones go to socket storage.
    let small = Sizes { connections: Sizes::CONNECTIONS.0, ..Sizes::default() };
    let mut exhausted = Direct::new(&full.bed, small)?;
    exhausted.publish(&frontends()?)?;
    let mut holder = client_on(0, &full.bed.namespace, &full.pod)?;
    let held = usize::try_from(small.connections / 2)?;
    holder.ask(&Task::Hold { to: address(LIST)?, count: held })?;
    full.server.ask(&Task::Empty)?;
    let _counting = CountingServer::begin()?;
    let mut all: Vec<(&str, &str, Vec<[f64; 3]>)> = WAYS.iter().map(|way| (way.what, way.hook, Vec::new())).collect();
    all.push((STORAGE, "sock_ops", Vec::new()));
    let mut nothing = f64::NAN;
    let list = WAYS.iter().find(|way| way.what == LIST).context("no such way")?;
    let stored = way(STORAGE, "sock_ops", Call::Connect, list.address);
    // Round 0 is a warm-up, and is not recorded.
    for round in 0..=rounds {
        for (way, (.., figures)) in WAYS.iter().zip(&mut all) {
            let figure = measure(&mut common, Some(&mut v6), way, calls, &mut nothing)?;
            figures.extend((round > 0).then_some(figure));
        }
        let figure = measure(&mut full, None, &stored, calls, &mut nothing)?;
        if let Some((.., figures)) = all.last_mut() {
            figures.extend((round > 0).then_some(figure));
        }
    }
    let sum_up = |(what, hook, figures): (&'static str, &'static str, Vec<[f64; 3]>)| {
        let of = |i: usize| Median::of(figures.iter().map(|figure| figure[i])).context("no rounds");
        Ok(Way { what, hook, call: of(0)?, all: of(1)?, runs: of(2)? })
    };
    all.into_iter().map(sum_up).collect()
}

/// Returns the run time of the program that handles the call, that of all programs, and their number of runs, for each call.
///
/// `nothing` is the time that the statistics take, which is measured with every connect to an IPv4 address.
fn measure(
    node: &mut Node,
    mut v6: Option<&mut Worker>,
    way: &Arrangement,
    calls: usize,
    nothing: &mut f64,
) -> Result<[f64; 3]> {
    let Arrangement { hook, call, address, .. } = *way;
    let to: SocketAddr = address.parse()?;
    let before = HOOKS.map(|name| counted(&node.bed, name));
    let nothing_before = node.nothing.counted()?;
    let mut left = calls;
    while left > 0 {
        let count = left.min(AT_ONCE);
        node.clients[0].ask(&match call {
            Call::Connect => Task::ConnectEach { to: vec![to], first: 0, count },
            Call::Refused => Task::Refused { to, count },
            Call::ConnectDatagram => Task::ConnectDatagram { to, count },
            Call::Query => Task::Datagrams { to, count, connected: true },
            Call::Send => Task::Send { to, count, threads: 1 },
            Call::SendByFour => Task::Send { to, count, threads: 4 },
            Call::Exchange => Task::Datagrams { to, count, connected: false },
        })?;
        node.server.ask(&Task::Empty)?;
        if let Some(server) = &mut v6 {
            server.ask(&Task::Empty)?;
        }
        left -= count;
    }
    let after = HOOKS.map(|name| counted(&node.bed, name));
    let nothing_after = node.nothing.counted()?;
    if nothing_after.1 > nothing_before.1 {
        *nothing = mean(nothing_before, nothing_after);
    }
    let (mut own, mut all, mut runs) = (f64::NAN, 0.0, 0.0);
    for (name, (before, after)) in HOOKS.iter().zip(before.into_iter().zip(after)) {
        let (before, after) = (before?, after?);
        let net = (after.0 - before.0) as f64 - *nothing * (after.1 - before.1) as f64;
        all += net / calls as f64;
        runs += (after.1 - before.1) as f64 / calls as f64;
        if *name == hook {
            own = net / calls as f64;
        }
    }
    Ok([own, all, runs])
}

/// Returns the address that is dialed to measure this.
fn address(what: &str) -> Result<SocketAddr> {
    let way = WAYS.iter().find(|way| way.what == what).with_context(|| format!("no way {what:?}"))?;
    Ok(way.address.parse()?)
}

/// One frontend for each way.
fn frontends() -> Result<Table> {
    let endpoints: Vec<SocketAddr> = (1..=10).map(|i| SocketAddr::from(([10, 1, 0, i], QUIET))).collect();
    let lists = [LIST, OUTLIER_DETECTION, WEIGHTS, LIMIT, AFFINITY];
    let mut all =
        table(lists.into_iter().map(|what| Ok((address(what)?, endpoints.clone()))).collect::<Result<Vec<_>>>()?);
    all.frontends.extend(table([(address(REFUSED)?, Vec::new())]).frontends);
    all.frontends.extend(table([(address(V6)?, vec![SocketAddr::new(V6_ENDPOINT.parse()?, QUIET)])]).frontends);
    let mut change = |what: &str, change: &dyn Fn(&mut portolan_core::table::FrontendSpec)| {
        let spec = all.frontends.get_mut(&key(address(what)?, Protocol::Tcp)).context("no such frontend")?;
        change(spec);
        anyhow::Ok(())
    };
    let pool = |port, limits, watch| PoolSpec {
        key: PoolKey {
            service: ServiceId::service(NamespacedName::new("bench", "web")),
            port,
            protocol: Protocol::Tcp,
            subset: None,
            family: IpFamily::V4,
        },
        limits,
        strict: false,
        watch,
    };
    change(OUTLIER_DETECTION, &|spec| spec.pools = Arc::new([pool(3, ConnectionPool::default(), TrackFlags::USE)]))?;
    change(WEIGHTS, &|spec| {
        let (some, others) = endpoints.split_at(3);
        let group = |parts, members: &[SocketAddr]| {
            let members = members.iter().map(|endpoint| (*endpoint, 1)).collect();
            WeightedGroup::in_turn(Share::new(parts, 1_000), members)
        };
        spec.schedule = Arc::new(Schedule::new(vec![group(317, some), group(683, others)]));
    })?;
    let limit = ConnectionPool { max_connections: Some(1_000_000), ..ConnectionPool::default() };
    change(LIMIT, &|spec| spec.pools = Arc::new([pool(5, limit.clone(), 0)]))?;
    change(AFFINITY, &|spec| spec.affinity = Some(Duration::from_secs(10_800)))?;
    // A datagram is answered by the server's echo port, at the only address that it answers from.
    for (what, endpoint) in [(UDP, endpoints.clone()), (EXCHANGE, vec![SocketAddr::from(([127, 0, 0, 1], FIRST))])] {
        let spec = table([(address(what)?, endpoint)]).frontends.into_values().next().context("no frontend")?;
        all.frontends.insert(key(address(what)?, Protocol::Udp), spec);
    }
    Ok(all)
}

/// How many connections find both of their entries taken, with this many entries in use.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Load {
    /// Open connections, in percent of the entries.
    pub(crate) percent: u32,
    pub(crate) entries: u32,
    pub(crate) connections: usize,
    /// Those of them whose state is in socket storage.
    pub(crate) in_storage: u64,
    /// The last connections, a hundredth of the entries, and those of them whose state is in socket storage.
    pub(crate) last: (usize, u64),
}

/// The entries of the table that is filled.
const ENTRIES: u32 = 1 << 14;
/// The pods that fill it: each stays below its share.
const PODS: usize = 8;

/// Opens connections until a table of connections is 20, 50 and 80 percent full.
pub(crate) fn loads() -> Result<Vec<Load>> {
    progress("in the kernel, connections that find both of their entries taken");
    let mut node = Node::new("load", 1)?;
    let mut direct = Direct::new(&node.bed, Sizes { connections: ENTRIES, ..Sizes::default() })?;
    direct.publish(&frontends()?)?;
    let pods: Vec<_> = (1..=PODS).map(|pod| node.bed.cgroup.make_inside(&container(pod))).collect::<Result<_>>()?;
    let mut clients: Vec<Worker> =
        pods.iter().map(|pod| client_on(0, &node.bed.namespace, pod)).collect::<Result<_>>()?;
    let to = address(LIST)?;
    let before = direct.fallback()?;
    let (mut all, mut open) = (Vec::new(), 0);
    for percent in [20, 50, 80] {
        let mut of_last = (0, 0);
        // The last hundredth apart: with how many entries in use it finds them taken is known.
        for percent in [percent - 1, percent] {
            let in_storage = direct.fallback()?;
            let each = usize::try_from(ENTRIES * percent / 100)? / PODS;
            for client in &mut clients {
                client.ask(&Task::Hold { to, count: each - open })?;
                node.server.ask(&Task::Empty)?;
            }
            of_last = ((each - open) * PODS, direct.fallback()? - in_storage);
            open = each;
        }
        let in_storage = direct.fallback()? - before;
        all.push(Load { percent, entries: ENTRIES, connections: open * PODS, in_storage, last: of_last });
    }
    Ok(all)
}
