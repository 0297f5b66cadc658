//! The test client; see `portolan_tests::dial`.

mod datagrams;
mod ways;

use std::{
    io::{self, BufRead as _, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::AsFd as _,
    sync::mpsc::{self, Receiver, TryRecvError},
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use portolan_tests::dial::{Reply, Seen, Task};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, Socket, Type};

/// Time limit for a connect and for a read.
const LIMIT: Duration = Duration::from_secs(30);

fn main() -> Result<()> {
    let (sender, tasks) = mpsc::channel();
    thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(io::Result::ok) {
            let Ok(task) = serde_json::from_str::<Task>(&line) else { break };
            if sender.send(task).is_err() {
                break;
            }
        }
    });
    let mut held = Held::default();
    while let Ok(task) = tasks.recv() {
        let reply = run(&task, &tasks, &mut held)?;
        let mut out = io::stdout().lock();
        writeln!(out, "{}", serde_json::to_string(&reply)?)?;
        out.flush()?;
    }
    Ok(())
}

fn run(task: &Task, tasks: &Receiver<Task>, held: &mut Held) -> Result<Reply> {
    let mut reply = Reply::default();
    match task {
        Task::Dial { to, times, mapped, nonblocking, send } => {
            let to = if *mapped { mapped_form(*to) } else { *to };
            reply.seen = (0..*times).map(|_| dial(to, *nonblocking, *send)).collect();
        }
        Task::Redial { to, then } => {
            let socket = Socket::new(Domain::for_address(*to), Type::STREAM, None)?;
            for (i, to) in [to, then].into_iter().enumerate() {
                if i > 0 {
                    rustix::net::connect_unspec(socket.as_fd())?;
                }
                let errno = errno(socket.connect(&(*to).into()));
                let peer = socket.peer_addr().ok().and_then(|peer| peer.as_socket());
                reply.seen.push(Seen { peer, errno, ..Seen::default() });
            }
        }
        Task::GiveUp { to } => {
            let socket = Socket::new(Domain::for_address(*to), Type::STREAM, None)?;
            socket.set_nonblocking(true)?;
            let errno = errno(socket.connect(&(*to).into()));
            reply.seen.push(Seen { errno, ..Seen::default() });
        }
        Task::Load { to } => {
            while matches!(tasks.try_recv(), Err(TryRecvError::Empty)) {
                reply.add(&dial(*to, false, 0));
            }
        }
        Task::Repeat { to, times } => (0..*times).for_each(|_| reply.add(&dial_and_reset(*to))),
        Task::Stop => {}
        Task::Hold { to, times } => {
            for _ in 0..*times {
                let socket = Socket::new(Domain::for_address(*to), Type::STREAM, None)?;
                let errno = errno(socket.connect(&(*to).into()));
                reply.seen.push(Seen { errno, ..Seen::default() });
                if errno == 0 {
                    held.sockets.push((socket, 0));
                }
            }
        }
        Task::BoundToLoopback { to, times, keep } => {
            raise_descriptor_limit()?;
            for _ in 0..*times {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
                socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
                match errno(socket.connect(&(*to).into())) {
                    libc::EINVAL => reply.good += 1,
                    _ => reply.bad += 1,
                }
                if *keep {
                    held.sockets.push((socket, 0));
                }
            }
        }
        Task::HoldDatagram { to, mapped, then } => {
            let to = if *mapped { mapped_form(*to) } else { *to };
            let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None)?;
            for to in [Some(to), *then].into_iter().flatten() {
                let errno = errno(socket.connect(&to.into()));
                let peer = socket.peer_addr().ok().and_then(|peer| peer.as_socket());
                reply.seen.push(Seen { peer, errno, ..Seen::default() });
            }
            held.sockets.push((socket, 0));
        }
        Task::Become { uid } => become_user(*uid)?,
        Task::Held => reply.seen = held.sockets.iter_mut().map(socket_state).collect::<Result<_>>()?,
        Task::Release => held.sockets.clear(),
        Task::Datagrams { to, times, from, mapped } => {
            let to = if *mapped { mapped_form(*to) } else { *to };
            (reply.seen, reply.value) = datagrams::send(to, *times, *from, &mut held.kept)?;
        }
        Task::DatagramsAround { to, times } => reply.seen = datagrams::around(to, *times)?,
        Task::Reuse { to, then } => reply.seen = datagrams::reuse(*to, *then)?,
        Task::Dialed { to, way } => reply.seen.push(ways::dial(*to, *way)?),
        Task::Keepalive { to, own } => {
            let socket = Socket::new(Domain::for_address(*to), Type::STREAM, None)?;
            socket.set_keepalive(*own)?;
            reply.seen.push(Seen { errno: errno(socket.connect(&(*to).into())), ..Seen::default() });
            let seconds = |time: Duration| time.as_secs() as u32;
            reply.values = vec![
                socket.keepalive()?.into(),
                seconds(socket.tcp_keepalive_time()?),
                seconds(socket.tcp_keepalive_interval()?),
                socket.tcp_keepalive_retries()?,
            ];
        }
        Task::UserTimeout { to, own } => {
            let socket = Socket::new(Domain::for_address(*to), Type::STREAM, None)?;
            if *own > 0 {
                socket.set_tcp_user_timeout(Some(Duration::from_millis((*own).into())))?;
            }
            reply.seen.push(Seen { errno: errno(socket.connect(&(*to).into())), ..Seen::default() });
            reply.value = socket.tcp_user_timeout()?.map_or(0, |timeout| timeout.as_millis() as u32);
        }
    }
    Ok(reply)
}

