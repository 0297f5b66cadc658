//! Limits of a pool, and who comes back to which of its endpoints.

use crate::{FrontendKey, plain};

/// Value of `POOLS`: what `connectionPool.tcp` asks for. Place 0 belongs to nobody: a pool without limits.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolLimits {
    /// Goes up when the place is given to another pool, so that a socket of the former one is not counted for the new one.
    pub epoch: u32,
    /// Connections at once; 0: no limit.
    pub max_connections: u32,
    /// Milliseconds after which a connect that is not answered is given up; 0: the system's own limit.
    pub connect_timeout_ms: u32,
    /// Not zero where the kernel looks after silent connections, as the next three say.
    pub keepalive: u32,
    /// Seconds of silence before the first probe; 0: the system's own.
    pub keepalive_time: u32,
    /// Seconds between probes; 0: the system's own.
    pub keepalive_interval: u32,
    /// Probes without an answer; 0: the system's own.
    pub keepalive_probes: u32,
    /// What the kernel has to look at, see [`TrackFlags`].
    pub watch: u32,
    /// A hash of the pool's name, by which the next agent knows it again.
    pub name: u64,
}
plain!(PoolLimits, 40, 8);

/// Bits of [`PoolLimits::watch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrackFlags;

impl TrackFlags {
    /// Endpoints are ejected: who uses each of them is taken down.
    pub const USE: u32 = 1;
    /// The status of HTTP/1 responses says how an endpoint is.
    pub const STATUS: u32 = 2;
    /// A connection that stands has proved nothing until a byte comes back.
    pub const ANSWER: u32 = 4;
}

/// Value of `POOL_STATS`, indexed as `POOLS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Connections that there are, those that are being made included.
    pub active: u64,
    /// Connections refused because there were as many as there may be.
    pub overflow: u64,
    /// What was spoken in place of HTTP/1 where that was expected, see [`DetectedProtocol`].
    pub spoken: u64,
}
plain!(PoolStats, 24, 8);

/// Bits of [`PoolStats::spoken`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DetectedProtocol;

impl DetectedProtocol {
    /// TLS.
    pub const TLS: u64 = 1;
    /// HTTP/2.
    pub const HTTP2: u64 = 2;
    /// Something else.
    pub const OTHER: u64 = 4;
}

/// Key of `AFFINITY`: a client, and what it dials.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AffinityKey {
    /// Cookie of its network namespace.
    pub client: u64,
    /// The frontend.
    pub frontend: FrontendKey,
}
plain!(AffinityKey, 32, 8);

/// Value of `AFFINITY`: where a client comes back to. It counts only while the backend has turns in the current version.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Affinity {
    /// When the client dialled last, nanoseconds of CLOCK_MONOTONIC.
    pub last_ns: u64,
    /// Backend id.
    pub backend_id: u32,
    /// Epoch of that id.
    pub epoch: u32,
}
plain!(Affinity, 16, 8);
