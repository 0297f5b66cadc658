//! Terminates connections to removed or inactive endpoints, and connections that exceed the limits of their pool.
//!
//! The helper sweeps the sockets of every network namespace, once per batch of changes.
//! It terminates a socket only if the socket has Portolan state and that state matches the socket's peer.

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
    error::{Context as _, Error, Result, ensure},
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

/// With [`RemovedEndpointTcp::Idle`], a connection is idle after this long without sent or received data.
pub const IDLE: Duration = Duration::from_secs(5);

/// Rate limit: at most this many connections to inactive endpoints are closed per [`MOVES_IN`].
/// Their applications reconnect at once, all to the same endpoints.
const MOVES: u64 = 20;
const MOVES_IN: Duration = Duration::from_secs(1);

/// Interval between scans for `CONNECTIONS` slots whose connect never started.
const REAP_INTERVAL: Duration = Duration::from_secs(60);

/// Why a socket was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Reason {
    /// Its endpoint was removed.
    Gone,
    /// Nothing was sent or received for longer than `idleTimeout`.
    Idle,
    /// It was open for longer than `maxConnectionDuration`.
    Age,
    /// It was idle, and its endpoint receives no new connections.
    Inactive,
}

impl Reason {
    /// Returns the value of the `reason` label in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::Idle => "idle",
            Self::Age => "age",
            Self::Inactive => "elsewhere",
        }
    }
}

/// The result of one sweep.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SweepReport {
    /// Whether the sweep looked for connections to close; if not, it only counted them.
    pub closing: bool,
    /// Whether the request asked to reconcile counts, successful or not.
    pub counting: bool,
    /// Number of sockets closed, by reason, protocol and endpoint.
    pub closed: BTreeMap<(Reason, Protocol, SocketAddr), u64>,
    /// Time until another sweep may close more: a connection may be idle by then, or the rate limit allows more.
    /// `None` if no connection waits.
    pub wait: Option<Duration>,
    /// How many more connections to inactive endpoints the rate limit allows.
    pub moves: u64,
    /// Corrections to slots and counts; `None` if not requested or the sweep had errors.
    pub recounted: Option<Reconciled>,
    /// Number of network namespaces visited.
    pub namespaces: usize,
    /// Errors, one message each. The sweep continues past them.
    pub trouble: Vec<String>,
    /// Removed endpoints that may still have connected UDP sockets, because of errors. Request them again.
    pub unfinished: Option<RemovedEndpoints>,
}

/// Sockets that were closed, by reason and protocol.
pub type Closed = BTreeMap<(Reason, Protocol), u64>;

/// The agent's side of the sweeps, which the helper runs.
pub struct Terminator {
    states: SocketAccounting,
    orders: UnboundedSender<SweepRequest>,
    passes: UnboundedReceiver<SweepReport>,
}

