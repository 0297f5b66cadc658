//! Corrects counts of connections that change while they are compared with the connections that exist.

use std::{collections::HashMap, sync::atomic::Ordering};

use serde::{Deserialize, Serialize};

use crate::{error::Result, mmap_array::MmapArray};

/// How often in a row a count must be wrong in the same direction before it is corrected, if it keeps changing.
const CONFIRMATIONS: u32 = 8;

/// The corrections that reconciling made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reconciled {
    /// Entries of `CONNECTIONS` freed, because their sockets no longer exist.
    pub freed: usize,
    /// Counts of active connections corrected, of backends and of pools.
    pub corrected: usize,
    /// Suspected errors that another run must confirm.
    pub unsettled: usize,
}

/// The connections that one count is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    connections: u64,
    /// The sum of the cookies of their sockets, by which two tallies are known to have found the same connections.
    cookies: u64,
}

impl Found {
    pub(super) fn add(&mut self, cookie: u64) {
        self.connections += 1;
        self.cookies = self.cookies.wrapping_add(cookie);
    }
}

/// Id → how its count has been wrong.
pub(super) type Drifts = HashMap<u32, Drift>;

/// A count that was wrong in the same direction in each of the last runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Drift {
    /// By how much it is too high, in the last run. Negative if it is too low.
    last: i64,
    /// The least and the most of these runs, by absolute value.
    least: i64,
    most: i64,
    /// The sum of the cookies that the last run found.
    cookies: u64,
    runs: u32,
}

impl Drift {
    /// Compares the lowest and the highest reading of a count with the number of connections found between the readings;
    /// `None` if it may be right.
    ///
    /// What begins or ends meanwhile may be found or not. While the count only rises or only falls, the right number is
    /// between its readings.
    fn of((lowest, highest): (i64, i64), found: u64) -> Option<i64> {
        match (lowest - found as i64, highest - found as i64) {
            (1.., _) => Some(lowest - found as i64),
            (_, ..=-1) => Some(highest - found as i64),
            _ => None,
        }
    }

    /// Adds a run that found the count to be too high by `excess`.
    fn follow(previous: Option<&Self>, excess: i64, cookies: u64) -> Self {
        match previous {
            Some(before) if (before.last > 0) == (excess > 0) => {
                let least = if excess.abs() < before.least.abs() { excess } else { before.least };
                let most = if excess.abs() > before.most.abs() { excess } else { before.most };
                Self { last: excess, least, most, cookies, runs: before.runs + 1 }
            }
            _ => Self { last: excess, least: excess, most: excess, cookies, runs: 1 },
        }
    }

    /// Returns whether a count that keeps changing is surely wrong: often enough, and by more than it varies.
    fn is_certain(&self) -> bool {
        self.runs >= CONFIRMATIONS && self.least.abs() > (self.most - self.least).abs()
    }
}

/// Readings of one count of each value of an array.
pub(super) struct Counts<'a> {
    of: &'a MmapArray,
    word: usize,
    /// The lowest and the highest reading of each.
    ranges: Vec<(i64, i64)>,
}

impl<'a> Counts<'a> {
    pub(super) fn new(of: &'a MmapArray, word: usize) -> Result<Self> {
        let mut counts = Self { of, word, ranges: vec![(i64::MAX, i64::MIN); of.len() as usize] };
        counts.read_again()?;
        Ok(counts)
    }

    pub(super) fn read_again(&mut self) -> Result<()> {
        for (id, (lowest, highest)) in (0..).zip(&mut self.ranges) {
            let reading = self.of.word(id, self.word)?.load(Ordering::SeqCst) as i64;
            (*lowest, *highest) = ((*lowest).min(reading), (*highest).max(reading));
        }
        Ok(())
    }

