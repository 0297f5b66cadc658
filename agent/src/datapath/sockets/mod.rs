//! Ending connections: those to endpoints that are gone, and those that have outlived the limits of their pool.
//!
//! A thread of its own goes through the sockets of every network namespace, once for each batch of changes. Only sockets are ended that carry
//! a state of Portolan's which their peer agrees with.

mod diag;

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    fs::{self, File},
    net::SocketAddr,
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::maps::MapData;
use portolan_common::{FrontendKey, SocketState};
use rustix::{
    thread::{LinkNameSpaceType, move_into_link_name_space},
    time::{ClockId, clock_gettime},
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use self::diag::{Diag, Found};
use super::{Pins, maps};
use crate::model::Protocol;

/// A connection is idle when nothing was sent or received for so long.
pub const IDLE: Duration = Duration::from_secs(5);

/// What becomes of TCP connections to endpoints that are gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum GoneTcp {
    /// They go on until one of their ends closes them.
    #[default]
    Keep,
    /// They are closed once they are idle: nothing was sent or received for five seconds.
    Idle,
    /// They are reset at once.
    Reset,
}

/// How long connections of a pool may live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lifetime {
    /// Without traffic.
    pub idle: Option<Duration>,
    /// In all.
    pub whole: Option<Duration>,
}

/// What to look for.
#[derive(Clone, Debug, Default)]
pub struct Order {
    /// The endpoints that each frontend has, where connections to gone ones shall be looked for. A frontend that is not named is not looked at.
    pub endpoints: HashMap<FrontendKey, Arc<[SocketAddr]>>,
    /// Whether the endpoints of all frontends are known, so that what is not named is gone.
    pub complete: bool,
    /// Whether UDP sockets of gone endpoints are looked for.
    pub gone_udp: bool,
    /// What becomes of TCP connections to gone endpoints.
    pub gone_tcp: GoneTcp,
    /// Lifetimes by place and epoch of the pool.
    pub lifetimes: HashMap<(u32, u32), Lifetime>,
}

/// Why sockets were ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// The endpoint is gone.
    Gone,
    /// Nothing was sent or received for longer than `idleTimeout`.
    Idle,
    /// It lasted longer than `maxConnectionDuration`.
    Age,
}

impl Reason {
    /// As metrics and events name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::Idle => "idle",
            Self::Age => "age",
        }
    }
}

/// What a pass has done.
#[derive(Clone, Debug, Default)]
pub struct Pass {
    /// Sockets that were ended, by reason, protocol and endpoint.
    pub closed: BTreeMap<(Reason, Protocol, SocketAddr), u64>,
    /// Connections to gone endpoints that are not idle yet.
    pub waiting: u64,
    /// Network namespaces that were looked into.
    pub namespaces: usize,
    /// What did not work.
    pub trouble: Vec<String>,
}

/// The thread, from outside.
pub struct Closer {
    orders: Sender<Order>,
    passes: UnboundedReceiver<Pass>,
}

impl Closer {
    /// Starts it, for the sockets whose states are pinned here, with ids of this set.
    pub(super) fn start(pins: &Pins, set: u32) -> Result<Self> {
        let states =
            MapData::from_pin(pins.socket_map(maps::OF_SOCKETS[0])).context("cannot open the sockets' states")?;
        let (orders, wanted) = channel();
        let (done, passes) = unbounded_channel();
        thread::Builder::new()
            .name("closer".to_owned())
            .spawn(move || work(&states, set, &wanted, &done))
            .context("cannot start a thread")?;
        Ok(Self { orders, passes })
    }

    /// Asks for a pass. Where one is under way, the next one follows, and of several that wait the last one counts.
    pub fn begin(&self, order: Order) {
        // It ends with this value only.
        let _ = self.orders.send(order);
    }

    /// What the next pass has done.
    pub async fn done(&mut self) -> Pass {
        match self.passes.recv().await {
            Some(pass) => pass,
            None => std::future::pending().await,
        }
    }
}

fn work(states: &MapData, set: u32, orders: &Receiver<Order>, done: &UnboundedSender<Pass>) {
    while let Ok(order) = orders.recv() {
        let order = orders.try_iter().fold(order, Order::followed_by);
        let mut pass = Pass::default();
        for namespace in namespaces(&mut pass.trouble) {
            pass.namespaces += 1;
            if let Err(error) = one_namespace(&namespace, states.fd().as_fd(), set, &order, &mut pass) {
                pass.trouble.push(format!("{}: {error:#}", namespace.display()));
            }
        }
        if done.send(pass).is_err() {
            return;
        }
    }
}

