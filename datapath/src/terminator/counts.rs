//! Corrects counts of connections that change while they are compared with the connections that exist.
//!
//! A [`SidedCount`](portolan_common::SidedCount) is two counts, and connections that begin are added to only one of them.
//! What is compared is the other one, the side at rest: connections that end are all that changes it.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
};

use portolan_common::{ConnectionFlags, NodeFlags, SidedCount};
use serde::{Deserialize, Serialize};

use crate::{error::Result, mmap_array::MmapArray};

/// After this many looks at one side it is the other one's turn, even if counts of this one could not be judged.
const LOOKS: u32 = 4;

/// The corrections that reconciling made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reconciled {
    /// Entries of `CONNECTIONS` freed, because their sockets no longer exist.
    pub freed: usize,
    /// Counts of active connections corrected, of backends and of pools.
    pub corrected: usize,
    /// Suspected errors that another run must confirm, and a side that another run must compare.
    pub unsettled: usize,
}

/// One of the two sides of all counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Zero,
    One,
}

impl Side {
    /// Returns the side at rest.
    pub(super) fn at_rest(node_flags: &AtomicU64) -> Self {
        if node_flags.load(Ordering::SeqCst) & NodeFlags::SIDE == 0 { Self::One } else { Self::Zero }
    }

    /// Makes the other side the one at rest.
    pub(super) fn change(node_flags: &AtomicU64) {
        node_flags.fetch_xor(NodeFlags::SIDE, Ordering::SeqCst);
    }

    /// Returns the side on which a connection with these flags is counted.
    pub(super) fn of(flags: u32) -> Self {
        if flags & ConnectionFlags::SIDE == 0 { Self::Zero } else { Self::One }
    }

    fn read(self, word: &AtomicU64) -> i64 {
        let count = SidedCount::from_word(word.load(Ordering::SeqCst));
        count.sides[usize::from(self == Self::One)].into()
    }

    /// Subtracts a number from the count of this side, and leaves that of the other one alone.
    pub(super) fn subtract(self, word: &AtomicU64, excess: i64) {
        let mut before = word.load(Ordering::SeqCst);
        loop {
            let mut count = SidedCount::from_word(before);
            let side = &mut count.sides[usize::from(self == Self::One)];
            *side = side.wrapping_sub(excess as i32);
            match word.compare_exchange(before, count.word(), Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return,
                Err(now) => before = now,
            }
        }
    }
}

/// Which sides have been compared since the last correction.
#[derive(Debug, Default)]
pub(super) struct Progress {
    compared: [bool; 2],
    looks: u32,
    /// Whether the side must change before the next look.
    is_over: bool,
}

impl Progress {
    /// Prepares a look: changes the side if that of the last look is done with.
    pub(super) fn begin(&mut self, node_flags: &AtomicU64) {
        let is_first = self.looks == 0 && self.compared == [false; 2];
        if std::mem::take(&mut self.is_over) || is_first {
            Side::change(node_flags);
        }
    }

    /// Records a look at a side: whether nothing is left to confirm, and whether a count was wrong and has been corrected.
    /// Returns whether both sides have been compared. A correction makes the comparison of the other side obsolete: what
    /// went wrong may have happened since.
    pub(super) fn end(&mut self, side: Side, is_settled: bool, was_wrong: bool) -> bool {
        self.looks += 1;
        let (this, other) = (usize::from(side == Side::One), usize::from(side == Side::Zero));
        self.compared[this] = is_settled;
        self.compared[other] &= !was_wrong;
        if is_settled || self.looks >= LOOKS {
            (self.looks, self.is_over) = (0, true);
        }
        let done = self.compared == [true; 2];
        if done {
            *self = Self::default();
        }
        done
    }
}

/// Id → by how much the count of each side was too high at the last look at it; negative if it was too low.
pub(super) type Drifts = HashMap<u32, [i64; 2]>;

