//! The sock_ops hook: it records how a connect ended and what the connection carried.
//!
//! State callbacks are enabled when the SYN is about to be sent, not when the connection is established.
//! Otherwise, a refused connect would be missed: it goes straight from SYN_SENT to CLOSE.

use core::{
    intrinsics::{AtomicOrdering, atomic_xadd},
    ptr::addr_of,
};

use aya_ebpf::{
    EbpfContext,
    bindings::{
        BPF_RB_AVAIL_DATA, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TIMEOUT_INIT,
    },
    helpers::generated::{
        bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_getsockopt, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns,
        bpf_ringbuf_query, bpf_setsockopt, bpf_skc_to_tcp_sock,
    },
    programs::SockOpsContext,
};
use aya_log_ebpf::debug;
use portolan_common::{
    BackendStats, ClientUse, Connection, ConnectionFlags, Counter, EventBudget, FailureCount, NodeFlags, Outcome,
    OutcomeKind, Response, SocketStage, TrackFlags,
};

use crate::{
    accounting::{self, increment, limits, pool_stats, stats, watch},
    addr, claim,
    consts::IPPROTO_TCP,
    maps::{BACKEND_USE, CLIENTS, EVENTS, EVENTS_BYTES, FAILURES, SK_ERR_OFFSET, TICK_NS, count, time},
    select::add,
    state::{self, State},
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
    // Nine in ten runs are for other events or other sockets.
    let op = ctx.op();
    if op != BPF_SOCK_OPS_TCP_CONNECT_CB
        && op != BPF_SOCK_OPS_TIMEOUT_INIT
        && op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB
        && !(op == BPF_SOCK_OPS_STATE_CB && ctx.arg(1) == TCP_CLOSE)
    {
        return;
    }
    if op == BPF_SOCK_OPS_TIMEOUT_INIT && !state::is_used(NodeFlags::CONNECT_TIMEOUT) {
        return;
    }
    // SAFETY: the kernel gives a valid context.
    let socket = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    let Some(state) = state::of_socket(socket) else { return };
    if op == BPF_SOCK_OPS_TIMEOUT_INIT {
        // SAFETY: a live map value of this socket.
        if unsafe { (*state.connection).backend_port } != 0 && state.flags() & ConnectionFlags::CONNECT_TIMEOUT != 0 {
            initial_rto(ctx, &state);
        }
        return;
    }
    let is_valid = state.has_backend(&addr::remote(ctx));
    if op == BPF_SOCK_OPS_TCP_CONNECT_CB {
        if is_valid {
            if state.flags() & (ConnectionFlags::STAGE | ConnectionFlags::SHARED) != 0 {
                // No hook saw the end of an earlier connection, and this socket, at the same address, connects to the same
                // endpoint without its Service.
                accounting::free(&state, state::owner(socket));
                return;
            }
            let me = state::owner(socket);
            if !state::begin(&state, me) {
                return;
            }
            // SAFETY: a helper call with the kernel's own context.
            let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
            let side = state::current_side();
            if let Some(flags) = claim::join_share(&state, cookie, side) {
                on_connect(ctx, &state, flags);
                state::settle(&state, me);
            } else if let Some(index) = state.index() {
                if !claim::move_to_storage(state.connection, index, socket, Connection::BUSY) {
                    // Without memory for its state, nothing of this connection is reported.
                    accounting::free(&state, Connection::BUSY);
                } else if let Some(moved) = state::of_socket(socket) {
                    on_connect(ctx, &moved, side);
                }
            }
        } else {
            // An earlier connect to a Service failed before its SYN, and this one goes elsewhere.
            accounting::free(&state, state::owner(socket));
        }
    } else if op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB {
        if is_valid {
            on_established(ctx, &state);
        }
    } else {
        if is_valid {
            on_close(ctx, &state);
        }
        accounting::free(&state, state::owner(socket));
    }
}

/// Handles a SYN that is about to be sent, and sets these flags, which name the side, with its own.
#[inline(always)]
fn on_connect(ctx: &SockOpsContext, state: &State, more: u32) {
    let flags = state.flags();
    // SAFETY: live map values of this socket, which is locked.
    unsafe {
        let connection = state.connection;
        (*connection).started_ns =
            if flags & ConnectionFlags::TIMED != 0 { bpf_ktime_get_ns() } else { bpf_ktime_get_coarse_ns() };
        if let Some(stats) = stats(state) {
            increment(&raw mut (*stats).active, more);
        }
        if (*connection).pool != 0 {
            if let Some(pool) = pool_stats(state) {
                increment(&raw mut (*pool).active, more);
            }
            set_keepalive(ctx, state);
        }
        if flags & ConnectionFlags::CONNECT_TIMEOUT != 0 {
            set_connect_timeout(ctx, state);
        }
    }
    state.set_first_flags(more | SocketStage::Connecting as u32 | ConnectionFlags::COUNTED);
    let _ = ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32);
}

