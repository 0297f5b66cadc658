//! What Portolan remembers on a socket.
//!
//! These maps outlive a change of all others: sockets go on when a new version of Portolan comes. So they have a layout of their own
//! ([`SOCKET_LAYOUT`](crate::SOCKET_LAYOUT)), and what they say of ids counts only for the set of maps that is named beside.

use crate::{Endpoint, plain};

/// Value of `SOCKETS` (socket storage), and a part of `CONNECTIONS`: the frontend that the application dialled and the backend that it
/// was given. It is believed only while the socket's peer is that backend.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SocketState {
    /// The Service address that the application dialled.
    pub frontend: Endpoint,
    /// The endpoint that it was given.
    pub backend: Endpoint,
    /// The set of maps that the following ids belong to.
    pub set: u32,
    /// Backend id of that endpoint.
    pub backend_id: u32,
    /// Epoch of that id, see `Backend::epoch`.
    pub epoch: u32,
    /// Frontend id.
    pub frontend_id: u32,
    /// The pool's place in `POOLS`; 0: none.
    pub pool: u32,
    /// Epoch of that place, see `PoolLimits::epoch`.
    pub pool_epoch: u32,
    /// See [`SocketStage`].
    pub stage: u32,
    /// Milliseconds; zero where Portolan set no limit of its own on the connect.
    pub connect_timeout_ms: u32,
    /// TCP_USER_TIMEOUT as the application had it, to be put back once connected.
    pub user_timeout_ms: u32,
    /// IP protocol number.
    pub protocol: u32,
    /// When the SYN was sent, or a UDP socket connected, nanoseconds of CLOCK_MONOTONIC.
    pub started_ns: u64,
}
plain!(SocketState, 88, 8);

/// Value of `CONNECTIONS`: the state of a TCP socket, in the place that the lower bits of its cookie name.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Connection {
    /// Cookie of the socket whose place it is; 0: it is free.
    pub owner: u64,
    /// The state.
    pub state: SocketState,
    /// Where its responses are looked at: what is known of them. A place is two cache lines.
    pub response: Response,
}
plain!(Connection, 128, 8);

/// How far the responses on a connection have been followed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Response {
    /// Cookie of the client's network namespace.
    pub netns: u64,
    /// Sequence number of the next byte to come.
    pub next: u32,
    /// First byte of what is missing before it, while `Response::HOLE` is set.
    pub hole: u32,
    /// What the client had written when something came last (`write_seq`): once it has written more, a response may begin.
    pub written: u32,
    /// Bits: [`Self::ON`] and the others.
    pub flags: u32,
    /// Bytes of the status line that have been seen, in a row: 0 ..= 12.
    pub place: u32,
    /// The status, as far as it has been seen.
    pub status: u32,
}
plain!(Response, 32, 8);

impl Response {
    /// Responses are looked at.
    pub const ON: u32 = 1;
    /// One of them has begun at least.
    pub const BEGUN: u32 = 2;
    /// Something is missing.
    pub const HOLE: u32 = 4;
    /// A response comes next, whatever the client has written: the first one, and what follows an interim one (1xx).
    pub const AWAITED: u32 = 8;
    /// Bytes of a status line up to the status: `HTTP/1.1 200`.
    pub const LENGTH: u32 = 12;

    /// Takes one byte more of a status line; whether it may be one.
    #[inline(always)]
    pub const fn feed(&mut self, byte: u8) -> bool {
        let fits = match self.place {
            0 => byte == b'H',
            1 | 2 => byte == b'T',
            3 => byte == b'P',
            4 => byte == b'/',
            5 => byte == b'1',
            6 => byte == b'.',
            7 => byte == b'0' || byte == b'1',
            8 => byte == b' ',
            _ => {
                self.status = self.status.wrapping_mul(10).wrapping_add(byte.wrapping_sub(b'0') as u32);
                byte >= b'0' && byte <= b'9'
            }
        };
        self.place += 1;
        fits
    }
}

impl Connection {
    /// How many there are: a power of two. Cookies come in batches of 4,096 for each CPU, so on a large machine two connections may be meant
    /// for the same place long before all are taken; the later one has its state in its storage.
    pub const CAPACITY: u32 = 0x1_0000;
}

/// How far a TCP connection has come, as far as it has been counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum SocketStage {
    /// Nothing of it is counted.
    None = 0,
    /// The SYN has left: it is one of the active ones.
    Connecting = 1,
    /// It stands, and counts as opened.
    Established = 2,
}

/// Destinations of an unconnected UDP socket that are remembered: more than any resolver alternates between.
pub const FLOWS: usize = 8;

/// One destination of an unconnected UDP socket.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// The Service address that datagrams were sent to.
    pub frontend: Endpoint,
    /// The endpoint that they went to.
    pub backend: Endpoint,
    /// Its backend id.
    pub backend_id: u32,
    /// Epoch of that id.
    pub epoch: u32,
    /// Zero.
    pub reserved: u32,
    /// Not zero where further datagrams to the frontend go there too; zero where it is remembered for late answers only.
    pub forward: u32,
    /// When the last datagram went there, nanoseconds of CLOCK_MONOTONIC.
    pub last_ns: u64,
}
plain!(Flow, 64, 8);

/// Value of `DATAGRAMS` (socket storage).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DatagramFlows {
    /// The set of maps that the ids belong to.
    pub set: u32,
    /// Zero.
    pub reserved: u32,
    /// The destinations.
    pub flows: [Flow; FLOWS],
}
plain!(DatagramFlows, 8 + 64 * FLOWS, 8);

#[cfg(test)]
mod tests {
    use super::*;

    fn status(line: &str) -> Option<u32> {
        let mut response = Response::default();
        let fits = line.bytes().take(Response::LENGTH as usize).all(|byte| response.feed(byte));
        (fits && response.place == Response::LENGTH).then_some(response.status)
    }

    #[test]
    fn status_lines() {
        assert_eq!(status("HTTP/1.1 200 OK"), Some(200));
        assert_eq!(status("HTTP/1.0 503 Service Unavailable"), Some(503));
        for other in ["HTTP/2 200", "HTTP/1.1 2x0", "http/1.1 200", "HTTP/1.1  20", "HTTP/1.1 50", "\x16\x03\x01", ""] {
            assert_eq!(status(other), None, "{other:?}");
        }
    }
}
