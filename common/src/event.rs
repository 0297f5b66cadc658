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
    /// An HTTP/1 response: its status is in `errno`. A status below 500 is told only while failures of the backend are counted.
    Responded = 3,
    /// The connection was reset, or timed out, after it was established and before a byte came back.
    Broken = 4,
    /// The connection is closed, and something had come back. Told only while failures of the backend are counted.
    Answered = 5,
    /// HTTP/1 was expected of the pool, and a connection speaks something else; `errno` says what (`DetectedProtocol`). Told once for each pool.
    NotHttp = 6,
}

impl OutcomeKind {
    /// The kind with this number, if there is one.
    pub const fn from_u32(kind: u32) -> Option<Self> {
        match kind {
            0 => Some(Self::Established),
            1 => Some(Self::Failed),
            2 => Some(Self::TimedOut),
            3 => Some(Self::Responded),
            4 => Some(Self::Broken),
            5 => Some(Self::Answered),
            6 => Some(Self::NotHttp),
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
    /// The socket's error; 0 where established. Of a response, its status.
    pub errno: u32,
    /// Zero.
    pub reserved: u32,
}
plain!(Outcome, 64, 8);
