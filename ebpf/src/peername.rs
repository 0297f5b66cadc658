//! The getpeername hooks: the application sees the Service address that it dialled.

use aya_ebpf::programs::SockAddrContext;
use portolan_common::Endpoint;

use crate::{
    addr,
    connect::{PROCEED, protocol},
    state,
};

#[inline(always)]
pub(crate) fn getpeername4(ctx: &SockAddrContext) -> i32 {
    if let Some(dialled) = dialled(ctx, addr::read4(ctx)) {
        addr::write4(ctx, &dialled);
    }
    PROCEED
}

#[inline(always)]
pub(crate) fn getpeername6(ctx: &SockAddrContext) -> i32 {
    if let Some(dialled) = dialled(ctx, addr::read6(ctx)) {
        addr::write6(ctx, &dialled);
    }
    PROCEED
}

/// The Service address behind this socket, if its peer still is the backend that it was given.
#[inline(always)]
fn dialled(ctx: &SockAddrContext, peer: Endpoint) -> Option<Endpoint> {
    let state = state::lookup(ctx, protocol(ctx))?;
    // SAFETY: the value is this socket's, which is locked.
    unsafe { ((*state).backend == peer).then(|| (*state).frontend) }
}
