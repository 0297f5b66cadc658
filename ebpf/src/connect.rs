//! The connect hooks: a Service address becomes an endpoint. TCP, and UDP sockets that are connected.

use aya_ebpf::{
    helpers::generated::{bpf_ktime_get_ns, bpf_set_retval, bpf_skc_to_mptcp_sock},
    programs::SockAddrContext,
};
use aya_log_ebpf::debug;
use portolan_common::{Counter, Endpoint, FrontendKey, SocketStage};

use crate::{
    addr,
    maps::{BACKEND_STATS, POOLS, SET, count},
    opt_out::is_opted_out,
    select::{Found, Lookup, Pick, Selected, add, lookup_frontend, pick},
    state,
};

/// What a sock_addr program returns to let the call go on.
pub(crate) const PROCEED: i32 = 1;
/// What it returns to fail the call with the error that was set.
const FAIL: i32 = 0;
const ECONNREFUSED: i32 = 111;
const EHOSTUNREACH: i32 = 113;
pub(crate) const IPPROTO_TCP: u32 = 6;
pub(crate) const IPPROTO_UDP: u32 = 17;

#[inline(always)]
pub(crate) fn connect4(ctx: &SockAddrContext) -> i32 {
    let protocol = protocol(ctx);
    if protocol != IPPROTO_TCP && protocol != IPPROTO_UDP {
        return PROCEED;
    }
    rewrite4(ctx, protocol, connect)
}

#[inline(always)]
pub(crate) fn connect6(ctx: &SockAddrContext) -> i32 {
    let protocol = protocol(ctx);
    if protocol != IPPROTO_TCP && protocol != IPPROTO_UDP {
        return PROCEED;
    }
    rewrite6(ctx, protocol, connect)
}

/// What is decided about an address: another one in its place, or none.
type Decision = Result<Option<Endpoint>, Refused>;

/// Has a call to an IPv4 address go where it is decided.
#[inline(always)]
pub(crate) fn rewrite4(
    ctx: &SockAddrContext,
    protocol: u32,
    decide: impl FnOnce(&SockAddrContext, FrontendKey) -> Decision,
) -> i32 {
    match decide(ctx, FrontendKey::new(addr::read4(ctx), protocol)) {
        Ok(Some(endpoint)) => {
            addr::write4(ctx, &endpoint);
            PROCEED
        }
        Ok(None) => PROCEED,
        Err(Refused) => FAIL,
    }
}

/// Has a call to an IPv6 address go where it is decided.
#[inline(always)]
pub(crate) fn rewrite6(
    ctx: &SockAddrContext,
    protocol: u32,
    decide: impl FnOnce(&SockAddrContext, FrontendKey) -> Decision,
) -> i32 {
    match decide(ctx, FrontendKey::new(addr::read6(ctx), protocol)) {
        Ok(Some(endpoint)) => {
            addr::write6(ctx, &endpoint);
            PROCEED
        }
        Ok(None) => PROCEED,
        Err(Refused) => FAIL,
    }
}

/// The error is set, and the call shall fail.
pub(crate) struct Refused;

/// The endpoint to connect to in place of what was dialled; `None`: what was dialled.
#[inline(always)]
fn connect(ctx: &SockAddrContext, key: FrontendKey) -> Result<Option<Endpoint>, Refused> {
    let found = match lookup_frontend(&key) {
        Lookup::Found(found) => found,
        Lookup::Miss => {
            clear_state(ctx, key.protocol());
            return Ok(None);
        }
        Lookup::Broken => {
            clear_tcp_state(ctx, &key);
            return Err(refuse(ctx, &key, false));
        }
    };
    if is_opted_out() {
        clear_state(ctx, key.protocol());
        return Ok(None);
    }
    // MPTCP is left alone: its further subflows would be connections of their own. But strict is strict.
    if key.protocol() == IPPROTO_TCP && is_mptcp(ctx) {
        clear_state(ctx, key.protocol());
        return if found.is_strict() { Err(refuse(ctx, &key, true)) } else { Ok(None) };
    }
    match pick(ctx, &found) {
        Pick::Refuse { strict } => {
            clear_tcp_state(ctx, &key);
            Err(refuse(ctx, &key, strict))
        }
        Pick::Take(taken) => {
            save_state(ctx, &key, &found, &taken);
            Ok(Some(taken.backend.endpoint))
        }
    }
}

