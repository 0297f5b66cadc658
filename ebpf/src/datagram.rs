//! The sendmsg and recvmsg hooks, for datagrams of unconnected UDP sockets.
//!
//! The datagrams from one socket to one Service address form a flow.
//! A flow keeps its endpoint while the endpoint has turns there, until the socket has been idle for a while.
//! Flows are stored on the socket, so that traffic of other sockets cannot evict them.

use aya_ebpf::{helpers::generated::bpf_ktime_get_ns, programs::SockAddrContext};
use portolan_common::{Counter, DatagramFlows, Endpoint, FLOWS, Flow, FrontendKey, PublishedFlags};

use crate::{
    addr,
    connect::{Decision, apply4, apply6, count_flow, is_denied, protocol, refuse},
    consts::{IPPROTO_UDP, PROCEED},
    frontend::{self, Found},
    maps::{DATAGRAMS, SET, VERSIONS, count},
    opt_out::is_opted_out,
    select::{Pick, current_backend, pick},
    state,
};

/// The idle time after which a flow may move to another endpoint.
const SILENCE_NS: u64 = 60_000_000_000;

#[inline(always)]
pub(crate) fn sendmsg4(ctx: &SockAddrContext) -> i32 {
    if protocol(ctx) != IPPROTO_UDP {
        return PROCEED;
    }
    apply4(ctx, send(ctx, FrontendKey::new(addr::read4(ctx), IPPROTO_UDP)))
}

#[inline(always)]
pub(crate) fn sendmsg6(ctx: &SockAddrContext) -> i32 {
    if protocol(ctx) != IPPROTO_UDP {
        return PROCEED;
    }
    apply6(ctx, send(ctx, FrontendKey::new(addr::read6(ctx), IPPROTO_UDP)))
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

/// Picks the endpoint to send to; `None` leaves the dialed address unchanged.
#[inline(always)]
fn send(ctx: &SockAddrContext, key: FrontendKey) -> Decision {
    let Some(found) = frontend::find(&key) else {
        clear_state(ctx, &key.endpoint());
        return Ok(None);
    };
    if is_denied() {
        return Ok(None);
    }
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
    // SAFETY: the kernel gives a valid context; the value belongs to this socket, which is locked.
    let flows = unsafe { DATAGRAMS.get_or_insert_ptr_mut(ctx, None) };
    if flows.is_null() {
        // The datagram still goes to its endpoint, but the reply will come from an address that was not dialed.
        count(Counter::NoMemory);
        return match pick(ctx, &key, &found) {
            Pick::Refuse { strict } => Err(refuse(ctx, &key, strict)),
            Pick::Take(taken) => Ok(Some(taken.endpoint)),
        };
    }
    // SAFETY: as above.
    let flows = unsafe { &mut *flows };
    // SAFETY: a helper call without pointers.
    let now = unsafe { bpf_ktime_get_ns() };
    if let Some(endpoint) = continue_flow(flows, &key, &found, now) {
        return Ok(Some(endpoint));
    }
    match pick(ctx, &key, &found) {
        Pick::Refuse { strict } => Err(refuse(ctx, &key, strict)),
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
            start_flow(flows, flow);
            Ok(Some(taken.endpoint))
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

/// Returns the endpoint of the flow to this frontend, if there is one that may continue.
#[inline(always)]
fn continue_flow(flows: &mut DatagramFlows, key: &FrontendKey, found: &Found, now: u64) -> Option<Endpoint> {
    if flows.set != SET.load() {
        return None;
    }
    // The schedules of UDP frontends list their members, and are therefore never mere lists of endpoints.
    if !found.current.has(PublishedFlags::DETAILED) {
        return None;
    }
    let version = VERSIONS.get(found.current.base())?;
    let frontend = key.endpoint();
    for flow in &mut flows.flows {
        if flow.forward == 0 || flow.frontend != frontend {
            continue;
        }
        if now.saturating_sub(flow.last_ns) > SILENCE_NS {
            return None;
        }
        let taken = current_backend(version, flow.backend_id, flow.epoch)?;
        flow.last_ns = now;
        return Some(taken.endpoint);
    }
    None
}

/// Stores a new flow in place of the one that has been idle longest.
/// An earlier flow to the same frontend is kept for late replies.
#[inline(always)]
fn start_flow(flows: &mut DatagramFlows, new: Flow) {
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
        *flow = new;
    }
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
