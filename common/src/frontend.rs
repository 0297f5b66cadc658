//! What a connection is looked up by, and what is found.

use core::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::plain;

/// An address and a port as the kernel sees them: 16 bytes of (v4-mapped) IPv6 and a port, both in
/// network order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Endpoint {
    address: [u32; 4],
    port: u16,
    pad: u16,
}
plain!(Endpoint, 20, 4);

/// The second and third word of `::ffff:a.b.c.d`.
const MAPPED: u32 = 0xffff_u32.to_be();

impl Endpoint {
    /// From words in network order, as they stand in `bpf_sock_addr` and `bpf_sock_ops`.
    #[inline(always)]
    pub const fn from_words(address: [u32; 4], port: u16) -> Self {
        Self { address, port, pad: 0 }
    }

    /// From an IPv4 address in network order.
    #[inline(always)]
    pub const fn from_v4_word(address: u32, port: u16) -> Self {
        Self::from_words([0, 0, MAPPED, address], port)
    }

    /// The address as four words in network order.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        self.address
    }

    /// The last word: the whole address where it is IPv4.
    #[inline(always)]
    pub const fn v4_word(&self) -> u32 {
        self.address[3]
    }

    /// The port in network order.
    #[inline(always)]
    pub const fn port_word(&self) -> u16 {
        self.port
    }

    /// Whether this is an IPv4 address in its v4-mapped form.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.address[0] == 0 && self.address[1] == 0 && self.address[2] == MAPPED
    }

    /// The address and port in host terms, IPv4 unmapped.
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

/// Key of `FRONTENDS`: a Service address, a port and a protocol.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct FrontendKey {
    endpoint: Endpoint,
    protocol: u32,
}
plain!(FrontendKey, 24, 4);

impl FrontendKey {
    /// `protocol` is the IP protocol number (6 for TCP).
    #[inline(always)]
    pub const fn new(endpoint: Endpoint, protocol: u32) -> Self {
        Self { endpoint, protocol }
    }

    /// The Service address and port.
    #[inline(always)]
    pub const fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    /// The IP protocol number.
    #[inline(always)]
    pub const fn protocol(&self) -> u32 {
        self.protocol
    }
}

/// Value of `VERSIONS`: what a frontend does, as it was published once. It is never written again while a program may read it; the
/// next version lies elsewhere, and one word in `CURRENT` says which of them counts.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrontendVersion {
    /// Whose version it is. A program that finds another's has been overtaken by a change of `FRONTENDS`, and looks again.
    pub key: FrontendKey,
    /// Goes up with each version that is published, of whichever frontend.
    pub generation: u32,
    /// First slot of the schedule in `SLOTS`.
    pub base: u32,
    /// Slots in the schedule; 0: the frontend is empty and refuses.
    pub period: u32,
    /// First of its backends in `RUNS`: every one that has a turn, once, in ascending order; behind them the pool of each, in the same order.
    /// Kept where somebody may come back to a backend (UDP, session affinity).
    pub members: u32,
    /// How many they are.
    pub member_count: u32,
    /// `sessionAffinity: ClientIP`: seconds for which a client comes back to its backend; 0: it does not.
    pub affinity_seconds: u32,
    /// See [`VersionFlags`].
    pub flags: u32,
    /// Zero: a version is one cache line.
    pub reserved: [u32; 3],
}
plain!(FrontendVersion, 64, 4);

/// Bits of [`FrontendVersion::flags`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionFlags;

impl VersionFlags {
    /// Connections must not leave their cluster: refused with EHOSTUNREACH, and never left to anybody else.
    pub const STRICT: u32 = 1;
    /// A slot is drawn instead of taken in turn.
    pub const RANDOM: u32 = 2;
}

/// How a slot's run gives one of its backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum LbPolicy {
    /// The next one.
    RoundRobin = 0,
    /// A random one.
    Random = 1,
    /// Of two that are drawn, the one with fewer active connections.
    LeastRequest = 2,
    /// The one that the client's hash names; the run is a Maglev table.
    Hash = 3,
}

/// Value of `SLOTS`: one place in a schedule. It names a run of backends (all those of a locality), and how
/// often that run is visited, so that one cursor for each frontend is enough to step through both levels
/// exactly (docs/adr/0003-schedule.md).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// First entry of the run in `RUNS`.
    pub first: u32,
    /// Entries in the run; 0: this turn refuses.
    pub len: u32,
    /// Visits of this run in one period.
    pub visits: u32,
    /// Which of these visits this slot is: 0 ..< visits.
    pub visit: u32,
    /// The pool's place in `POOLS`, where its limits are; 0: it has none.
    pub pool: u32,
    /// See [`LbPolicy`].
    pub choice: u16,
    /// Not zero where a turn that refuses does so because connections must not leave their cluster.
    pub strict: u16,
}
plain!(Slot, 24, 4);

impl Slot {
    /// The entry of `RUNS` that this slot takes in the given period.
    #[inline(always)]
    pub const fn entry(&self, period: u64) -> u32 {
        self.at(period.wrapping_mul(self.visits as u64).wrapping_add(self.visit as u64))
    }

    /// The entry of `RUNS` at this place of the run, which begins anew at its end.
    #[inline(always)]
    pub const fn at(&self, place: u64) -> u32 {
        // A program for the kernel has no way to panic, so there must be no division that could.
        match place.checked_rem(self.len as u64) {
            Some(member) => self.first.wrapping_add(member as u32),
            None => self.first,
        }
    }
}
