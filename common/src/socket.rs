//! Per-socket state.
//!
//! These maps survive upgrades that replace all other maps, because sockets outlive them.
//! They therefore have their own layout version ([`SOCKET_LAYOUT`](crate::SOCKET_LAYOUT)).
//! The ids in them are valid only for the map set named beside them.

use crate::{Endpoint, SidedCount, plain};

/// The value of `CONNECTIONS`: the state of a connected socket, in one cache line.
/// Holds the frontend that the application dialed and the backend that it got.
/// The state is valid only while the socket's peer is that backend.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connection {
    /// The kernel address of the socket that owns the entry; 0 if the entry is free, and [`Self::BUSY`] while a
    /// program fills it in, counts it or takes it from a socket.
    pub owner: u64,
    /// The socket's cookie, by which user space recognizes it; 0 before the SYN.
    pub cookie: u64,
    /// The time when the SYN was sent, in nanoseconds of CLOCK_MONOTONIC; meaningless for UDP.
    /// Precise only with [`ConnectionFlags::TIMED`]; otherwise to a kernel tick.
    pub started_ns: u64,
    /// The last word of the Service address that the application dialed; for IPv4, the whole address.
    pub frontend_word: u32,
    /// The last word of the endpoint's address; for IPv4, the whole address.
    pub backend_word: u32,
    /// The Service port that the application dialed, in network order.
    pub frontend_port: u16,
    /// The endpoint's port, in network order; 0 if the state is void.
    pub backend_port: u16,
    /// [`ConnectionFlags`] bits; the lowest eight hold the [`SocketStage`], the upper half a generation.
    pub flags: u32,
    /// The backend id of the endpoint.
    pub backend_id: u32,
    /// The frontend that was dialed.
    pub frontend_id: u32,
    /// The entry of `POOLS` that holds the pool's limits; 0 for none.
    pub pool: u32,
    /// The client, as in [`ClientUse`].
    pub client: u32,
    /// The lower half of `Backend::epoch`.
    pub backend_epoch: u16,
    /// The lower half of `Frontend::epoch`.
    pub frontend_epoch: u16,
    /// The lower half of `PoolLimits::epoch`.
    pub pool_epoch: u16,
    /// The map set that the ids belong to.
    pub set: u16,
}
plain!(Connection, 64, 8);

/// The value of `CONNECTION_EXTRAS`, at the same index: what only some connections need.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionExtra {
    /// The first three words of the Service address; valid with [`ConnectionFlags::V6`].
    pub frontend_words: [u32; 3],
    /// The first three words of the endpoint's address; valid with [`ConnectionFlags::V6`].
    pub backend_words: [u32; 3],
    /// The response tracking state; valid with [`ConnectionFlags::HTTP`].
    pub response: Response,
    /// The connect timeout in milliseconds; valid with [`ConnectionFlags::CONNECT_TIMEOUT`].
    pub connect_timeout_ms: u32,
    /// The application's own TCP_USER_TIMEOUT in milliseconds, restored once the connect ends.
    pub user_timeout_ms: u32,
}
plain!(ConnectionExtra, 64, 8);

/// The value of `SOCKETS` (socket storage): the same state, for sockets that got no entry in `CONNECTIONS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketState {
    /// What every connection needs; `owner` is 0.
    pub connection: Connection,
    /// What only some connections need.
    pub extra: ConnectionExtra,
}
plain!(SocketState, 128, 8);

/// The bits of [`Connection::flags`] above the stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionFlags;

