//! Where the frontends are: open addressing in two arrays, one for each address family.
//!
//! A key has two buckets of two lines each. It is placed in the first one if there is room, else in the second one, else
//! behind all buckets, where a hash map finds it. A search reads at most four lines, and ends at a bucket with an empty
//! line. So a bucket that a key was placed behind must have no empty line as long as that key exists.

use std::collections::{HashMap, HashSet, VecDeque};

use portolan_common::{Frontend, FrontendHash, FrontendKey};

use super::{
    ids::{FrontendId, GraceEpoch},
    ops::Sizes,
    range_alloc::OutOfCapacity,
};

/// The bit of a frontend id that tells IPv6 from IPv4; the other bits are the index.
const V6: u32 = 1 << 31;

impl FrontendId {
    /// Returns the id of the line at this index, of IPv6 or else IPv4.
    pub const fn of_line(index: u32, v6: bool) -> Self {
        Self::new(if v6 { index | V6 } else { index })
    }

    /// Returns whether the frontend has an IPv6 address.
    pub const fn is_v6(self) -> bool {
        self.get() & V6 != 0
    }

    /// Returns the index of its line.
    pub const fn index(self) -> u32 {
        self.get() & !V6
    }
}

/// The frontends' places, and what may be reused.
#[derive(Clone, Debug)]
pub(super) struct FrontendLines {
    /// The most frontends, of both families together.
    size: u32,
    hash: FrontendHash,
    shift: u32,
    /// The number of lines in buckets; those behind them are found through `FRONTEND_OVERFLOW`.
    hashed: u32,
    used: u32,
    v4: Vec<Line>,
    v6: Vec<Line>,
    /// For each bucket, by family and first line, the number of keys that were placed behind it.
    passed: HashMap<(bool, u32), u32>,
    /// Fingerprints of the keys behind all buckets. `FRONTEND_OVERFLOW` has one place for each.
    behind: HashSet<u64>,
    deferred: VecDeque<(GraceEpoch, FrontendId)>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Line {
    state: State,
    /// The epoch of its last use.
    epoch: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Free, and the kernel holds [`Frontend::EMPTY`].
    #[default]
    Empty,
    /// Free, and the kernel holds [`Frontend::REMOVED`].
    Removed,
    Used,
    /// Removed, but a program may still be reading it; then as in the payload.
    Waiting {
        empty: bool,
    },
}

/// Where a new frontend goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placement {
    pub(super) id: FrontendId,
    /// The epoch of this use of the line.
    pub(super) epoch: u32,
    /// Lines that must be marked as removed before the key is written, so that searches pass them.
    pub(super) passed: Vec<FrontendId>,
}

impl FrontendLines {
    pub(super) fn new(sizes: &Sizes, hash: FrontendHash) -> Self {
        let line = vec![Line::default(); sizes.frontend_lines() as usize];
        Self {
            size: sizes.frontends,
            hash,
            shift: sizes.frontend_shift(),
            hashed: sizes.hashed_frontend_lines(),
            used: 0,
            v4: line.clone(),
            v6: line,
            passed: HashMap::new(),
            behind: HashSet::new(),
            deferred: VecDeque::new(),
        }
    }

    /// Finds a place for a key that has none: the index for [`Self::place`].
    pub(super) fn find_free(&self, key: &FrontendKey) -> Result<u32, OutOfCapacity> {
        let full = OutOfCapacity { wanted: 1, size: self.size };
        if self.used >= self.size {
            return Err(full);
        }
        let (v6, [first, second]) = (!key.endpoint().is_v4(), self.buckets(key));
        let in_buckets = (first..first + Frontend::BUCKET).chain(second..second + Frontend::BUCKET);
        let last = if self.behind.contains(&self.fingerprint(key)) { self.hashed } else { self.v4.len() as u32 };
        let behind = self.hashed..last;
        let is_free = |index: &u32| matches!(self.line(*index, v6).state, State::Empty | State::Removed);
        in_buckets.chain(behind).find(is_free).ok_or(full)
    }