/// Allows this process as many descriptors as the system does.
fn raise_descriptor_limit() -> io::Result<()> {
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    Ok(rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit { current: most, maximum: most },
    )?)
}

/// Sockets that outlive the task that created them.
#[derive(Default)]
struct Held {
    /// Each with its last error (0 for none), because the kernel reports an error only once.
    sockets: Vec<(Socket, i32)>,
    /// Socket of `Sender::Kept` and `Sender::KeptConnected`.
    kept: Option<UdpSocket>,
}

/// Returns the state of a socket: no error while it is open, ENOTCONN if the peer closed it, or the socket's error.
fn socket_state((socket, ended): &mut (Socket, i32)) -> Result<Seen> {
    if let Some(error) = socket.take_error()?.and_then(|error| error.raw_os_error()) {
        *ended = error;
    }
    let mut poll_for = [PollFd::new(socket, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let readable = *ended == 0 && poll(&mut poll_for, Some(&now))? > 0;
    let peer = socket.peer_addr().ok().and_then(|peer| peer.as_socket());
    Ok(Seen { peer, errno: if readable { libc::ENOTCONN } else { *ended }, ..Seen::default() })
}

fn mapped_form(to: SocketAddr) -> SocketAddr {
    match to.ip() {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), to.port()),
        IpAddr::V6(_) => to,
    }
}

fn dial(to: SocketAddr, nonblocking: bool, send: usize) -> Seen {
    match connect(to, nonblocking) {
        Err(error) => Seen { errno: error.raw_os_error().unwrap_or(-1), ..Seen::default() },
        Ok(mut stream) => {
            let peer = stream.peer_addr().ok();
            let mut greeting = String::new();
            let talk = stream
                .set_read_timeout(Some(LIMIT))
                .and_then(|()| stream.write_all(&vec![b'x'; send]))
                .and_then(|()| stream.shutdown(std::net::Shutdown::Write))
                .and_then(|()| stream.read_to_string(&mut greeting));
            Seen { peer, greeting, errno: errno(talk.map(drop)) }
        }
    }
}

/// Reads the greeting and resets the connection, so that its port is free again at once.
fn dial_and_reset(to: SocketAddr) -> Seen {
    let mut greeting = String::new();
    let talk = connect(to, false).and_then(|mut stream| {
        stream.set_read_timeout(Some(LIMIT))?;
        stream.read_to_string(&mut greeting)?;
        Socket::from(stream).set_linger(Some(Duration::ZERO))
    });
    Seen { greeting, errno: errno(talk), ..Seen::default() }
}

fn connect(to: SocketAddr, nonblocking: bool) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_nonblocking(nonblocking)?;
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
            let limit = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
            poll(&mut [PollFd::new(&socket, PollFlags::OUT)], Some(&limit))?;
            if let Some(error) = socket.take_error()? {
                return Err(error);
            }
        }
        result => result?,
    }
    socket.set_nonblocking(false)?;
    Ok(socket.into())
}

fn errno(result: io::Result<()>) -> i32 {
    result.err().map_or(0, |error| error.raw_os_error().unwrap_or(-1))
}

/// Switches to another user, who then also owns this process's /proc entries.
fn become_user(uid: u32) -> Result<()> {
    // SAFETY: system calls without pointers.
    let done = unsafe { libc::setresgid(uid, uid, uid) == 0 && libc::setresuid(uid, uid, uid) == 0 };
    ensure!(done, io::Error::last_os_error());
    // Changing the user resets both.
    for (option, value) in [(libc::PR_SET_DUMPABLE, 1), (libc::PR_SET_PDEATHSIG, libc::SIGKILL)] {
        // SAFETY: as above.
        ensure!(unsafe { libc::prctl(option, value) } == 0, io::Error::last_os_error());
    }
    Ok(())
}
