//! What Portolan remembers on a socket.

use crate::{Endpoint, plain};

/// Value of `SOCKETS` (socket storage): the frontend that the application dialled and the backend that it
/// was given. It is believed only while the socket's peer is that backend.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SocketState {
    /// The Service address that the application dialled.
    pub frontend: Endpoint,
    /// The endpoint that it was given.
    pub backend: Endpoint,
    /// Backend id of that endpoint.
    pub backend_id: u32,
    /// Epoch of that id, see `Backend::epoch`.
    pub epoch: u32,
    /// Frontend id.
    pub frontend_id: u32,
    /// Zero where the connection has not been counted as active.
    pub active: u32,
    /// Milliseconds; zero where Portolan set no limit of its own on the connect.
    pub connect_timeout_ms: u32,
    /// TCP_USER_TIMEOUT as the application had it, to be put back once connected.
    pub user_timeout_ms: u32,
    /// When the SYN was sent, nanoseconds of CLOCK_MONOTONIC.
    pub started_ns: u64,
}
plain!(SocketState, 72, 8);