/// A way to each network namespace that a process is in or that has a name.
fn namespaces(trouble: &mut Vec<String>) -> Vec<PathBuf> {
    let mut found: HashMap<(u64, u64), PathBuf> = HashMap::new();
    let mut add = |path: PathBuf| {
        // Processes end while one looks.
        if let Ok(metadata) = fs::metadata(&path) {
            found.entry((metadata.dev(), metadata.ino())).or_insert(path);
        }
    };
    match fs::read_dir("/proc") {
        Ok(entries) => {
            let is_process = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
            for entry in entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(is_process)) {
                add(entry.path().join("ns/net"));
            }
        }
        Err(error) => trouble.push(format!("/proc cannot be read: {error}")),
    }
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        add(entry.path());
    }
    found.into_values().collect()
}

fn one_namespace(namespace: &Path, states: BorrowedFd<'_>, set: u32, order: &Order, pass: &mut Pass) -> Result<()> {
    let Ok(file) = File::open(namespace) else { return Ok(()) };
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).context("cannot get in")?;
    let diag = Diag::open()?;
    let tcp = order.gone_tcp != GoneTcp::Keep || !order.lifetimes.is_empty();
    for protocol in
        [(Protocol::Udp, order.gone_udp), (Protocol::Tcp, tcp)].into_iter().filter_map(|(it, is)| is.then_some(it))
    {
        for socket in diag.sockets(protocol, states).with_context(|| format!("cannot list {protocol} sockets"))? {
            let reason = match order.verdict(protocol, &socket, set) {
                Verdict::Keep => continue,
                Verdict::Wait => {
                    pass.waiting += 1;
                    continue;
                }
                Verdict::Close(reason) => reason,
            };
            if diag.destroy(protocol, &socket).with_context(|| format!("cannot close {protocol} sockets"))? {
                *pass.closed.entry((reason, protocol, socket.state.backend.socket_addr())).or_default() += 1;
            }
        }
    }
    Ok(())
}

enum Verdict {
    Keep,
    Wait,
    Close(Reason),
}

impl Order {
    /// Both in one.
    fn followed_by(self, next: Self) -> Self {
        Self { gone_udp: self.gone_udp || next.gone_udp, ..next }
    }

    fn verdict(&self, protocol: Protocol, socket: &Found, set: u32) -> Verdict {
        let state = &socket.state;
        let looked_for = match protocol {
            Protocol::Udp => self.gone_udp,
            _ => self.gone_tcp != GoneTcp::Keep,
        };
        if looked_for && self.is_gone(protocol, state) {
            let waits = protocol == Protocol::Tcp && self.gone_tcp == GoneTcp::Idle;
            return match socket.idle {
                Some(idle) if waits && idle < IDLE => Verdict::Wait,
                _ => Verdict::Close(Reason::Gone),
            };
        }
        if protocol != Protocol::Tcp || state.set != set || state.pool == 0 {
            return Verdict::Keep;
        }
        let Some(lifetime) = self.lifetimes.get(&(state.pool, state.pool_epoch)) else { return Verdict::Keep };
        if lifetime.whole.is_some_and(|most| age(state) > most) {
            return Verdict::Close(Reason::Age);
        }
        if lifetime.idle.zip(socket.idle).is_some_and(|(most, idle)| idle > most) {
            return Verdict::Close(Reason::Idle);
        }
        Verdict::Keep
    }

    fn is_gone(&self, protocol: Protocol, state: &SocketState) -> bool {
        match self.endpoints.get(&FrontendKey::new(state.frontend, protocol.number())) {
            Some(endpoints) => endpoints.binary_search(&state.backend.socket_addr()).is_err(),
            None => self.complete,
        }
    }
}

/// How long ago the connection was begun.
fn age(state: &SocketState) -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    let now = Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32);
    now.saturating_sub(Duration::from_nanos(state.started_ns))
}

impl fmt::Display for GoneTcp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Keep => "keep",
            Self::Idle => "idle",
            Self::Reset => "reset",
        })
    }
}
