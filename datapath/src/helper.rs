//! The privileged helper process.
//!
//! It does the three things that need capabilities: it terminates connections in the network namespaces of pods, finds
//! the owner of such a namespace, and attaches the packet program.
//!
//! The agent starts the helper before it drops its own capabilities.
//! The helper parses no Kubernetes objects and no HTTP requests; its only input is [`SweepRequest`]s and
//! [`HelperRequest`]s from the agent, and it exits with the agent.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
        unix::{net::UnixStream, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError, mpsc::channel},
    thread,
    time::Duration,
};

use portolan_core::table::Sizes;
use rustix::thread::CapabilitySet;

use crate::{
    capabilities,
    error::{Context as _, Error, Result, bail, ensure},
    netns::name_namespace,
    pins::{Pins, Set},
    programs::HTTP_INGRESS,
    sys,
    terminator::{SocketAccounting, SweepRequest, work},
    wire::{HelperRequest, HelperResponse, read, write},
};

/// The subcommand that runs this executable as the helper.
pub const VERB: &str = "helper";

/// How long the agent waits for a response from the helper.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// The capabilities that the helper retains.
///
/// - `SYS_ADMIN` to enter namespaces and read socket storage
/// - `NET_ADMIN` to terminate connections and attach the packet program
/// - `SYS_PTRACE` to find the processes that own sockets and namespaces
fn retained_capabilities() -> CapabilitySet {
    CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN | CapabilitySet::SYS_PTRACE
}

/// Command-line arguments of the helper.
#[derive(Clone, Debug, clap::Args)]
pub struct HelperArgs {
    /// Directory of the pins, on a bpffs
    bpffs: PathBuf,
    /// The cgroup whose processes are served
    cgroup: PathBuf,
    /// Directory name of the map set, e.g. v4-17
    set: String,
    /// Number of entries of the map with the state of connections
    connections: u32,
    /// Inherited file descriptor of the loaded packet program
    packets: RawFd,
}

/// The agent's handle to the helper process, which is killed when the last clone is dropped.
#[derive(Clone)]
pub struct Helper(Arc<Inner>);

struct Inner {
    child: Child,
    channel: Mutex<HelperChannel>,
}

impl Helper {
    /// Starts the helper from the executable `program`. Also returns the socket for its sweep requests.
    pub(crate) fn start(
        program: &Path,
        pins: &Pins,
        (set, sizes): (Set, &Sizes),
        cgroup: &Path,
        packets: BorrowedFd<'_>,
    ) -> Result<(Self, UnixStream)> {
        let (sweep_channel, sweep_peer) = UnixStream::pair()?;
        let (requests, requests_peer) = UnixStream::pair()?;
        requests.set_read_timeout(Some(RESPONSE_TIMEOUT))?;
        let packets = packets.as_raw_fd();
        let mut command = Command::new(program);
        command.arg0("portolan").arg(VERB).arg(pins.root()).arg(cgroup).arg(set.folder());
        command.arg(sizes.connections.to_string()).arg(packets.to_string());
        command.stdin(Stdio::from(OwnedFd::from(sweep_peer))).stdout(Stdio::from(OwnedFd::from(requests_peer)));
        // SAFETY: the closure only makes a system call, on a descriptor that the child inherits.
        unsafe {
            command.pre_exec(move || {
                rustix::io::fcntl_setfd(BorrowedFd::borrow_raw(packets), rustix::io::FdFlags::empty())
                    .map_err(io::Error::from)
            });
        }
        let child = command.spawn().with_context(|| format!("cannot start {} {VERB}", program.display()))?;
        let channel = Mutex::new(HelperChannel { stream: requests, sequence: 0 });
        Ok((Self(Arc::new(Inner { child, channel })), sweep_channel))
    }

    /// Describes the owner of the network namespace with this cookie, for display.
    ///
    /// Returns its first process and the cgroup of that, or the path of a named namespace.
    /// Returns `None` if the namespace no longer exists, is not visible, or the helper does not respond.
    /// Blocks while the helper scans all namespaces.
    pub fn name_namespace(&self, cookie: u64) -> Option<String> {
        match self.ask(&HelperRequest::Name(cookie)) {
            Ok(HelperResponse::Named(name)) => name,
            _ => None,
        }
    }

