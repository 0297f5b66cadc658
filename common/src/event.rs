//! The events that the kernel sends to the agent.

use crate::{Endpoint, plain};

/// The outcome of a connection attempt, a response, or a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum OutcomeKind {
    /// The connection was established.
    /// Sent only while the agent counts failures of the backend.
    Established = 0,
    /// The connect failed: refused, reset or unreachable.
    Failed = 1,
    /// The connect timed out.
    TimedOut = 2,
    /// An HTTP/1 response arrived; `errno` holds its status.
    /// A status below 500 is sent only while the agent counts failures of the backend.
    Responded = 3,
    /// The established connection was reset or timed out before the first response byte.
    Broken = 4,
    /// The connection was closed after at least one response byte.
    /// Sent only while the agent counts failures of the backend.
    Answered = 5,
    /// A connection to a pool that should speak HTTP/1 speaks another protocol; `errno` holds the
    /// [`DetectedProtocol`](crate::DetectedProtocol) bit.
    /// Sent once for each pool and protocol.
    NotHttp = 6,
}

impl OutcomeKind {
    /// Returns the kind with this number, or `None` if there is none.
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

/// One record of the ring buffer `EVENTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// The time of the event, in nanoseconds of CLOCK_MONOTONIC.
    pub time_ns: u64,
    /// The time from SYN to the event, in microseconds, at most about 71 minutes.
    pub latency_us: u32,
    /// The client's pod, as in [`ClientUse`](crate::ClientUse).
    pub client: u32,
    /// The cookie of the client's network namespace.
    pub netns_cookie: u64,
    /// The endpoint that the connection was redirected to.
    pub backend: Endpoint,
    /// The backend id of that endpoint.
    pub backend_id: u32,
    /// The id of the frontend that the application dialed.
    pub frontend_id: u32,
    /// The [`OutcomeKind`] as a number.
    pub kind: u16,
    /// The lower half of the epoch of the frontend id: the id may be that of another frontend by now.
    pub frontend_epoch: u16,
    /// The socket error, or 0 if established; the HTTP status or protocol bit for the kinds that say so.
    pub errno: u32,
    /// The backend's count of failures, see [`FailureCount`](crate::FailureCount).
    pub failures: u32,
}
plain!(Outcome, 64, 8);
