//! The counters that the kernel maintains.

use crate::{Frontend, plain};

/// A number of connections, as the sum of two counts.
///
/// A connection is added to the count of the side that is current when it begins ([`NodeFlags::SIDE`]), remembers it
/// ([`ConnectionFlags::SIDE`]), and is subtracted from the same count when it ends.
/// The agent changes the current side before it compares a count with the connections that there are: on the side that
/// is not current, connections only end, so that its count comes to rest, however many connections begin meanwhile.
///
/// [`NodeFlags::SIDE`]: crate::NodeFlags::SIDE
/// [`ConnectionFlags::SIDE`]: crate::ConnectionFlags::SIDE
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SidedCount {
    /// The connections of either side. A count may be below zero for a moment.
    pub sides: [i32; 2],
}
plain!(SidedCount, 8, 8);

impl SidedCount {
    /// Returns whether both counts are zero.
    pub const fn is_zero(&self) -> bool {
        self.sides[0] == 0 && self.sides[1] == 0
    }

    /// Returns the number of connections; 0 if the counts are below zero.
    #[inline(always)]
    pub const fn total(&self) -> u64 {
        let total = self.sides[0] as i64 + self.sides[1] as i64;
        if total < 0 { 0 } else { total as u64 }
    }

    /// Returns both counts as one word of memory.
    pub const fn word(&self) -> u64 {
        self.sides[0] as u32 as u64 | (self.sides[1] as u32 as u64) << 32
    }

    /// Returns the counts in a word of memory.
    pub const fn from_word(word: u64) -> Self {
        Self { sides: [word as i32, (word >> 32) as i32] }
    }
}

impl From<i32> for SidedCount {
    fn from(count: i32) -> Self {
        Self { sides: [count, 0] }
    }
}

/// The value of `BACKEND_STATS`, indexed by backend id.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendStats {
    /// Connections established.
    pub opened: u64,
    /// Open connections, including those being established.
    pub active: SidedCount,
    /// UDP sockets and flows that got this backend.
    pub flows: u64,
    /// Connections closed after they were established.
    pub closed: u64,
    /// Connects that failed: refused, reset, unreachable or timed out.
    pub failed: u64,
    /// Bytes that peers acknowledged, on closed connections.
    pub sent_bytes: u64,
    /// Bytes received, on closed connections.
    pub received_bytes: u64,
    /// The epoch that the counters belong to, see `Backend::epoch`.
    pub epoch: u32,
    /// Padding; always zero.
    pub reserved: u32,
}
plain!(BackendStats, 64, 8);

/// The value of `BACKEND_USE`, indexed by backend id: the use of endpoints under outlier detection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendUse {
    /// The cookie of the network namespace that connected last.
    pub last_netns: u64,
    /// The time of that connection, in nanoseconds of CLOCK_MONOTONIC.
    pub last_ns: u64,
    /// The cookie of the last different network namespace before that.
    pub other_netns: u64,
    /// The time of its last connection, in nanoseconds of CLOCK_MONOTONIC.
    pub other_ns: u64,
    /// HTTP/1 responses.
    pub responses: u64,
    /// Responses with status 500 or above.
    pub server_errors: u64,
    /// Responses with status 502, 503 or 504.
    pub gateway_errors: u64,
    /// The moving average of the time from SYN to established, in nanoseconds; each connection weighs 1/8.
    pub connect_ns: u64,
}
plain!(BackendUse, 64, 8);

impl BackendUse {
    /// Returns whether another network namespace established a connection at or after `since` (nanoseconds of
    /// CLOCK_MONOTONIC).
    /// A pod that makes network namespaces to push others out of this record still has used the endpoint from another one.
    pub fn used_by_others(&self, netns: u64, since: u64) -> bool {
        let one = |user: u64, at: u64| user != 0 && user != netns && at >= since;
        one(self.last_netns, self.last_ns) || one(self.other_netns, self.other_ns)
    }
}

/// The counters of a frontend, as read from its line, see [`Frontend`](crate::Frontend).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontendStats {
    /// The number of turns taken so far.
    pub cursor: u64,
    /// Connections refused without a turn.
    pub refused: u64,
    /// Connections that took a turn and were refused.
    pub refused_turns: u64,
    /// Connections that returned to their backend and took no turn.
    pub came_back: u64,
}