    /// Has the helper attach the packet program and pin its link.
    pub(crate) fn attach_packets(&self) -> Result<()> {
        match self.ask(&HelperRequest::Packets)? {
            HelperResponse::Attached(result) => result.map_err(Error::State),
            HelperResponse::Named(_) => Err(Error::State("unexpected response from the helper".to_owned())),
        }
    }

    /// Sends a request and waits for its response.
    /// The sequence number tells a late response to an earlier request from the one that is awaited.
    fn ask(&self, ask: &HelperRequest) -> Result<HelperResponse> {
        let mut channel = self.0.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let HelperChannel { stream, sequence } = &mut *channel;
        *sequence += 1;
        write(stream, &(*sequence, ask)).context("cannot send a request to the helper")?;
        loop {
            match read::<(u64, HelperResponse)>(stream).context("no response from the helper")? {
                Some((to, answer)) if to == *sequence => return Ok(answer),
                Some(_) => {}
                None => bail!("the helper exited"),
            }
        }
    }
}

/// The stream for requests, and the sequence number of the last one.
struct HelperChannel {
    stream: UnixStream,
    sequence: u64,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Killing it midway is safe: the next helper starts from scratch.
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

/// Runs as the helper until the agent exits.
///
/// # Errors
/// Returns an error if this process was not started by an agent, cannot open the pinned maps, or fails to read a
/// request.
pub fn serve(args: &HelperArgs) -> Result<()> {
    capabilities::retain_capabilities(retained_capabilities()).context("cannot drop capabilities")?;
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: ignoring a signal runs no handler.
        // These signals are for the agent; this process exits with it.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    let stream = |own: BorrowedFd<'_>| Ok::<_, io::Error>(UnixStream::from(own.try_clone_to_owned()?));
    let (mut sweep_channel, mut asks) = (stream(io::stdin().as_fd())?, stream(io::stdout().as_fd())?);
    ensure!(sweep_channel.peer_addr().is_ok(), "`{VERB}` is internal and can only be started by the agent");
    let pins = Pins::new(&args.bpffs);
    let set = Set::parse(&args.set).with_context(|| format!("{} is not the name of a map set", args.set))?;
    let sizes = Sizes { connections: args.connections, ..Sizes::default() };
    let states = SocketAccounting::open(&pins, set, &sizes).context("cannot open the socket state maps")?;
    // SAFETY: the agent leaves this descriptor open for the helper.
    let packets = unsafe { BorrowedFd::borrow_raw(args.packets) };

    let mut answers = sweep_channel.try_clone()?;
    let (sender, sweeps) = channel();
    thread::Builder::new().name("terminator".to_owned()).spawn(move || {
        work(&states, set.id, &sweeps, |report| write(&mut answers, &report).is_ok());
        end();
    })?;
    let cgroup = args.cgroup.clone();
    thread::Builder::new().name("answers".to_owned()).spawn(move || {
        while let Ok(Some((number, ask))) = read::<(u64, HelperRequest)>(&mut asks) {
            let answer = match ask {
                HelperRequest::Name(cookie) => HelperResponse::Named(name_namespace(cookie)),
                HelperRequest::Packets => {
                    let attached = attach(&cgroup, packets, &pins.link(HTTP_INGRESS.name));
                    HelperResponse::Attached(attached.map_err(|error| error.to_string()))
                }
            };
            if write(&mut asks, &(number, answer)).is_err() {
                break;
            }
        }
        end();
    })?;
    while let Some(request) = read::<SweepRequest>(&mut sweep_channel)? {
        if sender.send(request).is_err() {
            bail!("the terminator thread has ended");
        }
    }
    Ok(())
}

/// Exits with status 0, because the agent has exited.
fn end() -> ! {
    std::process::exit(0)
}

fn attach(cgroup: &Path, program: BorrowedFd<'_>, pin: &Path) -> io::Result<()> {
    sys::pin(sys::attach(File::open(cgroup)?, program, HTTP_INGRESS.attach_type)?, pin)
}
