//! What the kernel tells the agent.

use crate::{Endpoint, plain};

/// How a connection attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum OutcomeKind {
    /// The connection was established. Told only while failures of its backend are counted.
    Established = 0,
    /// The connect failed: refused, reset or unreachable.
    Failed = 1,
    /// The connect was not answered in time.
    TimedOut = 2,
}

impl OutcomeKind {
    /// The kind with this number, if there is one.
    pub const fn from_u32(kind: u32) -> Option<Self> {
        match kind {
            0 => Some(Self::Established),
            1 => Some(Self::Failed),
            2 => Some(Self::TimedOut),
            _ => None,
        }
    }
}

/// One record of `EVENTS`, the ring buffer.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// When, nanoseconds of CLOCK_MONOTONIC.
    pub time_ns: u64,
    /// From SYN to the outcome, nanoseconds.
    pub latency_ns: u64,
    /// Network namespace of the client.
    pub netns_cookie: u64,
    /// The endpoint that was dialled.
    pub backend: Endpoint,
    /// Its backend id.
    pub backend_id: u32,
    /// The frontend that the application dialled.
    pub frontend_id: u32,
    /// See [`OutcomeKind`].
    pub kind: u32,
    /// The socket's error; 0 where established.
    pub errno: u32,
    /// Zero.
    pub reserved: u32,
}
plain!(Outcome, 64, 8);
