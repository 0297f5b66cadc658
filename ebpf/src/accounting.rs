//! What the counters of a connection's backend and pool are, and when it stops to count as active.

use portolan_common::{BackendStats, ClientUse, Connection, ConnectionFlags, PoolLimits, PoolStats};

use crate::{
    maps::{BACKEND_STATS, CLIENTS, POOL_STATS, POOLS, SET},
    select::decrement,
    state::{self, Place, State, exchange},
};

/// Takes a connection out of the counts that these flags stand for: the active connections of its backend and pool
/// ([`ConnectionFlags::COUNTED`]), and its client's share ([`ConnectionFlags::SHARED`]).
/// Whoever clears a flag decrements the counts.
#[inline(always)]
pub(crate) fn leave(state: &State, owner: u64, flags: u32) {
    if state.flags() & flags == 0 {
        return;
    }
    let left = state.remove_flags(flags) & flags;
    if left == 0 {
        return;
    }
    if !state::is_owned_by(state, owner) {
        // The connection ended on another CPU, and the entry has another owner already, whose flags these were.
        state.add_flags(left);
        return;
    }
    // SAFETY: live map values; the counters are only ever added to.
    unsafe {
        if left & ConnectionFlags::SHARED != 0
            && let Some(uses) = CLIENTS.get_ptr_mut(ClientUse::index((*state.connection).client))
        {
            decrement(&raw mut (*uses).connections);
        }
        if left & ConnectionFlags::COUNTED == 0 {
            return;
        }
        if let Some(stats) = stats(state) {
            decrement(&raw mut (*stats).active);
        }
        if (*state.connection).pool != 0
            && let Some(pool) = pool_stats(state)
        {
            decrement(&raw mut (*pool).active);
        }
    }
}

/// Both flags of [`leave`].
const COUNTS: u32 = ConnectionFlags::COUNTED | ConnectionFlags::SHARED;

/// Takes what an earlier connect of this socket has left in its entry out of the counts. Returns true.
/// Not inlined: it is rare.
#[inline(never)]
pub(crate) fn forget(connection: *mut Connection, owner: u64) -> bool {
    leave(&State { connection, place: Place::Entry(0) }, owner, COUNTS);
    true
}

/// Voids the state of a socket, takes it out of the counts, and frees its entry.
/// Socket storage is freed with the socket.
#[inline(always)]
pub(crate) fn free(state: &State, owner: u64) {
    leave(state, owner, COUNTS);
    // SAFETY: a live map value of this socket.
    unsafe {
        (*state.connection).backend_port = 0;
        if let Place::Entry(_) = state.place {
            // Sequentially consistent: earlier writes come first on every architecture.
            exchange(&raw mut (*state.connection).owner, owner, 0);
        }
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
