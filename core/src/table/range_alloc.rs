//! An allocator for ranges of array maps.
//! Ranges that the kernel may still be reading are reused only after a grace period.

use std::collections::{BTreeMap, VecDeque};

use super::ids::GraceEpoch;

/// An error: the map has no contiguous range of the requested length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfCapacity {
    /// The number of entries requested.
    pub wanted: u32,
    /// The capacity of the map, in entries.
    pub size: u32,
}

/// A first-fit allocator for ranges of an array map.
#[derive(Clone, Debug)]
pub(super) struct RangeAllocator {
    size: u32,
    free: BTreeMap<u32, u32>,
    deferred: VecDeque<(GraceEpoch, u32, u32)>,
}

impl RangeAllocator {
    pub(super) fn new(size: u32) -> Self {
        Self { size, free: BTreeMap::from([(0, size)]), deferred: VecDeque::new() }
    }

    /// Allocates a range of `len` entries and returns its start.
    pub(super) fn alloc(&mut self, len: u32) -> Result<u32, OutOfCapacity> {
        let hole = self.free.iter().find(|(_, free)| **free >= len).map(|(start, free)| (*start, *free));
        let (start, free) = hole.ok_or(OutOfCapacity { wanted: len, size: self.size })?;
        self.free.remove(&start);
        if free > len {
            self.free.insert(start + len, free - len);
        }
        Ok(start)
    }

    /// Marks a range that a previous agent uses as allocated.
    /// A no-op if part of it is already allocated.
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

    /// Frees a range that was never published, for immediate reuse.
    pub(super) fn unalloc(&mut self, start: u32, len: u32) {
        self.put(start, len);
    }

    /// Frees a range that the kernel may still be reading; [`Self::reclaim`] makes it reusable.
    pub(super) fn defer_free(&mut self, epoch: GraceEpoch, start: u32, len: u32) {
        if len > 0 {
            self.deferred.push_back((epoch, start, len));
        }
    }

    /// Returns whether ranges that were freed in this epoch are waiting for reclamation.
    pub(super) fn has_deferred(&self, epoch: GraceEpoch) -> bool {
        self.deferred.back().is_some_and(|(since, ..)| *since == epoch)
    }

    pub(super) fn size(&self) -> u32 {
        self.size
    }

    /// Returns the number of entries in use, including those waiting for reclamation.
    pub(super) fn used(&self) -> u32 {
        self.size - self.free.values().sum::<u32>()
    }

    /// Makes all ranges that were freed up to `epoch` reusable.
    pub(super) fn reclaim(&mut self, epoch: GraceEpoch) {
        while let Some((_, start, len)) = self.deferred.pop_front_if(|(since, ..)| *since <= epoch) {
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
    fn freed_range_is_reused_only_after_grace_period() {
        let mut ranges = RangeAllocator::new(10);
        assert_eq!((ranges.alloc(6), ranges.alloc(4)), (Ok(0), Ok(6)));
        ranges.defer_free(GraceEpoch::new(7), 0, 6);
        ranges.reclaim(GraceEpoch::new(6));
        assert!(ranges.alloc(1).is_err());
        ranges.reclaim(GraceEpoch::new(7));
        assert_eq!(ranges.alloc(6), Ok(0));
    }

    #[test]
    fn adjacent_free_ranges_are_merged() {
        let mut ranges = RangeAllocator::new(9);
        for _ in 0..3 {
            ranges.alloc(3).unwrap();
        }
        for start in [0, 6, 3] {
            ranges.defer_free(GraceEpoch::new(1), start, 3);
        }
        ranges.reclaim(GraceEpoch::new(1));
        assert_eq!(ranges.alloc(9), Ok(0));
    }

    #[test]
    fn claimed_range_is_not_allocated() {
        let mut ranges = RangeAllocator::new(10);
        ranges.claim(2, 3);
        ranges.claim(9, 1);
        assert_eq!(
            (ranges.alloc(4), ranges.alloc(2), ranges.alloc(1)),
            (Ok(5), Ok(0), Err(OutOfCapacity { wanted: 1, size: 10 }))
        );
        assert_eq!(ranges.used(), 10);
    }
}
