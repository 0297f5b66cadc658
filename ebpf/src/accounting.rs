//! What the counters of a connection's backend and pool are, and when it stops counting as active.

use core::{
    intrinsics::{AtomicOrdering, atomic_xadd},
    ptr::null_mut,
};

use portolan_common::{BackendStats, ClientUse, Connection, ConnectionFlags, PoolLimits, PoolStats, SidedCount};

use crate::{
    maps::{BACKEND_STATS, CLIENTS, POOL_STATS, POOLS, SET},
    state::{self, Place, State, exchange},
};

/// Counts a connection with these flags, on its side.
///
/// # Safety
/// `count` must point into a live map value.
#[inline(always)]
pub(crate) unsafe fn increment(count: *mut SidedCount, flags: u32) {
    // SAFETY: guaranteed by the caller.
    unsafe { atomic_xadd::<u32, u32, { AtomicOrdering::SeqCst }>(side(count, flags), 1) };
}

/// Counts a connection with these flags no longer.
///
/// # Safety
/// `count` must point into a live map value.
#[inline(always)]
unsafe fn decrement(count: *mut SidedCount, flags: u32) {
    // SAFETY: guaranteed by the caller.
    unsafe { atomic_xadd::<u32, u32, { AtomicOrdering::SeqCst }>(side(count, flags), u32::MAX) };
}

#[inline(always)]
unsafe fn side(count: *mut SidedCount, flags: u32) -> *mut u32 {
    // SAFETY: guaranteed by the caller; there are two sides.
    unsafe { count.cast::<u32>().add(usize::from(flags & ConnectionFlags::SIDE != 0)) }
}

/// Takes a connection out of the counts of active ones, of its backend and its pool, unless that has been done.
/// The application's close and the end of the TCP connection may come at the same time, on two CPUs: whoever clears the
/// flag decrements the counts.
#[inline(always)]
pub(crate) fn stop_counting(state: &State, owner: u64) {
    let seen = state.flags();
    if seen & ConnectionFlags::COUNTED == 0 || !state::is_owned_by(state, owner) {
        return;
    }
    // SAFETY: live map values; the counters are only ever added to.
    unsafe {
        // The entry had this owner after its flags were read, so the generation in them is this connection's.
        // If another CPU frees it now, and another socket fills it, the flags are no longer these.
        // These are pointers that may be null, because the verifier loses track of an `Option` of one.
        let stats = stats(state).unwrap_or(null_mut());
        let pool = if (*state.connection).pool == 0 { None } else { pool_stats(state) }.unwrap_or(null_mut());
        if !clear_counted(state, seen) {
            return;
        }
        if !stats.is_null() {
            decrement(&raw mut (*stats).active, seen);
        }
        if !pool.is_null() {
            decrement(&raw mut (*pool).active, seen);
        }
    }
}

/// Clears [`ConnectionFlags::COUNTED`] for the connection that had the flags `seen`; returns whether it was set.
#[inline(always)]
fn clear_counted(state: &State, mut seen: u32) -> bool {
    // Again if another flag has changed in between. If that happens twice, the end of the connection clears the flag, or a
    // recount corrects the counts.
    for _ in 0..2 {
        let (now, cleared) = state.exchange_flags(seen, seen & !ConnectionFlags::COUNTED);
        if cleared {
            return true;
        }
        if (now ^ seen) & ConnectionFlags::GENERATION != 0 || now & ConnectionFlags::COUNTED == 0 {
            return false;
        }
        seen = now;
    }
    false
}

/// Removes an earlier connect of this socket from the counts, and marks its entry as busy.
/// Returns false if another socket has taken the entry.
/// Not inlined: it is rare.
#[inline(never)]
pub(crate) fn forget(connection: *mut Connection, owner: u64) -> bool {
    let state = State { connection, place: Place::Entry(0) };
    if !state::begin(&state, owner) {
        return false;
    }
    stop_counting(&state, Connection::BUSY);
    // SAFETY: a live map value of this socket.
    leave_share(state.flags(), unsafe { (*connection).client });
    true
}

/// Takes the state of a socket out of the counts, and frees its entry; in socket storage, the state is voided.
#[inline(always)]
pub(crate) fn free(state: &State, owner: u64) {
    stop_counting(state, owner);
    // SAFETY: a live map value.
    unsafe {
        let connection = state.connection;
        if let Place::Storage(_) = state.place {
            (*connection).backend_port = 0;
            return;
        }
        let (flags, client) = (state.flags(), (&raw const (*connection).client).read_volatile());
        // Sequentially consistent: earlier writes come first on every architecture.
        // Whoever frees the entry takes it out of the share: it may have been stolen, or the agent may be freeing it.
        if exchange(&raw mut (*connection).owner, owner, 0).1 {
            leave_share(flags, client);
        }
    }
}

/// Takes an entry with these flags out of its client's share, if it is in it.
#[inline(always)]
fn leave_share(flags: u32, client: u32) {
    if flags & ConnectionFlags::SHARED != 0
        && let Some(uses) = CLIENTS.get_ptr_mut(ClientUse::index(client))
    {
        // SAFETY: a live map value; the counter is only ever added to.
        unsafe { decrement(&raw mut (*uses).connections, flags) };
    }
}

/// Returns the limits of the socket's pool, unless its entry has been reassigned or belongs to another map set.
#[inline(always)]
pub(crate) unsafe fn limits(state: &State) -> Option<&'static PoolLimits> {
    // SAFETY: a live value.
    let (pool, epoch, set) =
        unsafe { ((*state.connection).pool, (*state.connection).pool_epoch, (*state.connection).set) };
    POOLS.get(pool).filter(|limits| pool != 0 && limits.epoch as u16 == epoch && set == SET.load() as u16)
}

/// Returns the events to track for the socket's pool, as [`TrackFlags`] bits.
#[inline(always)]
pub(crate) unsafe fn watch(state: &State) -> u32 {
    // SAFETY: a live value.
    unsafe { limits(state) }.map_or(0, |limits| limits.watch)
}

/// Returns the counters of the socket's backend, unless the id has been reassigned or belongs to another map set.
#[inline(always)]
pub(crate) unsafe fn stats(state: &State) -> Option<*mut BackendStats> {
    // SAFETY: live values.
    unsafe {
        let connection = state.connection;
        if (*connection).set != SET.load() as u16 {
            return None;
        }
        let stats = BACKEND_STATS.get_ptr_mut((*connection).backend_id)?;
        ((*stats).epoch as u16 == (*connection).backend_epoch).then_some(stats)
    }
}

/// Returns the counters of the socket's pool, unless its entry has been reassigned or belongs to another map set.
#[inline(always)]
pub(crate) unsafe fn pool_stats(state: &State) -> Option<*mut PoolStats> {
    // SAFETY: live values.
    unsafe {
        limits(state)?;
        POOL_STATS.get_ptr_mut((*state.connection).pool)
    }
}