impl Terminator {
    /// Opens the pinned socket state maps of `set`, and starts the tasks that talk to the helper over its socket.
    /// Must be called within a Tokio runtime.
    pub(super) fn start(pins: &Pins, set: Set, helper: UnixStream) -> Result<Self> {
        let states = SocketAccounting::open(pins, set).context("cannot open the socket state maps")?;
        helper.set_nonblocking(true)?;
        let (mut answers, mut asks) = tokio::net::UnixStream::from_std(helper)?.into_split();
        let (orders, mut pending) = unbounded_channel();
        let (done, passes) = unbounded_channel();
        tokio::spawn(async move {
            while let Some(order) = pending.recv().await {
                match encode_frame(&order) {
                    Ok(frame) => asks.write_all(&frame).await?,
                    Err(error) => tracing::warn!("failed to terminate some connections: cannot encode sweep: {error}"),
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

    /// Requests a sweep.
    /// If one is in progress, the next one follows it; requests that queue up meanwhile are merged into one.
    pub fn begin(&self, order: SweepRequest) {
        // Fails only if the helper has exited, which `done` reports.
        let _ = self.orders.send(order);
    }

    /// Returns the number of `CONNECTIONS` slots in use, and the capacity of the map.
    pub fn places(&self) -> (u32, u32) {
        (self.states.taken(), portolan_common::Connection::CAPACITY)
    }

    /// Waits for the next sweep to finish, and returns its report.
    ///
    /// # Errors
    /// Returns an error if the helper has exited.
    pub async fn done(&mut self) -> Result<SweepReport> {
        self.passes.recv().await.context("the helper exited, so connections can no longer be terminated")
    }
}

/// Checks that `sock_diag` can list and close sockets on this machine; if not, returns why.
pub(super) fn check() -> Result<(), String> {
    let diag = Diag::open().map_err(|error| format!("cannot open sock_diag: {error}"))?;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        diag.check(protocol).map_err(|error| format!("cannot close {protocol} sockets through sock_diag: {error}"))?;
    }
    Ok(())
}

/// Runs the requested sweeps until the request channel closes or `done` returns false.
/// Moves the calling thread from one network namespace to the next.
pub(super) fn work(
    states: &SocketAccounting,
    set: u32,
    orders: &Receiver<SweepRequest>,
    mut done: impl FnMut(SweepReport) -> bool,
) {
    let own = File::open("/proc/thread-self/ns/net");
    let (mut waiting, mut reaped_at) = (Waiting::default(), Instant::now());
    let mut doubts = Doubts::default();
    let (mut moves, mut moves_since) = (MOVES, Instant::now());
    loop {
        if reaped_at.elapsed() >= REAP_INTERVAL {
            reaped_at = Instant::now();
            if let Err(error) = reap_abandoned(states, &mut waiting, reaped_at) {
                tracing::warn!("cannot reclaim abandoned connection slots: {error:#}");
            }
        }
        let order = match orders.recv_timeout(REAP_INTERVAL) {
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
                Err(error) => pass.trouble.push(format!("cannot count connections: {error:#}")),
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
        // A thread keeps the namespace that it is in alive, so leave the last one.
        if let Err(error) = own.as_ref().map_err(|error| error.to_string()).and_then(|own| {
            let back = move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::Network));
            back.map_err(|error| error.to_string())
        }) {
            pass.trouble.push(format!("cannot return to the original network namespace: {error}"));
        }
        if !datagrams.is_empty()
            && let Err(error) = close_datagrams(datagrams, states, &order, &mut pass)
        {
            pass.trouble.push(format!("cannot close UDP sockets of removed endpoints: {error:#}"));
        }
        // A partial list of sockets proves nothing, so reconcile only after a sweep without errors.
        if let Some((before, seen)) = before.filter(|_| pass.trouble.is_empty()) {
            match states.recount(&before, &seen, &mut doubts) {
                Ok(recounted) => pass.recounted = Some(recounted),
                Err(error) => pass.trouble.push(format!("cannot reconcile connection counts: {error:#}")),
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

/// Frees the slots of connects that failed before they started; no hook sees those fail.
fn reap_abandoned(states: &SocketAccounting, waiting: &mut Waiting, now: Instant) -> Result<()> {
    let abandoned = states.abandoned(waiting, now)?;
    if abandoned.is_empty() {
        return Ok(());
    }
    sees_all_processes()?;
    let own = File::open("/proc/thread-self/ns/net")?;
    let (mut seen, mut trouble) = (Seen::nothing(), Vec::new());
    let counted = namespaces(&mut trouble).into_iter().try_for_each(|(_, namespace)| {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        Ok(Diag::open()?.count(states, &mut seen)?)
    });
    move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::Network))?;
    counted.and_then(|()| trouble.pop().map_or(Ok(()), |why| Err(Error::State(why))))?;
    let gone = abandoned.into_iter().filter(|(_, owner)| !seen.cookies.contains(owner));
    gone.into_iter().try_for_each(|slot| states.free(slot).map(drop))
}

/// Checks that this process sees all processes of the machine.
/// If not, a socket that is missing from the list may still exist.
fn sees_all_processes() -> Result<()> {
    /// Inode of the initial PID namespace (`PROC_PID_INIT_INO`), which is the host's.
    const FIRST: u64 = 0xefff_fffc;
    let own = fs::metadata("/proc/self/ns/pid")?.ino();
    ensure!(own == FIRST, "the agent cannot see all processes of the machine; set hostPID: true");
    Ok(())
}

/// A UDP socket connected to an endpoint that may be removed, and the netlink socket of its namespace to close it.
type Datagrams = (Rc<Diag>, Connected);

/// Closes the TCP connections of one namespace that match the request.
/// Returns the UDP sockets that may match.
fn one_namespace(
    namespace: &File,
    states: &SocketAccounting,
    set: u32,
    order: &SweepRequest,
    seen: Option<&mut Seen>,
    pass: &mut SweepReport,
) -> Result<Vec<Datagrams>> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).context("cannot enter namespace")?;
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

/// Closes those UDP sockets whose Portolan state matches the request.
/// `sock_diag` does not report socket storage for UDP, so each socket is duplicated from a process that owns it.
fn close_datagrams(
    sockets: Vec<Datagrams>,
    states: &SocketAccounting,
    order: &SweepRequest,
    pass: &mut SweepReport,
) -> Result<()> {
    sees_all_processes()?;
    let mut by_inode: HashMap<u64, Datagrams> =
        sockets.into_iter().map(|(diag, socket)| (socket.inode.into(), (diag, socket))).collect();
    for process in procfs::process::all_processes().map_err(io::Error::other).context("cannot read /proc")?.flatten() {
        if by_inode.is_empty() {
            break;
        }
        // Processes may exit and close descriptors during the scan.
        for (descriptor, inode) in descriptors(process.pid) {
            if !by_inode.contains_key(&inode) {
                continue;
            }
            // On failure, another process may share the socket.
            let Ok(borrowed) = borrow(process.pid, descriptor) else { continue };
            let Some((diag, socket)) = by_inode.remove(&inode) else { continue };
            // Without state, Portolan did not choose the socket's peer.
            let Ok(state) = sys::lookup_socket::<SocketState>(states.storage.fd(), &borrowed) else { continue };
            if state.backend == socket.peer
                && state.protocol == Protocol::Udp.number()
                && order.is_gone(Protocol::Udp, &state)
            {
                match diag.destroy(Protocol::Udp, &socket) {
                    Ok(true) => pass.count(Reason::Gone, Protocol::Udp, &state),
                    Ok(false) => {}
                    Err(error) => pass.trouble.push(format!("cannot close a UDP socket: {error}")),
                }
            }
        }
    }
    Ok(())
}

/// Returns the descriptors of a process with their inodes.
/// Reads `/proc/PID/fdinfo`, which requires only ptrace access, while `/proc/PID/fd` is restricted to the owner.
fn descriptors(process: i32) -> impl Iterator<Item = (i32, u64)> {
    let inode = |path: &Path| -> Option<u64> {
        let text = fs::read_to_string(path).ok()?;
        text.lines().find_map(|line| line.strip_prefix("ino:"))?.trim().parse().ok()
    };
    let entries = fs::read_dir(format!("/proc/{process}/fdinfo")).into_iter().flatten().flatten();
    entries.filter_map(move |entry| Some((entry.file_name().to_str()?.parse().ok()?, inode(&entry.path())?)))
}

/// Duplicates a descriptor of another process.
fn borrow(process: i32, descriptor: i32) -> Result<OwnedFd> {
    let process = Pid::from_raw(process).context("invalid process id")?;
    let process = pidfd_open(process, PidfdFlags::empty())?;
    Ok(pidfd_getfd(process, descriptor, PidfdGetfdFlags::empty())?)
}

impl SweepReport {
    fn count(&mut self, reason: Reason, protocol: Protocol, state: &SocketState) {
        *self.closed.entry((reason, protocol, state.backend.socket_addr())).or_default() += 1;
    }
}
