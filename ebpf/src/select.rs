//! Which backend a connection gets: one hash lookup, and array reads.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{
    helpers::generated::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_ktime_get_ns},
    programs::SockAddrContext,
};
use portolan_common::{
    Affinity, AffinityKey, Backend, Counter, FrontendKey, FrontendStats, FrontendVersion, LbPolicy, Slot, VersionFlags,
};

use crate::maps::{
    AFFINITY, BACKEND_STATS, BACKENDS, CURRENT, FRONTEND_STATS, FRONTENDS, POOL_STATS, POOLS, RUNS, SLOTS, VERSIONS,
    count,
};

/// A frontend that somebody dials.
pub(crate) struct Found {
    pub(crate) id: u32,
    pub(crate) version: FrontendVersion,
}

impl Found {
    /// Whether its connections must not leave their cluster.
    #[inline(always)]
    pub(crate) fn is_strict(&self) -> bool {
        self.version.flags & VersionFlags::STRICT != 0
    }
}

/// What the table says of an address.
pub(crate) enum Lookup {
    /// Not a Service address: none of our business.
    Miss,
    Found(Found),
    /// The table contradicts itself.
    Broken,
}

/// What a connection gets.
pub(crate) enum Pick {
    /// Nobody. `strict`: because it must not leave its cluster.
    Refuse {
        strict: bool,
    },
    Take(Selected),
}

/// The endpoint for one connection.
pub(crate) struct Selected {
    pub(crate) backend_id: u32,
    pub(crate) backend: Backend,
    pub(crate) pool: u32,
}

/// How often a lookup is tried that changes of FRONTENDS overtake. Each takes a system call of the agent's, so one is rare.
const TRIES: u32 = 4;
/// Enough for 262,143 members, which is as many as there may be backends.
const SEARCH_STEPS: u32 = 18;
/// An affinity is not written again for less than this part of its timeout.
const AFFINITY_STEPS: u64 = 16;

/// Looks an address up.
#[inline(always)]
pub(crate) fn lookup_frontend(key: &FrontendKey) -> Lookup {
    for _ in 0..TRIES {
        // SAFETY: the value is copied out at once.
        let Some(id) = (unsafe { FRONTENDS.get(key) }).copied() else { return Lookup::Miss };
        let Some(current) = CURRENT.get_ptr(id) else { break };
        // SAFETY: a live map value, which the agent changes by a single store.
        let index = unsafe { current.read_volatile() } as u32;
        let Some(version) = VERSIONS.get(index) else { break };
        // An entry of FRONTENDS that was removed may be another one's by now.
        if version.key == *key {
            return Lookup::Found(Found { id, version: *version });
        }
    }
    count(Counter::Inconsistent);
    Lookup::Broken
}

/// Takes a backend for one more connection to the frontend.
#[inline(always)]
pub(crate) fn pick(ctx: &SockAddrContext, found: &Found) -> Pick {
    let version = &found.version;
    let Some(stats) = FRONTEND_STATS.get_ptr_mut(found.id) else { return inconsistent() };
    if version.period == 0 {
        // SAFETY: a live map value; the field is only ever added to.
        unsafe { add(&raw mut (*stats).refused, 1) };
        return Pick::Refuse { strict: found.is_strict() };
    }
    if version.affinity_seconds == 0 {
        return next(ctx, found, stats);
    }
    let key = AffinityKey { client: client(ctx), frontend: version.key };
    if let Some(taken) = affinity_backend(&key, version) {
        if at_connection_limit(taken.pool) {
            // SAFETY: a live map value; the field is only ever added to.
            unsafe { add(&raw mut (*stats).refused, 1) };
            return Pick::Refuse { strict: false };
        }
        // SAFETY: as above.
        unsafe { add(&raw mut (*stats).came_back, 1) };
        return Pick::Take(taken);
    }
    let pick = next(ctx, found, stats);
    if let Pick::Take(taken) = &pick {
        let affinity = Affinity {
            // SAFETY: a helper call without pointers.
            last_ns: unsafe { bpf_ktime_get_ns() },
            backend_id: taken.backend_id,
            epoch: taken.backend.epoch,
        };
        // Where there is no memory for it, the client is served all the same.
        let _ = AFFINITY.insert(&key, &affinity, 0);
    }
    pick
}

/// The backend that the client had, if it still has turns and the client has not been away for too long.
#[inline(always)]
fn affinity_backend(key: &AffinityKey, version: &FrontendVersion) -> Option<Selected> {
    let affinity = AFFINITY.get_ptr_mut(key)?;
    // SAFETY: a live map value. The entry may become another client's while it is read; whatever is read is looked for among the frontend's
    // own backends. A helper call without pointers.
    unsafe {
        let now = bpf_ktime_get_ns();
        let idle = now.saturating_sub((*affinity).last_ns);
        let timeout = u64::from(version.affinity_seconds) * 1_000_000_000;
        if idle > timeout {
            return None;
        }
        let taken = current_backend(version, (*affinity).backend_id, (*affinity).epoch)?;
        if idle > timeout / AFFINITY_STEPS {
            (*affinity).last_ns = now;
        }
        Some(taken)
    }
}

