//! Ending connections: those to endpoints that are gone, and those that have outlived the limits of their pool.
//!
//! The helper goes through the sockets of every network namespace, once for each batch of changes. Only sockets are ended that carry
//! a state of Portolan's which their peer agrees with.

mod accounting;
mod request;
mod sock_diag;
mod socket;

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io,
    net::SocketAddr,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{fs::MetadataExt as _, net::UnixStream},
    },
    path::Path,
    rc::Rc,
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use portolan_common::SocketState;
use portolan_core::{model::Protocol, table::RemovedEndpoints};
use rustix::{
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
};

use self::{
    accounting::{Doubts, Waiting},
    request::Action,
    sock_diag::Diag,
    socket::{Connected, Seen},
};
use crate::{
    netns::namespaces,
    pins::{Pins, Set},
    sys,
    wire::{encode_frame, frame_len},
};

pub(super) use self::accounting::SocketAccounting;
pub use self::{
    accounting::Reconciled,
    request::{ActiveEndpoints, Lifetime, RemovedEndpointTcp, SweepRequest},
};

/// A connection is idle when nothing was sent or received for so long.
pub const IDLE: Duration = Duration::from_secs(5);

/// Connections that are closed within a second because their endpoints get none any more: their applications come back at once, all to the same ones.
const MOVES: u64 = 20;
const MOVES_IN: Duration = Duration::from_secs(1);

/// How often places are looked through whose connect never began.
const TIDY: Duration = Duration::from_secs(60);

/// Why sockets were ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Reason {
    /// The endpoint is gone.
    Gone,
    /// Nothing was sent or received for longer than `idleTimeout`.
    Idle,
    /// It lasted longer than `maxConnectionDuration`.
    Age,
    /// It was idle, and its endpoint gets no connections any more.
    Inactive,
}

impl Reason {
    /// As metrics and events name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::Idle => "idle",
            Self::Age => "age",
            Self::Inactive => "elsewhere",
        }
    }
}

/// What a pass has done.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SweepReport {
    /// Whether it looked for connections to end, and not only counted them.
    pub closing: bool,
    /// Whether it was to count.
    pub counting: bool,
    /// Sockets that were ended, by reason, protocol and endpoint.
    pub closed: BTreeMap<(Reason, Protocol, SocketAddr), u64>,
    /// When the next of the connections to gone endpoints may be idle, if there are any.
    pub wait: Option<Duration>,
    /// How many more may be ended because their endpoints get no connections any more.
    moves: u64,
    /// What was put right.
    pub recounted: Option<Reconciled>,
    /// Network namespaces that were looked into.
    pub namespaces: usize,
    /// What did not work.
    pub trouble: Vec<String>,
    /// Endpoints whose connected UDP sockets may not all have been ended, for that reason.
    pub unfinished: Option<RemovedEndpoints>,
}

/// The helper that does it, from outside.
pub struct Terminator {
    states: SocketAccounting,
    orders: UnboundedSender<SweepRequest>,
    passes: UnboundedReceiver<SweepReport>,
}

impl Terminator {
    /// Speaks with the helper on this way, of the sockets whose states are pinned here, with ids of this set. To be called inside a runtime.
    pub(super) fn start(pins: &Pins, set: Set, helper: UnixStream) -> Result<Self> {
        let states = SocketAccounting::open(pins, set).context("cannot open the sockets' states")?;
        helper.set_nonblocking(true)?;
        let (mut answers, mut asks) = tokio::net::UnixStream::from_std(helper)?.into_split();
        let (orders, mut wanted) = unbounded_channel();
        let (done, passes) = unbounded_channel();
        tokio::spawn(async move {
            while let Some(order) = wanted.recv().await {
                match encode_frame(&order) {
                    Ok(frame) => asks.write_all(&frame).await?,
                    Err(error) => tracing::warn!("connections that should end go on: the order to end them: {error}"),
                }
            }
            io::Result::Ok(())
        });
        tokio::spawn(async move {
            loop {
                let mut length = [0; 4];
                answers.read_exact(&mut length).await?;
                let mut bytes = vec![0; frame_len(length)?];
                answers.read_exact(&mut bytes).await?;
                if done.send(postcard::from_bytes(&bytes).map_err(io::Error::other)?).is_err() {
                    return io::Result::Ok(());
                }
            }
        });
        Ok(Self { states, orders, passes })
    }

    /// Asks for a pass. Where one is under way, the next one follows, and of several that wait the last one counts.
    pub fn begin(&self, order: SweepRequest) {
        // It ends with this value only, or with the helper, which `done` tells.
        let _ = self.orders.send(order);
    }

    /// Connections that have a place of their own for what is remembered, and how many may.
    pub fn places(&self) -> (u32, u32) {
        (self.states.taken(), portolan_common::Connection::CAPACITY)
    }

