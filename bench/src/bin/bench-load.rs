//! The benchmark's load generator and server.
//! Both read tasks from stdin, one JSON object per line, and answer each with a line on stdout.
//!
//! `bench-load client CPU` generates load.
//! `bench-load server CPU [--answer BYTE] ADDRESS:PORT…` listens on three consecutive ports of each address:
//!
//! 1. Echo, over TCP and UDP. Over TCP, `--answer BYTE` replaces every byte with this one.
//! 2. Sink: discards what it receives, and sends one byte after each MiB.
//! 3. Queue: connections wait in the listen queue until [`Task::Empty`] accepts all of them.

use std::{
    collections::HashMap,
    io::{self, BufRead as _, ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use portolan_bench::task::{Measurement, Task, Watched};
use rustix::{
    event::epoll,
    process::{Resource, getrlimit, setrlimit},
    thread::{CpuSet, sched_setaffinity},
    time::{ClockId, clock_gettime},
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Listen backlog of the server (the default of `net.core.somaxconn`).
const QUEUE: i32 = 4_096;
const MIB: usize = 1 << 20;
/// Stack size of the threads of a watch, in bytes.
const STACK: usize = 128 << 10;
/// Time for all threads of a watch to start.
const START: Duration = Duration::from_millis(300);
/// Timeout of connects and reads; a request that hangs longer counts as failed.
const TIMEOUT: Duration = Duration::from_secs(2);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["client", cpu] => {
            pin(cpu)?;
            let mut held = Vec::new();
            tasks(|task| client(task, &mut held))
        }
        ["server", cpu, "--answer", byte, ref addresses @ ..] => server(cpu, addresses, Some(byte.parse()?)),
        ["server", cpu, ref addresses @ ..] => server(cpu, addresses, None),
        _ => bail!("usage: bench-load client CPU | server CPU [--answer BYTE] ADDRESS:PORT…"),
    }
}

fn pin(cpu: &str) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu.parse()?);
    Ok(sched_setaffinity(None, &set)?)
}

/// Lets the calling thread run on all CPUs.
fn unpin() -> Result<()> {
    let mut set = CpuSet::new();
    (0..CpuSet::MAX_CPU).for_each(|cpu| set.set(cpu));
    Ok(sched_setaffinity(None, &set)?)
}

fn tasks(mut work: impl FnMut(Task) -> Result<Measurement>) -> Result<()> {
    for line in io::stdin().lock().lines() {
        let answer = work(serde_json::from_str(&line?)?)?;
        let mut out = io::stdout().lock();
        serde_json::to_writer(&mut out, &answer)?;
        writeln!(out)?;
        out.flush()?;
    }
    Ok(())
}

/// Runs a task. `held` are the connections that stay open after it.
fn client(task: Task, held: &mut Vec<Socket>) -> Result<Measurement> {
    let (began, spent_before) = (Instant::now(), spent());
    let mut answer = match task {
        Task::Connect { to, count, rate } => {
            let to = SockAddr::from(to);
            of_connects(count, |_| &to, rate)?
        }
        Task::ConnectEach { to, first, count } => {
            let to: Vec<SockAddr> = to.into_iter().map(SockAddr::from).collect();
            of_connects(count, |i| &to[(first + i) % to.len()], None)?
        }
        Task::Refused { to, count } => {
            let to = SockAddr::from(to);
            each(count, |_| match stream_socket(&to)?.connect(&to) {
                Ok(()) => bail!("a connect succeeded that should have been refused"),
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
                Err(error) => Err(error.into()),
            })?
        }
        Task::Hold { to, count } => {
            ensure!(count <= QUEUE as usize, "{count} connections exceed the server's listen backlog of {QUEUE}");
            let to = SockAddr::from(to);
            allow_descriptors(held.len() + count)?;
            each(count, |_| {
                let socket = stream_socket(&to)?;
                socket.connect(&to)?;
                held.push(socket);
                Ok(())
            })?
        }
        Task::ConnectDatagram { to, count } => each(count, |_| Ok(datagram_socket()?.connect(to)?))?,
        Task::Send { to, count, threads: 1 } => {
            let socket = datagram_socket()?;
            each(count, |_| Ok(socket.send_to(&[7], to).map(drop)?))?
        }
        Task::Send { to, count, threads } => {
            let socket = datagram_socket()?;
            let send = || {
                unpin()?;
                each(count / threads, |_| Ok(socket.send_to(&[7], to).map(drop)?)).map(drop)
            };
            std::thread::scope(|scope| {
                let running: Vec<_> = (0..threads).map(|_| scope.spawn(send)).collect();
                running.into_iter().try_for_each(|one| one.join().unwrap_or_else(|_| bail!("a thread panicked")))
            })?;
            Measurement::default()
        }
        Task::Request { to, count } => each(count, |_| request(to).map(drop))?,
        Task::RequestEach { to, first, count } => each(count, |i| request(to[(first + i) % to.len()]).map(drop))?,
        Task::RoundTrips { to, count } => {
            let mut stream = TcpStream::connect(to)?;
            stream.set_nodelay(true)?;
            each(count, |_| round_trip(&mut stream).map(drop))?
        }
        Task::Bulk { to, bytes } => bulk(to, bytes)?,
        Task::Datagrams { to, count, connected: true } => each(count, |_| {
            let socket = datagram_socket()?;
            socket.connect(to)?;
            socket.send(&[7])?;
            Ok(socket.recv(&mut [0; 8]).map(drop)?)
        })?,
        Task::Datagrams { to, count, connected: false } => {
            let socket = datagram_socket()?;
            each(count, |_| {
                socket.send_to(&[7], to)?;
                Ok(socket.recv_from(&mut [0; 8]).map(drop)?)
            })?
        }
        Task::Watch { to, rate, seconds, threads } => watch(to, rate, seconds, threads)?,
        Task::Empty => bail!("the client has no listen queue: send Empty to the server"),
        Task::Spent => return Ok(Measurement { spent: spent(), ..Measurement::default() }),
    };
    answer.seconds = began.elapsed().as_secs_f64();
    answer.spent = spent() - spent_before;
    Ok(answer)
}

