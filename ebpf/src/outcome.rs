//! The sock_ops hook: it records how a connect ended and what the connection carried.
//!
//! State callbacks are enabled when the SYN is about to be sent, not when the connection is established.
//! Otherwise, a refused connect would be missed: it goes straight from SYN_SENT to CLOSE.

use core::ptr::addr_of;

use aya_ebpf::{
    EbpfContext,
    bindings::{
        BPF_RB_AVAIL_DATA, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TIMEOUT_INIT,
    },
    helpers::generated::{
        bpf_get_netns_cookie, bpf_getsockopt, bpf_ktime_get_ns, bpf_ringbuf_query, bpf_setsockopt, bpf_skc_to_tcp_sock,
    },
    programs::SockOpsContext,
};
use aya_log_ebpf::debug;
use portolan_common::{
    BackendStats, Counter, EventBudget, Outcome, OutcomeKind, PoolStats, Response, SocketStage, SocketState, TrackFlags,
};

use crate::{
    addr,
    consts::IPPROTO_TCP,
    maps::{
        BACKEND_STATS, BACKEND_USE, BUDGETS, EVENTS, EVENTS_BYTES, POOL_STATS, POOLS, SET, SK_ERR_OFFSET, TICK_NS,
        TROUBLED, count, time,
    },
    select::{add, decrement},
    state,
};

const TCP_SYN_SENT: u32 = 2;
const TCP_SYN_RECV: u32 = 3;
const TCP_FIN_WAIT2: u32 = 5;
const TCP_CLOSE: u32 = 7;
const TCP_CLOSE_WAIT: u32 = 8;
const TCP_LAST_ACK: u32 = 9;
const TCP_CLOSING: u32 = 11;
const ECONNABORTED: u32 = 103;
const ECONNRESET: u32 = 104;
const ETIMEDOUT: u32 = 110;
/// The kernel's initial retransmission timeout for a SYN.
const INITIAL_RTO_MS: u32 = 1_000;
const TCP_USER_TIMEOUT: i32 = 18;
const TCP_KEEPIDLE: i32 = 4;
const TCP_KEEPINTVL: i32 = 5;
const TCP_KEEPCNT: i32 = 6;
const SOL_SOCKET: i32 = 1;
const SO_KEEPALIVE: i32 = 9;

#[inline(always)]
pub(crate) fn sock_ops(ctx: &SockOpsContext) {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => {
            if let Some(state) = state(ctx) {
                on_connect(ctx, state);
            }
        }
        BPF_SOCK_OPS_TIMEOUT_INIT => {
            if let Some(state) = state(ctx) {
                initial_rto(ctx, state);
            }
        }
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => {
            if let Some(state) = state(ctx) {
                on_established(ctx, state);
            }
        }
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == TCP_CLOSE => {
            if let Some(state) = state(ctx) {
                on_close(ctx, state);
            }
            state::release(ctx);
        }
        _ => {}
    }
}

/// Returns the socket's state, if its peer is still the backend that it got.
#[inline(always)]
fn state(ctx: &SockOpsContext) -> Option<*mut SocketState> {
    let state = state::for_sock_ops(ctx)?;
    // SAFETY: the value belongs to this socket, which is locked.
    unsafe { ((*state).backend == addr::remote(ctx)).then_some(state) }
}

/// Handles a SYN that is about to be sent.
#[inline(always)]
fn on_connect(ctx: &SockOpsContext, state: *mut SocketState) {
    // SAFETY: `state` is a live value of this socket, which is locked.
    unsafe {
        (*state).started_ns = bpf_ktime_get_ns();
        (*state).stage = SocketStage::Connecting as u32;
        if let Some(stats) = stats(state) {
            add(&raw mut (*stats).active, 1);
        }
        if (*state).pool != 0 {
            if let Some(pool) = pool_stats(state) {
                add(&raw mut (*pool).active, 1);
            }
            set_keepalive(ctx, state);
        }
        if (*state).connect_timeout_ms != 0 {
            set_connect_timeout(ctx, state);
        }
    }
    let _ = ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32);
}