    /// Places a key at an index that [`Self::find_free`] has returned.
    pub(super) fn place(&mut self, key: &FrontendKey, index: u32) -> Placement {
        let v6 = !key.endpoint().is_v4();
        let mut passed = Vec::new();
        for bucket in self.passed_by(key, index) {
            *self.passed.entry((v6, bucket)).or_default() += 1;
            for line in bucket..bucket + Frontend::BUCKET {
                let state = &mut self.line_mut(line, v6).state;
                if *state == (State::Waiting { empty: true }) {
                    *state = State::Waiting { empty: false };
                    passed.push(FrontendId::of_line(line, v6));
                }
            }
        }
        if index >= self.hashed {
            self.behind.insert(self.fingerprint(key));
        }
        self.used += 1;
        let line = self.line_mut(index, v6);
        line.state = State::Used;
        line.epoch = line.epoch.wrapping_add(1);
        Placement { id: FrontendId::of_line(index, v6), epoch: line.epoch, passed }
    }

    /// Removes a key. Returns whether its line must be marked as removed instead of empty.
    pub(super) fn remove(&mut self, key: &FrontendKey, id: FrontendId) -> bool {
        self.leave_passed(key, id);
        if id.index() >= self.hashed {
            self.behind.remove(&self.fingerprint(key));
        }
        let bucket = id.index() - id.index() % Frontend::BUCKET;
        let is_passed = self.passed.contains_key(&(id.is_v6(), bucket));
        self.line_mut(id.index(), id.is_v6()).state = State::Waiting { empty: !is_passed };
        is_passed
    }

    /// Makes a removed line reusable after a grace period.
    pub(super) fn defer_free(&mut self, epoch: GraceEpoch, id: FrontendId) {
        self.deferred.push_back((epoch, id));
    }

    pub(super) fn has_deferred(&self, epoch: GraceEpoch) -> bool {
        self.deferred.back().is_some_and(|(since, _)| *since == epoch)
    }

    pub(super) fn reclaim(&mut self, epoch: GraceEpoch) {
        while let Some((_, id)) = self.deferred.pop_front_if(|(since, _)| *since <= epoch) {
            self.used -= 1;
            let line = self.line_mut(id.index(), id.is_v6());
            line.state = if line.state == (State::Waiting { empty: true }) { State::Empty } else { State::Removed };
        }
    }

    /// Marks a line that a previous agent uses.
    pub(super) fn claim(&mut self, key: &FrontendKey, id: FrontendId, epoch: u32) {
        for bucket in self.passed_by(key, id.index()) {
            *self.passed.entry((id.is_v6(), bucket)).or_default() += 1;
        }
        if id.index() >= self.hashed {
            self.behind.insert(self.fingerprint(key));
        }
        self.used += 1;
        *self.line_mut(id.index(), id.is_v6()) = Line { state: State::Used, epoch };
    }

    /// Restores the epoch of a line that a previous agent has used, and whether it is marked as removed.
    pub(super) fn restore(&mut self, id: FrontendId, epoch: u32, removed: bool) {
        let state = if removed { State::Removed } else { State::Empty };
        *self.line_mut(id.index(), id.is_v6()) = Line { state, epoch };
    }

    pub(super) fn size(&self) -> u32 {
        self.size
    }

    /// Returns the number of frontends, including those whose lines wait for a grace period.
    pub(super) fn used(&self) -> u32 {
        self.used
    }

    fn line(&self, index: u32, v6: bool) -> &Line {
        if v6 { &self.v6[index as usize] } else { &self.v4[index as usize] }
    }

    fn line_mut(&mut self, index: u32, v6: bool) -> &mut Line {
        if v6 { &mut self.v6[index as usize] } else { &mut self.v4[index as usize] }
    }

    fn fingerprint(&self, key: &FrontendKey) -> u64 {
        key.fingerprint(&self.hash.multipliers)
    }

    fn buckets(&self, key: &FrontendKey) -> [u32; 2] {
        let hash = Frontend::hash(self.fingerprint(key), self.hash.seed);
        [Frontend::first_bucket(hash, self.shift), Frontend::second_bucket(hash, self.shift)]
    }

