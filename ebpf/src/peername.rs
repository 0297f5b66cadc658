//! The getpeername hooks: the application sees the Service address that it dialled.

use aya_ebpf::programs::SockAddrContext;
use portolan_common::Endpoint;

use crate::{addr, connect::PROCEED, maps::SOCKETS};

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
    // SAFETY: the kernel gives a valid context; the value is this socket's, which is locked.
    unsafe {
        let state = SOCKETS.get_ptr_mut(ctx);
        if state.is_null() || (*state).backend != peer {
            return None;
        }
        Some((*state).frontend)
    }
}
