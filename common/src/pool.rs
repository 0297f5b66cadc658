//! Pool limits and session affinity.

use crate::{FrontendKey, SidedCount, plain};

/// The value of `POOLS`: the limits that `connectionPool.tcp` sets.
/// Entry 0 is reserved for pools without limits.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolLimits {
    /// Incremented whenever the entry is reassigned to another pool.
    /// Counters ignore sockets that carry an older epoch.
    pub epoch: u32,
    /// The maximum number of concurrent connections; 0 for no limit.
    pub max_connections: u32,
    /// The connect timeout in milliseconds; 0 for the system's default.
    pub connect_timeout_ms: u32,
    /// Nonzero if the kernel sends keepalive probes, with the next three parameters.
    pub keepalive: u32,
    /// Seconds of idle time before the first probe; 0 for the system's default.
    pub keepalive_time: u32,
    /// Seconds between probes; 0 for the system's default.
    pub keepalive_interval: u32,
    /// Unanswered probes before the connection fails; 0 for the system's default.
    pub keepalive_probes: u32,
    /// The events that the kernel tracks, as [`TrackFlags`] bits.
    pub watch: u32,
    /// A hash of the pool's name, by which the next agent recognizes the pool.
    pub name: u64,
}
plain!(PoolLimits, 40, 8);

/// The bits of [`PoolLimits::watch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrackFlags;

impl TrackFlags {
    /// Outlier detection is on: the kernel records which network namespaces use each endpoint.
    pub const USE: u32 = 1;
    /// The status of HTTP/1 responses determines an endpoint's health.
    pub const STATUS: u32 = 2;
    /// A connection counts as a success only once a response byte arrives.
    pub const ANSWER: u32 = 4;
}

/// The value of `POOL_STATS`, indexed like `POOLS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Open connections, including those being established.
    pub active: SidedCount,
    /// Connections refused at the connection limit.
    pub overflow: u64,
    /// The protocols seen where HTTP/1 was expected, as [`DetectedProtocol`] bits.
    pub spoken: u64,
}
plain!(PoolStats, 24, 8);

/// The bits of [`PoolStats::spoken`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DetectedProtocol;

impl DetectedProtocol {
    /// A TLS handshake or alert.
    pub const TLS: u64 = 1;
    /// HTTP/2: the first bytes are a SETTINGS frame.
    pub const HTTP2: u64 = 2;
    /// Any other protocol.
    pub const OTHER: u64 = 4;
}

/// The key of `AFFINITY`: a client and the frontend that it dials.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AffinityKey {
    /// The cookie of the client's network namespace.
    pub client: u64,
    /// The Service address, port and protocol.
    pub frontend: FrontendKey,
}
plain!(AffinityKey, 32, 8);

/// The value of `AFFINITY`: the backend that a client returns to.
/// It applies only while the backend has turns in the active version.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Affinity {
    /// The time of the client's last connection, in nanoseconds of CLOCK_MONOTONIC; updates may be skipped.
    pub last_ns: u64,
    /// The backend that the client returns to; the index of `BACKENDS`.
    pub backend_id: u32,
    /// The epoch of that id, see [`Backend::epoch`](crate::Backend::epoch).
    pub epoch: u32,
}
plain!(Affinity, 16, 8);
