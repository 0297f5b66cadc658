//! The connect hooks: they replace a Service address with an endpoint, for TCP and connected UDP sockets.

use aya_ebpf::{
    bindings::bpf_sock_addr,
    helpers::generated::{bpf_get_retval, bpf_get_socket_cookie, bpf_set_retval},
    programs::SockAddrContext,
};
use aya_log_ebpf::debug;
use portolan_common::{Connection, ConnectionFlags, Endpoint, FrontendKey, NodeFlags};

use crate::{
    addr, claim,
    consts::{ECONNREFUSED, EHOSTUNREACH, FAIL, IPPROTO_TCP, IPPROTO_UDP, PROCEED},
    frontend::{self, Found},
    maps::{BACKEND_STATS, POOLS, SET},
    opt_out::is_opted_out,
    select::{Pick, Selected, add, pick},
    state::{self, State},
};

#[inline(always)]
pub(crate) fn connect4(ctx: &SockAddrContext) -> i32 {
    let protocol = protocol(ctx);
    if protocol != IPPROTO_TCP && protocol != IPPROTO_UDP {
        return PROCEED;
    }
    connect(ctx, FrontendKey::new(addr::read4(ctx), protocol)).apply4(ctx)
}

#[inline(always)]
pub(crate) fn connect6(ctx: &SockAddrContext) -> i32 {
    let protocol = protocol(ctx);
    if protocol != IPPROTO_TCP && protocol != IPPROTO_UDP {
        return PROCEED;
    }
    connect(ctx, FrontendKey::new(addr::read6(ctx), protocol)).apply6(ctx)
}

/// The decision on a call: redirect it to an endpoint, leave its address unchanged, or refuse it.
///
/// The endpoint is all zero where there is none.
/// In an `Option`, its words would be undefined there, and the verifier rejects the compiler's copies of them.
pub(crate) struct Decision {
    endpoint: Endpoint,
    /// What the program returns.
    verdict: i32,
}

impl Decision {
    #[inline(always)]
    pub(crate) fn redirect(endpoint: Endpoint) -> Self {
        Self { endpoint, verdict: PROCEED }
    }

    #[inline(always)]
    pub(crate) fn unchanged() -> Self {
        Self { endpoint: Endpoint::from_words([0; 4], 0), verdict: PROCEED }
    }

    #[inline(always)]
    fn refused() -> Self {
        Self { endpoint: Endpoint::from_words([0; 4], 0), verdict: FAIL }
    }

    /// Applies the decision to a call with an IPv4 address, and returns the program's result.
    #[inline(always)]
    pub(crate) fn apply4(&self, ctx: &SockAddrContext) -> i32 {
        if self.endpoint.port_word() != 0 {
            addr::write4(ctx, &self.endpoint);
        }
        self.verdict
    }

    /// Applies the decision to a call with an IPv6 address, and returns the program's result.
    #[inline(always)]
    pub(crate) fn apply6(&self, ctx: &SockAddrContext) -> i32 {
        if self.endpoint.port_word() != 0 {
            addr::write6(ctx, &self.endpoint);
        }
        self.verdict
    }
}

/// Picks the endpoint to connect to.
#[inline(always)]
fn connect(ctx: &SockAddrContext, key: FrontendKey) -> Decision {
    let Some(found) = frontend::find(&key) else {
        // The state of a TCP socket is compared with its peer when the SYN is about to be sent.
        // A UDP socket has no such event.
        if key.protocol() == IPPROTO_UDP {
            clear_state(ctx);
        }
        return Decision::unchanged();
    };
    if is_denied() {
        return Decision::unchanged();
    }
    if is_opted_out() {
        clear_state(ctx);
        return Decision::unchanged();
    }
    match pick(ctx, &key, &found) {
        Pick::Refuse { strict } => {
            clear_tcp_state(ctx, &key);
            refuse(ctx, &key, strict)
        }
        Pick::Take(taken) => {
            save_state(ctx, &key, &found, &taken);
            Decision::redirect(taken.endpoint)
        }
    }
}

#[inline(always)]
pub(crate) fn protocol(ctx: &SockAddrContext) -> u32 {
    // SAFETY: the kernel gives a valid context.
    unsafe { (*ctx.sock_addr).protocol }
}

/// Returns whether another program has denied the call already; it must not use up a turn or an entry.
#[inline(always)]
pub(crate) fn is_denied() -> bool {
    // SAFETY: a helper call without pointers.
    unsafe { bpf_get_retval() != 0 }
}

/// Sets the error with which the call fails at once.
/// The default EPERM is unsuitable: applications retry on these errors, and kernel clients have looped on EPERM.
#[inline(always)]
pub(crate) fn refuse(ctx: &SockAddrContext, key: &FrontendKey, strict: bool) -> Decision {
    let dialed = key.endpoint();
    debug!(ctx, "refused {:i}:{}: no backend", u32::from_be(dialed.v4_word()), u16::from_be(dialed.port_word()));
    // SAFETY: a helper call without pointers.
    unsafe { bpf_set_retval(if strict { -EHOSTUNREACH } else { -ECONNREFUSED }) };
    Decision::refused()
}

/// Voids the state that an earlier connect left on this socket.
#[inline(always)]
fn clear_state(ctx: &SockAddrContext) {
    clear_state_of(ctx.sock_addr);
}

/// Not inlined: several paths lead here, none of them the common one. Returns 0.
#[inline(never)]
fn clear_state_of(ctx: *mut bpf_sock_addr) -> u32 {
    if let Some(state) = state::lookup(&SockAddrContext::new(ctx)) {
        // SAFETY: the value belongs to this socket, which is locked.
        unsafe { (*state.connection).backend_port = 0 };
    }
    0
}

