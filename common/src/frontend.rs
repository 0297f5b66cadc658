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

/// What a frontend is found by: a Service address, a port and a protocol.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
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

    /// Returns a number that stands for the key: the key itself for IPv4, which no other key has.
    ///
    /// For IPv6, its lower half is a universal hash of the address, with these [multipliers](FrontendHash::multipliers):
    /// without knowing them, no two addresses can be chosen whose numbers are more likely equal than 1 in 2^31.
    #[inline(always)]
    pub const fn fingerprint(&self, multipliers: &[u64; 4]) -> u64 {
        const V4: u64 = 1 << 56;
        const V6: u64 = 2 << 56;
        let rest = (self.endpoint.port as u64) << 32 | (self.protocol as u64 & 0xff) << 48;
        if self.endpoint.is_v4() {
            return self.endpoint.v4_word() as u64 | rest | V4;
        }
        let ([a, b, c, d], [k, l, m, n]) = (self.endpoint.address, *multipliers);
        let ab = (a as u64).wrapping_mul(k).wrapping_add((b as u64).wrapping_mul(l));
        let cd = (c as u64).wrapping_mul(m).wrapping_add((d as u64).wrapping_mul(n));
        ab.wrapping_add(cd) >> 32 | rest | V6
    }

    /// Returns the IPv4 key that a fingerprint is, or `None` if it is no such key.
    pub const fn from_v4_fingerprint(fingerprint: u64) -> Option<Self> {
        if fingerprint >> 56 != 1 {
            return None;
        }
        let endpoint = Endpoint::from_v4_word(fingerprint as u32, (fingerprint >> 32) as u16);
        Some(Self::new(endpoint, (fingerprint >> 48) as u32 & 0xff))
    }
}

/// The hash by which frontends are found. Its seed differs between map sets, and is known only on the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrontendHash {
    /// See [`Frontend::hash`].
    pub seed: u64,
    /// See [`FrontendKey::fingerprint`].
    pub multipliers: [u64; 4],
}

impl FrontendHash {
    /// Derives the hash from the id of a map set.
    pub fn of_set(id: u32) -> Self {
        let draw = |i: u64| {
            // SplitMix64: consecutive inputs give unrelated numbers.
            let mixed = (id as u64).wrapping_add(i << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        };
        Self { seed: draw(1), multipliers: [draw(2), draw(3), draw(4), draw(5)] }
    }
}

/// One frontend: the first cache line of a value of `FRONTENDS4` or `FRONTENDS6`.
///
/// The index is the frontend's id, and follows from its key: open addressing with two buckets of two lines each.
/// A key is in its first bucket if there was room, else in its second one, else at an index that `FRONTEND_OVERFLOW`
/// names.
/// A bucket with an empty line therefore ends the search.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frontend {
    /// The [fingerprint](FrontendKey::fingerprint) of the key, [`Self::EMPTY`] or [`Self::REMOVED`].
    /// Written last, and not reused for another key while a program may be reading the line.
    pub key: u64,
    /// What is in effect, see [`Published`]. A single store publishes.
    pub current: u64,
    /// The shared cursor: the number of turns taken so far.
    pub cursor: u64,
    /// Connections refused because the frontend is empty, or because a returning client's pool is at its limit.
    pub refused: u64,
    /// Connections that took a turn and were refused, because the turn is empty or its pool is at its limit.
    pub refused_turns: u64,
    /// Connections that returned to their backend and took no turn.
    pub came_back: u64,
    /// Incremented whenever the line is reused for another key.
    pub epoch: u32,
    /// The number of the publication, counted over all frontends; for people.
    pub generation: u32,
    /// Zero; reserved for the schedules of client classes.
    pub variants: u64,
    /// Padding to full cache lines; always zero.
    pub reserved: [u64; RESERVED],
}
plain!(Frontend, 64 + 8 * RESERVED, 8);

/// Words of padding in [`Frontend`].
const RESERVED: usize = if cfg!(feature = "next-schema") { 8 } else { 0 };