    /// Compares the readings, and another one, with what was found between them.
    ///
    /// Subtracts the excess of each count that was too high by the same amount twice in a row, did not change, and had the
    /// same connections both times.
    /// A count that keeps changing is corrected by the least excess of [`CONFIRMATIONS`] runs, if that is more than it
    /// varies.
    /// What is not confirmed yet remains in `drifts`.
    pub(super) fn correct(
        mut self,
        found: &HashMap<u32, Found>,
        drifts: &mut Drifts,
        recounted: &mut Reconciled,
    ) -> Result<()> {
        let previous = std::mem::take(drifts);
        self.read_again()?;
        for (id, range) in (0..).zip(self.ranges) {
            let found = found.get(&id).copied().unwrap_or_default();
            let Some(excess) = Drift::of(range, found.connections) else { continue };
            let before = previous.get(&id);
            let drift = Drift::follow(before, excess, found.cookies);
            let is_at_rest =
                range.0 == range.1 && before.is_some_and(|last| (last.last, last.cookies) == (excess, found.cookies));
            if is_at_rest || drift.is_certain() {
                let excess = if is_at_rest { excess } else { drift.least };
                self.of.word(id, self.word)?.fetch_sub(excess as u64, Ordering::SeqCst);
                recounted.corrected += 1;
                // Of a count that keeps changing, a part may be left.
                recounted.unsettled += usize::from(!is_at_rest);
            } else {
                // One that varies by more than its drift starts over.
                if drift.runs < CONFIRMATIONS {
                    drifts.insert(id, drift);
                }
                recounted.unsettled += 1;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts in memory in place of a BPF array.
    fn counts(values: &[u64]) -> (MmapArray, impl Fn(&[u64])) {
        let file = rustix::fs::memfd_create("counts", rustix::fs::MemfdFlags::empty()).unwrap();
        rustix::fs::ftruncate(&file, 8 * values.len() as u64).unwrap();
        let array = MmapArray::open::<u64>(&file, values.len() as u32).unwrap();
        let other = MmapArray::open::<u64>(&file, values.len() as u32).unwrap();
        let set = move |values: &[u64]| {
            (0..).zip(values).for_each(|(i, value)| other.word(i, 0).unwrap().store(*value, Ordering::SeqCst));
        };
        set(values);
        (array, set)
    }

    fn values(array: &MmapArray) -> Vec<u64> {
        (0..array.len()).map(|id| array.word(id, 0).unwrap().load(Ordering::SeqCst)).collect()
    }

    fn found(connections: u64, cookies: u64) -> Found {
        Found { connections, cookies }
    }

    #[test]
    fn count_at_rest_is_corrected_once_two_runs_agree() {
        let (array, _) = counts(&[5, 3, 0]);
        let (tally, mut drifts) = (HashMap::from([(0, found(5, 50)), (1, found(1, 7))]), Drifts::new());
        for (corrected, second) in [(0, 3), (1, 1), (0, 1)] {
            let mut recounted = Reconciled::default();
            Counts::new(&array, 0).unwrap().correct(&tally, &mut drifts, &mut recounted).unwrap();
            assert_eq!(recounted.corrected, corrected);
            assert_eq!(values(&array), [5, second, 0]);
        }
        assert!(drifts.is_empty());
    }

    /// In a full pool, a connection that ends is followed by another one at once: the count does not change.
    #[test]
    fn full_pool_is_not_at_rest() {
        let (array, _) = counts(&[100]);
        let mut drifts = Drifts::new();
        for run in 0..2 * u64::from(CONFIRMATIONS) {
            let mut recounted = Reconciled::default();
            let tally = HashMap::from([(0, found(99 - run % 2, 1_000 + run))]);
            Counts::new(&array, 0).unwrap().correct(&tally, &mut drifts, &mut recounted).unwrap();
            assert_eq!((recounted.corrected, values(&array)), (0, vec![100]));
        }
    }

    #[test]
    fn count_that_never_rests_is_corrected_by_what_is_certain() {
        let (array, set) = counts(&[0]);
        let mut drifts = Drifts::new();
        for run in 1..=u64::from(CONFIRMATIONS) {
            // Twenty ends were lost; three to five connections are open, and one begins.
            set(&[23 + run % 3]);
            let counts = Counts::new(&array, 0).unwrap();
            set(&[24 + run % 3]);
            let mut recounted = Reconciled::default();
            counts.correct(&HashMap::from([(0, found(4 + run % 3, run))]), &mut drifts, &mut recounted).unwrap();
            assert_eq!(recounted.corrected, usize::from(run == u64::from(CONFIRMATIONS)));
        }
        assert_eq!(values(&array), [24 + 8 % 3 - 19]);
    }

    #[test]
    fn number_between_two_readings_may_be_right() {
        assert_eq!(Drift::of((5, 5), 5), None);
        assert_eq!(Drift::of((5, 9), 7), None, "connections began during the tally");
        assert_eq!(Drift::of((5, 9), 5), None, "connections ended during the tally");
        assert_eq!(Drift::of((7, 9), 4), Some(3));
        assert_eq!(Drift::of((1, 2), 4), Some(-2));
        assert_eq!(Drift::of((-1, -1), 0), Some(-1), "a decrement came twice");
    }

    #[test]
    fn changing_count_is_certainly_wrong_if_it_varies_by_less() {
        let runs = |found: &[i64]| {
            let follow = |previous: Option<Drift>, found: &i64| Some(Drift::follow(previous.as_ref(), *found, 0));
            found.iter().fold(None, follow).unwrap()
        };
        let drift = runs(&[7, 4, 9, 5, 4, 6, 5]);
        assert_eq!((drift.least, drift.most, drift.runs, drift.is_certain()), (4, 9, 7, false));
        assert!(!runs(&[7, 4, 9, 5, 4, 6, 5, 7]).is_certain(), "it varies by 5");
        assert!(runs(&[7, 6, 9, 7, 8, 6, 9, 7]).is_certain());
        assert!(runs(&[-7, -6, -9, -7, -8, -6, -9, -7]).is_certain());
        assert_eq!(runs(&[7, 4, -1]).runs, 1, "it was too low once");
    }
}
