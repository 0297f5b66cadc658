//! Sockets as `sock_diag` reports them.

use std::{collections::HashSet, time::Duration};

use portolan_common::{Connection as Entry, ConnectionExtra, ConnectionFlags, Endpoint, SocketStage};

use super::counts::Side;

/// Portolan's state of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct State {
    /// The Service address that the application dialed.
    pub(super) frontend: Endpoint,
    /// The endpoint that the connection was redirected to; its port is 0 if the state is void.
    pub(super) backend: Endpoint,
    /// The map set that the ids belong to.
    pub(super) set: u16,
    pub(super) backend_id: u32,
    pub(super) backend_epoch: u16,
    pub(super) pool: u32,
    pub(super) pool_epoch: u16,
    /// When the SYN was sent, in nanoseconds of CLOCK_MONOTONIC; meaningless for UDP.
    pub(super) started_ns: u64,
    flags: u32,
}

impl State {
    pub(super) fn new(connection: &Entry, extra: &ConnectionExtra) -> Self {
        Self {
            frontend: connection.frontend(extra),
            backend: connection.backend(extra),
            set: connection.set,
            backend_id: connection.backend_id,
            backend_epoch: connection.backend_epoch,
            pool: connection.pool,
            pool_epoch: connection.pool_epoch,
            started_ns: connection.started_ns,
            flags: connection.flags,
        }
    }

    /// Returns whether the connection is in the counts of active ones.
    pub(super) fn is_counted(&self) -> bool {
        self.flags & ConnectionFlags::COUNTED != 0
    }

    /// Returns the side on which the connection is counted.
    pub(super) fn side(&self) -> Side {
        Side::of(self.flags)
    }

    pub(super) fn is_established(&self) -> bool {
        self.flags & ConnectionFlags::STAGE == SocketStage::Established as u32
    }

    pub(super) fn is_udp(&self) -> bool {
        self.flags & ConnectionFlags::UDP != 0
    }
}

/// A connected TCP or UDP socket.
pub(super) struct Connected {
    pub(super) peer: Endpoint,
    pub(super) inode: u32,
    pub(super) family: u8,
    pub(super) identity: [u8; 48],
}

impl Connected {
    /// Returns the socket's cookie, stored as two words, the lower one first.
    pub(super) fn cookie(&self) -> u64 {
        let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|byte| self.identity[at + byte]));
        u64::from(word(40)) | u64::from(word(44)) << 32
    }
}

/// The TCP sockets found so far while listing all namespaces.
pub(super) struct Seen {
    pub(super) cookies: HashSet<u64>,
    /// What socket storage holds of those without an entry.
    pub(super) stored: Vec<State>,
}

/// A TCP connection whose endpoint Portolan chose.
pub(super) struct Connection {
    pub(super) socket: Connected,
    /// Portolan's state of the socket.
    pub(super) state: State,
    /// Time since data was last sent or received.
    pub(super) idle: Duration,
}

/// Parses the peer from a `struct inet_diag_sockid`: source and destination port, then both addresses.
pub(super) fn peer(family: u8, identity: &[u8; 48]) -> Option<Endpoint> {
    let word = |at: usize| Some(u32::from_ne_bytes(identity.get(at..at + 4)?.try_into().ok()?));
    let port = u16::from_ne_bytes([identity[2], identity[3]]);
    if i32::from(family) == libc::AF_INET {
        return Some(Endpoint::from_v4_word(word(20)?, port));
    }
    Some(Endpoint::from_words([word(20)?, word(24)?, word(28)?, word(32)?], port))
}
