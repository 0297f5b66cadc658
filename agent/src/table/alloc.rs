//! Who may write where: ranges and ids that the kernel may still be reading are kept back for a while.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

/// No room for this many entries in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full {
    /// Entries that were asked for.
    pub wanted: u32,
    /// Entries that the map has.
    pub size: u32,
}

/// How long something freed is not given out again. A program that looked a frontend up just before it changed has finished
/// with the old slots microseconds later; this is longer by far.
const GRACE: Duration = Duration::from_secs(1);

/// Ranges of an array map.
#[derive(Clone, Debug)]
pub(super) struct Ranges {
    size: u32,
    free: BTreeMap<u32, u32>,
    resting: VecDeque<(Instant, u32, u32)>,
}

impl Ranges {
    pub(super) fn new(size: u32) -> Self {
        Self { size, free: BTreeMap::from([(0, size)]), resting: VecDeque::new() }
    }

    /// A range of `len` entries.
    pub(super) fn take(&mut self, now: Instant, len: u32) -> Result<u32, Full> {
        self.wake(now);
        let hole = self.free.iter().find(|(_, free)| **free >= len).map(|(start, free)| (*start, *free));
        let (start, free) = hole.ok_or(Full { wanted: len, size: self.size })?;
        self.free.remove(&start);
        if free > len {
            self.free.insert(start + len, free - len);
        }
        Ok(start)
    }

    /// Marks a range as used: for what a former agent left in the kernel.
    pub(super) fn claim(&mut self, start: u32, len: u32) {
        let Some((&hole, &free)) = self.free.range(..=start).next_back() else { return };
        if len == 0 || hole + free < start + len {
            return;
        }
        self.free.remove(&hole);
        if start > hole {
            self.free.insert(hole, start - hole);
        }
        if hole + free > start + len {
            self.free.insert(start + len, hole + free - start - len);
        }
    }

    /// Gives a range back that was never published.
    pub(super) fn untake(&mut self, start: u32, len: u32) {
        self.put(start, len);
    }

    /// Gives a range back that the kernel may still be reading.
    pub(super) fn release(&mut self, now: Instant, start: u32, len: u32) {
        if len > 0 {
            self.resting.push_back((now, start, len));
        }
    }

    /// Entries in use, those at rest included.
    pub(super) fn used(&self) -> u32 {
        self.size - self.free.values().sum::<u32>()
    }

    fn wake(&mut self, now: Instant) {
        while let Some(&(since, start, len)) = self.resting.front() {
            if now.saturating_duration_since(since) < GRACE {
                return;
            }
            self.resting.pop_front();
            self.put(start, len);
        }
    }

    fn put(&mut self, mut start: u32, mut len: u32) {
        if let Some(next) = self.free.remove(&(start + len)) {
            len += next;
        }
        if let Some((&before, &free)) = self.free.range(..start).next_back()
            && before + free == start
        {
            self.free.remove(&before);
            (start, len) = (before, free + len);
        }
        self.free.insert(start, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_range_rests_before_it_is_given_out_again() {
        let now = Instant::now();
        let mut ranges = Ranges::new(10);
        assert_eq!((ranges.take(now, 6), ranges.take(now, 4)), (Ok(0), Ok(6)));
        ranges.release(now, 0, 6);
        assert!(ranges.take(now, 1).is_err());
        assert_eq!(ranges.take(now + GRACE, 6), Ok(0));
    }

    #[test]
    fn neighbours_grow_together() {
        let now = Instant::now();
        let mut ranges = Ranges::new(9);
        for _ in 0..3 {
            ranges.take(now, 3).unwrap();
        }
        for start in [0, 6, 3] {
            ranges.release(now, start, 3);
        }
        assert_eq!(ranges.take(now + GRACE, 9), Ok(0));
    }

    #[test]
    fn a_claimed_range_is_not_given_out() {
        let now = Instant::now();
        let mut ranges = Ranges::new(10);
        ranges.claim(2, 3);
        ranges.claim(9, 1);
        assert_eq!(
            (ranges.take(now, 4), ranges.take(now, 2), ranges.take(now, 1)),
            (Ok(5), Ok(0), Err(Full { wanted: 1, size: 10 }))
        );
        assert_eq!(ranges.used(), 10);
    }
}