/// Returns the CPU time of this process so far, in nanoseconds.
fn spent() -> f64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as f64 * 1e9 + now.tv_nsec as f64
}

/// Runs an operation `count` times, and times each run.
fn each(count: usize, mut one: impl FnMut(usize) -> Result<()>) -> Result<Measurement> {
    let mut times = Vec::with_capacity(count);
    for i in 0..count {
        let began = Instant::now();
        one(i)?;
        times.push(began.elapsed());
    }
    Ok(of(times))
}

/// Summarizes durations.
fn of(mut times: Vec<Duration>) -> Measurement {
    times.sort_unstable();
    let last = times.len().saturating_sub(1) as f64;
    let at = |part: f64| times.get((last * part).round() as usize).map_or(f64::NAN, |time| time.as_nanos() as f64);
    Measurement { percentiles: [0.5, 0.9, 0.99, 0.999].map(at), count: times.len(), ..Measurement::default() }
}

/// Returns a socket that is closed with a RST, so that no port stays in TIME_WAIT.
fn stream_socket(to: &SockAddr) -> Result<Socket> {
    let socket = Socket::new(to.domain(), Type::STREAM, None)?;
    socket.set_linger(Some(Duration::ZERO))?;
    Ok(socket)
}

/// Allows this process as many open connections, and some other descriptors.
fn allow_descriptors(count: usize) -> Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    let needed = count as u64 + 64;
    if limit.current.is_some_and(|current| current < needed) {
        limit.current = Some(needed);
        limit.maximum = limit.maximum.map(|maximum| maximum.max(needed));
        setrlimit(Resource::Nofile, limit)?;
    }
    Ok(())
}

fn datagram_socket() -> Result<UdpSocket> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    Ok(socket)
}

/// Connects to an address for each number, and times only `connect()`, or from the planned start of each with a rate.
fn of_connects<'a>(count: usize, to: impl Fn(usize) -> &'a SockAddr, rate: Option<f64>) -> Result<Measurement> {
    ensure!(count <= QUEUE as usize, "{count} connections exceed the server's listen backlog of {QUEUE}");
    let mut times = Vec::with_capacity(count);
    let start = Instant::now();
    for i in 0..count {
        let to = to(i);
        let socket = stream_socket(to)?;
        let began = match rate {
            None => Instant::now(),
            Some(rate) => {
                let planned = start + Duration::from_secs_f64(i as f64 / rate);
                while Instant::now() < planned {
                    std::hint::spin_loop();
                }
                planned
            }
        };
        socket.connect(to)?;
        times.push(began.elapsed());
    }
    Ok(of(times))
}

fn request(to: SocketAddr) -> Result<u8> {
    let to = SockAddr::from(to);
    let socket = stream_socket(&to)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.connect_timeout(&to, TIMEOUT)?;
    round_trip(&mut socket.into())
}

fn round_trip(stream: &mut TcpStream) -> Result<u8> {
    stream.write_all(&[7])?;
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    Ok(byte[0])
}

fn bulk(to: SocketAddr, bytes: usize) -> Result<Measurement> {
    let mut stream = TcpStream::connect(to)?;
    let chunk = vec![7; MIB];
    each(bytes / MIB, |_| {
        stream.write_all(&chunk)?;
        Ok(stream.read_exact(&mut [0])?)
    })
}