/// The backend, if it is the one of this epoch and has turns in this version.
#[inline(always)]
pub(crate) fn current_backend(version: &FrontendVersion, backend_id: u32, epoch: u32) -> Option<Selected> {
    let place = find_member(version, backend_id)?;
    let pool = *RUNS.get(version.members.wrapping_add(version.member_count).wrapping_add(place))?;
    let backend = BACKENDS.get(backend_id).copied()?;
    (backend.epoch == epoch).then_some(Selected { backend_id, backend, pool })
}

/// The place of a backend among those that have turns in this version: a binary search.
#[inline(always)]
fn find_member(version: &FrontendVersion, backend_id: u32) -> Option<u32> {
    let (mut low, mut len) = (0u32, version.member_count);
    for _ in 0..SEARCH_STEPS {
        if len == 0 {
            return None;
        }
        let half = len / 2;
        let middle = low.wrapping_add(half);
        let id = *RUNS.get(version.members.wrapping_add(middle))?;
        if id == backend_id {
            return Some(middle);
        }
        if id < backend_id {
            low = middle.wrapping_add(1);
            len -= half + 1;
        } else {
            len = half;
        }
    }
    None
}

/// Takes the next slot of the frontend's schedule, or draws one, and a backend of its run.
#[inline(always)]
fn next(ctx: &SockAddrContext, found: &Found, stats: *mut FrontendStats) -> Pick {
    let version = &found.version;
    // SAFETY: a live map value; the field is only ever added to.
    let cursor = unsafe { add(&raw mut (*stats).cursor, 1) };
    let drawn = version.flags & VersionFlags::RANDOM != 0;
    let turn = if drawn { u64::from(random()) } else { cursor };
    // Checked, for a program has no way to panic, and the compiler does not see that there is a period.
    let period = u64::from(version.period);
    let (Some(place), Some(round)) = (turn.checked_rem(period), turn.checked_div(period)) else {
        return inconsistent();
    };
    let Some(slot) = SLOTS.get(version.base.wrapping_add(place as u32)).copied() else { return inconsistent() };
    let nobody = slot.len == 0;
    if nobody || at_connection_limit(slot.pool) {
        // SAFETY: as above.
        unsafe { add(&raw mut (*stats).refused_slots, 1) };
        return Pick::Refuse { strict: nobody && slot.strict != 0 };
    }
    let entry = if slot.choice == LbPolicy::RoundRobin as u16 { slot.entry(round) } else { pick_in_run(ctx, &slot) };
    let Some(&backend_id) = RUNS.get(entry) else { return inconsistent() };
    let Some(backend) = BACKENDS.get(backend_id).copied() else { return inconsistent() };
    Pick::Take(Selected { backend_id, backend, pool: slot.pool })
}

/// The entry of `RUNS` that a slot gives that does not go in turn.
#[inline(always)]
fn pick_in_run(ctx: &SockAddrContext, slot: &Slot) -> u32 {
    if slot.choice == LbPolicy::Hash as u16 {
        return slot.at(splitmix64(client(ctx)));
    }
    let first = u64::from(random());
    if slot.choice == LbPolicy::Random as u16 {
        return slot.at(first);
    }
    // Of two different ones.
    let Some(further) = u64::from(random()).checked_rem(u64::from(slot.len) - 1) else { return slot.at(first) };
    let (one, other) = (slot.at(first), slot.at(first + further + 1));
    if active(other) < active(one) { other } else { one }
}

/// Active connections of the backend at this entry of `RUNS`.
#[inline(always)]
fn active(entry: u32) -> u64 {
    let stats = RUNS.get(entry).and_then(|id| BACKEND_STATS.get(*id));
    stats.map_or(u64::MAX, |stats| clamp_negative(stats.active))
}

/// A count of what comes and goes. One that was taken off while its counter began anew for somebody else leaves it below zero for a while.
#[inline(always)]
fn clamp_negative(count: u64) -> u64 {
    if (count as i64) < 0 { 0 } else { count }
}

/// Whether a pool has as many connections as it may have; if so, it is counted.
#[inline(always)]
fn at_connection_limit(pool: u32) -> bool {
    if pool == 0 {
        return false;
    }
    let Some(max) = POOLS.get(pool).map(|limits| limits.max_connections) else { return false };
    if max == 0 {
        return false;
    }
    let Some(stats) = POOL_STATS.get_ptr_mut(pool) else { return false };
    // SAFETY: a live map value; the fields are only ever added to.
    unsafe {
        if clamp_negative((*stats).active) < u64::from(max) {
            return false;
        }
        add(&raw mut (*stats).overflow, 1);
    }
    true
}

/// Who dials: the network namespace, which is the pod.
#[inline(always)]
fn client(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the kernel gives a valid context.
    unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) }
}

#[inline(always)]
fn random() -> u32 {
    // SAFETY: a helper call without pointers.
    unsafe { bpf_get_prandom_u32() as u32 }
}

/// Spreads numbers that are close together over all there are (the finalizer of SplitMix64).
#[inline(always)]
fn splitmix64(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// The table contradicts itself, which the agent's order of writing rules out: refuse rather than guess.
#[inline(always)]
fn inconsistent() -> Pick {
    count(Counter::Inconsistent);
    Pick::Refuse { strict: false }
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

/// Takes one from a shared counter in one atomic instruction.
///
/// # Safety
/// `value` points into a live map value.
#[inline(always)]
pub(crate) unsafe fn decrement(value: *mut u64) {
    // SAFETY: as the caller promises.
    unsafe { add(value, u64::MAX) };
}
