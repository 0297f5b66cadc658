//! Client process of the self-probe: for each line of input, it probes and prints one line with the result.

use std::{
    fs,
    io::{self, BufRead as _, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream, UdpSocket},
    path::Path,
    time::Duration,
};

use socket2::{Domain, Socket, Type};

use super::self_probe::{FRONTEND, FRONTEND6, GREETING, LOOPBACK, QUESTIONS};
use crate::error::{Context as _, Result, ensure};

const TIMEOUT: Duration = Duration::from_secs(5);

/// Moves into the cgroup, then probes once per line of input, and prints `ok` or the error, until the input ends.
///
/// # Errors
/// Returns an error if the process cannot join the cgroup, or if standard input or output fails.
pub fn run(cgroup: &Path) -> Result<()> {
    move_below(cgroup)?;
    for line in io::stdin().lock().lines() {
        let v6 = line? == QUESTIONS[1];
        let answer = match probe(v6) {
            Ok(()) => "ok".to_owned(),
            Err(error) => format!("{error:#}").replace('\n', " "),
        };
        let mut out = io::stdout().lock();
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

fn probe(v6: bool) -> Result<()> {
    let mapped = mapped();
    stream(FRONTEND).context("connect4 or getpeername4 does not work")?;
    stream(mapped).context("connect6 or getpeername6 does not work")?;
    datagram(Ipv4Addr::LOCALHOST, FRONTEND).context("sendmsg4 or recvmsg4 does not work")?;
    // An IPv4-mapped address on an IPv6 socket: sent as IPv4, received as IPv6.
    datagram(Ipv6Addr::UNSPECIFIED, mapped).context("sendmsg4 or recvmsg6 does not work")?;
    if v6 {
        stream(FRONTEND6).context("connect6 or getpeername6 does not work for IPv6")?;
        datagram(Ipv6Addr::LOCALHOST, FRONTEND6).context("sendmsg6 or recvmsg6 does not work for IPv6")?;
    }
    Ok(())
}

/// Returns [`FRONTEND`] as an IPv4-mapped IPv6 address.
fn mapped() -> SocketAddr {
    let SocketAddr::V4(v4) = FRONTEND else { return FRONTEND };
    let address: Ipv6Addr = v4.ip().to_ipv6_mapped();
    SocketAddrV6::new(address, v4.port(), 0, 0).into()
}

fn stream(to: SocketAddr) -> Result<()> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.bind_device(Some(LOOPBACK)).context("cannot bind a socket to the loopback interface")?;
    socket.connect_timeout(&to.into(), TIMEOUT)?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(TIMEOUT))?;
    let peer = stream.peer_addr()?;
    ensure!(peer == to, "getpeername returned {peer}, expected {to}");
    let mut greeting = Vec::new();
    stream.read_to_end(&mut greeting)?;
    ensure!(greeting == GREETING, "unexpected response: another process answered");
    Ok(())
}

fn datagram(from: impl Into<IpAddr>, to: SocketAddr) -> Result<()> {
    let from = SocketAddr::new(from.into(), 0);
    let socket = Socket::new(Domain::for_address(from), Type::DGRAM, None)?;
    socket.bind_device(Some(LOOPBACK)).context("cannot bind a socket to the loopback interface")?;
    socket.bind(&from.into())?;
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.send_to(GREETING, to)?;
    let mut buffer = [0; GREETING.len()];
    let (len, source) = socket.recv_from(&mut buffer)?;
    ensure!(&buffer[..len] == GREETING, "unexpected response: another process answered");
    ensure!(source == to, "the response has source {source}, expected {to}");
    Ok(())
}

/// Moves this process into the cgroup, because a socket belongs to the cgroup of the process that creates it.
fn move_below(cgroup: &Path) -> Result<()> {
    // The root cgroup has no `cgroup.type` file, and contains every process.
    if !cgroup.join("cgroup.type").exists() {
        return Ok(());
    }
    // A cgroup that delegates controllers cannot hold processes itself ("no internal processes" rule).
    let delegates = fs::read_to_string(cgroup.join("cgroup.subtree_control")).is_ok_and(|it| !it.trim().is_empty());
    let folder = if delegates { cgroup.join(super::self_probe::CGROUP) } else { cgroup.to_owned() };
    match fs::create_dir(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("cannot create {}", folder.display()));
        }
        _ => {}
    }
    let procs = folder.join("cgroup.procs");
    fs::write(&procs, "0").with_context(|| format!("cannot write to {}", procs.display()))
}
