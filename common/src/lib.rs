//! The types that the eBPF programs and the agent share, byte for byte.
//!
//! Rules of this crate: `repr(C)`, no implicit padding (asserted at compile time), addresses and ports
//! in network order inside private fields with accessors in host terms, IPv4 as v4-mapped IPv6.
#![no_std]

mod backend;
mod event;
mod frontend;
mod opt_out;
mod pool;
mod socket;
mod stats;

pub use backend::Backend;
pub use event::{Outcome, OutcomeKind};
pub use frontend::{Endpoint, FrontendKey, FrontendVersion, LbPolicy, Slot, VersionFlags};
pub use opt_out::OptOut;
pub use pool::{Affinity, AffinityKey, DetectedProtocol, PoolLimits, PoolStats, TrackFlags};
pub use socket::{Connection, DatagramFlows, FLOWS, Flow, Response, SocketStage, SocketState};
pub use stats::{BackendStats, BackendUse, Counter, EventBudget, FrontendStats, TIME_BUCKETS};

/// The layout of the maps. It is part of the pin path, so that two layouts never share a map.
pub const SCHEMA_VERSION: u32 = if cfg!(feature = "next-schema") { 5 } else { 4 };

/// The layout of what is kept on sockets, which changes as seldom as can be.
pub const SOCKET_LAYOUT: u32 = 1;

/// Makes a type readable and writable as map bytes, and proves that it has no hidden padding.
macro_rules! plain {
    ($type:ty, $size:expr, $align:expr) => {
        const _: () = assert!(size_of::<$type>() == $size && align_of::<$type>() == $align);
        #[cfg(feature = "aya")]
        // SAFETY: `repr(C)`, `Copy`, every field is plain data, and the size is the sum of the fields.
        unsafe impl aya::Pod for $type {}
    };
}
pub(crate) use plain;
