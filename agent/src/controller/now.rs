//! The time, as an argument.

use std::time::{Duration, Instant, SystemTime};

use rustix::time::{ClockId, clock_gettime};

/// One moment on the three clocks that the controller compares times with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// For timers of the agent.
    pub instant: Instant,
    /// For what outlives the agent or is shown to people.
    pub wall: SystemTime,
    /// `CLOCK_MONOTONIC` since boot, with which the programs stamp outcomes.
    pub monotonic: Duration,
}

impl Now {
    /// Reads the clocks. Only the loop does this.
    pub fn read() -> Self {
        let monotonic = clock_gettime(ClockId::Monotonic);
        Self {
            instant: Instant::now(),
            wall: SystemTime::now(),
            monotonic: Duration::new(monotonic.tv_sec.unsigned_abs(), monotonic.tv_nsec as u32),
        }
    }
}

#[cfg(test)]
impl std::ops::Add<Duration> for Now {
    type Output = Self;

    fn add(self, time: Duration) -> Self {
        Self { instant: self.instant + time, wall: self.wall + time, monotonic: self.monotonic + time }
    }
}
