//! The sendmsg and recvmsg hooks, for datagrams of unconnected UDP sockets.
//!
//! The datagrams from one socket to one Service address form a flow.
//! A flow keeps its endpoint while the endpoint has turns there, until the socket has been idle for a while.
//! Flows are stored on the socket, so that traffic of other sockets cannot evict them.

use aya_ebpf::{helpers::generated::bpf_ktime_get_ns, programs::SockAddrContext};
use portolan_common::{Counter, DatagramFlows, Endpoint, FLOWS, Flow, FrontendKey, Published, PublishedFlags};

use crate::{
    addr,
    connect::{Decision, count_flow, is_denied, protocol, refuse},
    consts::{IPPROTO_UDP, PROCEED},
    frontend,
    maps::{DATAGRAMS, SET, VERSIONS, count},
    opt_out::is_opted_out,
    select::{Pick, current_backend, pick_from_version},
    state,
};

/// The idle time after which a flow may move to another endpoint.
const SILENCE_NS: u64 = 60_000_000_000;

#[inline(always)]
pub(crate) fn sendmsg4(ctx: &SockAddrContext) -> i32 {
    if protocol(ctx) != IPPROTO_UDP {
        return PROCEED;
    }
    send(ctx, FrontendKey::new(addr::read4(ctx), IPPROTO_UDP)).apply4(ctx)
}

