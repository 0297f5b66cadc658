//! Terminates connections to removed or inactive endpoints, and connections that exceed the limits of their pool.
//!
//! The helper sweeps the sockets of every network namespace, once per batch of changes.
//! It terminates a socket only if the socket has Portolan state and that state matches the socket's peer.

pub(crate) mod accounting;
mod counts;
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
use portolan_core::{
    model::Protocol,
    table::{RemovedEndpoints, Sizes},
};
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
    accounting::{ConnectionUsage, Connections, Unconfirmed, Waiting},
    counts::Drifts,
    request::Action,
    sock_diag::Diag,
    socket::{Connected, Seen, State},
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
    counts::Reconciled,
    request::{ActiveEndpoints, Lifetime, RemovedEndpointTcp, SweepRequest},
};

/// With [`RemovedEndpointTcp::Idle`], a connection is idle after this long without sent or received data.
pub const IDLE: Duration = Duration::from_secs(5);

/// Rate limit: at most this many connections to inactive endpoints are closed per [`MOVE_INTERVAL`].
/// Their applications reconnect at once, all to the same endpoints.
const MAX_MOVES: u64 = 20;
const MOVE_INTERVAL: Duration = Duration::from_secs(1);

/// Interval between scans for entries of `CONNECTIONS` that no hook may ever free.
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
    pub errors: Vec<String>,
    /// Removed endpoints that may still have connected UDP sockets, because of errors. Request them again.
    pub unfinished: Option<RemovedEndpoints>,
}

/// Sockets that were closed, by reason and protocol.
pub type Closed = BTreeMap<(Reason, Protocol), u64>;

/// The agent's side of the sweeps, which the helper runs.
pub struct Terminator {
    usage: ConnectionUsage,
    requests: UnboundedSender<SweepRequest>,
    reports: UnboundedReceiver<SweepReport>,
}

