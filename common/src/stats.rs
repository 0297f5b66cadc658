//! Counters that the kernel keeps.

use crate::plain;

/// Value of `BACKEND_STATS`, indexed by backend id.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendStats {
    /// Connections established.
    pub opened: u64,
    /// Connections that there are, those that are being made included.
    pub active: u64,
    /// UDP: sockets that were given this backend.
    pub flows: u64,
    /// Connections closed after they were established.
    pub closed: u64,
    /// Connects that failed: refused, reset, unreachable or timed out.
    pub failed: u64,
    /// Bytes that peers acknowledged, of closed connections.
    pub sent_bytes: u64,
    /// Bytes received, of closed connections.
    pub received_bytes: u64,
    /// Whose counters these are, see `Backend::epoch`.
    pub epoch: u32,
    /// Zero.
    pub reserved: u32,
}
plain!(BackendStats, 64, 8);

/// Value of `FRONTEND_STATS`, indexed by frontend id. As long as a cache line,
/// for its cursor is what all CPUs share.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontendStats {
    /// The shared cursor: how many connections have taken a slot.
    pub cursor: u64,
    /// Connections refused because the frontend was empty.
    pub refused: u64,
    /// Connections that took a slot, and were refused: by the slot itself, or by the limit of its pool.
    pub refused_slots: u64,
    /// Connections that came back to their backend, and took no slot.
    pub came_back: u64,
    /// Zero.
    pub reserved: [u64; RESERVED],
}
plain!(FrontendStats, 32 + 8 * RESERVED, 8);

/// What is left of the cache line.
const RESERVED: usize = if cfg!(feature = "next-schema") { 12 } else { 4 };

/// Indices into `COUNTERS`, one `u64` for each CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Counter {
    /// Outcomes that found the ring buffer full.
    EventsLost = 0,
    /// Connections whose published table was not consistent, and that were refused for it.
    Inconsistent = 1,
    /// Sockets on which nothing could be remembered for lack of memory.
    NoMemory = 2,
}

impl FrontendStats {
    /// Connections that were given a backend.
    pub fn given(&self) -> u64 {
        (self.cursor + self.came_back).saturating_sub(self.refused_slots)
    }

    /// Connections that were refused.
    pub fn refused_in_all(&self) -> u64 {
        self.refused + self.refused_slots
    }
}

impl Counter {
    /// How many counters there are.
    pub const COUNT: u32 = 3;
}