    /// Returns the buckets that a search for this key passes before it comes to the line.
    fn passed_by(&self, key: &FrontendKey, index: u32) -> Vec<u32> {
        let [first, second] = self.buckets(key);
        let is_in = |bucket: u32| (bucket..bucket + Frontend::BUCKET).contains(&index);
        let mut passed = Vec::new();
        if !is_in(first) {
            passed.push(first);
            if !is_in(second) && second != first {
                passed.push(second);
            }
        }
        passed
    }

    fn leave_passed(&mut self, key: &FrontendKey, id: FrontendId) {
        for bucket in self.passed_by(key, id.index()) {
            if let Some(count) = self.passed.get_mut(&(id.is_v6(), bucket)) {
                *count -= 1;
                if *count == 0 {
                    self.passed.remove(&(id.is_v6(), bucket));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, net::SocketAddr};

    use proptest::prelude::*;

    use super::*;

    fn sizes(frontends: u32) -> Sizes {
        Sizes { frontends, ..Sizes::default() }
    }

    fn key(i: u32, v6: bool) -> FrontendKey {
        let [a, b, c, d] = i.to_be_bytes();
        let address = if v6 {
            SocketAddr::from(([0xfd00, 0, 0, 0, 0, 0, (i >> 16) as u16, i as u16], 80))
        } else {
            SocketAddr::from(([10 ^ a, b, c, d], 80))
        };
        FrontendKey::new(address.into(), 6)
    }

    /// What the kernel holds, and its search.
    #[derive(Default)]
    struct Kernel {
        lines: BTreeMap<(bool, u32), u64>,
        keys: BTreeMap<(bool, u32), FrontendKey>,
        overflow: BTreeMap<u64, u32>,
    }

    impl Kernel {
        fn at(&self, v6: bool, index: u32) -> u64 {
            self.lines.get(&(v6, index)).copied().unwrap_or(Frontend::EMPTY)
        }

        fn add(&mut self, lines: &FrontendLines, key: &FrontendKey, placement: &Placement) {
            for passed in &placement.passed {
                self.lines.insert((passed.is_v6(), passed.index()), Frontend::REMOVED);
            }
            let index = placement.id.index();
            self.lines.insert((placement.id.is_v6(), index), lines.fingerprint(key));
            self.keys.insert((placement.id.is_v6(), index), *key);
            if index >= lines.hashed {
                self.overflow.insert(lines.fingerprint(key), index);
            }
        }

        fn remove(&mut self, lines: &FrontendLines, key: &FrontendKey, id: FrontendId, removed: bool) {
            if id.index() >= lines.hashed {
                self.overflow.remove(&lines.fingerprint(key));
            }
            let word = if removed { Frontend::REMOVED } else { Frontend::EMPTY };
            self.lines.insert((id.is_v6(), id.index()), word);
        }

        /// Returns the index of a key, and the number of lines that the search reads.
        fn find(&self, lines: &FrontendLines, key: &FrontendKey) -> (Option<u32>, usize) {
            let (v6, mut read) = (!key.endpoint().is_v4(), 0);
            for bucket in lines.buckets(key) {
                let mut is_open = false;
                for index in bucket..bucket + Frontend::BUCKET {
                    read += 1;
                    if self.at(v6, index) == lines.fingerprint(key) && self.keys[&(v6, index)] == *key {
                        return (Some(index), read);
                    }
                    is_open |= self.at(v6, index) == Frontend::EMPTY;
                }
                if is_open {
                    return (None, read);
                }
            }
            let behind = self.overflow.get(&lines.fingerprint(key)).copied();
            (behind.filter(|index| self.keys[&(v6, *index)] == *key), read)
        }
    }

    #[test]
    fn full_table_needs_few_reads_and_little_overflow() {
        for seed in 0..4 {
            let (sizes, mut kernel) = (sizes(16_384), Kernel::default());
            let mut lines = FrontendLines::new(&sizes, FrontendHash::of_set(seed));
            for i in 0..sizes.frontends {
                let index = lines.find_free(&key(i, false)).unwrap();
                let placement = lines.place(&key(i, false), index);
                assert!(placement.passed.is_empty());
                kernel.add(&lines, &key(i, false), &placement);
            }
            assert!(lines.find_free(&key(1 << 20, false)).is_err(), "the setting is the limit");
            let reads: usize = (0..sizes.frontends)
                .map(|i| {
                    let (found, read) = kernel.find(&lines, &key(i, false));
                    assert!(found.is_some() && read <= 4);
                    read
                })
                .sum();
            let missed = (0..10_000).map(|i| kernel.find(&lines, &key(1 << 20 | i, false)).1).sum::<usize>();
            let (hits, misses) = (reads as f64 / f64::from(sizes.frontends), missed as f64 / 10_000.0);
            let overflow = kernel.overflow.len() as f64 / f64::from(sizes.frontends);
            println!("load 0.25: {hits:.2} lines for a hit, {misses:.2} for a miss, {overflow:.4} in the overflow");
            assert!(hits < 1.5 && misses < 2.5 && overflow < 0.01);
        }
    }

    /// Of so many addresses, some have the same fingerprint.
    #[test]
    fn keys_with_the_same_fingerprint_are_told_apart() {
        let (sizes, mut kernel) = (sizes(16_384), Kernel::default());
        let mut lines = FrontendLines::new(&sizes, FrontendHash::of_set(1));
        let key = |i: u32| {
            let mixed = FrontendHash::of_set(i).seed;
            let [a, b, c, d] = [48, 32, 16, 0].map(|shift| (mixed >> shift) as u16);
            FrontendKey::new(SocketAddr::from(([0xfd00, a, 0, b, 0, c, 0, d], 80)).into(), 6)
        };
        let mut seen: HashMap<u64, u32> = HashMap::new();
        let twins = (0..1_000_000).find_map(|i| Some((seen.insert(lines.fingerprint(&key(i)), i)?, i)));
        let (one, other) = twins.unwrap();
        let of_set = |i: u32, set| key(i).fingerprint(&FrontendHash::of_set(set).multipliers);
        assert!((2..100).all(|set| of_set(one, set) != of_set(other, set)), "they do so in other map sets as well");
        for i in [one, other] {
            let index = lines.find_free(&key(i)).unwrap();
            let placement = lines.place(&key(i), index);
            kernel.add(&lines, &key(i), &placement);
        }
        let found = [one, other].map(|i| kernel.find(&lines, &key(i)).0.unwrap());
        assert_ne!(found[0], found[1]);
        // Behind the buckets, only one of them has room.
        let mut behind = lines.clone();
        behind.behind.insert(lines.fingerprint(&key(one)));
        let buckets = behind.buckets(&key(one));
        for index in buckets.into_iter().flat_map(|first| first..first + Frontend::BUCKET) {
            behind.line_mut(index, true).state = State::Used;
        }
        assert!(behind.find_free(&key(one)).is_err());
    }

    proptest! {
        /// After every single write, each key that exists is found where it is, and no other key is.
        #[test]
        fn every_key_is_found_at_any_time(
            steps in prop::collection::vec((0u32..24, any::<bool>(), 0u32..4), 1..200),
            frontends in 4u32..20,
        ) {
            let sizes = sizes(frontends);
            let (mut lines, mut kernel) = (FrontendLines::new(&sizes, FrontendHash::of_set(7)), Kernel::default());
            let mut present: BTreeMap<FrontendKey, FrontendId> = BTreeMap::new();
            let mut epoch = GraceEpoch::new(1);
            for (i, v6, what) in steps {
                let key = key(i, v6);
                match present.get(&key).copied() {
                    Some(id) => {
                        let removed = lines.remove(&key, id);
                        kernel.remove(&lines, &key, id, removed);
                        lines.defer_free(epoch, id);
                        present.remove(&key);
                    }
                    None => {
                        if let Ok(index) = lines.find_free(&key) {
                            let placement = lines.place(&key, index);
                            kernel.add(&lines, &key, &placement);
                            present.insert(key, placement.id);
                        } else {
                            prop_assert!(lines.used() >= frontends);
                        }
                    }
                }
                if what == 1 {
                    lines.reclaim(epoch);
                    epoch = epoch.next();
                }
                for i in 0..24 {
                    for v6 in [false, true] {
                        let key = self::key(i, v6);
                        let found = kernel.find(&lines, &key).0.map(|index| FrontendId::of_line(index, v6));
                        prop_assert_eq!(found, present.get(&key).copied());
                    }
                }
            }
        }
    }
}
