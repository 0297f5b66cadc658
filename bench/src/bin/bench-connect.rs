//! Times connect() for the benchmark. Reads `ADDRESS COUNT` from stdin, line by line, and answers each with the nanoseconds of every connect.
//!
//! With `--listen ADDRESS` it is the server instead: connections wait in its queue, and each line from stdin has it empty the queue. Nobody
//! is woken by a connection while it is timed.

use std::{
    io::{self, BufRead as _, Write as _},
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::thread::{CpuSet, sched_setaffinity};
use socket2::{Domain, Socket, Type};

/// What fits into a server's queue (`net.core.somaxconn`).
const MOST: usize = 4_096;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--listen", address] => serve(address.parse()?),
        ["--cpu", cpu] => time(cpu.parse()?),
        _ => bail!("usage: bench-connect --listen ADDRESS | --cpu N"),
    }
}

fn serve(address: SocketAddr) -> Result<()> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into()).with_context(|| format!("cannot listen on {address}"))?;
    socket.listen(MOST as i32)?;
    socket.set_nonblocking(true)?;
    for line in io::stdin().lock().lines() {
        line?;
        while socket.accept().is_ok() {}
        let mut out = io::stdout().lock();
        writeln!(out, "empty")?;
        out.flush()?;
    }
    Ok(())
}

fn time(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set)?;
    for line in io::stdin().lock().lines() {
        let line = line?;
        let (address, count) = line.split_once(' ').context("ADDRESS COUNT")?;
        let (address, count): (SocketAddr, usize) = (address.parse()?, count.parse()?);
        if count > MOST {
            bail!("{count} connections do not fit into the server's queue of {MOST}");
        }
        let mut times = Vec::with_capacity(count);
        for _ in 0..count {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
            // Closed with a reset: no port waits for anything.
            socket.set_linger(Some(Duration::ZERO))?;
            let to = address.into();
            let began = Instant::now();
            socket.connect(&to)?;
            times.push(began.elapsed().as_nanos().to_string());
        }
        let mut out = io::stdout().lock();
        writeln!(out, "{}", times.join(" "))?;
        out.flush()?;
    }
    Ok(())
}
