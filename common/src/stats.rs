//! Counters that the kernel keeps.

use crate::plain;

/// Value of `BACKEND_STATS`, indexed by backend id.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendStats {
    /// Connections established.
    pub opened: u64,
    /// Connections that there are, those that are being made included.
    pub active: u64,
    /// UDP: sockets that were given this backend.
    pub flows: u64,
    /// Connections closed after they were established.
    pub closed: u64,
    /// Connects that failed: refused, reset, unreachable or timed out.
    pub failed: u64,
    /// Bytes that peers acknowledged, of closed connections.
    pub sent_bytes: u64,
    /// Bytes received, of closed connections.
    pub received_bytes: u64,
    /// Whose counters these are, see `Backend::epoch`.
    pub epoch: u32,
    /// Zero.
    pub reserved: u32,
}
plain!(BackendStats, 64, 8);

/// Value of `BACKEND_USE`, indexed by backend id: what is taken down of endpoints that may be ejected.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendUse {
    /// Cookie of the network namespace whose connection was established last.
    pub last_netns: u64,
    /// When, nanoseconds of CLOCK_MONOTONIC.
    pub last_ns: u64,
    /// The last other namespace before that one.
    pub other_netns: u64,
    /// When its last connection was established.
    pub other_ns: u64,
    /// HTTP/1 responses.
    pub responses: u64,
    /// Those with a status of 500 and more.
    pub server_errors: u64,
    /// Those of 502, 503 and 504.
    pub gateway_errors: u64,
    /// Nanoseconds from SYN to established: an eighth of the last one, seven of what was before.
    pub connect_ns: u64,
}
plain!(BackendUse, 64, 8);

impl BackendUse {
    /// Whether connections of another network namespace than this one were established at or after `since` (nanoseconds of
    /// CLOCK_MONOTONIC).
    pub fn used_by_others(&self, netns: u64, since: u64) -> bool {
        let one = |user: u64, at: u64| user != 0 && user != netns && at >= since;
        one(self.last_netns, self.last_ns) || one(self.other_netns, self.other_ns)
    }
}

/// Value of `FRONTEND_STATS`, indexed by frontend id. As long as a cache line,
/// for its cursor is what all CPUs share.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontendStats {
    /// The shared cursor: how many connections have taken a slot.
    pub cursor: u64,
    /// Connections refused because the frontend was empty.
    pub refused: u64,
    /// Connections that took a slot, and were refused: by the slot itself, or by the limit of its pool.
    pub refused_slots: u64,
    /// Connections that came back to their backend, and took no slot.
    pub came_back: u64,
    /// Zero.
    pub reserved: [u64; RESERVED],
}
plain!(FrontendStats, 32 + 8 * RESERVED, 8);

/// What is left of the cache line.
const RESERVED: usize = if cfg!(feature = "next-schema") { 12 } else { 4 };

/// Value of `BUDGETS`: what a network namespace may tell while the agent is behind, so that one that floods leaves room for what the others have to
/// tell. The upper half of the word is the window, the lower half counts.
#[derive(Clone, Copy, Debug)]
pub struct EventBudget;

impl EventBudget {
    /// How many there are: a power of two. Namespaces get cookies one after the other.
    pub const CAPACITY: u32 = 4_096;
    /// Outcomes in a window.
    pub const OUTCOMES: u32 = 256;
    /// A window is so many bits of nanoseconds long: a second.
    const WINDOW_BITS: u32 = 30;

    /// Takes one outcome at `now` (nanoseconds) from a budget: what is left, and whether there was one.
    #[inline(always)]
    pub const fn spend(budget: u64, now: u64) -> (u64, bool) {
        let window = (now >> Self::WINDOW_BITS) as u32;
        let told = if (budget >> 32) as u32 == window { budget as u32 } else { 0 };
        let may = told < Self::OUTCOMES;
        let told = if may { told + 1 } else { told };
        ((window as u64) << 32 | told as u64, may)
    }
}

/// Entries of each half of `TIMES`: counts by powers of two, in the last but one of all that is longer, and the sum.
pub const TIME_BUCKETS: u32 = 28;

/// Indices into `COUNTERS`, one `u64` for each CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Counter {
    /// Outcomes that found the ring buffer full, or of a network namespace that floods it.
    EventsLost = 0,
    /// Connections whose published table was not consistent, and that were refused for it.
    Inconsistent = 1,
    /// Sockets on which nothing could be remembered for lack of memory.
    NoMemory = 2,
}

impl FrontendStats {
    /// Connections that were given a backend.
    pub fn given(&self) -> u64 {
        (self.cursor + self.came_back).saturating_sub(self.refused_slots)
    }

    /// Connections that were refused.
    pub fn refused_in_all(&self) -> u64 {
        self.refused + self.refused_slots
    }
}

impl Counter {
    /// How many counters there are.
    pub const COUNT: u32 = 3;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_for_a_window() {
        let mut budget = 0;
        let mut spend = |now: u64| {
            let (left, may) = EventBudget::spend(budget, now);
            budget = left;
            may
        };
        let told = |spend: &mut dyn FnMut(u64) -> bool, now: u64| (0..1_000).filter(|_| spend(now)).count();
        assert_eq!(told(&mut spend, 5 << 30), EventBudget::OUTCOMES as usize);
        assert_eq!(told(&mut spend, (6 << 30) - 1), 0);
        assert_eq!(told(&mut spend, 6 << 30), EventBudget::OUTCOMES as usize);
    }
}