impl Terminator {
    /// Opens the pinned socket state maps of `set`, and starts the tasks that talk to the helper over its socket.
    /// Must be called within a Tokio runtime.
    pub(super) fn start(pins: &Pins, set: Set, sizes: &Sizes, helper: UnixStream) -> Result<Self> {
        let usage = ConnectionUsage::open(pins, set, sizes).context("cannot open the socket state maps")?;
        helper.set_nonblocking(true)?;
        let (mut answers, mut asks) = tokio::net::UnixStream::from_std(helper)?.into_split();
        let (requests, mut pending) = unbounded_channel();
        let (report_sender, reports) = unbounded_channel();
        tokio::spawn(async move {
            while let Some(request) = pending.recv().await {
                match encode_frame(&request) {
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
                if report_sender.send(postcard::from_bytes(&bytes).map_err(io::Error::other)?).is_err() {
                    return io::Result::Ok(());
                }
            }
        });
        Ok(Self { usage, requests, reports })
    }

    /// Requests a sweep.
    /// If one is in progress, the next one follows it; requests that queue up meanwhile are merged into one.
    pub fn request(&self, request: SweepRequest) {
        // Fails only if the helper has exited, which `next_report` reports.
        let _ = self.requests.send(request);
    }

    /// Returns the usage of `CONNECTIONS`: the entries in use, the capacity, and the number of connections so far that
    /// found their pod's share used up.
    pub fn connection_slots(&self) -> (u32, u32, u64) {
        self.usage.read()
    }

    /// Waits for the next sweep to finish, and returns its report.
    ///
    /// # Errors
    /// Returns an error if the helper has exited.
    pub async fn next_report(&mut self) -> Result<SweepReport> {
        self.reports.recv().await.context("the helper exited, so connections can no longer be terminated")
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
    requests: &Receiver<SweepRequest>,
    mut done: impl FnMut(SweepReport) -> bool,
) {
    let own = File::open("/proc/thread-self/ns/net");
    let (mut waiting, mut reaped_at) = (Waiting::default(), Instant::now());
    let (mut client_drifts, mut reaping_error) = (Drifts::new(), None);
    let mut unconfirmed = Unconfirmed::default();
    let (mut moves, mut moves_since) = (MAX_MOVES, Instant::now());
    loop {
        if reaped_at.elapsed() >= REAP_INTERVAL {
            reaped_at = Instant::now();
            let result = reap_abandoned(states, &mut waiting, &mut client_drifts, reaped_at);
            let error = result.err().map(|error| format!("{error:#}"));
            // It lasts as long as its cause, so say it once.
            if let Some(why) = error.as_ref().filter(|_| error != reaping_error) {
                tracing::warn!("cannot reclaim abandoned entries of CONNECTIONS: {why}");
            }
            reaping_error = error;
        }
        let request = match requests.recv_timeout(REAP_INTERVAL) {
            Ok(request) => request,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let request = requests.try_iter().fold(request, SweepRequest::followed_by);
        let closing = request.looks_for_removed() || request.looks_for_outlived();
        let mut report = SweepReport { closing, counting: request.recount, ..SweepReport::default() };
        if moves_since.elapsed() >= MOVE_INTERVAL {
            (moves, moves_since) = (MAX_MOVES, Instant::now());
        }
        report.moves = moves;
        let connections = match states.connections() {
            Ok(connections) => connections,
            Err(error) => {
                report.errors.push(format!("cannot read the state of connections: {error:#}"));
                report.unfinished = request.removed_udp;
                if done(report) {
                    continue;
                }
                return;
            }
        };
        let mut datagrams = Vec::new();
        let mut before = None;
        if request.recount {
            match sees_all_processes().and_then(|()| connections.before_list(&mut unconfirmed)) {
                Ok(now) => before = Some((now, Seen::nothing())),
                Err(error) => report.errors.push(format!("cannot count connections: {error:#}")),
            }
        }
        let mut seen = before.as_mut().map(|(_, seen)| seen);
        for (path, namespace) in namespaces(&mut report.errors) {
            report.namespaces += 1;
            match one_namespace(&namespace, (&connections, set), &request, seen.as_deref_mut(), &mut report) {
                Ok(found) => datagrams.extend(found),
                Err(error) => report.errors.push(format!("{}: {error:#}", path.display())),
            }
        }
        moves = report.moves;
        // A thread keeps the namespace that it is in alive, so leave the last one.
        if let Err(error) = own.as_ref().map_err(|error| error.to_string()).and_then(|own| {
            let back = move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::Network));
            back.map_err(|error| error.to_string())
        }) {
            report.errors.push(format!("cannot return to the original network namespace: {error}"));
        }
        if !datagrams.is_empty()
            && let Err(error) = close_datagrams(datagrams, &connections, &request, &mut report)
        {
            report.errors.push(format!("cannot close UDP sockets of removed endpoints: {error:#}"));
        }
        // A partial list of sockets proves nothing, so reconcile only after a sweep without errors.
        if let Some((before, seen)) = before.filter(|_| report.errors.is_empty()) {
            match connections.recount(before, &seen, &mut unconfirmed) {
                Ok(recounted) => report.recounted = Some(recounted),
                Err(error) => report.errors.push(format!("cannot reconcile connection counts: {error:#}")),
            }
        }
        if !report.errors.is_empty() {
            report.unfinished = request.removed_udp;
        }
        if !done(report) {
            return;
        }
    }
}

/// Frees the entries of sockets that ended without any hook seeing it, and corrects the clients' shares.
fn reap_abandoned(
    states: &SocketAccounting,
    waiting: &mut Waiting,
    client_drifts: &mut Drifts,
    now: Instant,
) -> Result<()> {
    let connections = states.connections()?;
    let corrected = connections.recount_clients(client_drifts)?;
    if corrected > 0 {
        tracing::info!("corrected the shares of CONNECTIONS that {corrected} clients use");
    }
    let old = waiting.abandoned(&connections.all()?, now);
    if old.is_empty() {
        return Ok(());
    }
    sees_all_processes()?;
    let own = File::open("/proc/thread-self/ns/net")?;
    let (mut seen, mut trouble) = (Seen::nothing(), Vec::new());
    let counted = namespaces(&mut trouble).into_iter().try_for_each(|(_, namespace)| {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        let diag = Diag::open()?;
        diag.count(&connections, &mut seen)?;
        seen.cookies.extend(diag.datagrams()?.iter().map(Connected::cookie));
        Ok(())
    });
    move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::Network))?;
    counted.and_then(|()| trouble.pop().map_or(Ok(()), |why| Err(Error::State(why))))?;
    let gone = waiting.gone(&old, now, |entry| seen.has(entry));
    gone.into_iter().try_for_each(|entry| connections.free(entry).map(drop))
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
    (states, set): (&Connections<'_>, u32),
    request: &SweepRequest,
    seen: Option<&mut Seen>,
    report: &mut SweepReport,
) -> Result<Vec<Datagrams>> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).context("cannot enter namespace")?;
    let diag = Rc::new(Diag::open()?);
    if let Some(seen) = seen {
        diag.count(states, seen).context("cannot list TCP connections")?;
    }
    if request.removed_endpoint_tcp != RemovedEndpointTcp::Keep || request.looks_for_outlived() {
        for connection in diag.connections(states).context("cannot list TCP connections")? {
            let reason = match request.action_for(&connection, set) {
                Action::Keep => continue,
                Action::Wait(left) => {
                    report.wait = Some(report.wait.map_or(left, |wait| wait.min(left)));
                    continue;
                }
                Action::Close(Reason::Inactive) if report.moves == 0 => {
                    report.wait = Some(report.wait.map_or(MOVE_INTERVAL, |wait| wait.min(MOVE_INTERVAL)));
                    continue;
                }
                Action::Close(reason) => reason,
            };
            report.moves -= u64::from(reason == Reason::Inactive);
            if diag.destroy(Protocol::Tcp, &connection.socket).context("cannot close TCP connections")? {
                report.count(reason, Protocol::Tcp, &connection.state);
            }
        }
    }
    let Some(gone) = &request.removed_udp else { return Ok(Vec::new()) };
    let connected = diag.datagrams().context("cannot list UDP sockets")?.into_iter();
    let may_be = connected.filter(|socket| gone.may_be(&socket.peer.socket_addr()));
    Ok(may_be.map(|socket| (Rc::clone(&diag), socket)).collect())
}