impl Frontend {
    /// The key of a line that has not been used, or that no search passes.
    pub const EMPTY: u64 = 0;
    /// The key of a line that is free, but that searches pass on the way to other lines.
    pub const REMOVED: u64 = u64::MAX;
    /// The number of lines in a bucket.
    pub const BUCKET: u32 = 2;
    /// The number of turns that have room behind the line.
    pub const INLINE: usize = 4;

    /// Scrambles a fingerprint: the first step to its buckets. `seed` is that of [`FrontendHash`].
    #[inline(always)]
    pub const fn hash(fingerprint: u64, seed: u64) -> u64 {
        let mixed = (fingerprint ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // Addresses of Services follow each other, and one multiplication alone would leave patterns.
        (mixed ^ (mixed >> 32)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
    }

    /// Returns the first line of the first bucket for a hash; 2^(64 - `shift`) is the number of buckets.
    #[inline(always)]
    pub const fn first_bucket(hash: u64, shift: u32) -> u32 {
        ((hash >> (shift & 63)) as u32).wrapping_mul(Self::BUCKET)
    }

    /// Returns the first line of the second bucket for a hash.
    #[inline(always)]
    pub const fn second_bucket(hash: u64, shift: u32) -> u32 {
        Self::first_bucket((hash ^ (hash >> 32)).wrapping_mul(0x94d0_49bb_1331_11eb), shift)
    }
}

/// A value of `FRONTENDS4`: a frontend with an IPv4 address, and room for a short list of endpoints.
///
/// Processors fetch cache lines in pairs, so that such a list arrives with its frontend's line.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frontend4 {
    /// What every connect reads.
    pub line: Frontend,
    /// The turns of a version with [`PublishedFlags::INLINE`] or [`VersionFlags::INLINE`].
    pub inline: [Entry; Frontend::INLINE],
}
plain!(Frontend4, 128 + 8 * RESERVED, 8);

/// A value of `FRONTENDS6`: the same with an IPv6 address. Every other list is in the same pair of lines as its frontend.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frontend6 {
    /// As for IPv4.
    pub line: Frontend,
    /// As for IPv4.
    pub inline: [Entry; Frontend::INLINE],
    /// The key that the fingerprint stands for. Written before the fingerprint.
    pub key: FrontendKey,
    /// Padding to full cache lines; always zero.
    pub reserved: [u64; 5],
}
plain!(Frontend6, 192 + 8 * RESERVED, 8);

/// The word that publishes a frontend's schedule: [`Frontend::current`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Published(pub u64);

impl Published {
    /// Packs a word. `base` is the first entry in `ENTRIES`; with [`PublishedFlags::DETAILED`], an index of `VERSIONS`.
    /// `period` is the number of turns, after which they repeat; 0 refuses all connections.
    pub const fn new(base: u32, period: u16, flags: u16) -> Self {
        Self(base as u64 | (period as u64) << 32 | (flags as u64) << 48)
    }

    /// Returns the first entry in `ENTRIES`, or the index of `VERSIONS`.
    #[inline(always)]
    pub const fn base(self) -> u32 {
        self.0 as u32
    }

    /// Returns the number of turns.
    #[inline(always)]
    pub const fn period(self) -> u32 {
        (self.0 >> 32) as u32 & 0xffff
    }

    /// Returns whether a flag of [`PublishedFlags`] is set.
    #[inline(always)]
    pub const fn has(self, flag: u16) -> bool {
        self.0 & (flag as u64) << 48 != 0
    }
}

/// Bits beside the schedule in the word that publishes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublishedFlags;

impl PublishedFlags {
    /// Connections must stay in the client's cluster.
    /// Without an endpoint there, they fail with EHOSTUNREACH; Portolan never lets them bypass it.
    pub const STRICT: u16 = 1;
    /// The schedule is in `VERSIONS`, because it is more than a list of endpoints, or needs more than one.
    pub const DETAILED: u16 = 2;
    /// The turns are not in `ENTRIES`, but behind the frontend's line.
    pub const INLINE: u16 = 4;
}

