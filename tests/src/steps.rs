//! A process that can be killed just before any of its steps: the system calls that change state that outlives it.
//!
//! A seccomp filter reports each step to a listener, and the process pauses until the listener lets it continue.

use std::{
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::{net::UnixDatagram, process::CommandExt as _},
    },
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The effect of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Creates a map.
    MakeMap,
    /// Loads a program, which includes verification.
    LoadProgram,
    /// Pins a map or a link.
    Pin,
    /// Attaches a program with a new link.
    MakeLink,
    /// Replaces the program of a link.
    UpdateLink,
    /// Creates a directory or symbolic link, or renames or removes a file, a directory, or a pin.
    Files,
}

/// `bpf()` commands that are steps.
const COMMANDS: [(u32, Step); 5] =
    [(0, Step::MakeMap), (5, Step::LoadProgram), (6, Step::Pin), (28, Step::MakeLink), (29, Step::UpdateLink)];
/// File system calls that are steps.
const FILES: [libc::c_long; 5] =
    [libc::SYS_symlinkat, libc::SYS_renameat, libc::SYS_renameat2, libc::SYS_unlinkat, libc::SYS_mkdirat];
/// Legacy file system calls, which x86-64 also has.
#[cfg(target_arch = "x86_64")]
const FILES_TOO: [libc::c_long; 5] =
    [libc::SYS_symlink, libc::SYS_rename, libc::SYS_unlink, libc::SYS_rmdir, libc::SYS_mkdir];
#[cfg(not(target_arch = "x86_64"))]
const FILES_TOO: [libc::c_long; 0] = [];

/// `_IOWR('!', 0, struct seccomp_notif)`
const RECEIVE: libc::Ioctl = 0xc050_2100_u32 as libc::Ioctl;
/// `_IOWR('!', 1, struct seccomp_notif_resp)`
const ANSWER: libc::Ioctl = 0xc018_2101_u32 as libc::Ioctl;

/// A process that pauses before each of its steps.
#[derive(Debug)]
pub struct Steps {
    listener: OwnedFd,
}

/// The listener of a program that has not been started yet.
#[derive(Debug)]
pub struct Watch {
    listener: UnixDatagram,
}

impl Watch {
    /// Makes the program pause before each step, from its first instruction on.
    ///
    /// # Errors
    /// Returns an error if the socket pair that passes the listener cannot be created.
    pub fn before(command: &mut Command) -> Result<Self> {
        let (own, childs) = UnixDatagram::pair()?;
        let filter = filter();
        // SAFETY: the closure only makes system calls with memory and descriptors from before the fork.
        unsafe {
            command.pre_exec(move || {
                let listener = install(&filter)?;
                send(childs.as_fd(), listener)
            });
        }
        Ok(Self { listener: own })
    }

    /// Returns the steps. The program must have been started.
    ///
    /// # Errors
    /// Returns an error if the program does not send its listener within a second.
    pub fn started(self) -> Result<Steps> {
        self.listener.set_read_timeout(Some(Duration::from_secs(1)))?;
        let listener = receive(self.listener.as_fd()).context("received no seccomp listener from the program")?;
        Ok(Steps { listener })
    }
}