/// Closes those UDP sockets whose Portolan state matches the request.
/// `sock_diag` does not report socket storage for UDP, so a socket that has its state there is duplicated from a process
/// that owns it.
fn close_datagrams(
    sockets: Vec<Datagrams>,
    states: &Connections<'_>,
    request: &SweepRequest,
    report: &mut SweepReport,
) -> Result<()> {
    let mut by_inode: HashMap<u64, Datagrams> = HashMap::new();
    for (diag, socket) in sockets {
        match states.connection(socket.cookie()) {
            Some(state) => close_datagram((&diag, &socket), &state, request, report),
            None => drop(by_inode.insert(socket.inode.into(), (diag, socket))),
        }
    }
    if by_inode.is_empty() || !states.accounting().uses_storage() {
        return Ok(());
    }
    sees_all_processes()?;
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
            let Ok(stored) = sys::lookup_socket::<SocketState>(states.accounting().storage.fd(), &borrowed) else {
                continue;
            };
            close_datagram((&diag, &socket), &State::new(&stored.connection, &stored.extra), request, report);
        }
    }
    Ok(())
}

/// Closes a UDP socket if its state matches both its peer and the request.
fn close_datagram(
    (diag, socket): (&Diag, &Connected),
    state: &State,
    request: &SweepRequest,
    report: &mut SweepReport,
) {
    if state.backend != socket.peer || !state.is_udp() || !request.is_gone(Protocol::Udp, state) {
        return;
    }
    match diag.destroy(Protocol::Udp, socket) {
        Ok(true) => report.count(Reason::Gone, Protocol::Udp, state),
        Ok(false) => {}
        Err(error) => report.errors.push(format!("cannot close a UDP socket: {error}")),
    }
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
    fn count(&mut self, reason: Reason, protocol: Protocol, state: &State) {
        *self.closed.entry((reason, protocol, state.backend.socket_addr())).or_default() += 1;
    }
}
