//! The dialling side: one line in, one line out.

use std::{
    fs,
    io::{self, BufRead as _, Read as _, Write as _},
    net::{Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream, UdpSocket},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use super::self_probe::{FRONTEND, GREETING};

const LIMIT: Duration = Duration::from_secs(5);

/// Moves below the cgroup, probes for each line of input, and answers `ok` or what is wrong, until the input ends.
///
/// # Errors
/// The cgroup does not take this process, or nobody listens any more.
pub fn run(cgroup: &Path) -> Result<()> {
    move_below(cgroup)?;
    for line in io::stdin().lock().lines() {
        line?;
        let answer = match probe() {
            Ok(()) => "ok".to_owned(),
            Err(error) => format!("{error:#}").replace('\n', " "),
        };
        let mut out = io::stdout().lock();
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

fn probe() -> Result<()> {
    let mapped = mapped();
    stream(FRONTEND).context("connect4 or getpeername4 does not do its work")?;
    stream(mapped).context("connect6 or getpeername6 does not do its work")?;
    datagram("127.0.0.1:0", FRONTEND).context("sendmsg4 or recvmsg4 does not do its work")?;
    // Sent as IPv4, received as IPv6.
    datagram("[::]:0", mapped).context("sendmsg4 or recvmsg6 does not do its work")
}

/// The address as an IPv6 socket dials it.
fn mapped() -> SocketAddr {
    let SocketAddr::V4(v4) = FRONTEND else { return FRONTEND };
    let address: Ipv6Addr = v4.ip().to_ipv6_mapped();
    SocketAddrV6::new(address, v4.port(), 0, 0).into()
}

fn stream(to: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let peer = stream.peer_addr()?;
    ensure!(peer == to, "the peer is {peer}");
    let mut greeting = Vec::new();
    stream.read_to_end(&mut greeting)?;
    ensure!(greeting == GREETING, "somebody else answered");
    Ok(())
}

fn datagram(from: &str, to: SocketAddr) -> Result<()> {
    let socket = UdpSocket::bind(from)?;
    socket.set_read_timeout(Some(LIMIT))?;
    socket.send_to(GREETING, to)?;
    let mut buffer = [0; GREETING.len()];
    let (len, source) = socket.recv_from(&mut buffer)?;
    ensure!(&buffer[..len] == GREETING, "somebody else answered");
    ensure!(source == to, "the answer comes from {source}");
    Ok(())
}

/// Sockets belong to the cgroup in which they are made.
fn move_below(cgroup: &Path) -> Result<()> {
    // The root of all cgroups has no type, and every process is below it.
    if !cgroup.join("cgroup.type").exists() {
        return Ok(());
    }
    // Where a cgroup passes resources on to others, it has no processes of its own.
    let passes_on = fs::read_to_string(cgroup.join("cgroup.subtree_control")).is_ok_and(|it| !it.trim().is_empty());
    let folder = if passes_on { cgroup.join(super::self_probe::CGROUP) } else { cgroup.to_owned() };
    match fs::create_dir(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("cannot create {}", folder.display()));
        }
        _ => {}
    }
    let procs = folder.join("cgroup.procs");
    fs::write(&procs, "0").with_context(|| format!("cannot write to {}", procs.display()))
}
