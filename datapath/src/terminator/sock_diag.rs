//! `sock_diag` over netlink: lists the sockets of a network namespace with their Portolan state, and closes them.
//!
//! This module encodes the messages itself, because existing `sock_diag` crates lack the attribute that requests socket
//! storage.
//! Layouts: linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    time::Duration,
};

use netlink_sys::{Socket as Netlink, protocols::NETLINK_SOCK_DIAG};
use portolan_common::{Endpoint, SocketState};
use portolan_core::model::Protocol;

use super::{
    accounting::Connections,
    socket::{Connected, Connection, Seen, State, peer},
};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;

const INET_DIAG_INFO: u16 = 2;
const INET_DIAG_SK_BPF_STORAGES: u16 = 20;
/// `INET_DIAG_REQ_SK_BPF_STORAGES`, an attribute of the request.
const REQ_SK_BPF_STORAGES: u16 = 2;
const REQ_MAP_FD: u16 = 1;
const STORAGE: u16 = 1;
const STORAGE_MAP_VALUE: u16 = 3;
const NESTED: u16 = 0x8000;

const HEADER: usize = 16;
/// Size of `struct inet_diag_msg`, which contains the socket's identity and inode.
const MESSAGE: usize = 72;
const IDENTITY: std::ops::Range<usize> = 4..52;
const INODE: std::ops::Range<usize> = 68..72;

const TCP_ESTABLISHED: u32 = 1;
const TCP_SYN_SENT: u32 = 2;
const TCP_FIN_WAIT1: u32 = 4;
const TCP_FIN_WAIT2: u32 = 5;
const TCP_CLOSE_WAIT: u32 = 8;
const TCP_LAST_ACK: u32 = 9;
const TCP_CLOSING: u32 = 11;

/// A netlink socket for `sock_diag` in the network namespace in which it was opened.
pub(super) struct Diag {
    netlink: Netlink,
}

impl Diag {
    pub(super) fn open() -> io::Result<Self> {
        let netlink = Netlink::new(NETLINK_SOCK_DIAG)?;
        netlink.set_rx_buf_sz(1 << 20)?;
        Ok(Self { netlink })
    }

    /// Lists the TCP connections that have Portolan state and whose peer is the endpoint in it.
    pub(super) fn connections(&self, states: &Connections<'_>) -> io::Result<Vec<Connection>> {
        let mut found = Vec::new();
        // Half-closed connections may still receive data.
        let tcp_states = [TCP_ESTABLISHED, TCP_SYN_SENT, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSE_WAIT];
        self.streams(&tcp_states, states, &mut |body| {
            found.extend(connection(body, &|cookie| states.connection(cookie)));
        })?;
        Ok(found)
    }

    /// Dumps the TCP sockets in `tcp_states`, each with its socket storage.
    fn streams(&self, tcp_states: &[u32], states: &Connections<'_>, take: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        let mut map = Vec::new();
        attribute(&mut map, REQ_MAP_FD, &(states.accounting().storage.fd().as_fd().as_raw_fd() as u32).to_ne_bytes());
        let mut storage = Vec::new();
        attribute(&mut storage, REQ_SK_BPF_STORAGES | NESTED, &map);
        self.dump(Protocol::Tcp, tcp_states.iter().fold(0, |all, one| all | 1 << one), &storage, take)
    }

    /// Adds all connected TCP sockets of the namespace, and what socket storage holds of them, to `seen`.
    pub(super) fn count(&self, states: &Connections<'_>, seen: &mut Seen) -> io::Result<()> {
        let tcp_states =
            [TCP_ESTABLISHED, TCP_SYN_SENT, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_CLOSING];
        self.streams(&tcp_states, states, &mut |body| {
            let Some(socket) = connected(body) else { return };
            seen.cookies.insert(socket.cookie());
            if states.connection(socket.cookie()).is_none() {
                let stored = connection(body, &|_| None).map(|connection| connection.state);
                seen.stored.extend(stored);
            }
        })
    }

    /// Lists the connected UDP sockets. Unconnected ones have no peer and are never closed.
    pub(super) fn datagrams(&self) -> io::Result<Vec<Connected>> {
        let mut found = Vec::new();
        self.dump(Protocol::Udp, 1 << TCP_ESTABLISHED, &[], &mut |body| found.extend(connected(body)))?;
        Ok(found)
    }