impl ConnectionFlags {
    /// The bits that hold the [`SocketStage`].
    pub const STAGE: u32 = 0xff;
    /// The connection counts as active, in its backend's and its pool's counters.
    /// Whoever clears the bit decrements them: the application's close or the end of the TCP connection, whichever is
    /// seen first.
    pub const COUNTED: u32 = 1 << 8;
    /// The addresses are IPv6, and their first three words are in [`ConnectionExtra`].
    pub const V6: u32 = 1 << 9;
    /// A UDP socket.
    pub const UDP: u32 = 1 << 10;
    /// Responses are being tracked.
    pub const HTTP: u32 = 1 << 11;
    /// [`ConnectionExtra::connect_timeout_ms`] applies.
    pub const CONNECT_TIMEOUT: u32 = 1 << 12;
    /// The times of this connection are needed to the microsecond.
    pub const TIMED: u32 = 1 << 13;
    /// The entry is in its client's share, see [`ClientUse`]; then its cookie is known.
    pub const SHARED: u32 = 1 << 14;
    /// The side on which the connection is counted, see [`SidedCount`].
    pub const SIDE: u32 = 1 << 15;
    /// The bits of a number that changes with each connect, so that whoever clears [`Self::COUNTED`] clears it for the
    /// connection that it has read, and never for a later one in the same entry.
    pub const GENERATION: u32 = 0xffff << 16;

    /// Returns the first flags of a connect in an entry that had the flags `before`.
    #[inline(always)]
    pub const fn of_next(before: u32, flags: u32) -> u32 {
        (before & Self::GENERATION).wrapping_add(1 << 16) | flags
    }
}

/// The bits of the word in `NODE_FLAGS`: what holds for all sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeFlags;

impl NodeFlags {
    /// A socket has had its state in `SOCKETS`. Until then, no hook needs to look there.
    pub const STORAGE: u64 = 1;
    /// A connection has had a [`ConnectionExtra::connect_timeout_ms`].
    pub const CONNECT_TIMEOUT: u64 = 2;
    /// The side on which connections that begin are counted, see [`SidedCount`]. Only the agent changes it.
    pub const SIDE: u64 = 4;
}

impl Connection {
    /// In place of an owner: the entry is in use, and no other socket may take it now.
    pub const BUSY: u64 = 1;
    /// The number of ways in which a socket may be placed: consecutive entries, the first at an even index.
    pub const WAYS: u32 = 2;

    /// Returns the first of the [`Self::WAYS`] entries where the state of a socket may be.
    /// `address` is the lower half of the socket's kernel address, and 2^(32 - `shift`) the number of pairs.
    ///
    /// The kernel allocates sockets from slabs of up to 32 KiB, mostly one after the other.
    /// Those of a slab have their entries in one page of 32 pairs, so that a new socket mostly finds its page where another
    /// one has been shortly before; and as sockets are longer than 1 KiB, each has another pair of the page.
    /// Sockets are in the same places of all slabs, so that each slab begins at another pair.
    #[inline(always)]
    pub const fn first_way(address: u32, shift: u32) -> u32 {
        // The golden ratio spreads the slabs over all pages.
        let begin = (address >> 15).wrapping_mul(0x9e37_79b1) >> (shift & 31);
        let pair = begin.wrapping_add(address >> 10) & 31;
        (begin & !31 | pair) << 1
    }

    /// Returns the `shift` of [`Self::first_way`] for an array of this many entries, a power of two.
    pub const fn shift(entries: u32) -> u32 {
        33 - entries.trailing_zeros()
    }

    /// Returns the Service address that the application dialed.
    #[inline(always)]
    pub const fn frontend(&self, extra: &ConnectionExtra) -> Endpoint {
        self.endpoint(extra.frontend_words, self.frontend_word, self.frontend_port)
    }

    /// Returns the endpoint that the connection was redirected to; its port is 0 if the state is void.
    #[inline(always)]
    pub const fn backend(&self, extra: &ConnectionExtra) -> Endpoint {
        self.endpoint(extra.backend_words, self.backend_word, self.backend_port)
    }

    const fn endpoint(&self, [a, b, c]: [u32; 3], word: u32, port: u16) -> Endpoint {
        if self.flags & ConnectionFlags::V6 == 0 {
            Endpoint::from_v4_word(word, port)
        } else {
            Endpoint::from_words([a, b, c, word], port)
        }
    }
}

