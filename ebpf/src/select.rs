//! Which backend a connection gets: one hash lookup, one atomic add, three array reads.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use portolan_common::{Backend, Counter, Frontend, FrontendKey};

use crate::maps::{BACKENDS, FRONTEND_STATS, FRONTENDS, RUNS, SLOTS, count};

/// What the table says of an address.
pub(crate) enum Choice {
    /// Not a Service address: none of our business.
    Miss,
    /// A Service address without a backend: the connect is refused.
    Refuse,
    /// A Service address, and the endpoint for this connection.
    Take(Taken),
}

/// The endpoint for one connection.
pub(crate) struct Taken {
    pub(crate) frontend: Frontend,
    pub(crate) backend_id: u32,
    pub(crate) backend: Backend,
}

/// Takes the next slot of the frontend's schedule.
#[inline(always)]
pub(crate) fn choose(key: &FrontendKey) -> Choice {
    // SAFETY: the value is copied out at once.
    let Some(frontend) = (unsafe { FRONTENDS.get(key) }).copied() else {
        return Choice::Miss;
    };
    let Some(stats) = FRONTEND_STATS.get_ptr_mut(frontend.id) else {
        return inconsistent();
    };
    if frontend.period == 0 {
        // SAFETY: a live map value; the field is only ever added to.
        unsafe { add(&raw mut (*stats).refused, 1) };
        return Choice::Refuse;
    }
    // SAFETY: as above.
    let turn = unsafe { add(&raw mut (*stats).cursor, 1) };
    let period = u64::from(frontend.period);
    let Some(slot) = SLOTS.get(frontend.base.wrapping_add((turn % period) as u32)).copied() else {
        return inconsistent();
    };
    if slot.len == 0 {
        // SAFETY: as above.
        unsafe { add(&raw mut (*stats).refused_slots, 1) };
        return Choice::Refuse;
    }
    let Some(&backend_id) = RUNS.get(slot.entry(turn / period)) else {
        return inconsistent();
    };
    let Some(backend) = BACKENDS.get(backend_id).copied() else {
        return inconsistent();
    };
    Choice::Take(Taken { frontend, backend_id, backend })
}

/// The table contradicts itself, which the agent's order of writing rules out: refuse rather than guess.
#[inline(always)]
fn inconsistent() -> Choice {
    count(Counter::Inconsistent);
    Choice::Refuse
}

/// Adds to a shared counter in one atomic instruction and returns what it was before.
///
/// # Safety
/// `value` points into a live map value.
#[inline(always)]
pub(crate) unsafe fn add(value: *mut u64, amount: u64) -> u64 {
    // SAFETY: as the caller promises.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(value, amount) }
}
