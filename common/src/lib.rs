//! The types that the eBPF programs and the agent share, byte for byte.
//!
//! Rules of this crate:
//! - `repr(C)` without implicit padding, asserted at compile time.
//! - Addresses and ports are in network order, in private fields with host-order accessors.
//! - IPv4 addresses are v4-mapped IPv6.
#![no_std]

// Addresses and ports are compared and shifted as little-endian words throughout.
#[cfg(target_endian = "big")]
compile_error!("Portolan supports little-endian machines only");

mod backend;
mod event;
mod frontend;
mod opt_out;
mod pool;
mod socket;
mod stats;

pub use backend::Backend;
pub use event::{Outcome, OutcomeKind};
pub use frontend::{
    Endpoint, Entry, Frontend, Frontend4, Frontend6, FrontendHash, FrontendKey, FrontendVersion, LbPolicy, Published,
    PublishedFlags, Slot, VersionFlags,
};
pub use opt_out::OptOut;
pub use pool::{Affinity, AffinityKey, DetectedProtocol, PoolLimits, PoolStats, TrackFlags};
pub use socket::{
    ClientUse, Connection, ConnectionExtra, ConnectionFlags, DatagramFlows, FLOWS, Flow, NodeFlags, Response,
    SocketStage, SocketState,
};
pub use stats::{
    BackendStats, BackendUse, Counter, EventBudget, FailureCount, FrontendStats, SidedCount, TIME_BUCKETS,
};

/// The version of the map layout.
/// It is part of the pin path, so two layouts never share a map.
pub const SCHEMA_VERSION: u32 = if cfg!(feature = "next-schema") { 7 } else { 6 };

/// The version of the layout of the state of connected sockets.
/// It changes as rarely as possible, because this state survives upgrades.
pub const SOCKET_LAYOUT: u32 = 3;

/// The version of the layout of what else survives upgrades: flows of UDP sockets, and excluded pods.
pub const SHARED_LAYOUT: u32 = 1;

/// Implements `aya::Pod` for a type and proves at compile time that it has no hidden padding.
macro_rules! plain {
    ($type:ty, $size:expr, $align:expr) => {
        const _: () = assert!(size_of::<$type>() == $size && align_of::<$type>() == $align);
        #[cfg(feature = "aya")]
        // SAFETY: `repr(C)` and `Copy`; every field is plain data, and the size is the sum of the fields.
        unsafe impl aya::Pod for $type {}
    };
}
pub(crate) use plain;
