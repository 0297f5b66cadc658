//! Backend selection for a connection: one hash lookup, then array reads.

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

/// A frontend that a connection dials, with its active version.
pub(crate) struct Found {
    pub(crate) id: u32,
    pub(crate) version: FrontendVersion,
}

impl Found {
    /// Returns whether connections must stay in the client's cluster.
    #[inline(always)]
    pub(crate) fn is_strict(&self) -> bool {
        self.version.flags & VersionFlags::STRICT != 0
    }
}

/// The result of looking up an address in `FRONTENDS`.
pub(crate) enum Lookup {
    /// Not a Service address: Portolan ignores the connection.
    Miss,
    Found(Found),
    /// The table is inconsistent.
    Broken,
}

/// The result of picking a backend.
pub(crate) enum Pick {
    /// No backend.
    /// `strict` if the reason is that the connection must stay in the client's cluster.
    Refuse {
        strict: bool,
    },
    Take(Selected),
}

/// The backend picked for one connection.
pub(crate) struct Selected {
    pub(crate) backend_id: u32,
    pub(crate) backend: Backend,
    pub(crate) pool: u32,
}

/// The number of lookup attempts that may race with changes of FRONTENDS.
/// Every race takes a system call by the agent, so even one is rare.
const TRIES: u32 = 4;
/// Binary search steps: enough for 262,143 members, the largest supported number of backends.
const SEARCH_STEPS: u32 = 18;
/// An affinity entry is refreshed at most this many times per timeout.
const AFFINITY_STEPS: u64 = 16;

/// Looks up the frontend of a dialed address.
#[inline(always)]
pub(crate) fn lookup_frontend(key: &FrontendKey) -> Lookup {
    for _ in 0..TRIES {
        // SAFETY: the value is copied out at once.
        let Some(id) = (unsafe { FRONTENDS.get(key) }).copied() else { return Lookup::Miss };
        let Some(current) = CURRENT.get_ptr(id) else { break };
        // SAFETY: a live map value, which the agent changes by a single store.
        let index = unsafe { current.read_volatile() } as u32;
        let Some(version) = VERSIONS.get(index) else { break };
        // The id of a removed entry of FRONTENDS may already belong to another frontend.
        if version.key == *key {
            return Lookup::Found(Found { id, version: *version });
        }
    }
    count(Counter::Inconsistent);
    Lookup::Broken
}

/// Picks a backend for one more connection to the frontend.
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
        // Best effort: without memory for the entry, the client is still served.
        let _ = AFFINITY.insert(&key, &affinity, 0);
    }
    pick
}

/// Returns the client's previous backend, if it still has turns and the affinity has not expired.
#[inline(always)]
fn affinity_backend(key: &AffinityKey, version: &FrontendVersion) -> Option<Selected> {
    let affinity = AFFINITY.get_ptr_mut(key)?;
    // SAFETY: a live map value.
    // The entry may be reassigned to another client during the read.
    // This is harmless, because the backend is looked up among the frontend's own.
    // A helper call without pointers.
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

/// Returns the backend, if its id still has this epoch and it has turns in this version.
#[inline(always)]
pub(crate) fn current_backend(version: &FrontendVersion, backend_id: u32, epoch: u32) -> Option<Selected> {
    let place = find_member(version, backend_id)?;
    let pool = *RUNS.get(version.members.wrapping_add(version.member_count).wrapping_add(place))?;
    let backend = BACKENDS.get(backend_id).copied()?;
    (backend.epoch == epoch).then_some(Selected { backend_id, backend, pool })
}

/// Returns the position of a backend among those with turns in this version, by binary search.
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

/// Takes the next slot of the frontend's schedule, or a random one, and picks a backend of its run.
#[inline(always)]
fn next(ctx: &SockAddrContext, found: &Found, stats: *mut FrontendStats) -> Pick {
    let version = &found.version;
    // SAFETY: a live map value; the field is only ever added to.
    let cursor = unsafe { add(&raw mut (*stats).cursor, 1) };
    let drawn = version.flags & VersionFlags::RANDOM != 0;
    let turn = if drawn { u64::from(random()) } else { cursor };
    // An eBPF program cannot panic, and the compiler does not know that the period is nonzero, so the division must be
    // checked.
    let period = u64::from(version.period);
    let (Some(place), Some(round)) = (turn.checked_rem(period), turn.checked_div(period)) else {
        return inconsistent();
    };
    let Some(slot) = SLOTS.get(version.base.wrapping_add(place as u32)).copied() else { return inconsistent() };
    let is_empty = slot.len == 0;
    if is_empty || at_connection_limit(slot.pool) {
        // SAFETY: as above.
        unsafe { add(&raw mut (*stats).refused_slots, 1) };
        return Pick::Refuse { strict: is_empty && slot.strict != 0 };
    }
    let entry = if slot.choice == LbPolicy::RoundRobin as u16 { slot.entry(round) } else { pick_in_run(ctx, &slot) };
    let Some(&backend_id) = RUNS.get(entry) else { return inconsistent() };
    let Some(backend) = BACKENDS.get(backend_id).copied() else { return inconsistent() };
    Pick::Take(Selected { backend_id, backend, pool: slot.pool })
}

/// Returns the entry of `RUNS` that a slot without round robin picks.
#[inline(always)]
fn pick_in_run(ctx: &SockAddrContext, slot: &Slot) -> u32 {
    if slot.choice == LbPolicy::Hash as u16 {
        return slot.at(splitmix64(client(ctx)));
    }
    let first = u64::from(random());
    if slot.choice == LbPolicy::Random as u16 {
        return slot.at(first);
    }
    // Two different entries.
    let Some(further) = u64::from(random()).checked_rem(u64::from(slot.len) - 1) else { return slot.at(first) };
    let (one, other) = (slot.at(first), slot.at(first + further + 1));
    if active(other) < active(one) { other } else { one }
}

/// Returns the active connections of the backend at this entry of `RUNS`.
#[inline(always)]
fn active(entry: u32) -> u64 {
    let stats = RUNS.get(entry).and_then(|id| BACKEND_STATS.get(*id));
    stats.map_or(u64::MAX, |stats| clamp_negative(stats.active))
}

/// Treats a negative gauge as zero.
/// A decrement that races with a counter reset leaves the gauge below zero for a while.
#[inline(always)]
fn clamp_negative(count: u64) -> u64 {
    if (count as i64) < 0 { 0 } else { count }
}

/// Returns whether a pool is at its connection limit; if so, counts the refusal.
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

/// Identifies the client by its network namespace, that is, its pod.
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

/// Hashes a number, so that consecutive inputs spread over the whole range (the SplitMix64 finalizer).
#[inline(always)]
fn splitmix64(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// Refuses a connection because the table is inconsistent.
/// The agent's write order rules this out.
#[inline(always)]
fn inconsistent() -> Pick {
    count(Counter::Inconsistent);
    Pick::Refuse { strict: false }
}

/// Adds to a shared counter atomically and returns its previous value.
///
/// # Safety
/// `value` must point into a live map value.
#[inline(always)]
pub(crate) unsafe fn add(value: *mut u64, amount: u64) -> u64 {
    // SAFETY: guaranteed by the caller.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(value, amount) }
}

/// Decrements a shared counter atomically.
///
/// # Safety
/// `value` must point into a live map value.
#[inline(always)]
pub(crate) unsafe fn decrement(value: *mut u64) {
    // SAFETY: guaranteed by the caller.
    unsafe { add(value, u64::MAX) };
}
