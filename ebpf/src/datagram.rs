//! The sendmsg and recvmsg hooks: datagrams of UDP sockets that are not connected.
//!
//! Datagrams from one socket to one Service address are a conversation: they go to the same endpoint while it has turns there, until the
//! socket has been silent for a while. What is remembered is kept on the socket, so that nobody else's traffic can push it out.

use aya_ebpf::{helpers::generated::bpf_ktime_get_ns, programs::SockAddrContext};
use portolan_common::{Counter, DatagramFlows, Endpoint, FLOWS, Flow, FrontendKey};

use crate::{
    addr,
    connect::{IPPROTO_UDP, PROCEED, Refused, count_flow, protocol, refuse, rewrite4, rewrite6},
    maps::{DATAGRAMS, SET, SOCKETS, count},
    opt_out::is_opted_out,
    select::{Found, Lookup, Pick, current_backend, lookup_frontend, pick},
};

/// A conversation that has been silent for so long may go on elsewhere.
const SILENCE_NS: u64 = 60_000_000_000;

#[inline(always)]
pub(crate) fn sendmsg4(ctx: &SockAddrContext) -> i32 {
    if protocol(ctx) == IPPROTO_UDP { rewrite4(ctx, IPPROTO_UDP, send) } else { PROCEED }
}

#[inline(always)]
pub(crate) fn sendmsg6(ctx: &SockAddrContext) -> i32 {
    if protocol(ctx) == IPPROTO_UDP { rewrite6(ctx, IPPROTO_UDP, send) } else { PROCEED }
}

#[inline(always)]
pub(crate) fn recvmsg4(ctx: &SockAddrContext) -> i32 {
    if let Some(frontend) = sender(ctx, addr::read4(ctx)) {
        addr::write4(ctx, &frontend);
    }
    PROCEED
}

#[inline(always)]
pub(crate) fn recvmsg6(ctx: &SockAddrContext) -> i32 {
    if let Some(frontend) = sender(ctx, addr::read6(ctx)) {
        addr::write6(ctx, &frontend);
    }
    PROCEED
}

/// The endpoint to send to in place of what was dialled; `None`: what was dialled.
#[inline(always)]
fn send(ctx: &SockAddrContext, key: FrontendKey) -> Result<Option<Endpoint>, Refused> {
    let found = match lookup_frontend(&key) {
        Lookup::Found(found) => found,
        Lookup::Miss => {
            clear_state(ctx, &key.endpoint());
            return Ok(None);
        }
        Lookup::Broken => return Err(refuse(ctx, &key, false)),
    };
    if let Some(endpoint) = connected_to(ctx, &key.endpoint()) {
        return Ok(Some(endpoint));
    }
    if is_peer(ctx, &key.endpoint()) {
        return Ok(None);
    }
    if is_opted_out() {
        clear_state(ctx, &key.endpoint());
        return Ok(None);
    }
    // SAFETY: the kernel gives a valid context; the value is this socket's, which is locked.
    let flows = unsafe { DATAGRAMS.get_or_insert_ptr_mut(ctx, None) };
    if flows.is_null() {
        // The datagram still goes where it should; only its answer will come from an address that was not dialled.
        count(Counter::NoMemory);
        return match pick(ctx, &found) {
            Pick::Refuse { strict } => Err(refuse(ctx, &key, strict)),
            Pick::Take(taken) => Ok(Some(taken.backend.endpoint)),
        };
    }
    // SAFETY: as above.
    let flows = unsafe { &mut *flows };
    // SAFETY: a helper call without pointers.
    let now = unsafe { bpf_ktime_get_ns() };
    if let Some(endpoint) = continue_flow(flows, &found, now) {
        return Ok(Some(endpoint));
    }
    match pick(ctx, &found) {
        Pick::Refuse { strict } => Err(refuse(ctx, &key, strict)),
        Pick::Take(taken) => {
            count_flow(&taken);
            let flow = Flow {
                frontend: key.endpoint(),
                backend: taken.backend.endpoint,
                backend_id: taken.backend_id,
                epoch: taken.backend.epoch,
                reserved: 0,
                forward: 1,
                last_ns: now,
            };
            start_flow(flows, flow);
            Ok(Some(taken.backend.endpoint))
        }
    }
}