/// Enables TCP keepalive as the pool's limits say.
/// An application that has enabled it keeps its own settings.
#[inline(always)]
unsafe fn set_keepalive(ctx: &SockOpsContext, state: *const SocketState) {
    // SAFETY: `state` is a live value of this socket.
    let (pool, epoch, set) = unsafe { ((*state).pool, (*state).pool_epoch, (*state).set) };
    let Some(limits) = POOLS.get(pool).copied() else { return };
    if limits.keepalive == 0 || limits.epoch != epoch || set != SET.load() {
        return;
    }
    let mut own = 0u32;
    // SAFETY: the option's buffer is four bytes of the stack.
    unsafe {
        bpf_getsockopt(ctx.as_ptr(), SOL_SOCKET, SO_KEEPALIVE, (&raw mut own).cast(), 4);
        if own != 0 {
            return;
        }
        own = 1;
        bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, SO_KEEPALIVE, (&raw mut own).cast(), 4);
        own = limits.keepalive_time;
        if own != 0 {
            bpf_setsockopt(ctx.as_ptr(), IPPROTO_TCP as i32, TCP_KEEPIDLE, (&raw mut own).cast(), 4);
        }
        own = limits.keepalive_interval;
        if own != 0 {
            bpf_setsockopt(ctx.as_ptr(), IPPROTO_TCP as i32, TCP_KEEPINTVL, (&raw mut own).cast(), 4);
        }
        own = limits.keepalive_probes;
        if own != 0 {
            bpf_setsockopt(ctx.as_ptr(), IPPROTO_TCP as i32, TCP_KEEPCNT, (&raw mut own).cast(), 4);
        }
    }
}

/// Limits the time of an unanswered connect: TCP_USER_TIMEOUT also applies in SYN_SENT.
/// An application that has set a shorter one keeps it.
#[inline(always)]
unsafe fn set_connect_timeout(ctx: &SockOpsContext, state: *mut SocketState) {
    let mut own = 0u32;
    let own_pointer = (&raw mut own).cast();
    // SAFETY: `state` is a live value of this socket; the option's buffer is four bytes of the stack.
    unsafe {
        bpf_getsockopt(ctx.as_ptr(), IPPROTO_TCP as i32, TCP_USER_TIMEOUT, own_pointer, 4);
        let limit = (*state).connect_timeout_ms;
        if own != 0 && own <= limit {
            (*state).connect_timeout_ms = 0;
            return;
        }
        (*state).user_timeout_ms = own;
        own = limit;
        bpf_setsockopt(ctx.as_ptr(), IPPROTO_TCP as i32, TCP_USER_TIMEOUT, own_pointer, 4);
    }
}

/// Shortens the initial retransmission timeout if the connect timeout is shorter, so that the kernel checks it in time.
#[inline(always)]
fn initial_rto(ctx: &SockOpsContext, state: *const SocketState) {
    // SAFETY: `state` is a live value of this socket, which is locked.
    let limit = unsafe { (*state).connect_timeout_ms };
    if limit == 0 || limit >= INITIAL_RTO_MS {
        return;
    }
    // In ticks of the kernel's clock.
    // An eBPF program cannot panic, so the division must be checked.
    if let Some(ticks) = (u64::from(limit) * 1_000_000).checked_div(u64::from(TICK_NS.load())) {
        ctx.set_reply(if ticks == 0 { 1 } else { ticks as u32 });
    }
}

