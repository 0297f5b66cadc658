//! Tasks that send UDP datagrams.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _},
};

use anyhow::{Result, ensure};
use portolan_tests::dial::{Seen, Sender};
use socket2::{Domain, SockAddr, Socket, Type};

use super::{LIMIT, errno};

const PAYLOAD: &[u8] = b"?";

/// Sends `times` datagrams, and waits for each answer before the next one, except in a batch.
/// Returns the results and the last socket's local port, which is 0 for a batch.
pub(super) fn send(to: SocketAddr, times: u32, from: Sender, kept: &mut Option<UdpSocket>) -> Result<(Vec<Seen>, u32)> {
    let mut seen = Vec::new();
    let keeps = matches!(from, Sender::Kept | Sender::KeptConnected);
    let mut same = if keeps { kept.take() } else { None };
    let mut port = 0;
    if from == Sender::Batch {
        let socket = unconnected(to)?;
        batch(&socket, to, times)?;
        return Ok(((0..times).map(|_| answer(&socket)).collect(), 0));
    }
    for _ in 0..times {
        let socket = match same.take() {
            Some(socket) => socket,
            None if from == Sender::KeptConnected => {
                let socket = unconnected(to)?;
                socket.connect(to)?;
                socket
            }
            None => unconnected(to)?,
        };
        let connected = matches!(from, Sender::Connected | Sender::ConnectedTo);
        let mut one = if connected {
            let sent = socket.connect(to).and_then(|()| match from {
                Sender::ConnectedTo => socket.send_to(PAYLOAD, to),
                _ => socket.send(PAYLOAD),
            });
            match sent {
                Ok(_) => answer(&socket),
                Err(error) => failed(&error),
            }
        } else {
            ask(&socket, to)
        };
        if connected && one.errno == 0 {
            // The answer's source address must be the peer that the socket reports.
            let peer = socket.peer_addr()?;
            ensure!(one.peer == Some(peer), "the answer came from {:?}, but the socket's peer is {peer}", one.peer);
            one.peer = Some(peer);
        }
        seen.push(one);
        port = socket.local_addr()?.port().into();
        if keeps || from == Sender::Same {
            same = Some(socket);
        }
    }
    if keeps {
        *kept = same;
    }
    Ok((seen, port))
}

/// Sends from one unconnected socket to several addresses in turn, in `times` rounds.
pub(super) fn around(to: &[SocketAddr], times: u32) -> Result<Vec<Seen>> {
    let Some(first) = to.first() else { return Ok(Vec::new()) };
    let socket = unconnected(*first)?;
    Ok((0..times).flat_map(|_| to).map(|to| ask(&socket, *to)).collect())
}

/// Sends from a connected socket, disconnects it, and sends to another address from it.
pub(super) fn reuse(to: SocketAddr, then: SocketAddr) -> Result<Vec<Seen>> {
    let socket = unconnected(to)?;
    socket.connect(to)?;
    socket.send(PAYLOAD)?;
    let first = answer(&socket);
    rustix::net::connect_unspec(socket.as_fd())?;
    Ok(vec![first, ask(&socket, then)])
}

fn unconnected(to: SocketAddr) -> Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None)?;
    socket.set_read_timeout(Some(LIMIT))?;
    Ok(socket.into())
}

fn ask(socket: &UdpSocket, to: SocketAddr) -> Seen {
    match socket.send_to(PAYLOAD, to) {
        Ok(_) => answer(socket),
        Err(error) => failed(&error),
    }
}

fn answer(socket: &UdpSocket) -> Seen {
    let mut buffer = [0; 512];
    match socket.recv_from(&mut buffer) {
        Ok((len, peer)) => {
            Seen { peer: Some(peer), greeting: String::from_utf8_lossy(&buffer[..len]).into_owned(), errno: 0 }
        }
        Err(error) => failed(&error),
    }
}

fn failed(error: &io::Error) -> Seen {
    Seen { errno: errno(Err(io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(-1)))), ..Seen::default() }
}

/// Sends all datagrams with one `sendmmsg()`.
fn batch(socket: &UdpSocket, to: SocketAddr, times: u32) -> Result<()> {
    let address = SockAddr::from(to);
    let mut part = libc::iovec { iov_base: PAYLOAD.as_ptr().cast_mut().cast(), iov_len: PAYLOAD.len() };
    // SAFETY: an all-zero message is valid and empty.
    let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
    message.msg_hdr.msg_name = address.as_ptr().cast_mut().cast();
    message.msg_hdr.msg_namelen = address.len();
    message.msg_hdr.msg_iov = &raw mut part;
    message.msg_hdr.msg_iovlen = 1;
    let mut messages = vec![message; times as usize];
    // SAFETY: there are `times` messages, and what they point to outlives the call.
    let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), times, 0) };
    ensure!(sent == times as i32, "sent {sent} of {times}: {}", io::Error::last_os_error());
    Ok(())
}