/// Enables TCP keepalive as the pool's limits say.
/// An application that has enabled it keeps its own settings.
#[inline(always)]
unsafe fn set_keepalive(ctx: &SockOpsContext, state: &State) {
    // SAFETY: a live value of this socket.
    let Some(limits) = (unsafe { limits(state) }) else { return };
    if limits.keepalive == 0 {
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
unsafe fn set_connect_timeout(ctx: &SockOpsContext, state: &State) {
    let Some(extra) = state.extra() else { return };
    let mut own = 0u32;
    // SAFETY: a live value of this socket; the option's buffer is four bytes of the stack.
    unsafe {
        bpf_getsockopt(ctx.as_ptr(), IPPROTO_TCP as i32, TCP_USER_TIMEOUT, (&raw mut own).cast(), 4);
        let limit = (*extra).connect_timeout_ms;
        if own != 0 && own <= limit {
            state.remove_flags(ConnectionFlags::CONNECT_TIMEOUT);
            return;
        }
        (*extra).user_timeout_ms = own;
        own = limit;
        bpf_setsockopt(ctx.as_ptr(), IPPROTO_TCP as i32, TCP_USER_TIMEOUT, (&raw mut own).cast(), 4);
    }
}

/// Shortens the initial retransmission timeout if the connect timeout is shorter, so that the kernel checks it in time.
#[inline(always)]
fn initial_rto(ctx: &SockOpsContext, state: &State) {
    let Some(extra) = state.extra() else { return };
    // SAFETY: a live value of this socket, which is locked.
    let limit = unsafe { (*extra).connect_timeout_ms };
    if limit >= INITIAL_RTO_MS {
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
unsafe fn restore_connect_timeout(ctx: &SockOpsContext, state: &State) {
    if state.flags() & ConnectionFlags::CONNECT_TIMEOUT == 0 {
        return;
    }
    state.remove_flags(ConnectionFlags::CONNECT_TIMEOUT);
    let Some(extra) = state.extra() else { return };
    let mut now = 0u32;
    // SAFETY: a live value of this socket; the option's buffer is four bytes of the stack.
    unsafe {
        bpf_getsockopt(ctx.as_ptr(), IPPROTO_TCP as i32, TCP_USER_TIMEOUT, (&raw mut now).cast(), 4);
        if now == (*extra).connect_timeout_ms {
            now = (*extra).user_timeout_ms;
            bpf_setsockopt(ctx.as_ptr(), IPPROTO_TCP as i32, TCP_USER_TIMEOUT, (&raw mut now).cast(), 4);
        }
    }
}

/// Handles a newly established connection.
#[inline(always)]
fn on_established(ctx: &SockOpsContext, state: &State) {
    // SAFETY: live map values of this socket, which is locked.
    unsafe {
        restore_connect_timeout(ctx, state);
        state.set_stage(SocketStage::Established);
        let Some(stats) = stats(state) else { return };
        add(&raw mut (*stats).opened, 1);
        let watch = watch(state);
        if watch == 0 {
            return;
        }
        track_use(ctx, state);
        if watch & TrackFlags::STATUS != 0 {
            watch_responses(ctx, state);
        }
        // While no failures are being counted, successes need not be reported.
        if let Some(failures) = failures_to_reset(state) {
            emit_outcome(bpf_get_netns_cookie(ctx.as_ptr()), state, (OutcomeKind::Established, 0), failures);
        }
    }
}

/// Handles a closed socket, whether or not it had been connected.
#[inline(always)]
fn on_close(ctx: &SockOpsContext, state: &State) {
    // SAFETY: live map values of this socket, which is locked; the context is the kernel's.
    unsafe {
        // Restore it even after a failed connect: the socket may connect again.
        restore_connect_timeout(ctx, state);
        let stage = state.stage();
        let Some(stats) = stats(state) else { return };
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
            debug!(ctx, "backend {}: connect aborted locally", (*state.connection).backend_id);
            return;
        }
        add(&raw mut (*stats).failed, 1);
        // The failures of a pool without outlier detection are not evaluated.
        if watch(state) != 0 {
            let kind = if errno == ETIMEDOUT { OutcomeKind::TimedOut } else { OutcomeKind::Failed };
            report_failure(bpf_get_netns_cookie(ctx.as_ptr()), state, (kind, errno));
        }
    }
}

/// Counts a failure of the socket's backend, and reports it.
#[inline(always)]
pub(crate) unsafe fn report_failure(netns: u64, state: &State, what: (OutcomeKind, u32)) {
    // SAFETY: live values. Only the lower half is added to, and its overflow does not reach the upper half.
    unsafe {
        let Some(failures) = FAILURES.get_ptr_mut((*state.connection).backend_id) else { return };
        let before = atomic_xadd::<u32, u32, { AtomicOrdering::SeqCst }>(failures.cast(), 1);
        emit_outcome(netns, state, what, before.wrapping_add(1));
    }
}

/// Returns the number of failures of the socket's backend, if a success resets how many of them count.
#[inline(always)]
pub(crate) unsafe fn failures_to_reset(state: &State) -> Option<u32> {
    // SAFETY: live values.
    let failures = unsafe { FAILURES.get_ptr((*state.connection).backend_id)?.read_volatile() };
    FailureCount::reports_successes(failures).then_some(failures as u32)
}

/// Records which network namespace uses the endpoint, and the connect time.
#[inline(always)]
unsafe fn track_use(ctx: &SockOpsContext, state: &State) {
    // SAFETY: live values.
    // Of two concurrent updates, one may be lost; either one records a use.
    unsafe {
        let Some(uses) = BACKEND_USE.get_ptr_mut((*state.connection).backend_id) else { return };
        let (now, netns) = (bpf_ktime_get_ns(), bpf_get_netns_cookie(ctx.as_ptr()));
        if (*uses).last_netns != netns {
            (*uses).other_netns = (*uses).last_netns;
            (*uses).other_ns = (*uses).last_ns;
            (*uses).last_netns = netns;
        }
        (*uses).last_ns = now;
        let took = now.saturating_sub((*state.connection).started_ns);
        let before = (*uses).connect_ns;
        (*uses).connect_ns = if before == 0 { took } else { before - before / 8 + took / 8 };
        time(0, (took / 1_000) as u32);
    }
}

/// Starts to track responses on a new connection.
#[inline(always)]
unsafe fn watch_responses(ctx: &SockOpsContext, state: &State) {
    let Some(extra) = state.extra() else { return };
    // SAFETY: a live map value; the context is the kernel's.
    unsafe {
        (*extra).response = Response {
            netns: bpf_get_netns_cookie(ctx.as_ptr()),
            next: addr_of!((*ctx.ops).rcv_nxt).read_volatile(),
            flags: Response::AWAITED,
            ..Response::default()
        };
    }
    state.add_flags(ConnectionFlags::HTTP);
}

/// Handles the end of a connection that needed a response byte to count as a success.
#[inline(always)]
unsafe fn check_first_byte(ctx: &SockOpsContext, state: &State, received: u64) {
    // SAFETY: live values; the context is the kernel's.
    unsafe {
        let netns = bpf_get_netns_cookie(ctx.as_ptr());
        if received > 0 {
            if let Some(failures) = failures_to_reset(state) {
                emit_outcome(netns, state, (OutcomeKind::Answered, 0), failures);
            }
            return;
        }
        let errno = socket_error(ctx);
        // Any other close comes from the application or Portolan and says nothing about the backend.
        if errno == ECONNRESET || errno == ETIMEDOUT {
            report_failure(netns, state, (OutcomeKind::Broken, errno));
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
        let (sent, received) =
            (sent.saturating_sub(1 + u64::from(own_fin)), received.saturating_sub(u64::from(peers_fin)));
        if sent != 0 {
            add(&raw mut (*stats).sent_bytes, sent);
        }
        if received != 0 {
            add(&raw mut (*stats).received_bytes, received);
        }
        received
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
/// `what` is the kind and its number; `failures` is the backend's count of failures.
/// A flood from one pod cannot crowd out the others, see [`EventBudget`].
#[inline(always)]
pub(crate) unsafe fn emit_outcome(netns: u64, state: &State, (kind, errno): (OutcomeKind, u32), failures: u32) -> bool {
    // SAFETY: live values.
    unsafe {
        let connection = state.connection;
        let now = bpf_ktime_get_ns();
        let room = if is_behind() && !may_emit((*connection).client, now) { None } else { EVENTS.reserve(0) };
        let Some(mut record) = room else {
            count(Counter::EventsLost);
            return false;
        };
        record.write(Outcome {
            time_ns: now,
            latency_us: u32::try_from(now.saturating_sub((*connection).started_ns) / 1_000).unwrap_or(u32::MAX),
            client: (*connection).client,
            netns_cookie: netns,
            backend: state.backend(),
            backend_id: (*connection).backend_id,
            frontend_id: (*connection).frontend_id,
            kind: kind as u16,
            frontend_epoch: (*connection).frontend_epoch,
            errno,
            failures,
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

/// Returns whether a client may send another event while the agent is behind.
/// All clients share the rest of the ring buffer.
#[inline(always)]
fn may_emit(client: u32, now: u64) -> bool {
    let Some(uses) = CLIENTS.get_ptr_mut(ClientUse::index(client)) else { return false };
    // SAFETY: a live map value.
    // Of two concurrent updates, one may be lost.
    unsafe {
        let place = &raw mut (*uses).budget;
        let (budget, may) = EventBudget::spend(place.read_volatile(), now);
        place.write_volatile(budget);
        may
    }
}