/// Voids the state of a TCP socket only: a UDP socket keeps its former peer if a connect is refused.
#[inline(always)]
fn clear_tcp_state(ctx: &SockAddrContext, key: &FrontendKey) {
    if key.protocol() == IPPROTO_TCP {
        clear_state(ctx);
    }
}

/// Stores what the socket dialed and which backend it got.
/// Without memory for this, the connection proceeds; only its outcome remains unknown.
#[inline(always)]
fn save_state(ctx: &SockAddrContext, key: &FrontendKey, found: &Found, taken: &Selected) {
    // SAFETY: the kernel gives a valid context.
    let socket = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    if socket.is_null() {
        return;
    }
    match claim::claim(socket) {
        Some(state) => fill(ctx, &state, key, found, taken),
        None => drop(save_elsewhere(ctx.sock_addr, key, found, taken)),
    }
    debug!(
        ctx,
        "frontend {}: backend {} {:i}:{}",
        found.id,
        taken.backend_id,
        u32::from_be(taken.endpoint.v4_word()),
        u16::from_be(taken.endpoint.port_word())
    );
}

/// Stores the same where both entries of the socket are taken.
/// Not inlined: it is rare, and takes longer than all the rest of a connect. Returns 0.
#[inline(never)]
fn save_elsewhere(ctx: *mut bpf_sock_addr, key: &FrontendKey, found: &Found, taken: &Selected) -> u32 {
    // SAFETY: the kernel gives a valid context.
    if let Some(state) = claim::make_room(unsafe { (*ctx).__bindgen_anon_1.sk }) {
        fill(&SockAddrContext::new(ctx), &state, key, found, taken);
    }
    0
}

/// Fills in the state of a socket, and ends the time in which its entry is busy.
#[inline(always)]
fn fill(ctx: &SockAddrContext, state: &State, key: &FrontendKey, found: &Found, taken: &Selected) {
    // SAFETY: the kernel gives a valid context.
    let me = state::owner(unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk });
    let (dialed, backend) = (key.endpoint(), taken.endpoint);
    let mut flags = 0;
    // SAFETY: the value belongs to this socket, which is locked.
    unsafe {
        let connection = &mut *state.connection;
        connection.frontend_word = dialed.v4_word();
        connection.frontend_port = dialed.port_word();
        connection.backend_word = backend.v4_word();
        connection.backend_port = backend.port_word();
        connection.set = SET.load() as u16;
        connection.backend_id = taken.backend_id;
        connection.backend_epoch = taken.epoch as u16;
        connection.frontend_id = found.id;
        connection.frontend_epoch = (*found.line).epoch as u16;
        connection.pool = taken.pool;
        connection.client = claim::client();
        if !(dialed.is_v4() && backend.is_v4()) {
            // Without the extra words the state would name other addresses.
            let Some(extra) = state.extra() else {
                connection.backend_port = 0;
                state::settle(state, me);
                return;
            };
            let ([a, b, c, _], [d, e, f, _]) = (dialed.words(), backend.words());
            (*extra).frontend_words = [a, b, c];
            (*extra).backend_words = [d, e, f];
            flags |= ConnectionFlags::V6;
        }
        if taken.pool != 0
            && let Some(limits) = POOLS.get(taken.pool)
        {
            connection.pool_epoch = limits.epoch as u16;
            if limits.watch != 0 {
                flags |= ConnectionFlags::TIMED;
            }
            if limits.connect_timeout_ms != 0
                && let Some(extra) = state.extra()
            {
                (*extra).connect_timeout_ms = limits.connect_timeout_ms;
                flags |= ConnectionFlags::CONNECT_TIMEOUT;
                state::set_used(NodeFlags::CONNECT_TIMEOUT);
            }
        }
        if key.protocol() == IPPROTO_UDP {
            flags |= ConnectionFlags::UDP;
            count_flow(taken);
        }
        connection.cookie = 0;
        flags = ConnectionFlags::of_next(state.flags(), flags);
        connection.flags = flags;
        if key.protocol() == IPPROTO_UDP {
            join_share_of_udp(ctx, state, flags);
        } else {
            state::settle(state, me);
        }
    }
}

/// Counts a busy entry of a UDP socket in its client's share, or moves it to socket storage.
#[inline(always)]
fn join_share_of_udp(ctx: &SockAddrContext, state: &State, flags: u32) {
    // SAFETY: helper calls with the kernel's own context; a live value of this socket, which is locked.
    unsafe {
        let socket = (*ctx.sock_addr).__bindgen_anon_1.sk;
        let side = state::current_side();
        if let Some(joined) = claim::join_share(state, bpf_get_socket_cookie(ctx.sock_addr.cast()), side) {
            (*state.connection).flags = flags | joined;
            state::settle(state, state::owner(socket));
        } else if let Some(index) = state.index()
            && !claim::move_to_storage(state.connection, index, socket, Connection::BUSY)
        {
            // Without memory for it, the state stays where it is, in no share.
            state::settle(state, state::owner(socket));
        }
    }
}

/// Counts a UDP socket or flow that got a backend.
#[inline(always)]
pub(crate) fn count_flow(taken: &Selected) {
    if let Some(stats) = BACKEND_STATS.get_ptr_mut(taken.backend_id) {
        // SAFETY: a live map value; the field is only ever added to.
        unsafe { add(&raw mut (*stats).flows, 1) };
    }
}
