//! Sockets as `sock_diag` reports them.

use std::{collections::HashSet, time::Duration};

use portolan_common::{Endpoint, SocketState};

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
    /// Portolan's state of those whose endpoint it chose.
    pub(super) states: Vec<SocketState>,
}

/// A TCP connection whose endpoint Portolan chose.
pub(super) struct Connection {
    pub(super) socket: Connected,
    /// Portolan's state of the socket.
    pub(super) state: SocketState,
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