/// Restores the application's TCP_USER_TIMEOUT, unless the application has changed it in the meantime.
#[inline(always)]
unsafe fn restore_connect_timeout(ctx: &SockOpsContext, state: *mut SocketState) {
    // SAFETY: `state` is a live value of this socket; the option's buffer is four bytes of the stack.
    unsafe {
        let limit = (*state).connect_timeout_ms;
        if limit == 0 {
            return;
        }
        (*state).connect_timeout_ms = 0;
        let mut now = 0u32;
        bpf_getsockopt(ctx.as_ptr(), IPPROTO_TCP as i32, TCP_USER_TIMEOUT, (&raw mut now).cast(), 4);
        if now == limit {
            now = (*state).user_timeout_ms;
            bpf_setsockopt(ctx.as_ptr(), IPPROTO_TCP as i32, TCP_USER_TIMEOUT, (&raw mut now).cast(), 4);
        }
    }
}

/// Handles a newly established connection.
#[inline(always)]
fn on_established(ctx: &SockOpsContext, state: *mut SocketState) {
    // SAFETY: `state` is a live value of this socket, which is locked.
    unsafe {
        restore_connect_timeout(ctx, state);
        (*state).stage = SocketStage::Established as u32;
        let Some(stats) = stats(state) else { return };
        add(&raw mut (*stats).opened, 1);
        let watch = watch(state);
        if watch != 0 {
            track_use(ctx, state);
        }
        let unseen = watch & TrackFlags::STATUS != 0 && !watch_responses(ctx);
        // While no failures are being counted, successes need not be reported.
        if TROUBLED.get((*state).backend_id).is_some_and(|troubled| *troubled != 0) {
            let netns = bpf_get_netns_cookie(ctx.as_ptr());
            emit_outcome(netns, state, OutcomeKind::Established, 0);
            if unseen {
                // Responses on this connection cannot be tracked, so establishing it counts as a success.
                emit_outcome(netns, state, OutcomeKind::Responded, 200);
            }
        }
    }
}

/// Handles a closed socket, whether or not it had been connected.
#[inline(always)]
fn on_close(ctx: &SockOpsContext, state: *mut SocketState) {
    // SAFETY: `state` is a live value of this socket, which is locked; the context is the kernel's.
    unsafe {
        // Restore it even after a failed connect: the socket may connect again.
        restore_connect_timeout(ctx, state);
        let stage = core::mem::replace(&mut (*state).stage, SocketStage::None as u32);
        if stage != SocketStage::None as u32
            && (*state).pool != 0
            && let Some(pool) = pool_stats(state)
        {
            decrement(&raw mut (*pool).active);
        }
        let Some(stats) = stats(state) else { return };
        if stage != SocketStage::None as u32 {
            decrement(&raw mut (*stats).active);
        }
        if stage == SocketStage::Established as u32 {
            add(&raw mut (*stats).closed, 1);
            let received = count_bytes(ctx, stats);
            let watch = watch(state);
            if watch & TrackFlags::USE != 0 {
                // The kernel stores the value times eight.
                time(1, addr_of!((*ctx.ops).srtt_us).read_volatile() >> 3);
            }
            if watch & TrackFlags::ANSWER != 0 {
                check_first_byte(ctx, state, received);
            }
            return;
        }
        let before = ctx.arg(0);
        if before != TCP_SYN_SENT && before != TCP_SYN_RECV {
            return;
        }
        let errno = socket_error(ctx);
        if errno == 0 || errno == ECONNABORTED {
            // The application, or Portolan itself, aborted the connect before an answer: this says nothing about the
            // backend.
            debug!(ctx, "backend {}: connect aborted locally", (*state).backend_id);
            return;
        }
        add(&raw mut (*stats).failed, 1);
        if let Some(troubled) = TROUBLED.get_ptr_mut((*state).backend_id) {
            *troubled = 1;
        }
        let kind = if errno == ETIMEDOUT { OutcomeKind::TimedOut } else { OutcomeKind::Failed };
        emit_outcome(bpf_get_netns_cookie(ctx.as_ptr()), state, kind, errno);
    }
}

