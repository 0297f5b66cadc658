//! Special ways to connect.

use std::{
    io::{self, Read as _},
    net::{SocketAddr, TcpStream},
    os::fd::{AsRawFd as _, RawFd},
};

use anyhow::Result;
use portolan_tests::dial::{Seen, Way};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{LIMIT, errno};

const DATA: &[u8] = b"x";

/// Connects in a special way, and reads the server's greeting.
pub(super) fn dial(to: SocketAddr, way: Way) -> Result<Seen> {
    let protocol = match way {
        Way::Multipath => Some(Protocol::MPTCP),
        Way::Sctp => Some(Protocol::from(libc::IPPROTO_SCTP)),
        _ => None,
    };
    let socket = match Socket::new(Domain::for_address(to), Type::STREAM, protocol) {
        Ok(socket) => socket,
        // This kernel does not support SCTP.
        Err(error) if way == Way::Sctp => return Ok(Seen { errno: errno(Err(error)), ..Seen::default() }),
        Err(error) => return Err(error.into()),
    };
    socket.set_read_timeout(Some(LIMIT))?;
    let connected = match way {
        Way::FastOpen => send_fast(socket.as_raw_fd(), to),
        Way::FastOpenConnect => set_fast_open_connect(socket.as_raw_fd())
            .and_then(|()| socket.connect(&to.into()))
            .and_then(|()| socket.send(DATA).map(drop)),
        Way::Bound(from) => socket.bind(&from.into()).and_then(|()| socket.connect(&to.into())),
        Way::Multipath | Way::Sctp => socket.connect(&to.into()),
    };
    if let Err(error) = connected {
        return Ok(Seen { errno: errno(Err(error)), ..Seen::default() });
    }
    let mut stream = TcpStream::from(socket);
    let mut greeting = String::new();
    let peer = stream.peer_addr().ok();
    // SCTP has no half-closed connections, and a half-closed MPTCP connection adds no subflows.
    if !matches!(way, Way::Sctp | Way::Multipath) {
        stream.shutdown(std::net::Shutdown::Write)?;
    }
    let errno = errno(stream.read_to_string(&mut greeting).map(drop));
    Ok(Seen { peer, greeting, errno })
}

fn send_fast(socket: RawFd, to: SocketAddr) -> io::Result<()> {
    let address = SockAddr::from(to);
    // SAFETY: the buffer and the address have the given lengths and outlive the call.
    let sent = unsafe {
        libc::sendto(
            socket,
            DATA.as_ptr().cast(),
            DATA.len(),
            libc::MSG_FASTOPEN,
            address.as_ptr().cast(),
            address.len(),
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn set_fast_open_connect(socket: RawFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option's value has the given length and outlives the call.
    let set = unsafe {
        libc::setsockopt(
            socket,
            libc::IPPROTO_TCP,
            libc::TCP_FASTOPEN_CONNECT,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as u32,
        )
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
