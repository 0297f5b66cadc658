//! The getpeername hooks: they return the Service address that the application dialed.

use aya_ebpf::programs::SockAddrContext;
use portolan_common::Endpoint;

use crate::{addr, consts::PROCEED, state};

#[inline(always)]
pub(crate) fn getpeername4(ctx: &SockAddrContext) -> i32 {
    if let Some(dialed) = dialed_address(ctx, addr::read4(ctx)) {
        addr::write4(ctx, &dialed);
    }
    PROCEED
}

#[inline(always)]
pub(crate) fn getpeername6(ctx: &SockAddrContext) -> i32 {
    if let Some(dialed) = dialed_address(ctx, addr::read6(ctx)) {
        addr::write6(ctx, &dialed);
    }
    PROCEED
}

/// Returns the Service address that the socket dialed, if its peer is still the backend that it got.
#[inline(always)]
fn dialed_address(ctx: &SockAddrContext, peer: Endpoint) -> Option<Endpoint> {
    let state = state::lookup(ctx)?;
    state.has_backend(&peer).then(|| state.frontend())
}