    fn dump(&self, protocol: Protocol, tcp_states: u32, more: &[u8], take: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
            let mut body = request(family, protocol, tcp_states, &[0; 48]);
            body.extend(more);
            self.netlink.send(&message(SOCK_DIAG_BY_FAMILY, REQUEST | DUMP, &body), 0)?;
            self.answers(take)?;
        }
        Ok(())
    }

    fn answers(&self, take: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        loop {
            let (bytes, _) = self.netlink.recv_from_full()?;
            let mut rest = bytes.as_slice();
            while let Some((kind, body, next)) = next_message(rest) {
                match kind {
                    // Both carry the result. An error discards a list that is cut short.
                    NLMSG_DONE | NLMSG_ERROR => return error(body),
                    SOCK_DIAG_BY_FAMILY => take(body),
                    _ => {}
                }
                rest = next;
            }
        }
    }

    /// Checks that sockets of a protocol can be closed, by closing one that does not exist.
    pub(super) fn check(&self, protocol: Protocol) -> io::Result<()> {
        let unspecified = Endpoint::from_words([0; 4], 0);
        let socket = Connected { peer: unspecified, inode: 0, family: libc::AF_INET as u8, identity: [0; 48] };
        self.destroy(protocol, &socket).map(drop)
    }

    /// Closes a socket with `SOCK_DESTROY`.
    /// Its application sees ECONNABORTED, and the peer of a TCP connection receives a reset.
    /// Returns false if the socket no longer exists.
    pub(super) fn destroy(&self, protocol: Protocol, socket: &Connected) -> io::Result<bool> {
        let body = request(socket.family, protocol, u32::MAX, &socket.identity);
        self.netlink.send(&message(SOCK_DESTROY, REQUEST | ACK, &body), 0)?;
        let (bytes, _) = self.netlink.recv_from_full()?;
        let Some((NLMSG_ERROR, body, _)) = next_message(&bytes) else { return Ok(true) };
        match error(body) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            result => result.map(|()| true),
        }
    }
}

/// `struct inet_diag_req_v2`
fn request(family: u8, protocol: Protocol, states: u32, identity: &[u8; 48]) -> Vec<u8> {
    let mut body = vec![family, protocol.number() as u8, 1 << (INET_DIAG_INFO - 1), 0];
    body.extend(states.to_ne_bytes());
    body.extend(identity);
    body
}

fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    // Sequence number and port id are zero, because only one request is in flight at a time.
    bytes.extend([0; 8]);
    bytes.extend(body);
    bytes
}

fn attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    bytes.extend(((4 + value.len()) as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Splits off the first message. Returns its type, its body, and the remaining bytes; `None` if it is incomplete.
fn next_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(HEADER..len)?;
    Some((kind, body, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

/// Iterates over the netlink attributes as (type, value), including unknown types. Stops at a malformed one.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & !NESTED;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn within(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(own, _)| *own == kind).map(|(_, value)| value)
}

fn error(body: &[u8]) -> io::Result<()> {
    match body.get(..4).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes) {
        Some(0..) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Parses a connected socket from an `inet_diag_msg`.
fn connected(body: &[u8]) -> Option<Connected> {
    let family = *body.first()?;
    let identity: [u8; 48] = body.get(IDENTITY)?.try_into().ok()?;
    let inode = u32::from_ne_bytes(body.get(INODE)?.try_into().ok()?);
    Some(Connected { peer: peer(family, &identity)?, inode, family, identity })
}

/// Parses a connection of Portolan's from an `inet_diag_msg` and its attributes.
/// Its state comes from `by_cookie`, or else from the socket storage in the message.
fn connection(body: &[u8], by_cookie: &dyn Fn(u64) -> Option<State>) -> Option<Connection> {
    let socket = connected(body)?;
    let attributes = body.get(MESSAGE..)?;
    let state = by_cookie(socket.cookie()).or_else(|| stored(attributes))?;
    // `struct tcp_info`: milliseconds since data was last sent (44) and received (52).
    let info = within(attributes, INET_DIAG_INFO)?;
    let milliseconds = |at: usize| Some(u32::from_ne_bytes(info.get(at..at + 4)?.try_into().ok()?));
    let idle = Duration::from_millis(milliseconds(44)?.min(milliseconds(52)?).into());
    // If the peer differs, the state is stale: an earlier connect of the same socket left it.
    (state.backend == socket.peer).then_some(Connection { socket, state, idle })
}

/// Extracts the state from the socket storage attributes.
fn stored(attributes: &[u8]) -> Option<State> {
    let value = within(within(within(attributes, INET_DIAG_SK_BPF_STORAGES)?, STORAGE)?, STORAGE_MAP_VALUE)?;
    if value.len() != size_of::<SocketState>() {
        return None;
    }
    // SAFETY: `SocketState` is plain data of exactly this length, and the read may be unaligned.
    let SocketState { connection, extra } = unsafe { value.as_ptr().cast::<SocketState>().read_unaligned() };
    Some(State::new(&connection, &extra))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parser_accepts_truncated_messages() {
        let mut body = vec![0; MESSAGE];
        attribute(&mut body, 7, &[1, 2, 3]);
        attribute(&mut body, INET_DIAG_SK_BPF_STORAGES | NESTED, &[]);
        let bytes = message(SOCK_DIAG_BY_FAMILY, 0, &body);
        let (kind, inner, rest) = next_message(&bytes).unwrap();
        assert_eq!((kind, inner, rest), (SOCK_DIAG_BY_FAMILY, body.as_slice(), [].as_slice()));
        assert!(connection(inner, &|_| None).is_none(), "has no Portolan state");
        for len in 0..bytes.len() {
            assert!(next_message(&bytes[..len]).is_none());
            connection(&body[..len.min(body.len())], &|_| None);
        }
        assert_eq!(within(&body[MESSAGE..], 7), Some([1, 2, 3].as_slice()));
    }
}