#[inline(always)]
pub(crate) fn sendmsg6(ctx: &SockAddrContext) -> i32 {
    if protocol(ctx) != IPPROTO_UDP {
        return PROCEED;
    }
    send(ctx, FrontendKey::new(addr::read6(ctx), IPPROTO_UDP)).apply6(ctx)
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

/// Picks the endpoint to send to.
#[inline(always)]
fn send(ctx: &SockAddrContext, key: FrontendKey) -> Decision {
    let Some(found) = frontend::find(&key) else {
        clear_state(ctx, &key.endpoint());
        return Decision::unchanged();
    };
    if is_denied() {
        return Decision::unchanged();
    }
    if let Some(endpoint) = connected_to(ctx, &key.endpoint()) {
        return Decision::redirect(endpoint);
    }
    if is_peer(ctx, &key.endpoint()) {
        return Decision::unchanged();
    }
    if is_opted_out() {
        clear_state(ctx, &key.endpoint());
        return Decision::unchanged();
    }
    // SAFETY: the kernel gives a valid context; the value belongs to this socket, which is locked.
    let flows = unsafe { DATAGRAMS.get_or_insert_ptr_mut(ctx, None) };
    // SAFETY: a helper call without pointers.
    let now = unsafe { bpf_ktime_get_ns() };
    let mut endpoint = Endpoint::from_words([0; 4], 0);
    if flows.is_null() {
        // The datagram still goes to its endpoint, but the reply will come from an address that was not dialed.
        count(Counter::NoMemory);
    // SAFETY: as above.
    } else if continue_flow(unsafe { &mut *flows }, &key.endpoint(), found.current, now, &mut endpoint) {
        return Decision::redirect(endpoint);
    }
    match pick_from_version(ctx, &key, &found) {
        Pick::Refuse { strict } => refuse(ctx, &key, strict),
        Pick::Take(taken) => {
            count_flow(&taken);
            let flow = Flow {
                frontend: key.endpoint(),
                backend: taken.endpoint,
                backend_id: taken.backend_id,
                epoch: taken.epoch,
                reserved: 0,
                forward: 1,
                last_ns: now,
            };
            if !flows.is_null() {
                // SAFETY: as above.
                start_flow(unsafe { &mut *flows }, &flow);
            }
            Decision::redirect(taken.endpoint)
        }
    }
}

/// Returns the endpoint of a connected socket that explicitly sends to the Service address it connected to.
/// The kernel accepts replies from this peer only.
#[inline(always)]
fn connected_to(ctx: &SockAddrContext, dialed: &Endpoint) -> Option<Endpoint> {
    // SAFETY: the kernel gives a valid context; the value belongs to this socket, which is locked.
    unsafe {
        let sk = (*ctx.sock_addr).__bindgen_anon_1.sk;
        if sk.is_null() || (*sk).dst_port == 0 {
            return None;
        }
        let state = state::lookup(ctx)?;
        let is_given = (*state.connection).backend_port != 0 && state.frontend() == *dialed;
        is_given.then(|| state.backend())
    }
}

/// Returns whether the socket is connected to the dialed address itself, as when it opted out or the address was no
/// frontend at connect time.
/// The kernel accepts replies from this peer only.
/// Not inlined, so that the verifier forgets which branch was taken.
#[inline(never)]
fn is_peer(ctx: &SockAddrContext, dialed: &Endpoint) -> bool {
    // SAFETY: the kernel gives a valid context.
    unsafe {
        let sk = (*ctx.sock_addr).__bindgen_anon_1.sk;
        !sk.is_null() && addr::peer(sk) == *dialed
    }
}

/// Finds the flow to this frontend, if there is one that may continue, and stores its endpoint. Returns whether there is.
///
/// Not inlined, so that the verifier forgets which flow it was.
#[inline(never)]
fn continue_flow(
    flows: &mut DatagramFlows,
    frontend: &Endpoint,
    current: Published,
    now: u64,
    endpoint: &mut Endpoint,
) -> bool {
    if flows.set != SET.load() {
        return false;
    }
    // The schedules of UDP frontends list their members, and are therefore never plain lists of endpoints.
    if !current.has(PublishedFlags::DETAILED) {
        return false;
    }
    let Some(version) = VERSIONS.get(current.base()) else { return false };
    for flow in &mut flows.flows {
        if flow.forward == 0 || flow.frontend != *frontend {
            continue;
        }
        if now.saturating_sub(flow.last_ns) > SILENCE_NS {
            return false;
        }
        let Some(taken) = current_backend(version, flow.backend_id, flow.epoch) else { return false };
        flow.last_ns = now;
        *endpoint = taken.endpoint;
        return true;
    }
    false
}

/// Stores a new flow in place of the one that has been idle longest.
/// An earlier flow to the same frontend is kept for late replies.
/// Not inlined, so that the verifier checks the loop once per call. Returns 0.
#[inline(never)]
fn start_flow(flows: &mut DatagramFlows, new: &Flow) -> u32 {
    // Ids of another map set are invalid here, but the addresses still identify late replies.
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
        *flow = *new;
    }
    0
}

/// Voids flows to this address, because a datagram goes to it directly: its replies no longer belong to a Service.
#[inline(always)]
fn clear_state(ctx: &SockAddrContext, dialed: &Endpoint) {
    // SAFETY: the kernel gives a valid context; the value belongs to this socket, which is locked.
    let flows = unsafe { DATAGRAMS.get_ptr_mut(ctx) };
    if flows.is_null() {
        return;
    }
    // SAFETY: as above.
    for flow in unsafe { &mut (*flows).flows } {
        if flow.backend == *dialed {
            flow.backend = Endpoint::from_words([0; 4], 0);
            flow.forward = 0;
        }
    }
}

/// Returns the Service address that a datagram from this endpoint replies for.
#[inline(always)]
fn sender(ctx: &SockAddrContext, source: Endpoint) -> Option<Endpoint> {
    // SAFETY: the kernel gives a valid context; the values belong to this socket, which is locked.
    unsafe {
        let sk = (*ctx.sock_addr).__bindgen_anon_1.sk;
        if sk.is_null() {
            return None;
        }
        // Connect state is valid only while the socket is connected: disconnecting with AF_UNSPEC runs no hook.
        if (*sk).dst_port != 0 {
            let state = state::lookup(ctx)?;
            return state.has_backend(&source).then(|| state.frontend());
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
