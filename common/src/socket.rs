//! What Portolan remembers on a socket.
//!
//! These maps outlive a change of all others: sockets go on when a new version of Portolan comes. So they have a layout of their own
//! ([`SOCKET_LAYOUT`](crate::SOCKET_LAYOUT)), and what they say of ids counts only for the set of maps that is named beside.

use crate::{Endpoint, plain};

/// Value of `SOCKETS` (socket storage), and a part of `CONNECTIONS`: the frontend that the application dialled and the backend that it
/// was given. It is believed only while the socket's peer is that backend.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SocketState {
    /// The Service address that the application dialled.
    pub frontend: Endpoint,
    /// The endpoint that it was given.
    pub backend: Endpoint,
    /// The set of maps that the following ids belong to.
    pub set: u32,
    /// Backend id of that endpoint.
    pub backend_id: u32,
    /// Epoch of that id, see `Backend::epoch`.
    pub epoch: u32,
    /// Frontend id.
    pub frontend_id: u32,
    /// The pool's place in `POOLS`; 0: none.
    pub pool: u32,
    /// Epoch of that place, see `Limits::epoch`.
    pub pool_epoch: u32,
    /// See [`SocketStage`].
    pub stage: u32,
    /// Milliseconds; zero where Portolan set no limit of its own on the connect.
    pub connect_timeout_ms: u32,
    /// TCP_USER_TIMEOUT as the application had it, to be put back once connected.
    pub user_timeout_ms: u32,
    /// IP protocol number.
    pub protocol: u32,
    /// When the SYN was sent, or a UDP socket connected, nanoseconds of CLOCK_MONOTONIC.
    pub started_ns: u64,
}
plain!(SocketState, 88, 8);

/// Value of `CONNECTIONS`: the state of a TCP socket, in the place that the lower bits of its cookie name.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Connection {
    /// Cookie of the socket whose place it is; 0: it is free.
    pub owner: u64,
    /// The state.
    pub state: SocketState,
    /// Zero: a place is two cache lines.
    pub reserved: [u64; 4],
}
plain!(Connection, 128, 8);

impl Connection {
    /// How many there are: a power of two. Cookies come in batches of 4,096 for each CPU, so on a large machine two connections may be meant
    /// for the same place long before all are taken; the later one has its state in its storage.
    pub const PLACES: u32 = 0x1_0000;
}

/// How far a TCP connection has come, as far as it has been counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum SocketStage {
    /// Nothing of it is counted.
    None = 0,
    /// The SYN has left: it is one of the active ones.
    Connecting = 1,
    /// It stands, and counts as opened.
    Established = 2,
}

/// Destinations of an unconnected UDP socket that are remembered: more than any resolver alternates between.
pub const FLOWS: usize = 8;

/// One destination of an unconnected UDP socket.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// The Service address that datagrams were sent to.
    pub frontend: Endpoint,
    /// The endpoint that they went to.
    pub backend: Endpoint,
    /// Its backend id.
    pub backend_id: u32,
    /// Epoch of that id.
    pub epoch: u32,
    /// Zero.
    pub reserved: u32,
    /// Not zero where further datagrams to the frontend go there too; zero where it is remembered for late answers only.
    pub forward: u32,
    /// When the last datagram went there, nanoseconds of CLOCK_MONOTONIC.
    pub last_ns: u64,
}
plain!(Flow, 64, 8);

/// Value of `DATAGRAMS` (socket storage).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Flows {
    /// The set of maps that the ids belong to.
    pub set: u32,
    /// Zero.
    pub reserved: u32,
    /// The destinations.
    pub flows: [Flow; FLOWS],
}
plain!(Flows, 8 + 64 * FLOWS, 8);