    /// What the next pass has done.
    ///
    /// # Errors
    /// The helper has ended.
    pub async fn done(&mut self) -> Result<SweepReport> {
        self.passes.recv().await.context("the helper, which closes connections, has ended")
    }
}

/// Whether sockets can be listed and ended on this machine; if not, why.
pub(super) fn check() -> Result<(), String> {
    let diag = Diag::open().map_err(|error| format!("no sock_diag: {error}"))?;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        diag.check(protocol).map_err(|error| format!("{protocol} sockets cannot be ended: {error}"))?;
    }
    Ok(())
}

/// Does what it is told, until nobody tells it anything or takes what it has done. It moves this thread from namespace to namespace.
pub(super) fn work(
    states: &SocketAccounting,
    set: u32,
    orders: &Receiver<SweepRequest>,
    mut done: impl FnMut(SweepReport) -> bool,
) {
    let own = File::open("/proc/thread-self/ns/net");
    let (mut waiting, mut tidied) = (Waiting::default(), Instant::now());
    let mut doubts = Doubts::default();
    let (mut moves, mut moves_since) = (MOVES, Instant::now());
    loop {
        if tidied.elapsed() >= TIDY {
            tidied = Instant::now();
            if let Err(error) = reap_abandoned(states, &mut waiting, tidied) {
                tracing::warn!("places of connections cannot be freed: {error:#}");
            }
        }
        let order = match orders.recv_timeout(TIDY) {
            Ok(order) => order,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let order = orders.try_iter().fold(order, SweepRequest::followed_by);
        let closing = order.is_about_gone() || order.is_about_living();
        let mut pass = SweepReport { closing, counting: order.recount, ..SweepReport::default() };
        if moves_since.elapsed() >= MOVES_IN {
            (moves, moves_since) = (MOVES, Instant::now());
        }
        pass.moves = moves;
        let mut datagrams = Vec::new();
        let mut before = None;
        if order.recount {
            match sees_all_processes().and_then(|()| states.now()) {
                Ok(now) => before = Some((now, Seen::nothing())),
                Err(error) => pass.trouble.push(format!("connections cannot be counted: {error:#}")),
            }
        }
        let mut seen = before.as_mut().map(|(_, seen)| seen);
        for (path, namespace) in namespaces(&mut pass.trouble) {
            pass.namespaces += 1;
            match one_namespace(&namespace, states, set, &order, seen.as_deref_mut(), &mut pass) {
                Ok(found) => datagrams.extend(found),
                Err(error) => pass.trouble.push(format!("{}: {error:#}", path.display())),
            }
        }
        moves = pass.moves;
        // A namespace lives as long as a thread is in it.
        if let Err(error) = own.as_ref().map_err(|error| error.to_string()).and_then(|own| {
            let back = move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::Network));
            back.map_err(|error| error.to_string())
        }) {
            pass.trouble.push(format!("cannot go back to the own namespace: {error}"));
        }
        if !datagrams.is_empty()
            && let Err(error) = close_datagrams(datagrams, states, &order, &mut pass)
        {
            pass.trouble.push(format!("UDP sockets of endpoints that are gone: {error:#}"));
        }
        // Of a part of all sockets nothing follows.
        if let Some((before, seen)) = before.filter(|_| pass.trouble.is_empty()) {
            match states.recount(&before, &seen, &mut doubts) {
                Ok(recounted) => pass.recounted = Some(recounted),
                Err(error) => pass.trouble.push(format!("connections cannot be counted: {error:#}")),
            }
        }
        if !pass.trouble.is_empty() {
            pass.unfinished = order.gone_udp;
        }
        if !done(pass) {
            return;
        }
    }
}

/// Frees the places of connects that failed before they began: no hook hears of those.
fn reap_abandoned(states: &SocketAccounting, waiting: &mut Waiting, now: Instant) -> Result<()> {
    let abandoned = states.abandoned(waiting, now)?;
    if abandoned.is_empty() {
        return Ok(());
    }
    sees_all_processes()?;
    let own = File::open("/proc/thread-self/ns/net")?;
    let (mut seen, mut trouble) = (Seen::nothing(), Vec::new());
    let looked = namespaces(&mut trouble).into_iter().try_for_each(|(_, namespace)| {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        Ok(Diag::open()?.count(states, &mut seen)?)
    });
    move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::Network))?;
    looked.and_then(|()| trouble.pop().map_or(Ok(()), |why| Err(anyhow::anyhow!(why))))?;
    let gone = abandoned.into_iter().filter(|(_, owner)| !seen.cookies.contains(owner));
    gone.into_iter().try_for_each(|place| states.free(place).map(drop))
}

/// Of the sockets of some processes nothing follows for those of all.
fn sees_all_processes() -> Result<()> {
    /// Of the first process namespace, that of the machine (`PROC_PID_INIT_INO`).
    const FIRST: u64 = 0xefff_fffc;
    let own = fs::metadata("/proc/self/ns/pid")?.ino();
    anyhow::ensure!(own == FIRST, "this agent does not see all processes of the machine; run it with hostPID: true");
    Ok(())
}