/// The endpoint that a connected socket was given for the address that it sends to all the same: it hears from nobody else.
#[inline(always)]
fn connected_to(ctx: &SockAddrContext, dialled: &Endpoint) -> Option<Endpoint> {
    // SAFETY: the kernel gives a valid context; the value is this socket's, which is locked.
    unsafe {
        let sk = (*ctx.sock_addr).__bindgen_anon_1.sk;
        if sk.is_null() || (*sk).dst_port == 0 {
            return None;
        }
        let state = SOCKETS.get_ptr_mut(ctx);
        let given = !state.is_null() && (*state).frontend == *dialled && (*state).backend.port_word() != 0;
        given.then(|| (*state).backend)
    }
}

/// Whether a socket is connected to this address itself: it was left alone, or nobody served it, when it connected, and it hears from nobody else.
/// A function of its own, for the kernel to forget which way it went.
#[inline(never)]
fn is_peer(ctx: &SockAddrContext, dialled: &Endpoint) -> bool {
    // SAFETY: the kernel gives a valid context.
    unsafe {
        let sk = (*ctx.sock_addr).__bindgen_anon_1.sk;
        !sk.is_null() && addr::peer(sk) == *dialled
    }
}

/// The endpoint of the conversation with this frontend, if there is one and it may go on.
#[inline(always)]
fn continue_flow(flows: &mut DatagramFlows, found: &Found, now: u64) -> Option<Endpoint> {
    if flows.set != SET.load() {
        return None;
    }
    let frontend = found.version.key.endpoint();
    for flow in &mut flows.flows {
        if flow.forward == 0 || flow.frontend != frontend {
            continue;
        }
        if now.saturating_sub(flow.last_ns) > SILENCE_NS {
            return None;
        }
        let taken = current_backend(&found.version, flow.backend_id, flow.epoch)?;
        flow.last_ns = now;
        return Some(taken.backend.endpoint);
    }
    None
}

/// Remembers a new conversation in the place of the one that has been silent longest. The former one with the same frontend is kept for
/// late answers.
#[inline(always)]
fn start_flow(flows: &mut DatagramFlows, new: Flow) {
    // Ids of other maps mean nothing here; what came from whom still does.
    let foreign = flows.set != SET.load();
    flows.set = SET.load();
    let (mut place, mut oldest) = (0, u64::MAX);
    for (i, flow) in flows.flows.iter_mut().enumerate() {
        if foreign || flow.frontend == new.frontend {
            flow.forward = 0;
        }
        if flow.last_ns < oldest {
            (place, oldest) = (i, flow.last_ns);
        }
    }
    if let Some(flow) = flows.flows.get_mut(place % FLOWS) {
        *flow = new;
    }
}

/// A datagram goes to this address itself: what comes from there is not a Service's answer any more.
#[inline(always)]
fn clear_state(ctx: &SockAddrContext, dialled: &Endpoint) {
    // SAFETY: the kernel gives a valid context; the value is this socket's, which is locked.
    let flows = unsafe { DATAGRAMS.get_ptr_mut(ctx) };
    if flows.is_null() {
        return;
    }
    // SAFETY: as above.
    for flow in unsafe { &mut (*flows).flows } {
        if flow.backend == *dialled {
            flow.backend = Endpoint::from_words([0; 4], 0);
            flow.forward = 0;
        }
    }
}

/// The Service address that a datagram from this endpoint answers.
#[inline(always)]
fn sender(ctx: &SockAddrContext, source: Endpoint) -> Option<Endpoint> {
    // SAFETY: the kernel gives a valid context; the values are this socket's, which is locked.
    unsafe {
        let sk = (*ctx.sock_addr).__bindgen_anon_1.sk;
        if sk.is_null() {
            return None;
        }
        // What a connect left counts while the socket is connected: one with AF_UNSPEC runs no hook.
        if (*sk).dst_port != 0 {
            let state = SOCKETS.get_ptr_mut(ctx);
            return (!state.is_null() && (*state).backend == source).then(|| (*state).frontend);
        }
        let flows = DATAGRAMS.get_ptr_mut(ctx);
        if flows.is_null() {
            return None;
        }
        let (mut frontend, mut last) = (None, 0);
        for flow in &(*flows).flows {
            if flow.backend == source && flow.last_ns >= last {
                (frontend, last) = (Some(flow.frontend), flow.last_ns);
            }
        }
        frontend
    }
}