#[inline(always)]
pub(crate) fn protocol(ctx: &SockAddrContext) -> u32 {
    // SAFETY: the kernel gives a valid context.
    unsafe { (*ctx.sock_addr).protocol }
}

/// Whether the socket is a subflow of an MPTCP connection.
#[inline(always)]
fn is_mptcp(ctx: &SockAddrContext) -> bool {
    // SAFETY: the kernel gives a valid context.
    unsafe {
        let sk = (*ctx.sock_addr).__bindgen_anon_1.sk;
        !sk.is_null() && !bpf_skc_to_mptcp_sock(sk.cast()).is_null()
    }
}

/// Fails the call at once. Not with the default EPERM: applications retry on these, and kernel clients have looped on that.
#[inline(always)]
pub(crate) fn refuse(ctx: &SockAddrContext, key: &FrontendKey, strict: bool) -> Refused {
    let dialled = key.endpoint();
    debug!(ctx, "refused {:i}:{}: no backend", u32::from_be(dialled.v4_word()), u16::from_be(dialled.port_word()));
    // SAFETY: a helper call without pointers.
    unsafe { bpf_set_retval(if strict { -EHOSTUNREACH } else { -ECONNREFUSED }) };
    Refused
}

/// Takes back what an earlier connect of this socket left on it.
#[inline(always)]
fn clear_state(ctx: &SockAddrContext, protocol: u32) {
    if let Some(state) = state::lookup(ctx, protocol) {
        // SAFETY: the value is this socket's, which is locked.
        unsafe { (*state).backend = Endpoint::from_words([0; 4], 0) };
    }
}

/// The same of TCP only: a UDP socket whose connect is refused stays connected to where it was.
#[inline(always)]
fn clear_tcp_state(ctx: &SockAddrContext, key: &FrontendKey) {
    if key.protocol() == IPPROTO_TCP {
        clear_state(ctx, IPPROTO_TCP);
    }
}

/// Writes on the socket what it dialled and what it was given. Where there is no memory for it, the
/// connection still goes where it should; only its outcome stays unknown.
#[inline(always)]
fn save_state(ctx: &SockAddrContext, key: &FrontendKey, found: &Found, taken: &Selected) {
    // SAFETY: the kernel gives a valid context; the value is this socket's, which is locked.
    unsafe {
        let Some(state) = state::get_or_create(ctx, key.protocol()) else {
            count(Counter::NoMemory);
            return;
        };
        (*state).frontend = key.endpoint();
        (*state).backend = taken.backend.endpoint;
        (*state).set = SET.load();
        (*state).backend_id = taken.backend_id;
        (*state).epoch = taken.backend.epoch;
        (*state).frontend_id = found.id;
        (*state).pool = taken.pool;
        (*state).stage = SocketStage::None as u32;
        (*state).connect_timeout_ms = 0;
        (*state).protocol = key.protocol();
        if taken.pool != 0
            && let Some(limits) = POOLS.get(taken.pool)
        {
            (*state).pool_epoch = limits.epoch;
            (*state).connect_timeout_ms = limits.connect_timeout_ms;
        }
        if key.protocol() == IPPROTO_UDP {
            (*state).started_ns = bpf_ktime_get_ns();
            count_flow(taken);
        }
    }
    debug!(
        ctx,
        "frontend {} generation {}: backend {} {:i}:{}",
        found.id,
        found.version.generation,
        taken.backend_id,
        u32::from_be(taken.backend.endpoint.v4_word()),
        u16::from_be(taken.backend.endpoint.port_word())
    );
}

/// Counts a UDP socket that was given a backend.
#[inline(always)]
pub(crate) fn count_flow(taken: &Selected) {
    if let Some(stats) = BACKEND_STATS.get_ptr_mut(taken.backend_id) {
        // SAFETY: a live map value; the field is only ever added to.
        unsafe { add(&raw mut (*stats).flows, 1) };
    }
}