/// Returns the events to track for the socket's pool, as [`TrackFlags`] bits.
#[inline(always)]
unsafe fn watch(state: *const SocketState) -> u32 {
    // SAFETY: `state` is a live value.
    let (pool, epoch, set) = unsafe { ((*state).pool, (*state).pool_epoch, (*state).set) };
    match POOLS.get(pool) {
        Some(limits) if pool != 0 && limits.epoch == epoch && set == SET.load() => limits.watch,
        _ => 0,
    }
}

/// Records which network namespace uses the endpoint, and the connect time.
#[inline(always)]
unsafe fn track_use(ctx: &SockOpsContext, state: *const SocketState) {
    // SAFETY: `state` is a live value, and so is the map's.
    // Of two concurrent updates, one may be lost; either one records a use.
    unsafe {
        let Some(uses) = BACKEND_USE.get_ptr_mut((*state).backend_id) else { return };
        let (now, netns) = (bpf_ktime_get_ns(), bpf_get_netns_cookie(ctx.as_ptr()));
        if (*uses).last_netns != netns {
            (*uses).other_netns = (*uses).last_netns;
            (*uses).other_ns = (*uses).last_ns;
            (*uses).last_netns = netns;
        }
        (*uses).last_ns = now;
        let took = now.saturating_sub((*state).started_ns);
        let before = (*uses).connect_ns;
        (*uses).connect_ns = if before == 0 { took } else { before - before / 8 + took / 8 };
        time(0, (took / 1_000) as u32);
    }
}

/// Starts to track responses on a new connection.
/// Returns `false` if the connection has no entry in `CONNECTIONS`.
#[inline(always)]
unsafe fn watch_responses(ctx: &SockOpsContext) -> bool {
    let Some(connection) = state::slot_for_sock_ops(ctx) else { return false };
    // SAFETY: a live map value; the context is the kernel's.
    unsafe {
        (*connection).response = Response {
            netns: bpf_get_netns_cookie(ctx.as_ptr()),
            next: addr_of!((*ctx.ops).rcv_nxt).read_volatile(),
            flags: Response::ON | Response::AWAITED,
            ..Response::default()
        };
    }
    true
}

/// Handles the end of a connection that needed a response byte to count as a success.
#[inline(always)]
unsafe fn check_first_byte(ctx: &SockOpsContext, state: *const SocketState, received: u64) {
    // SAFETY: `state` is a live value; the context is the kernel's.
    unsafe {
        let Some(troubled) = TROUBLED.get_ptr_mut((*state).backend_id) else { return };
        let netns = bpf_get_netns_cookie(ctx.as_ptr());
        if received > 0 {
            if *troubled != 0 {
                emit_outcome(netns, state, OutcomeKind::Answered, 0);
            }
            return;
        }
        let errno = socket_error(ctx);
        // Any other close comes from the application or Portolan and says nothing about the backend.
        if errno == ECONNRESET || errno == ETIMEDOUT {
            *troubled = 1;
            emit_outcome(netns, state, OutcomeKind::Broken, errno);
        }
    }
}

/// Adds the transferred bytes to the counters, and returns the number of bytes received.
/// The kernel counts a SYN and a FIN as one byte each; the last state tells which FINs were exchanged.
#[inline(always)]
unsafe fn count_bytes(ctx: &SockOpsContext, stats: *mut BackendStats) -> u64 {
    let before = ctx.arg(0);
    let own_fin = matches!(before, TCP_FIN_WAIT2 | TCP_LAST_ACK | TCP_CLOSING);
    let peers_fin = matches!(before, TCP_FIN_WAIT2 | TCP_LAST_ACK | TCP_CLOSING | TCP_CLOSE_WAIT);
    // SAFETY: a live map value; the context is the kernel's.
    unsafe {
        let sent = addr_of!((*ctx.ops).bytes_acked).read_volatile();
        let received = addr_of!((*ctx.ops).bytes_received).read_volatile();
        add(&raw mut (*stats).sent_bytes, sent.saturating_sub(1 + u64::from(own_fin)));
        let received = received.saturating_sub(u64::from(peers_fin));
        add(&raw mut (*stats).received_bytes, received);
        received
    }
}