impl Steps {
    /// Returns the next step and its ID; the process pauses until [`Self::go_on`] gets that ID.
    /// Returns `None` if the process takes no step within `bound`, or has exited.
    ///
    /// # Errors
    /// Returns an error if the kernel rejects the request.
    pub fn next(&self, bound: Duration) -> Result<Option<(Step, u64)>> {
        let mut ready = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, PollTimeout::try_from(bound)?)? == 0 {
            return Ok(None);
        }
        if !ready[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN)) {
            return Ok(None);
        }
        // SAFETY: all fields are integers, and the kernel requires them to be zero.
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes a `seccomp_notif` into a value of that type.
        if unsafe { libc::ioctl(self.listener.as_raw_fd(), RECEIVE, &raw mut call) } != 0 {
            let error = io::Error::last_os_error();
            // The process was killed in the meantime.
            return if error.raw_os_error() == Some(libc::ENOENT) { Ok(None) } else { Err(error.into()) };
        }
        let step = if libc::c_long::from(call.data.nr) == libc::SYS_bpf {
            COMMANDS.iter().find(|(command, _)| u64::from(*command) == call.data.args[0]).map(|(_, step)| *step)
        } else {
            Some(Step::Files)
        };
        Ok(Some((step.context("the filter reported an unexpected bpf() command")?, call.id)))
    }

    /// Lets the process take the step with this ID.
    ///
    /// # Errors
    /// Returns an error if the kernel rejects the reply, unless the process has exited.
    pub fn go_on(&self, id: u64) -> Result<()> {
        let answer =
            libc::seccomp_notif_resp { id, val: 0, error: 0, flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32 };
        // SAFETY: the kernel reads a `seccomp_notif_resp` from a value of that type.
        if unsafe { libc::ioctl(self.listener.as_raw_fd(), ANSWER, &raw const answer) } != 0 {
            let error = io::Error::last_os_error();
            ensure!(error.raw_os_error() == Some(libc::ENOENT), "cannot resume the process: {error}");
        }
        Ok(())
    }
}

/// Builds the filter, which reports steps to the listener and allows everything else.
fn filter() -> Vec<libc::sock_filter> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const IS: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let op = |code, k: u32| libc::sock_filter { code, jt: 0, jf: 0, k };
    // A comparison that fails skips the instruction after it, which notifies the listener.
    let ask_if = |k: u32| [libc::sock_filter { code: IS, jt: 0, jf: 1, k }, op(RETURN, libc::SECCOMP_RET_USER_NOTIF)];
    let mut program = vec![op(LOAD, 0)];
    for call in FILES.into_iter().chain(FILES_TOO) {
        program.extend(ask_if(call as u32));
    }
    let commands = COMMANDS.iter().flat_map(|(command, _)| ask_if(*command));
    let commands: Vec<libc::sock_filter> = [op(LOAD, 16)].into_iter().chain(commands).collect();
    program.push(libc::sock_filter { code: IS, jt: 0, jf: commands.len() as u8, k: libc::SYS_bpf as u32 });
    program.extend(commands);
    program.push(op(RETURN, libc::SECCOMP_RET_ALLOW));
    program
}

/// Installs the filter in this process, and returns the listener's descriptor.
fn install(filter: &[libc::sock_filter]) -> io::Result<RawFd> {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program outlives the call, which reads it.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    if listener < 0 { Err(io::Error::last_os_error()) } else { Ok(listener as RawFd) }
}

/// Space for one descriptor in a control message.
#[repr(C, align(8))]
struct Room([u8; 24]);

/// Calls `with` with a message of one byte and one descriptor, to send or to receive.
fn message<T>(with: impl FnOnce(&mut libc::msghdr) -> T) -> T {
    let (mut byte, mut room) = (0u8, Room([0; 24]));
    let mut data = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: the fields are integers and pointers, for all of which zero is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut data;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut room.0).cast();
    message.msg_controllen = room.0.len() as _;
    with(&mut message)
}

/// Sends a descriptor. This runs between fork and exec, so it must not allocate.
fn send(socket: BorrowedFd<'_>, fd: RawFd) -> io::Result<()> {
    message(|message| {
        // SAFETY: the message has room for a header and a descriptor.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(4) as _;
            libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(fd);
            if libc::sendmsg(socket.as_raw_fd(), message, 0) == 1 { Ok(()) } else { Err(io::Error::last_os_error()) }
        }
    })
}

fn receive(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    message(|message| {
        // SAFETY: as above. The message is one that `send` built, or is empty.
        unsafe {
            if libc::recvmsg(socket.as_raw_fd(), message, libc::MSG_CMSG_CLOEXEC) != 1 {
                return Err(io::Error::last_os_error());
            }
            let header = libc::CMSG_FIRSTHDR(message);
            if header.is_null() {
                return Err(io::ErrorKind::InvalidData.into());
            }
            Ok(OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned()))
        }
    })
}
