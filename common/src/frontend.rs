//! The key of a connection lookup, and the schedule that the lookup leads to.

use core::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::plain;

/// An address and a port in network byte order, as the kernel sees them.
/// IPv4 addresses are v4-mapped IPv6.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Endpoint {
    address: [u32; 4],
    port: u16,
    pad: u16,
}
plain!(Endpoint, 20, 4);

/// The third word of `::ffff:a.b.c.d`.
const MAPPED: u32 = 0xffff_u32.to_be();

impl Endpoint {
    /// Builds an endpoint from words in network order, as found in `bpf_sock_addr` and `bpf_sock_ops`.
    #[inline(always)]
    pub const fn from_words(address: [u32; 4], port: u16) -> Self {
        Self { address, port, pad: 0 }
    }

    /// Builds an endpoint from an IPv4 address and a port, both in network order.
    #[inline(always)]
    pub const fn from_v4_word(address: u32, port: u16) -> Self {
        Self::from_words([0, 0, MAPPED, address], port)
    }

    /// Returns the address as four words in network order.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        self.address
    }

    /// Returns the last word of the address: for IPv4, the whole address.
    #[inline(always)]
    pub const fn v4_word(&self) -> u32 {
        self.address[3]
    }

    /// Returns the port in network order.
    #[inline(always)]
    pub const fn port_word(&self) -> u16 {
        self.port
    }

    /// Returns whether this is a v4-mapped IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.address[0] == 0 && self.address[1] == 0 && self.address[2] == MAPPED
    }

    /// Converts to a host-order socket address, with IPv4 unmapped.
    pub fn socket_addr(&self) -> SocketAddr {
        let [a, b, c, d] = self.address;
        let mut bytes = [0; 16];
        for (chunk, word) in bytes.chunks_exact_mut(4).zip([a, b, c, d]) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        SocketAddr::new(Ipv6Addr::from(bytes).to_canonical(), u16::from_be(self.port))
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        let bytes = match address.ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let word = |i: usize| u32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        Self::from_words([word(0), word(4), word(8), word(12)], address.port().to_be())
    }
}

/// The key of `FRONTENDS`: a Service address, a port and a protocol.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct FrontendKey {
    endpoint: Endpoint,
    protocol: u32,
}
plain!(FrontendKey, 24, 4);

impl FrontendKey {
    /// Builds a key; `protocol` is the IP protocol number (6 for TCP, 17 for UDP).
    #[inline(always)]
    pub const fn new(endpoint: Endpoint, protocol: u32) -> Self {
        Self { endpoint, protocol }
    }

    /// Returns the Service address and port.
    #[inline(always)]
    pub const fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    /// Returns the IP protocol number.
    #[inline(always)]
    pub const fn protocol(&self) -> u32 {
        self.protocol
    }
}

/// The value of `VERSIONS`: one published version of a frontend.
/// It is immutable while a program may read it.
/// The next version is written to another index, and one word in `CURRENT` selects the active one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrontendVersion {
    /// The frontend that the version belongs to.
    /// A program that finds another key has raced with a change of `FRONTENDS` and retries.
    pub key: FrontendKey,
    /// The publication number, counted over all frontends.
    pub generation: u32,
    /// The first slot of the schedule in `SLOTS`.
    pub base: u32,
    /// The number of slots in the schedule; 0 means that the frontend is empty and refuses connections.
    pub period: u32,
    /// The first entry in `RUNS` of the sorted list of backends that have a turn, without duplicates.
    /// The pool of each follows in the same order.
    /// Present only if clients may return to a backend (UDP, session affinity).
    pub members: u32,
    /// The number of backends in that list.
    pub member_count: u32,
    /// The timeout of `sessionAffinity: ClientIP`, in seconds; 0 without affinity.
    pub affinity_seconds: u32,
    /// A combination of [`VersionFlags`] bits.
    pub flags: u32,
    /// Padding to a full cache line; always zero.
    pub reserved: [u32; 3],
}
plain!(FrontendVersion, 64, 4);

/// The bits of [`FrontendVersion::flags`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionFlags;

impl VersionFlags {
    /// Connections must stay in the client's cluster.
    /// Without an endpoint there, they fail with EHOSTUNREACH; Portolan never lets them bypass it.
    pub const STRICT: u32 = 1;
    /// Each connection draws a slot at random instead of taking the next one.
    pub const RANDOM: u32 = 2;
}

/// How a slot picks one backend of its run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum LbPolicy {
    /// Picks the next backend.
    RoundRobin = 0,
    /// Picks a random backend.
    Random = 1,
    /// Draws two backends and picks the one with fewer active connections.
    LeastRequest = 2,
    /// Picks the backend at the client's hash; the run is a Maglev table.
    Hash = 3,
}

/// The value of `SLOTS`: one turn in a schedule.
/// It names a run of backends (those of one locality) and the number of visits to that run per period.
/// One cursor per frontend is therefore enough to step through both levels exactly (docs/adr/0003-schedule.md).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The first entry of the run in `RUNS`.
    pub first: u32,
    /// The number of entries in the run; 0 means that this turn refuses connections.
    pub len: u32,
    /// The number of visits to this run in one period.
    pub visits: u32,
    /// The index of this visit within the period: `0..visits`.
    pub visit: u32,
    /// The entry of `POOLS` that holds the pool's limits; 0 for a pool without limits.
    pub pool: u32,
    /// The [`LbPolicy`] as a number.
    pub choice: u16,
    /// Nonzero if the turn is empty because connections must stay in the client's cluster.
    pub strict: u16,
}
plain!(Slot, 24, 4);

impl Slot {
    /// Returns the entry of `RUNS` that this slot picks in the given period, in round-robin order.
    #[inline(always)]
    pub const fn entry(&self, period: u64) -> u32 {
        self.at(period.wrapping_mul(self.visits as u64).wrapping_add(self.visit as u64))
    }

    /// Returns the entry of `RUNS` at this position of the run, modulo its length.
    #[inline(always)]
    pub const fn at(&self, place: u64) -> u32 {
        // An eBPF program cannot panic, so the division must be checked.
        match place.checked_rem(self.len as u64) {
            Some(member) => self.first.wrapping_add(member as u32),
            None => self.first,
        }
    }
}