/// Returns the counters of the socket's backend, unless the id has been reassigned or belongs to another map set.
#[inline(always)]
pub(crate) unsafe fn stats(state: *const SocketState) -> Option<*mut BackendStats> {
    // SAFETY: `state` is a live value.
    unsafe {
        if (*state).set != SET.load() {
            return None;
        }
        let stats = BACKEND_STATS.get_ptr_mut((*state).backend_id)?;
        ((*stats).epoch == (*state).epoch).then_some(stats)
    }
}

/// Returns the counters of the socket's pool, unless its entry has been reassigned or belongs to another map set.
#[inline(always)]
pub(crate) unsafe fn pool_stats(state: *const SocketState) -> Option<*mut PoolStats> {
    // SAFETY: `state` is a live value.
    unsafe {
        if (*state).set != SET.load() || POOLS.get((*state).pool)?.epoch != (*state).pool_epoch {
            return None;
        }
        POOL_STATS.get_ptr_mut((*state).pool)
    }
}

/// Returns the error that the application will get; the kernel sets it before it changes the state.
#[inline(always)]
fn socket_error(ctx: &SockOpsContext) -> u32 {
    // SAFETY: the kernel gives a valid context; a read through a BTF pointer cannot fault, and the offset comes from
    // the kernel's own BTF.
    unsafe {
        let sk = (*ctx.ops).__bindgen_anon_2.sk;
        if sk.is_null() {
            return 0;
        }
        let tcp = bpf_skc_to_tcp_sock(sk.cast());
        if tcp.is_null() {
            return 0;
        }
        tcp.cast::<u8>().add(SK_ERR_OFFSET.load() as usize).cast::<u32>().read_volatile()
    }
}

/// Sends an outcome to the agent, and returns whether the ring buffer had room for it.
/// A flood from one pod cannot crowd out the others, see [`EventBudget`].
#[inline(always)]
pub(crate) unsafe fn emit_outcome(netns: u64, state: *const SocketState, kind: OutcomeKind, errno: u32) -> bool {
    // SAFETY: `state` is a live value.
    unsafe {
        let now = bpf_ktime_get_ns();
        let room = if is_behind() && !may_emit(netns, now) { None } else { EVENTS.reserve(0) };
        let Some(mut record) = room else {
            count(Counter::EventsLost);
            return false;
        };
        record.write(Outcome {
            time_ns: now,
            latency_ns: now.saturating_sub((*state).started_ns),
            netns_cookie: netns,
            backend: (*state).backend,
            backend_id: (*state).backend_id,
            frontend_id: (*state).frontend_id,
            kind: kind as u32,
            errno,
            reserved: 0,
        });
        record.submit(0);
        true
    }
}

/// Returns whether at least a quarter of the ring buffer is unread.
#[inline(always)]
fn is_behind() -> bool {
    // SAFETY: a helper call with the program's own map.
    let unread = unsafe { bpf_ringbuf_query((&raw const EVENTS).cast_mut().cast(), u64::from(BPF_RB_AVAIL_DATA)) };
    unread > EVENTS_BYTES / 4
}

/// Returns whether a network namespace may send another event while the agent is behind.
/// All namespaces share the rest of the ring buffer.
#[inline(always)]
fn may_emit(netns: u64, now: u64) -> bool {
    let Some(place) = BUDGETS.get_ptr_mut(netns as u32 & (EventBudget::CAPACITY - 1)) else { return false };
    // SAFETY: a live map value.
    // Of two concurrent updates, one may be lost.
    unsafe {
        let (budget, may) = EventBudget::spend(place.read_volatile(), now);
        place.write_volatile(budget);
        may
    }
}
