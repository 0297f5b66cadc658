//! Load generator for the tests and benchmarks of the data path, as fast as the machine allows.
//!
//! `storm serve ADDRESS=SERVICE/ENDPOINT…` accepts on each address, sends the two numbers as bytes, and closes.
//! `storm load --threads N --count N [--record FILE] FRONTEND…` dials the frontends in turn.
//! Frontend i must lead to service i.
//! The load stops after `--count` connections or when stdin is closed, and prints its result as one line of JSON.

use std::{
    fs::File,
    io::{self, BufWriter, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use portolan_tests::storm::{Connection, Summary};
use rustix::time::{ClockId, clock_gettime};
use socket2::{Domain, Socket, Type};

/// Read timeout of a connection.
const LIMIT: Duration = Duration::from_secs(30);

#[derive(Debug, Parser)]
enum Verb {
    Serve { addresses: Vec<String> },
    Load(Load),
}

#[derive(Clone, Debug, clap::Args)]
struct Load {
    #[arg(long)]
    threads: usize,
    #[arg(long)]
    count: u64,
    #[arg(long)]
    record: Option<PathBuf>,
    frontends: Vec<SocketAddr>,
}

fn main() -> Result<()> {
    match Verb::parse() {
        Verb::Serve { addresses } => serve(&addresses),
        Verb::Load(load) => {
            let summary = run(load)?;
            println!("{}", serde_json::to_string(&summary)?);
            Ok(())
        }
    }
}

fn serve(addresses: &[String]) -> Result<()> {
    for address in addresses {
        let (address, id) = address.split_once('=').context("expected ADDRESS=SERVICE/ENDPOINT")?;
        let (service, endpoint) = id.split_once('/').context("expected SERVICE/ENDPOINT after the address")?;
        let id: [u8; 2] = [service.parse()?, endpoint.parse()?];
        let address: SocketAddr = address.parse()?;
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into()).with_context(|| format!("cannot listen on {address}"))?;
        socket.listen(4_096)?;
        let listener = TcpListener::from(socket);
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                // The client may be gone already.
                let _ = stream.write_all(&id);
            }
        });
    }
    println!("listening");
    // Serve until stdin is closed.
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn run(load: Load) -> Result<Summary> {
    let left = Arc::new(AtomicU64::new(load.count));
    let stop = Arc::new(AtomicBool::new(false));
    {
        let stop = Arc::clone(&stop);
        thread::spawn(move || {
            let _ = io::stdin().read_to_end(&mut Vec::new());
            stop.store(true, Ordering::Relaxed);
        });
    }
    let record = match &load.record {
        Some(path) => Some(Arc::new(Mutex::new(BufWriter::new(File::create(path)?)))),
        None => None,
    };
    let began = Instant::now();
    let workers: Vec<_> = (0..load.threads)
        .map(|i| {
            let (load, left, stop, record) = (load.clone(), Arc::clone(&left), Arc::clone(&stop), record.clone());
            thread::spawn(move || work(i, &load, &left, &stop, record.as_deref()))
        })
        .collect();
    let mut summary = Summary::default();
    for worker in workers {
        let Ok(own) = worker.join() else { bail!("a worker panicked") };
        summary.add(own?);
    }
    summary.seconds = began.elapsed().as_secs_f64();
    if let Some(record) = record {
        record.lock().map_err(|_| anyhow::anyhow!("a worker panicked"))?.flush()?;
    }
    Ok(summary)
}

fn work(
    worker: usize,
    load: &Load,
    left: &AtomicU64,
    stop: &AtomicBool,
    record: Option<&Mutex<BufWriter<File>>>,
) -> Result<Summary> {
    let mut summary = Summary::default();
    let mut next = worker;
    let mut own = Vec::new();
    while !stop.load(Ordering::Relaxed)
        && left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    {
        let service = next % load.frontends.len();
        next += 1;
        let began = now();
        match dial(load.frontends[service]) {
            Ok([served, endpoint]) => {
                summary.good += 1;
                if usize::from(served) != service {
                    summary.misrouted += 1;
                }
                if record.is_some() {
                    let connection = Connection { began, ended: now(), service: service as u8, endpoint };
                    connection.write(&mut own);
                }
            }
            Err(error) => {
                summary.bad += 1;
                summary.error.get_or_insert_with(|| error.to_string());
            }
        }
        if let Some(record) = record
            && own.len() > 1 << 16
        {
            record.lock().map_err(|_| anyhow::anyhow!("a worker panicked"))?.write_all(&own)?;
            own.clear();
        }
    }
    if let Some(record) = record {
        record.lock().map_err(|_| anyhow::anyhow!("a worker panicked"))?.write_all(&own)?;
    }
    Ok(summary)
}

fn dial(to: SocketAddr) -> io::Result<[u8; 2]> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    // Close with a reset, so that no port stays in TIME_WAIT.
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_read_timeout(Some(LIMIT))?;
    socket.connect(&to.into())?;
    let mut id = [0; 2];
    TcpStream::from(socket).read_exact(&mut id)?;
    Ok(id)
}

/// Returns the time of CLOCK_MONOTONIC in nanoseconds.
fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}
