//! The connect hooks: a Service address becomes an endpoint.

use aya_ebpf::{helpers::generated::bpf_set_retval, programs::SockAddrContext};
use aya_log_ebpf::debug;
use portolan_common::{Endpoint, FrontendKey};

use crate::{
    addr,
    maps::SOCKETS,
    select::{Choice, Taken, choose},
};

/// What a sock_addr program returns to let the connect go on.
pub(crate) const PROCEED: i32 = 1;
/// What it returns to fail the connect with the error that was set.
const FAIL: i32 = 0;
const ECONNREFUSED: i32 = 111;
const IPPROTO_TCP: u32 = 6;

#[inline(always)]
pub(crate) fn connect4(ctx: &SockAddrContext) -> i32 {
    if !is_tcp(ctx) {
        return PROCEED;
    }
    let dialled = addr::read4(ctx);
    match choose(&FrontendKey::new(dialled, IPPROTO_TCP)) {
        Choice::Miss => forget(ctx),
        Choice::Refuse => refuse(ctx, &dialled),
        Choice::Take(taken) => {
            remember(ctx, dialled, &taken);
            addr::write4(ctx, &taken.backend.endpoint);
            PROCEED
        }
    }
}

#[inline(always)]
pub(crate) fn connect6(ctx: &SockAddrContext) -> i32 {
    if !is_tcp(ctx) {
        return PROCEED;
    }
    let dialled = addr::read6(ctx);
    match choose(&FrontendKey::new(dialled, IPPROTO_TCP)) {
        Choice::Miss => forget(ctx),
        Choice::Refuse => refuse(ctx, &dialled),
        Choice::Take(taken) => {
            remember(ctx, dialled, &taken);
            addr::write6(ctx, &taken.backend.endpoint);
            PROCEED
        }
    }
}

#[inline(always)]
fn is_tcp(ctx: &SockAddrContext) -> bool {
    // SAFETY: the kernel gives a valid context.
    unsafe { (*ctx.sock_addr).protocol == IPPROTO_TCP }
}

/// Fails the connect at once. ECONNREFUSED, not the default EPERM: applications retry on the former, and
/// kernel clients have looped on the latter.
#[inline(always)]
fn refuse(ctx: &SockAddrContext, dialled: &Endpoint) -> i32 {
    forget(ctx);
    debug!(ctx, "refused {:i}:{}: no backend", u32::from_be(dialled.v4_word()), u16::from_be(dialled.port_word()));
    // SAFETY: a helper call without pointers.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    FAIL
}

/// Takes back what an earlier connect of this socket left on it.
#[inline(always)]
fn forget(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the kernel gives a valid context; the value is this socket's, which is locked.
    unsafe {
        let state = SOCKETS.get_ptr_mut(ctx);
        if !state.is_null() {
            (*state).backend = Endpoint::from_words([0; 4], 0);
        }
    }
    PROCEED
}

/// Writes on the socket what it dialled and what it was given. Where there is no memory for it, the
/// connection still goes where it should; only its outcome stays unknown.
#[inline(always)]
fn remember(ctx: &SockAddrContext, dialled: Endpoint, taken: &Taken) {
    // SAFETY: the kernel gives a valid context; the value is this socket's, which is locked.
    unsafe {
        let state = SOCKETS.get_or_insert_ptr_mut(ctx, None);
        if state.is_null() {
            return;
        }
        (*state).frontend = dialled;
        (*state).backend = taken.backend.endpoint;
        (*state).backend_id = taken.backend_id;
        (*state).epoch = taken.backend.epoch;
        (*state).frontend_id = taken.frontend.id;
        (*state).connect_timeout_ms = taken.frontend.connect_timeout_ms;
        (*state).active = 0;
    }
    debug!(
        ctx,
        "frontend {} generation {}: backend {} {:i}:{}",
        taken.frontend.id,
        taken.frontend.generation,
        taken.backend_id,
        u32::from_be(taken.backend.endpoint.v4_word()),
        u16::from_be(taken.backend.endpoint.port_word())
    );
}