/// The event budget of a client while the agent is behind, in [`ClientUse::budget`](crate::ClientUse::budget).
/// It keeps one pod from filling the ring buffer at the expense of others.
/// The upper 32 bits hold the window, the lower ones the number of events in it.
#[derive(Clone, Copy, Debug)]
pub struct EventBudget;

impl EventBudget {
    /// The number of events allowed per window.
    pub const OUTCOMES: u32 = 256;
    /// The length of a window as a power of two: 2^30 ns, about one second.
    const WINDOW_BITS: u32 = 30;

    /// Spends one event at `now` (nanoseconds).
    /// Returns the new budget and whether the event is allowed.
    #[inline(always)]
    pub const fn spend(budget: u64, now: u64) -> (u64, bool) {
        let window = (now >> Self::WINDOW_BITS) as u32;
        let used = if (budget >> 32) as u32 == window { budget as u32 } else { 0 };
        let may = used < Self::OUTCOMES;
        let used = if may { used + 1 } else { used };
        ((window as u64) << 32 | used as u64, may)
    }
}

/// The value of `FAILURES`, indexed by backend id: whether successes must be reported.
///
/// The lower half counts failures, and only the programs change it.
/// The upper half is the count up to which the agent has evaluated them and found that none counts any more.
/// While the halves differ, the programs report successes too.
/// The agent acknowledges only what it has evaluated, so a failure that happens meanwhile is never overwritten.
#[derive(Clone, Copy, Debug)]
pub struct FailureCount;

impl FailureCount {
    /// Returns whether the programs report successes.
    #[inline(always)]
    pub const fn reports_successes(value: u64) -> bool {
        value as u32 != (value >> 32) as u32
    }

    /// Returns the value after the agent has evaluated all failures up to `count`.
    pub const fn acknowledged(value: u64, count: u32) -> u64 {
        (count as u64) << 32 | value & 0xffff_ffff
    }
}

/// The number of entries in each half of `TIMES`: a histogram over powers of two, whose last bucket is open-ended, and
/// then the sum.
pub const TIME_BUCKETS: u32 = 28;

/// Indices into `COUNTERS`, which holds one `u64` per CPU and counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Counter {
    /// Events lost because the ring buffer was full or the client had used up its budget.
    EventsLost = 0,
    /// Connections refused because a lookup found the published table inconsistent.
    Inconsistent = 1,
    /// Sockets without state, because the kernel had no memory for it.
    NoMemory = 2,
    /// Sockets whose state is in socket storage, because `CONNECTIONS` had no entry for it.
    Fallback = 3,
}

impl From<&Frontend> for FrontendStats {
    fn from(line: &Frontend) -> Self {
        let Frontend { cursor, refused, refused_turns, came_back, .. } = *line;
        Self { cursor, refused, refused_turns, came_back }
    }
}

impl FrontendStats {
    /// Returns the number of connections that got a backend.
    pub fn given(&self) -> u64 {
        (self.cursor + self.came_back).saturating_sub(self.refused_turns)
    }

    /// Returns the number of connections that were refused, for any reason.
    pub fn refused_in_all(&self) -> u64 {
        self.refused + self.refused_turns
    }
}

impl Counter {
    /// The number of counters.
    pub const COUNT: u32 = 4;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_that_happens_during_evaluation_is_not_acknowledged() {
        let mut value = 0;
        assert!(!FailureCount::reports_successes(value));
        value += 3;
        assert!(FailureCount::reports_successes(value));
        // The agent has evaluated two of three.
        value = FailureCount::acknowledged(value, 2);
        assert!(FailureCount::reports_successes(value));
        value = FailureCount::acknowledged(value, 3);
        assert!(!FailureCount::reports_successes(value));
        value += 1;
        assert!(FailureCount::reports_successes(value));
    }

    #[test]
    fn event_budget_resets_with_each_window() {
        let mut budget = 0;
        let mut spend = |now: u64| {
            let (left, may) = EventBudget::spend(budget, now);
            budget = left;
            may
        };
        let accepted = |spend: &mut dyn FnMut(u64) -> bool, now: u64| (0..1_000).filter(|_| spend(now)).count();
        assert_eq!(accepted(&mut spend, 5 << 30), EventBudget::OUTCOMES as usize);
        assert_eq!(accepted(&mut spend, (6 << 30) - 1), 0);
        assert_eq!(accepted(&mut spend, 6 << 30), EventBudget::OUTCOMES as usize);
    }
}
