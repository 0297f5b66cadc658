//! A backend: one endpoint as the kernel sees it.

use crate::{Endpoint, plain};

/// Value of `BACKENDS`, indexed by backend id.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// The address and port that connections are redirected to.
    pub endpoint: Endpoint,
    /// Incremented whenever the id is reassigned to another endpoint.
    /// Counters ignore sockets that carry an older epoch.
    pub epoch: u32,
}
plain!(Backend, 24, 4);