/// Makes requests in an open loop: each starts on schedule, regardless of earlier ones.
fn watch(to: SocketAddr, rate: f64, seconds: f64, threads: usize) -> Result<Measurement> {
    let total = (rate * seconds) as usize;
    let (next, watched) = (AtomicUsize::new(0), Mutex::new(Vec::with_capacity(total)));
    let start = Instant::now() + START;
    let worker = || {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= total {
                return;
            }
            let planned = start + Duration::from_secs_f64(i as f64 / rate);
            while let Some(early) = planned.checked_duration_since(Instant::now()).filter(|it| !it.is_zero()) {
                thread::park_timeout(early);
            }
            let (at, began) = (monotonic(), Instant::now());
            let answer = request(to).ok();
            let (took, late) = (began.elapsed().as_nanos() as u64, (began - planned).as_nanos() as u64);
            if let Ok(mut all) = watched.lock() {
                all.push(Watched { began: at, took, late, answer });
            }
        }
    };
    thread::scope(|scope| -> Result<()> {
        for _ in 0..threads {
            thread::Builder::new().stack_size(STACK).spawn_scoped(scope, worker)?;
        }
        Ok(())
    })?;
    let mut watched = watched.into_inner().unwrap_or_default();
    watched.sort_by_key(|one| one.began);
    Ok(Measurement { count: watched.len(), watched, ..Measurement::default() })
}

fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

fn server(cpu: &str, addresses: &[&str], answer: Option<u8>) -> Result<()> {
    pin(cpu)?;
    let (mut echo, mut quiet) = (Vec::new(), Vec::new());
    for address in addresses {
        let first: SocketAddr = address.parse()?;
        let at = |more: u16| SocketAddr::new(first.ip(), first.port() + more);
        echo.push(listen(at(0))?);
        let sink = listen(at(1))?;
        quiet.push(listen(at(2))?);
        let datagrams = UdpSocket::bind(at(0)).with_context(|| format!("cannot listen on {first}"))?;
        thread::Builder::new().name("datagrams".to_owned()).spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((len, from)) = datagrams.recv_from(&mut buffer) {
                // Best effort: the client may be gone.
                let _ = datagrams.send_to(&buffer[..len], from);
            }
        })?;
        thread::Builder::new().name("sink".to_owned()).spawn(move || {
            for stream in sink.incoming().flatten() {
                let _ = discard(stream);
            }
        })?;
    }
    thread::Builder::new().name("echo".to_owned()).spawn(move || {
        if let Err(error) = echo_all(&echo, answer) {
            eprintln!("bench-load: {error:#}");
            std::process::exit(1);
        }
    })?;
    quiet.iter().try_for_each(|listener| listener.set_nonblocking(true))?;
    tasks(|task| {
        match task {
            Task::Empty => {
                for listener in &quiet {
                    while listener.accept().is_ok() {}
                }
            }
            Task::Spent => {}
            _ => bail!("the server handles only Empty and Spent"),
        }
        Ok(Measurement { spent: spent(), ..Measurement::default() })
    })
}

fn listen(address: SocketAddr) -> Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into()).with_context(|| format!("cannot listen on {address}"))?;
    socket.listen(QUEUE)?;
    Ok(socket.into())
}

/// Discards what a client sends, and acknowledges each MiB.
fn discard(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; MIB];
    loop {
        stream.read_exact(&mut buffer)?;
        stream.write_all(&[1])?;
    }
}

/// Serves all echo connections in one thread, with epoll. Returns only on an error.
fn echo_all(listeners: &[TcpListener], answer: Option<u8>) -> Result<()> {
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let id = |descriptor: i32| epoll::EventData::new_u64(descriptor as u64);
    for listener in listeners {
        listener.set_nonblocking(true)?;
        epoll::add(&poll, listener, id(listener.as_raw_fd()), epoll::EventFlags::IN)?;
    }
    let mut streams: HashMap<u64, TcpStream> = HashMap::new();
    let mut events = Vec::with_capacity(256);
    loop {
        events.clear();
        match epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), None) {
            Err(error) if error != rustix::io::Errno::INTR => return Err(error.into()),
            _ => {}
        }
        for event in &events {
            let which = event.data.u64();
            if let Some(listener) = listeners.iter().find(|listener| listener.as_raw_fd() as u64 == which) {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true)?;
                    stream.set_nodelay(true)?;
                    epoll::add(&poll, &stream, id(stream.as_raw_fd()), epoll::EventFlags::IN)?;
                    streams.insert(stream.as_raw_fd() as u64, stream);
                }
                continue;
            }
            let Some(stream) = streams.get_mut(&which) else { continue };
            let mut bytes = [0; 64];
            let keep_open = match stream.read(&mut bytes) {
                Ok(0) => false,
                Ok(len) => stream.write_all(&answer.map_or(bytes, |own| [own; 64])[..len]).is_ok(),
                Err(error) => error.kind() == ErrorKind::WouldBlock,
            };
            if !keep_open {
                streams.remove(&which);
            }
        }
    }
}
