//! Backend selection for a connection.
//!
//! Most schedules are a list of endpoints, of which each connection takes the next.
//! Whatever is more than that is in a function of its own, so that it costs the others nothing.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{
    bindings::bpf_sock_addr,
    helpers::generated::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_ktime_get_ns},
    programs::SockAddrContext,
};
use portolan_common::{
    Affinity, AffinityKey, Counter, Endpoint, Entry, Frontend, Frontend4, FrontendKey, FrontendVersion, LbPolicy,
    PublishedFlags, Slot, VersionFlags,
};

use crate::{
    frontend::Found,
    maps::{AFFINITY, BACKEND_STATS, BACKENDS, ENTRIES, POOL_STATS, POOLS, RUNS, SLOTS, VERSIONS, count},
};

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
#[derive(Clone, Copy)]
pub(crate) struct Selected {
    pub(crate) endpoint: Endpoint,
    pub(crate) backend_id: u32,
    pub(crate) pool: u32,
    /// The epoch of the id; only the lower half counts.
    pub(crate) epoch: u32,
}

/// What [`pick_detailed`] returns.
const TAKE: u32 = 0;
const REFUSE: u32 = 1;
const REFUSE_STRICT: u32 = 2;

/// Binary search steps: enough for 262,143 members, the largest supported number of backends.
const SEARCH_STEPS: u32 = 18;
/// An affinity entry is refreshed at most this many times per timeout.
const AFFINITY_STEPS: u64 = 16;

/// Picks a backend for one more connection to the frontend with this key.
#[inline(always)]
pub(crate) fn pick(ctx: &SockAddrContext, key: &FrontendKey, found: &Found) -> Pick {
    let current = found.current;
    let period = current.period();
    if period == 0 || current.has(PublishedFlags::DETAILED) {
        return pick_from_version(ctx, key, found);
    }
    // SAFETY: a live map value; the field is only ever added to.
    unsafe {
        let line = found.line;
        let turn = add(&raw mut (*line).cursor, 1) as u32;
        // An eBPF program cannot panic, and the compiler does not know that the period is nonzero, so the division
        // must be checked.
        let Some(turn) = turn.checked_rem(period) else { return inconsistent() };
        let Some(entry) = entry_at(line, current.has(PublishedFlags::INLINE), current.base(), turn) else {
            return inconsistent();
        };
        match take_entry(&entry, !key.endpoint().is_v4()) {
            Some(taken) => Pick::Take(taken),
            None => inconsistent(),
        }
    }
}

/// The same for a frontend whose schedule is in `VERSIONS`, as those of UDP always are, or that refuses all connections.
#[inline(always)]
pub(crate) fn pick_from_version(ctx: &SockAddrContext, key: &FrontendKey, found: &Found) -> Pick {
    let current = found.current;
    if !current.has(PublishedFlags::DETAILED) {
        // SAFETY: a live map value; the field is only ever added to.
        unsafe { add(&raw mut (*found.line).refused, 1) };
        return Pick::Refuse { strict: current.has(PublishedFlags::STRICT) };
    }
    let mut taken = Selected { endpoint: Endpoint::from_words([0; 4], 0), backend_id: 0, pool: 0, epoch: 0 };
    match pick_detailed(ctx.sock_addr, found.line, current.base(), key, &mut taken) {
        TAKE => Pick::Take(taken),
        REFUSE_STRICT => Pick::Refuse { strict: true },
        _ => Pick::Refuse { strict: false },
    }
}

/// Returns the entry at a turn of a list: behind the frontend's line, or in `ENTRIES` from `base` on.
///
/// # Safety
/// `line` must be the line of a live value of `FRONTENDS4` or `FRONTENDS6`.
#[inline(always)]
unsafe fn entry_at(line: *mut Frontend, is_inline: bool, base: u32, turn: u32) -> Option<Entry> {
    // SAFETY: guaranteed by the caller; the values of both maps begin alike. An entry is immutable while it is in use.
    // Both words are read at once, so that the two places are the same to the verifier from here on.
    unsafe {
        if is_inline {
            // The mask tells the verifier the bounds of the whole register, which it does not know after a division.
            let turn = turn & 7;
            if turn >= Frontend::INLINE as u32 {
                return None;
            }
            let inline = (&raw const (*line.cast::<Frontend4>()).inline).cast::<Entry>();
            let words: *const u64 = inline.add(turn as usize).cast();
            return Some(Entry::from_words([words.read_volatile(), words.add(1).read_volatile()]));
        }
        let words: *const u64 = ENTRIES.get_ptr(base.wrapping_add(turn))?.cast();
        Some(Entry::from_words([words.read_volatile(), words.add(1).read_volatile()]))
    }
}

/// Returns what an entry stands for; an IPv6 address is in `BACKENDS`.
#[inline(always)]
fn take_entry(entry: &Entry, v6: bool) -> Option<Selected> {
    let Entry { address, port, epoch, backend_id, pool } = *entry;
    if !v6 {
        let endpoint = Endpoint::from_v4_word(address, port);
        return Some(Selected { endpoint, backend_id, pool, epoch: u32::from(epoch) });
    }
    let backend = BACKENDS.get(backend_id)?;
    Some(Selected { endpoint: backend.endpoint, backend_id, pool, epoch: backend.epoch })
}