/// The value of `ENTRIES`, and of the room behind a frontend's line: one turn of a schedule that is a list of endpoints.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The endpoint's IPv4 address in network order; 0 for IPv6, whose address is in `BACKENDS`.
    pub address: u32,
    /// The endpoint's port in network order.
    pub port: u16,
    /// The lower half of `Backend::epoch`.
    pub epoch: u16,
    /// The endpoint's backend id.
    pub backend_id: u32,
    /// The entry of `POOLS` that holds the pool's limits; 0 for none.
    pub pool: u32,
}
plain!(Entry, 16, 8);

impl Entry {
    /// Returns the entry as two words.
    #[inline(always)]
    pub const fn words(&self) -> [u64; 2] {
        [
            self.address as u64 | (self.port as u64) << 32 | (self.epoch as u64) << 48,
            self.backend_id as u64 | (self.pool as u64) << 32,
        ]
    }

    /// The inverse of [`Self::words`].
    #[inline(always)]
    pub const fn from_words([first, second]: [u64; 2]) -> Self {
        Self {
            address: first as u32,
            port: (first >> 32) as u16,
            epoch: (first >> 48) as u16,
            backend_id: second as u32,
            pool: (second >> 32) as u32,
        }
    }
}

/// The value of `VERSIONS`: a schedule that is more than a list of endpoints, or needs more than one: limits, or members.
/// It is immutable while a program may read it.
/// The next version is written to another index, and the word in [`Frontend::current`] selects the active one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontendVersion {
    /// The first slot of the schedule in `SLOTS`.
    pub base: u32,
    /// The number of slots in the schedule; 0 if it is a list of endpoints.
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
    /// The first turn in `ENTRIES` if the schedule is a list of endpoints; then it has no slots.
    pub entries: u32,
    /// The number of these turns; 0 if the schedule is in `SLOTS`.
    pub entry_count: u32,
}
plain!(FrontendVersion, 32, 4);

/// The bits of [`FrontendVersion::flags`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionFlags;

impl VersionFlags {
    /// Each connection draws a slot at random instead of taking the next one.
    pub const RANDOM: u32 = 2;
    /// The turns are not in `ENTRIES`, but behind the frontend's line.
    pub const INLINE: u32 = 4;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn key(address: &str, protocol: u32) -> FrontendKey {
        FrontendKey::new(address.parse::<SocketAddr>().unwrap().into(), protocol)
    }

    #[test]
    fn fingerprint_of_ipv4_is_the_key() {
        for (address, protocol) in [("172.16.0.10:80", 6), ("255.255.255.255:65535", 17), ("0.0.0.0:0", 6)] {
            let key = key(address, protocol);
            assert_eq!(FrontendKey::from_v4_fingerprint(key.fingerprint(&[1; 4])), Some(key));
        }
    }

    #[test]
    fn fingerprints_differ() {
        let keys = [
            key("[fd00::10]:80", 6),
            key("[fd00::10]:80", 17),
            key("[fd00::10]:81", 6),
            key("[fd00::11]:80", 6),
            key("[fd00:0:0:1::10]:80", 6),
            key("[fd01::10]:80", 6),
            key("172.16.0.10:80", 6),
        ];
        for (i, one) in keys.iter().enumerate() {
            let of = |key: &FrontendKey| key.fingerprint(&FrontendHash::of_set(7).multipliers);
            assert!(keys[i + 1..].iter().all(|other| of(other) != of(one)));
            assert!(![Frontend::EMPTY, Frontend::REMOVED].contains(&of(one)));
        }
    }

    #[test]
    fn published_word_round_trips() {
        let word = Published::new(u32::MAX, 10_000, PublishedFlags::STRICT);
        assert_eq!((word.base(), word.period()), (u32::MAX, 10_000));
        assert!(word.has(PublishedFlags::STRICT) && !word.has(PublishedFlags::DETAILED));
    }
}
