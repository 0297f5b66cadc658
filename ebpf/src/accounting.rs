//! What the counters of a connection's backend and pool are, and when it stops to count as active.

use portolan_common::{BackendStats, ConnectionFlags, PoolLimits, PoolStats};

use crate::{
    maps::{BACKEND_STATS, POOL_STATS, POOLS, SET},
    select::decrement,
    state::{self, State},
};

/// Takes a connection out of the counts of active ones, unless that has been done.
#[inline(always)]
pub(crate) fn stop_counting(state: &State, owner: u64) {
    if state.flags() & ConnectionFlags::COUNTED == 0
        || state.remove_flags(ConnectionFlags::COUNTED) & ConnectionFlags::COUNTED == 0
    {
        return;
    }
    if !state::is_owned_by(state, owner) {
        // The connection ended on another CPU, and the entry has another owner already, whose flag this was.
        state.add_flags(ConnectionFlags::COUNTED);
        return;
    }
    // SAFETY: live map values.
    unsafe {
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
