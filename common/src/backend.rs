//! One endpoint as the kernel sees it.

use crate::{Endpoint, plain};

/// Value of `BACKENDS`, indexed by backend id.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Where connections go.
    pub endpoint: Endpoint,
    /// Goes up when the id is given to another endpoint, so that a socket of the former one is not counted
    /// for the new one.
    pub epoch: u32,
}
plain!(Backend, 24, 4);
