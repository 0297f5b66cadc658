//! Per-socket state.
//!
//! These maps survive upgrades that replace all other maps, because sockets outlive them.
//! They therefore have their own layout version ([`SOCKET_LAYOUT`](crate::SOCKET_LAYOUT)).
//! The ids in them are valid only for the map set named beside them.

use crate::{Endpoint, plain};

/// The value of `SOCKETS` (socket storage) and a part of `CONNECTIONS`.
/// Holds the frontend that the application dialed and the backend that it got.
/// The state is valid only while the socket's peer is that backend.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SocketState {
    /// The Service address that the application dialed.
    pub frontend: Endpoint,
    /// The endpoint that the connection was redirected to; all zero if the state is void.
    pub backend: Endpoint,
    /// The map set that the following ids belong to.
    pub set: u32,
    /// The backend id of the endpoint.
    pub backend_id: u32,
    /// The epoch of that id, see `Backend::epoch`.
    pub epoch: u32,
    /// The frontend that was dialed; a value of `FRONTENDS`.
    pub frontend_id: u32,
    /// The entry of `POOLS` that holds the pool's limits; 0 for none.
    pub pool: u32,
    /// The epoch of that entry, see `PoolLimits::epoch`.
    pub pool_epoch: u32,
    /// The [`SocketStage`] as a number.
    pub stage: u32,
    /// The connect timeout in milliseconds; 0 if Portolan set none.
    pub connect_timeout_ms: u32,
    /// The application's own TCP_USER_TIMEOUT in milliseconds, restored once the connect ends.
    pub user_timeout_ms: u32,
    /// The IP protocol number.
    pub protocol: u32,
    /// The time when the SYN was sent or the UDP socket connected, in nanoseconds of CLOCK_MONOTONIC.
    pub started_ns: u64,
}
plain!(SocketState, 88, 8);

/// The value of `CONNECTIONS`: the state of a TCP socket, at the index given by the low bits of its cookie.
/// An entry takes two cache lines.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Connection {
    /// The cookie of the socket that owns the entry; 0 if the entry is free.
    pub owner: u64,
    /// The socket's state.
    pub state: SocketState,
    /// The response tracking state; meaningful only while `Response::ON` is set.
    pub response: Response,
}
plain!(Connection, 128, 8);

/// How far the responses on a connection have been tracked.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Response {
    /// The cookie of the client's network namespace.
    pub netns: u64,
    /// The sequence number of the next expected byte.
    pub next: u32,
    /// The sequence number where missing data begins, while `Response::HOLE` is set.
    pub hole: u32,
    /// The client's `write_seq` when data last arrived.
    /// Once it has advanced, a response may begin.
    pub written: u32,
    /// The flag bits: [`Self::ON`], [`Self::BEGUN`], [`Self::HOLE`] and [`Self::AWAITED`].
    pub flags: u32,
    /// The number of status line bytes matched so far: `0..=12`.
    pub place: u32,
    /// The status code, as far as it has been parsed.
    pub status: u32,
}
plain!(Response, 32, 8);

impl Response {
    /// Responses on this connection are tracked.
    pub const ON: u32 = 1;
    /// At least one response has begun.
    pub const BEGUN: u32 = 2;
    /// Data is missing from the stream.
    pub const HOLE: u32 = 4;
    /// A response comes next, even if the client has written nothing more: at the start, and after an interim response
    /// (1xx).
    pub const AWAITED: u32 = 8;
    /// The length of a status line up to the status code: `HTTP/1.1 200`.
    pub const LENGTH: u32 = 12;

    /// Consumes one byte of a status line, and returns whether the line is still valid.
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
    /// The number of entries; a power of two.
    /// Each CPU allocates cookies in batches of 4,096, so on a large machine two sockets may map to the same entry long
    /// before all are taken.
    /// The later one keeps its state in socket storage.
    pub const CAPACITY: u32 = 0x1_0000;
}

/// How far a TCP connection has come in the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum SocketStage {
    /// The connection is not counted.
    None = 0,
    /// The SYN has been sent; the connection counts as active.
    Connecting = 1,
    /// The connection is established and counts as opened.
    Established = 2,
}

/// The number of remembered destinations of an unconnected UDP socket: more than any resolver alternates between.
pub const FLOWS: usize = 8;

/// A flow: one destination of an unconnected UDP socket.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// The Service address that datagrams are sent to.
    pub frontend: Endpoint,
    /// The endpoint that they are redirected to; all zero if the flow is void.
    pub backend: Endpoint,
    /// The backend id of the endpoint.
    pub backend_id: u32,
    /// The epoch of that id.
    pub epoch: u32,
    /// Padding; always zero.
    pub reserved: u32,
    /// Nonzero if further datagrams to the frontend use this flow; zero if it is kept for late replies only.
    pub forward: u32,
    /// The time of the last datagram, in nanoseconds of CLOCK_MONOTONIC.
    pub last_ns: u64,
}
plain!(Flow, 64, 8);

/// The value of `DATAGRAMS` (socket storage): the flows of an unconnected UDP socket.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DatagramFlows {
    /// The map set that the ids belong to.
    pub set: u32,
    /// Padding; always zero.
    pub reserved: u32,
    /// The remembered flows, in no particular order.
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