/// Readings of one side of one count of each value of an array.
pub(super) struct Counts<'a> {
    of: &'a MmapArray,
    word: usize,
    side: Side,
    /// The lowest and the highest reading of each.
    ranges: Vec<(i64, i64)>,
}

impl<'a> Counts<'a> {
    /// Reads the counts of a side, which are in this word of each value.
    pub(super) fn new(of: &'a MmapArray, word: usize, side: Side) -> Result<Self> {
        let mut counts = Self { of, word, side, ranges: vec![(i64::MAX, i64::MIN); of.len() as usize] };
        counts.read_again()?;
        Ok(counts)
    }

    pub(super) fn read_again(&mut self) -> Result<()> {
        for (id, (lowest, highest)) in (0..).zip(&mut self.ranges) {
            let reading = self.side.read(self.of.word(id, self.word)?);
            (*lowest, *highest) = ((*lowest).min(reading), (*highest).max(reading));
        }
        Ok(())
    }

    /// Compares the readings, and another one, with the numbers of connections that were found between them.
    ///
    /// Subtracts the excess of each count that did not change meanwhile and had the same excess at the last look: a
    /// connection that a program is just taking out of the counts is not there for that long.
    /// What is not confirmed yet remains in `drifts`.
    pub(super) fn correct(
        mut self,
        found: &HashMap<u32, u64>,
        drifts: &mut Drifts,
        recounted: &mut Reconciled,
    ) -> Result<()> {
        self.read_again()?;
        for (id, (lowest, highest)) in (0..).zip(self.ranges) {
            let found = found.get(&id).map_or(0, |found| *found as i64);
            if lowest != highest {
                // Connections ended meanwhile, and may be among those found or not.
                recounted.unsettled += usize::from(!(lowest..=highest).contains(&found));
                continue;
            }
            let excess = lowest - found;
            if excess == 0 && !drifts.contains_key(&id) {
                continue;
            }
            let both = drifts.entry(id).or_default();
            let last = &mut both[usize::from(self.side == Side::One)];
            if excess == 0 {
                *last = 0;
            } else if *last == excess {
                *last = 0;
                self.side.subtract(self.of.word(id, self.word)?, excess);
                recounted.corrected += 1;
            } else {
                *last = excess;
                recounted.unsettled += 1;
            }
            if *both == [0; 2] {
                drifts.remove(&id);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts in memory in place of a BPF array, each with its two sides.
    fn counts(values: &[[i32; 2]]) -> (MmapArray, impl Fn(&[[i32; 2]])) {
        let file = rustix::fs::memfd_create("counts", rustix::fs::MemfdFlags::empty()).unwrap();
        rustix::fs::ftruncate(&file, 8 * values.len() as u64).unwrap();
        let array = MmapArray::open::<u64>(&file, values.len() as u32).unwrap();
        let other = MmapArray::open::<u64>(&file, values.len() as u32).unwrap();
        let set = move |values: &[[i32; 2]]| {
            for (i, sides) in (0..).zip(values) {
                other.word(i, 0).unwrap().store(SidedCount { sides: *sides }.word(), Ordering::SeqCst);
            }
        };
        set(values);
        (array, set)
    }

    fn values(array: &MmapArray) -> Vec<[i32; 2]> {
        let read = |id| SidedCount::from_word(array.word(id, 0).unwrap().load(Ordering::SeqCst)).sides;
        (0..array.len()).map(read).collect()
    }

    #[test]
    fn count_at_rest_is_corrected_once_two_looks_agree() {
        let (array, _) = counts(&[[5, 9], [3, 9], [0, 9], [-1, 9]]);
        let (found, mut drifts) = (HashMap::from([(0, 5), (1, 1)]), Drifts::new());
        for (corrected, unsettled, of_1, of_3) in [(0, 2, 3, -1), (2, 0, 1, 0), (0, 0, 1, 0)] {
            let mut recounted = Reconciled::default();
            Counts::new(&array, 0, Side::Zero).unwrap().correct(&found, &mut drifts, &mut recounted).unwrap();
            assert_eq!((recounted.corrected, recounted.unsettled), (corrected, unsettled));
            assert_eq!(values(&array), [[5, 9], [of_1, 9], [0, 9], [of_3, 9]]);
        }
        assert!(drifts.is_empty());
    }

    #[test]
    fn other_side_is_corrected_alike() {
        let (array, _) = counts(&[[7, 3]]);
        let mut drifts = Drifts::new();
        for left in [3, 1] {
            let counts = Counts::new(&array, 0, Side::One).unwrap();
            counts.correct(&HashMap::from([(0, 1)]), &mut drifts, &mut Reconciled::default()).unwrap();
            assert_eq!(values(&array), [[7, left]]);
        }
    }

    /// A connection that is being taken out of the counts is not among the entries, and is still counted.
    #[test]
    fn excess_that_changes_is_not_corrected() {
        let (array, set) = counts(&[[0, 0]]);
        let mut drifts = Drifts::new();
        for (count, found) in [(4, 3), (3, 3), (3, 2), (3, 1), (1, 1)] {
            set(&[[count, 0]]);
            let mut recounted = Reconciled::default();
            let counts = Counts::new(&array, 0, Side::Zero).unwrap();
            counts.correct(&HashMap::from([(0, found)]), &mut drifts, &mut recounted).unwrap();
            assert_eq!((recounted.corrected, values(&array)), (0, vec![[count, 0]]));
        }
        assert!(drifts.is_empty());
    }

    #[test]
    fn count_that_changes_during_a_look_is_left_alone() {
        let (array, set) = counts(&[[0, 0], [0, 0]]);
        let mut drifts = Drifts::new();
        for _ in 0..5 {
            set(&[[9, 0], [9, 0]]);
            let counts = Counts::new(&array, 0, Side::Zero).unwrap();
            set(&[[7, 0], [7, 0]]);
            let mut recounted = Reconciled::default();
            // The first may be right, and the second cannot be.
            counts.correct(&HashMap::from([(0, 8), (1, 2)]), &mut drifts, &mut recounted).unwrap();
            assert_eq!((recounted.corrected, recounted.unsettled), (0, 1));
        }
    }

    #[test]
    fn both_sides_take_turns_at_rest() {
        let flags = AtomicU64::new(NodeFlags::STORAGE);
        let mut progress = Progress::default();
        let mut look = |(is_settled, was_wrong)| {
            progress.begin(&flags);
            let side = Side::at_rest(&flags);
            (side, progress.end(side, is_settled, was_wrong))
        };
        let (right, suspected, corrected) = ((true, false), (false, false), (true, true));
        assert_eq!([right, right].map(&mut look), [(Side::Zero, false), (Side::One, true)]);
        // What is found is confirmed on the same side.
        let looks = [suspected, corrected, right].map(&mut look);
        assert_eq!(looks, [(Side::Zero, false), (Side::Zero, false), (Side::One, true)]);
        // After a correction, the side that was compared before is compared again.
        let looks = [right, suspected, corrected, right].map(&mut look);
        assert_eq!(looks.map(|(side, _)| side), [Side::Zero, Side::One, Side::One, Side::Zero]);
        assert_eq!(looks.map(|(_, done)| done), [false, false, false, true]);
        // A side that never settles does not keep the other one from being compared.
        let looks = [suspected, suspected, suspected, suspected, right, right].map(&mut look).map(|(side, _)| side);
        assert_eq!(looks[..4], [looks[0]; 4]);
        assert!(looks[4] != looks[0] && looks[5] == looks[0]);
        assert_eq!(flags.load(Ordering::SeqCst) & NodeFlags::STORAGE, NodeFlags::STORAGE);
    }

    #[test]
    fn subtracting_leaves_the_other_side_alone() {
        let word = AtomicU64::new(SidedCount { sides: [1, -1] }.word());
        Side::Zero.subtract(&word, 3);
        Side::One.subtract(&word, -5);
        assert_eq!(SidedCount::from_word(word.into_inner()).sides, [-2, 4]);
    }
}