/// Picks a backend from a schedule that is more than a list of endpoints; `index` is that of its version.
#[inline(never)]
fn pick_detailed(
    ctx: *mut bpf_sock_addr,
    line: *mut Frontend,
    index: u32,
    key: &FrontendKey,
    taken: &mut Selected,
) -> u32 {
    // SAFETY: `line` is a live map value; its counters are only ever added to. Helper calls without pointers.
    unsafe {
        let Some(version) = VERSIONS.get(index) else { return refuse_inconsistent() };
        let v6 = !key.endpoint().is_v4();
        if version.affinity_seconds == 0 {
            return next(ctx, line, version, v6, taken);
        }
        let key = AffinityKey { client: client(ctx), frontend: *key };
        if let Some(returned) = affinity_backend(&key, version) {
            if at_connection_limit(returned.pool) {
                add(&raw mut (*line).refused, 1);
                return REFUSE;
            }
            add(&raw mut (*line).came_back, 1);
            *taken = returned;
            return TAKE;
        }
        let result = next(ctx, line, version, v6, taken);
        if result == TAKE {
            let affinity = Affinity { last_ns: bpf_ktime_get_ns(), backend_id: taken.backend_id, epoch: taken.epoch };
            // Best effort: without memory for the entry, the client is still served.
            let _ = AFFINITY.insert(key, affinity, 0);
        }
        result
    }
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
/// The lower half of the epoch decides: entries of lists have no more.
#[inline(always)]
pub(crate) fn current_backend(version: &FrontendVersion, backend_id: u32, epoch: u32) -> Option<Selected> {
    let place = find_member(version, backend_id)?;
    let pool = *RUNS.get(version.members.wrapping_add(version.member_count).wrapping_add(place))?;
    let backend = BACKENDS.get(backend_id)?;
    (backend.epoch as u16 == epoch as u16).then_some(Selected { endpoint: backend.endpoint, backend_id, pool, epoch })
}

/// Returns the position of a backend among those with turns in this version, by binary search.
#[inline(always)]
fn find_member(version: &FrontendVersion, backend_id: u32) -> Option<u32> {
    search_members(version.members, version.member_count, backend_id).checked_sub(1)
}

/// Searches a sorted list in `RUNS`, and returns the position plus one; 0 if the backend is not in it.
///
/// The verifier checks a global function once for all callers, and this loop would be most of its work.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn search_members(members: u32, count: u32, backend_id: u32) -> u32 {
    let (mut low, mut len) = (0u32, count);
    for _ in 0..SEARCH_STEPS {
        if len == 0 {
            return 0;
        }
        let half = len / 2;
        let middle = low.wrapping_add(half);
        let Some(&id) = RUNS.get(members.wrapping_add(middle)) else { return 0 };
        if id == backend_id {
            return middle.wrapping_add(1);
        }
        if id < backend_id {
            low = middle.wrapping_add(1);
            len -= half + 1;
        } else {
            len = half;
        }
    }
    0
}

/// Takes the next slot of the frontend's schedule, or a random one, and picks a backend of its run.
#[inline(always)]
fn next(
    ctx: *mut bpf_sock_addr,
    line: *mut Frontend,
    version: &FrontendVersion,
    v6: bool,
    taken: &mut Selected,
) -> u32 {
    // SAFETY: a live map value; the field is only ever added to.
    let cursor = unsafe { add(&raw mut (*line).cursor, 1) };
    if let Some(turn) = (cursor as u32).checked_rem(version.entry_count) {
        // SAFETY: `line` is that of a live map value.
        let entry = unsafe { entry_at(line, version.flags & VersionFlags::INLINE != 0, version.entries, turn) };
        let Some(entry) = entry else { return refuse_inconsistent() };
        if at_connection_limit(entry.pool) {
            // SAFETY: as above.
            unsafe { add(&raw mut (*line).refused_turns, 1) };
            return REFUSE;
        }
        let Some(selected) = take_entry(&entry, v6) else { return refuse_inconsistent() };
        *taken = selected;
        return TAKE;
    }
    let drawn = version.flags & VersionFlags::RANDOM != 0;
    let turn = if drawn { u64::from(random()) } else { cursor };
    let period = u64::from(version.period);
    let (Some(place), Some(round)) = (turn.checked_rem(period), turn.checked_div(period)) else {
        return refuse_inconsistent();
    };
    let Some(slot) = SLOTS.get(version.base.wrapping_add(place as u32)).copied() else { return refuse_inconsistent() };
    let is_empty = slot.len == 0;
    if is_empty || at_connection_limit(slot.pool) {
        // SAFETY: as above.
        unsafe { add(&raw mut (*line).refused_turns, 1) };
        return if is_empty && slot.strict != 0 { REFUSE_STRICT } else { REFUSE };
    }
    let entry = if slot.choice == LbPolicy::RoundRobin as u16 { slot.entry(round) } else { pick_in_run(ctx, &slot) };
    let Some(&backend_id) = RUNS.get(entry) else { return refuse_inconsistent() };
    let Some(backend) = BACKENDS.get(backend_id) else { return refuse_inconsistent() };
    *taken = Selected { endpoint: backend.endpoint, backend_id, pool: slot.pool, epoch: backend.epoch };
    TAKE
}

/// Returns the entry of `RUNS` that a slot without round robin picks.
#[inline(always)]
fn pick_in_run(ctx: *mut bpf_sock_addr, slot: &Slot) -> u32 {
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
    stats.map_or(u64::MAX, |stats| stats.active.total())
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
        if (*stats).active.total() < u64::from(max) {
            return false;
        }
        add(&raw mut (*stats).overflow, 1);
    }
    true
}

/// Identifies the client by its network namespace, that is, its pod.
#[inline(always)]
fn client(ctx: *mut bpf_sock_addr) -> u64 {
    // SAFETY: the kernel gives a valid context.
    unsafe { bpf_get_netns_cookie(ctx.cast()) }
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

#[inline(always)]
fn refuse_inconsistent() -> u32 {
    count(Counter::Inconsistent);
    REFUSE
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