/// A UDP socket that is connected to an endpoint that may be gone, and the way to end it.
type Datagrams = (Rc<Diag>, Connected);

/// Ends the TCP connections of a namespace that the order is about, and finds the UDP sockets that it may be about.
fn one_namespace(
    namespace: &File,
    states: &SocketAccounting,
    set: u32,
    order: &SweepRequest,
    seen: Option<&mut Seen>,
    pass: &mut SweepReport,
) -> Result<Vec<Datagrams>> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).context("cannot get in")?;
    let diag = Rc::new(Diag::open()?);
    if let Some(seen) = seen {
        diag.count(states, seen).context("cannot list TCP connections")?;
    }
    if order.removed_endpoint_tcp != RemovedEndpointTcp::Keep || order.is_about_living() {
        for connection in diag.connections(states).context("cannot list TCP connections")? {
            let reason = match order.action_for(&connection, set) {
                Action::Keep => continue,
                Action::Wait(left) => {
                    pass.wait = Some(pass.wait.map_or(left, |wait| wait.min(left)));
                    continue;
                }
                Action::Close(Reason::Inactive) if pass.moves == 0 => {
                    pass.wait = Some(pass.wait.map_or(MOVES_IN, |wait| wait.min(MOVES_IN)));
                    continue;
                }
                Action::Close(reason) => reason,
            };
            pass.moves -= u64::from(reason == Reason::Inactive);
            if diag.destroy(Protocol::Tcp, &connection.socket).context("cannot close TCP connections")? {
                pass.count(reason, Protocol::Tcp, &connection.state);
            }
        }
    }
    let Some(gone) = &order.gone_udp else { return Ok(Vec::new()) };
    let connected = diag.datagrams().context("cannot list UDP sockets")?.into_iter();
    let may_be = connected.filter(|socket| gone.may_be(&socket.peer.socket_addr()));
    Ok(may_be.map(|socket| (Rc::clone(&diag), socket)).collect())
}

/// Ends those UDP sockets that carry a state of ours. sock_diag does not show it for UDP, so each is borrowed from a process that has it.
fn close_datagrams(
    sockets: Vec<Datagrams>,
    states: &SocketAccounting,
    order: &SweepRequest,
    pass: &mut SweepReport,
) -> Result<()> {
    sees_all_processes()?;
    let mut by_inode: HashMap<u64, Datagrams> =
        sockets.into_iter().map(|(diag, socket)| (socket.inode.into(), (diag, socket))).collect();
    for process in procfs::process::all_processes().context("/proc cannot be read")?.flatten() {
        if by_inode.is_empty() {
            break;
        }
        // Processes end while one looks, and so do their descriptors.
        for (descriptor, inode) in descriptors(process.pid) {
            if !by_inode.contains_key(&inode) {
                continue;
            }
            // Another process may have it as well.
            let Ok(borrowed) = borrow(process.pid, descriptor) else { continue };
            let Some((diag, socket)) = by_inode.remove(&inode) else { continue };
            // Where there is none, Portolan did not give it its peer.
            let Ok(state) = sys::lookup_socket::<SocketState>(states.storage.fd(), &borrowed) else { continue };
            if state.backend == socket.peer
                && state.protocol == Protocol::Udp.number()
                && order.is_gone(Protocol::Udp, &state)
            {
                match diag.destroy(Protocol::Udp, &socket) {
                    Ok(true) => pass.count(Reason::Gone, Protocol::Udp, &state),
                    Ok(false) => {}
                    Err(error) => pass.trouble.push(format!("a UDP socket cannot be closed: {error}")),
                }
            }
        }
    }
    Ok(())
}

/// The descriptors of a process, and the inodes behind them. `/proc/PID/fd` is for the process's own user; this is for who may trace it.
fn descriptors(process: i32) -> impl Iterator<Item = (i32, u64)> {
    let inode = |path: &Path| -> Option<u64> {
        let text = fs::read_to_string(path).ok()?;
        text.lines().find_map(|line| line.strip_prefix("ino:"))?.trim().parse().ok()
    };
    let entries = fs::read_dir(format!("/proc/{process}/fdinfo")).into_iter().flatten().flatten();
    entries.filter_map(move |entry| Some((entry.file_name().to_str()?.parse().ok()?, inode(&entry.path())?)))
}

/// A descriptor of another process.
fn borrow(process: i32, descriptor: i32) -> Result<OwnedFd> {
    let process = Pid::from_raw(process).context("no process")?;
    let process = pidfd_open(process, PidfdFlags::empty())?;
    Ok(pidfd_getfd(process, descriptor, PidfdGetfdFlags::empty())?)
}

impl SweepReport {
    fn count(&mut self, reason: Reason, protocol: Protocol, state: &SocketState) {
        *self.closed.entry((reason, protocol, state.backend.socket_addr())).or_default() += 1;
    }
}
