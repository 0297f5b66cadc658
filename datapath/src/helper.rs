//! The process that keeps privileges, for what cannot be done without: closing connections in the network namespaces of pods, saying whose such a
//! namespace is, and attaching the program that sees packets.
//!
//! The agent starts it before it gives up its own. It reads no objects and no requests; it is told nothing but [`SweepRequest`]s and [`HelperRequest`]s, and it ends with
//! the agent.

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

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rustix::thread::CapabilitySet;

use crate::{
    capabilities,
    netns::name_namespace,
    pins::{Pins, Set},
    programs::HTTP_INGRESS,
    sys,
    terminator::{SocketAccounting, SweepRequest, work},
    wire::{HelperRequest, HelperResponse, read, write},
};

/// The verb by which this program is the helper.
pub const VERB: &str = "helper";

/// An answer is waited for no longer than this.
const ANSWER: Duration = Duration::from_secs(10);

/// To enter namespaces and read sockets' states, to end connections and attach a program, to see whose processes are.
fn kept() -> CapabilitySet {
    CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN | CapabilitySet::SYS_PTRACE
}

/// What the helper is told at its start.
#[derive(Clone, Debug, clap::Args)]
pub struct HelperArgs {
    /// Folder of the pins
    bpffs: PathBuf,
    /// The cgroup that is served
    cgroup: PathBuf,
    /// The set of maps
    set: String,
    /// Descriptor of the program that sees packets
    packets: RawFd,
}

/// The helper, from outside.
#[derive(Clone)]
pub struct Helper(Arc<Inner>);

struct Inner {
    child: Child,
    asking: Mutex<HelperChannel>,
}

impl Helper {
    /// Starts it, from this program; and the way on which it takes orders to close.
    pub(crate) fn start(
        program: &Path,
        pins: &Pins,
        set: Set,
        cgroup: &Path,
        packets: BorrowedFd<'_>,
    ) -> Result<(Self, UnixStream)> {
        let (orders, theirs) = UnixStream::pair()?;
        let (asking, answering) = UnixStream::pair()?;
        asking.set_read_timeout(Some(ANSWER))?;
        let packets = packets.as_raw_fd();
        let mut command = Command::new(program);
        command.arg0("portolan").arg(VERB).arg(pins.root()).arg(cgroup).arg(set.folder()).arg(packets.to_string());
        command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::from(OwnedFd::from(answering)));
        // SAFETY: only a system call is made, on a descriptor that is open in this process and so in its copy.
        unsafe {
            command.pre_exec(move || {
                rustix::io::fcntl_setfd(BorrowedFd::borrow_raw(packets), rustix::io::FdFlags::empty())
                    .map_err(io::Error::from)
            });
        }
        let child = command.spawn().with_context(|| format!("cannot start {} {VERB}", program.display()))?;
        Ok((Self(Arc::new(Inner { child, asking: Mutex::new(HelperChannel { stream: asking, asked: 0 }) })), orders))
    }

    /// Whose the network namespace with this cookie is, for people: its first process, and the cgroup of that; or its name. `None` where it is
    /// gone, or not to be seen. May take some time.
    pub fn name_namespace(&self, cookie: u64) -> Option<String> {
        match self.ask(&HelperRequest::Name(cookie)) {
            Ok(HelperResponse::Named(name)) => name,
            _ => None,
        }
    }

    /// Attaches the program that sees packets, and pins its link.
    pub(crate) fn attach_packets(&self) -> Result<()> {
        match self.ask(&HelperRequest::Packets)? {
            HelperResponse::Attached(result) => result.map_err(|error| anyhow!(error)),
            HelperResponse::Named(_) => Err(anyhow!("the helper answers something else")),
        }
    }

    /// Each question has a number, for an answer that comes too late is not one to the next question.
    fn ask(&self, ask: &HelperRequest) -> Result<HelperResponse> {
        let mut asking = self.0.asking.lock().unwrap_or_else(PoisonError::into_inner);
        let HelperChannel { stream, asked } = &mut *asking;
        *asked += 1;
        write(stream, &(*asked, ask)).context("the helper cannot be asked")?;
        loop {
            match read::<(u64, HelperResponse)>(stream).context("the helper does not answer")? {
                Some((to, answer)) if to == *asked => return Ok(answer),
                Some(_) => {}
                None => bail!("the helper has ended"),
            }
        }
    }
}

/// The way to ask, and how often it was used.
struct HelperChannel {
    stream: UnixStream,
    asked: u64,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Whatever it is at, another one begins anew.
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

/// Is the helper, until the agent has ended.
///
/// # Errors
/// It was not started by an agent, or nobody listens any more.
pub fn serve(args: &HelperArgs) -> Result<()> {
    capabilities::retain_capabilities(kept()).context("cannot give up privileges")?;
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: to ignore a signal runs nothing. They are for the agent, and this process ends with it.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    let stream = |own: BorrowedFd<'_>| Ok::<_, io::Error>(UnixStream::from(own.try_clone_to_owned()?));
    let (mut orders, mut asks) = (stream(io::stdin().as_fd())?, stream(io::stdout().as_fd())?);
    ensure!(orders.peer_addr().is_ok(), "{VERB} is for agents to start");
    let pins = Pins::new(&args.bpffs);
    let set = Set::parse(&args.set).with_context(|| format!("{} is no set of maps", args.set))?;
    let states = SocketAccounting::open(&pins, set).context("cannot open the sockets' states")?;
    // SAFETY: the agent has left it open for this.
    let packets = unsafe { BorrowedFd::borrow_raw(args.packets) };

    let mut answers = orders.try_clone()?;
    let (sender, wanted) = channel();
    thread::Builder::new().name("closer".to_owned()).spawn(move || {
        work(&states, set.id, &wanted, |pass| write(&mut answers, &pass).is_ok());
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
    while let Some(order) = read::<SweepRequest>(&mut orders)? {
        sender.send(order)?;
    }
    Ok(())
}

/// The agent has ended.
fn end() -> ! {
    std::process::exit(0)
}

fn attach(cgroup: &Path, program: BorrowedFd<'_>, pin: &Path) -> io::Result<()> {
    sys::pin(sys::attach(File::open(cgroup)?, program, HTTP_INGRESS.attach_type)?, pin)
}
