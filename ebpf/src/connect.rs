//! The connect hooks: they replace a Service address with an endpoint, for TCP and connected UDP sockets.

use aya_ebpf::{
    helpers::generated::{bpf_ktime_get_ns, bpf_set_retval, bpf_skc_to_mptcp_sock},
    programs::SockAddrContext,
};
use aya_log_ebpf::debug;
use portolan_common::{Counter, Endpoint, FrontendKey, SocketStage};

use crate::{
    addr,
    consts::{ECONNREFUSED, EHOSTUNREACH, FAIL, IPPROTO_TCP, IPPROTO_UDP, PROCEED},
    maps::{BACKEND_STATS, POOLS, SET, count},
    opt_out::is_opted_out,
    select::{Found, Lookup, Pick, Selected, add, lookup_frontend, pick},
    state,
};

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

/// The decision on a call: redirect it to an endpoint, leave its address unchanged (`None`), or refuse it.
type Decision = Result<Option<Endpoint>, Refused>;

/// Applies a decision to a call with an IPv4 address.
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

/// Applies a decision to a call with an IPv6 address.
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

/// The call must fail; its error is already set.
pub(crate) struct Refused;

/// Picks the endpoint to connect to; `None` leaves the dialed address unchanged.
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
    // MPTCP bypasses Portolan, because every further subflow would get an endpoint of its own.
    // Strict frontends refuse it instead.
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

/// Returns whether the socket is a subflow of an MPTCP connection.
#[inline(always)]
fn is_mptcp(ctx: &SockAddrContext) -> bool {
    // SAFETY: the kernel gives a valid context.
    unsafe {
        let sk = (*ctx.sock_addr).__bindgen_anon_1.sk;
        !sk.is_null() && !bpf_skc_to_mptcp_sock(sk.cast()).is_null()
    }
}

/// Sets the error with which the call fails at once.
/// The default EPERM is unsuitable: applications retry on these errors, and kernel clients have looped on EPERM.
#[inline(always)]
pub(crate) fn refuse(ctx: &SockAddrContext, key: &FrontendKey, strict: bool) -> Refused {
    let dialed = key.endpoint();
    debug!(ctx, "refused {:i}:{}: no backend", u32::from_be(dialed.v4_word()), u16::from_be(dialed.port_word()));
    // SAFETY: a helper call without pointers.
    unsafe { bpf_set_retval(if strict { -EHOSTUNREACH } else { -ECONNREFUSED }) };
    Refused
}

/// Voids the state that an earlier connect left on this socket.
#[inline(always)]
fn clear_state(ctx: &SockAddrContext, protocol: u32) {
    if let Some(state) = state::lookup(ctx, protocol) {
        // SAFETY: the value belongs to this socket, which is locked.
        unsafe { (*state).backend = Endpoint::from_words([0; 4], 0) };
    }
}

/// Voids the state of a TCP socket only: a UDP socket keeps its former peer if a connect is refused.
#[inline(always)]
fn clear_tcp_state(ctx: &SockAddrContext, key: &FrontendKey) {
    if key.protocol() == IPPROTO_TCP {
        clear_state(ctx, IPPROTO_TCP);
    }
}

/// Stores on the socket what it dialed and which backend it got.
/// Without memory for this, the connection proceeds; only its outcome remains unknown.
#[inline(always)]
fn save_state(ctx: &SockAddrContext, key: &FrontendKey, found: &Found, taken: &Selected) {
    // SAFETY: the kernel gives a valid context; the value belongs to this socket, which is locked.
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

/// Counts a UDP socket or flow that got a backend.
#[inline(always)]
pub(crate) fn count_flow(taken: &Selected) {
    if let Some(stats) = BACKEND_STATS.get_ptr_mut(taken.backend_id) {
        // SAFETY: a live map value; the field is only ever added to.
        unsafe { add(&raw mut (*stats).flows, 1) };
    }
}