/// The value of `CLIENTS`, indexed by a hash of the client: what a pod uses of what all pods share.
///
/// A client is a cgroup at the level of pods or of their containers, by the lower half of its id.
/// The ids of cgroups are far apart, because the kernel numbers the files in them too.
/// Of 250 pods, two pairs share a value on average.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientUse {
    /// The entries of `CONNECTIONS` in use, of sockets that have sent a SYN or are UDP.
    pub connections: SidedCount,
    /// The events sent while the agent was behind, see [`EventBudget`](crate::EventBudget).
    pub budget: u64,
    /// The connections that went to socket storage, because the client had used up its share of `CONNECTIONS`.
    pub over_share: u64,
    /// Padding to a full cache line; always zero.
    pub reserved: [u64; 5],
}
plain!(ClientUse, 64, 8);

impl ClientUse {
    /// The number of values; a power of two.
    pub const CAPACITY: u32 = 1 << 14;
    /// One client may use at most one in this many entries of `CONNECTIONS`.
    /// Its further connections keep their state in socket storage, which is slower to create for each.
    pub const SHARE: u32 = 4;

    /// Returns the index of a client.
    #[inline(always)]
    pub const fn index(client: u32) -> u32 {
        // The golden ratio spreads ids with any distance between them.
        client.wrapping_mul(0x9e37_79b1) >> (32 - Self::CAPACITY.trailing_zeros())
    }
}

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
    /// The flag bits: [`Self::BEGUN`], [`Self::HOLE`] and [`Self::AWAITED`].
    pub flags: u32,
    /// The number of status line bytes matched so far: `0..=12`.
    pub place: u32,
    /// The status code, as far as it has been parsed.
    pub status: u32,
}
plain!(Response, 32, 8);

impl Response {
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

/// How far a TCP connection has come in the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum SocketStage {
    /// The connection is not counted.
    None = 0,
    /// The SYN has been sent; the connection counts as active.
    Connecting = 1,
    /// The connection is established and counts as opened.
    /// It has the bit of [`Self::Connecting`] too.
    Established = 3,
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
    fn sockets_of_a_slab_have_pairs_of_their_own_in_one_page() {
        let shift = Connection::shift(1 << 18);
        for slab in [0x8000u32, 0x1234_8000, 0xffff_8000] {
            // The sizes of UDP and TCP sockets on Linux 6.18, over IPv4 and IPv6, in bytes.
            for size in [1_344u32, 1_472, 2_368, 2_496] {
                let way = |i: u32| Connection::first_way(slab + i * size, shift);
                for i in 0..0x8000 / size {
                    assert!(way(i) < 1 << 18 && way(i) / 64 == way(0) / 64, "{size}: another page");
                    assert!((0..i).all(|other| way(i) != way(other)), "{size}: the same pair");
                }
            }
        }
    }

    /// TCP sockets fill a third of the smallest array: hardly any pair gets more than two.
    #[test]
    fn sockets_of_many_slabs_are_spread_over_all_pairs() {
        const ENTRIES: usize = 1 << 10;
        let mut pairs = [0u8; ENTRIES / 2];
        let (shift, size, in_slab) = (Connection::shift(ENTRIES as u32), 2_368u32, 13u32);
        for i in 0..340 {
            // Slabs follow each other as far as memory is free.
            let address = (i / in_slab) * 0x8000 + (i / in_slab / 7) * 0x30_0000 + (i % in_slab) * size;
            pairs[Connection::first_way(address, shift) as usize / 2] += 1;
        }
        let unused = pairs.iter().filter(|sockets| **sockets == 0).count();
        let beyond: u32 = pairs.iter().map(|sockets| u32::from(sockets.saturating_sub(2))).sum();
        // Of 340 sockets in 512 pairs at random, 263 pairs would be unused, and 14 sockets would be beyond two.
        assert!(unused < 300 && beyond < 25, "{unused} pairs unused, {beyond} sockets without an entry");
    }

    #[test]
    fn generations_follow_each_other_and_leave_the_other_flags_alone() {
        let first = ConnectionFlags::of_next(0, ConnectionFlags::V6);
        assert_eq!(first, 1 << 16 | ConnectionFlags::V6);
        assert_eq!(ConnectionFlags::of_next(first | ConnectionFlags::COUNTED, 0), 2 << 16);
        assert_eq!(ConnectionFlags::of_next(u32::MAX, ConnectionFlags::UDP), ConnectionFlags::UDP);
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
