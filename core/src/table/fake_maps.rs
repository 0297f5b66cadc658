//! The BPF maps of a table in ordinary memory: what the programs would do with them, without a kernel.
//!
//! For tests of everything above the data path. `kernel::facts` of the agent runs the same checks on this fake and
//! on the kernel's maps, so that it may be trusted for what those checks cover and for nothing else.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use portolan_common::{
    Backend, BackendStats, BackendUse, Entry, FrontendHash, FrontendKey, FrontendStats, FrontendVersion, PoolLimits,
    PoolStats, Published, PublishedFlags, Slot, VersionFlags,
};

use super::{
    ids::{BackendId, FrontendId, Generation, PoolId, VersionIndex},
    kernel_state::{PinnedFrontend, PinnedState},
    ops::Op,
};

/// What the maps hold.
#[derive(Clone, Debug, Default)]
pub struct FakeMaps {
    frontends: BTreeMap<FrontendKey, FrontendId>,
    /// Lines that were ever in use.
    lines: BTreeMap<FrontendId, Line>,
    entries: BTreeMap<u32, Entry>,
    inline: BTreeMap<FrontendId, Vec<Entry>>,
    versions: BTreeMap<VersionIndex, FrontendVersion>,
    slots: BTreeMap<u32, Slot>,
    runs: BTreeMap<u32, u32>,
    backends: BTreeMap<BackendId, Backend>,
    pools: BTreeMap<PoolId, PoolLimits>,
    /// Counters of frontends; a test sets them as the programs would.
    pub frontend_stats: BTreeMap<FrontendId, FrontendStats>,
    /// Counters of backends; a test sets them as the programs would.
    pub backend_stats: BTreeMap<BackendId, BackendStats>,
    /// Recent use of backends; a test sets it as the programs would.
    pub backend_use: BTreeMap<BackendId, BackendUse>,
    /// Counters of pools; a test sets them as the programs would.
    pub pool_stats: BTreeMap<PoolId, PoolStats>,
}

/// A line that was in use.
#[derive(Clone, Copy, Debug, Default)]
struct Line {
    epoch: u32,
    published: Published,
    generation: Generation,
    /// Whether searches pass it while it is free.
    passed: bool,
}

impl FakeMaps {
    /// Does one write, with the resets that go with it.
    pub fn write(&mut self, op: &Op) {
        match op {
            Op::SetBackend(id, backend) => {
                self.backend_stats.insert(*id, BackendStats { epoch: backend.epoch, ..BackendStats::default() });
                self.backend_use.insert(*id, BackendUse::default());
                self.backends.insert(*id, *backend);
            }
            Op::ResetPool(id, limits) => {
                self.pools.insert(*id, *limits);
                self.pool_stats.insert(*id, PoolStats::default());
            }
            Op::SetPool(id, limits) => drop(self.pools.insert(*id, *limits)),
            Op::SetRuns(first, ids) => self.runs.extend((*first..).zip(ids.iter().copied())),
            Op::SetSlots(first, slots) => self.slots.extend((*first..).zip(slots.iter().copied())),
            Op::SetEntries(first, entries) => self.entries.extend((*first..).zip(entries.iter().copied())),
            Op::SetInline(id, entries) => drop(self.inline.insert(*id, entries.clone())),
            Op::SetVersion(index, version) => drop(self.versions.insert(*index, *version)),
            Op::ResetFrontend(id, epoch) => {
                self.lines.insert(*id, Line { epoch: *epoch, ..Line::default() });
                self.frontend_stats.insert(*id, FrontendStats::default());
            }
            Op::Publish(id, published, generation) => {
                let line = self.lines.entry(*id).or_default();
                (line.published, line.generation) = (*published, *generation);
            }
            Op::PassLine(id) => self.lines.entry(*id).or_default().passed = true,
            Op::AddFrontend(key, id) => drop(self.frontends.insert(*key, *id)),
            Op::RemoveFrontend(key, id, passed) => {
                self.frontends.remove(key);
                self.lines.entry(*id).or_default().passed = *passed;
            }
        }
    }

    /// Does several writes, in their order.
    pub fn write_all(&mut self, ops: &[Op]) {
        ops.iter().for_each(|op| self.write(op));
    }

    /// Returns the keys of all frontends.
    pub fn keys(&self) -> impl Iterator<Item = &FrontendKey> {
        self.frontends.keys()
    }

    /// Returns the limits of a pool.
    pub fn limits(&self, id: PoolId) -> Option<&PoolLimits> {
        self.pools.get(&id)
    }

    /// Returns a frontend's id, what is published for it, and the number of that publication.
    pub fn frontend(&self, key: &FrontendKey) -> Option<(FrontendId, Published, Generation)> {
        let id = self.frontends.get(key)?;
        let line = self.lines.get(id)?;
        Some((*id, line.published, line.generation))
    }

    /// Returns what is published for a frontend.
    ///
    /// # Panics
    /// There is no such frontend, or nothing is published for it: then a write came too early.
    pub fn published(&self, key: &FrontendKey) -> Published {
        let line = &self.lines[&self.frontends[key]];
        assert_ne!(line.generation, Generation::default(), "nothing is published for the frontend");
        line.published
    }

    /// Returns the endpoint of each of the first `count` connections to a frontend, as the programs choose it: `None` where
    /// the connection is refused.
    ///
    /// # Panics
    /// An entry that the programs would read is missing.
    pub fn picks(&self, key: &FrontendKey, count: u64) -> Vec<Option<SocketAddr>> {
        self.picks_of(self.frontends[key], self.published(key), count)
    }

    /// Returns the same as [`Self::picks`] for what a program may still be reading.
    ///
    /// # Panics
    /// An entry that the programs would read is missing, or names a backend that is another one by now.
    pub fn picks_of(&self, id: FrontendId, published: Published, count: u64) -> Vec<Option<SocketAddr>> {
        let period = u64::from(published.period());
        let count = if period == 0 { 0 } else { count };
        let endpoint = |id: u32| self.backends[&BackendId::new(id)];
        let version =
            published.has(PublishedFlags::DETAILED).then(|| self.versions[&VersionIndex::new(published.base())]);
        let (base, len, is_inline) = self.list(published, version.as_ref());
        if len > 0 {
            let pick = |turn: u64| {
                let entry = self.turn(id, is_inline, base, (turn % period) as u32);
                let backend = endpoint(entry.backend_id);
                assert_eq!((entry.epoch, entry.port), (backend.epoch as u16, backend.endpoint.port_word()));
                let word = if backend.endpoint.is_v4() { backend.endpoint.v4_word() } else { 0 };
                assert_eq!(entry.address, word);
                Some(backend.endpoint.socket_addr())
            };
            assert_eq!(u64::from(len), period);
            return (0..count).map(pick).collect();
        }
        let Some(version) = version else { return Vec::new() };
        assert_eq!(u64::from(version.period), period);
        let pick = |turn: u64| {
            let slot = self.slots[&(version.base + (turn % period) as u32)];
            (slot.len > 0).then(|| endpoint(self.runs[&slot.entry(turn / period)]).endpoint.socket_addr())
        };
        (0..count).map(pick).collect()
    }

    /// Returns the list of turns that is published: its first entry in `ENTRIES`, its length, which is 0 if the schedule is in
    /// slots, and whether it is behind the frontend's line instead.
    fn list(&self, published: Published, version: Option<&FrontendVersion>) -> (u32, u32, bool) {
        match version {
            Some(version) => (version.entries, version.entry_count, version.flags & VersionFlags::INLINE != 0),
            None => (published.base(), published.period(), published.has(PublishedFlags::INLINE)),
        }
    }

    fn turn(&self, id: FrontendId, is_inline: bool, base: u32, turn: u32) -> Entry {
        if is_inline { self.inline[&id][turn as usize] } else { self.entries[&(base + turn)] }
    }

    /// Returns the endpoints that a client with session affinity may return to.
    ///
    /// # Panics
    /// They are not sorted by id, as the programs' binary search needs them.
    pub fn members(&self, key: &FrontendKey) -> BTreeSet<SocketAddr> {
        let published = self.published(key);
        if !published.has(PublishedFlags::DETAILED) {
            return BTreeSet::new();
        }
        let version = self.versions[&VersionIndex::new(published.base())];
        let ids: Vec<u32> = (version.members..version.members + version.member_count).map(|i| self.runs[&i]).collect();
        assert!(ids.is_sorted(), "the programs search the members by bisection");
        ids.iter().map(|id| self.backends[&BackendId::new(*id)].endpoint.socket_addr()).collect()
    }

    /// Returns what an agent that starts now finds.
    pub fn read_back(&self) -> PinnedState {
        let (mut backends, mut pools) = (BTreeSet::new(), BTreeSet::new());
        let mut frontends = Vec::new();
        for (key, id) in &self.frontends {
            let published = self.published(key);
            let mut pinned = PinnedFrontend {
                key: *key,
                id: *id,
                epoch: self.lines[id].epoch,
                published,
                generation: self.lines[id].generation,
                version: None,
                runs: (0, 0),
            };
            let version =
                published.has(PublishedFlags::DETAILED).then(|| self.versions[&VersionIndex::new(published.base())]);
            let (base, len, is_inline) = self.list(published, version.as_ref());
            for entry in (0..len).map(|turn| self.turn(*id, is_inline, base, turn)) {
                pools.insert(PoolId::new(entry.pool));
                backends.insert(BackendId::new(entry.backend_id));
            }
            if let Some(version) = version {
                let slots: Vec<Slot> = (version.base..version.base + version.period).map(|i| self.slots[&i]).collect();
                pools.extend(slots.iter().map(|slot| PoolId::new(slot.pool)));
                let of_slots = slots.iter().filter(|slot| slot.len > 0).map(|slot| (slot.first, slot.len));
                for (first, len) in of_slots.clone() {
                    backends.extend((first..first + len).map(|i| BackendId::new(self.runs[&i])));
                }
                let members = (version.member_count > 0).then_some((version.members, 2 * version.member_count));
                let ranges: Vec<(u32, u32)> = of_slots.chain(members).collect();
                let start = ranges.iter().map(|(first, _)| *first).min().unwrap_or(0);
                let end = ranges.iter().map(|(first, len)| first + len).max().unwrap_or(0);
                pinned.version = Some((VersionIndex::new(published.base()), version));
                pinned.runs = (start, end - start);
            }
            frontends.push(pinned);
        }
        let used: BTreeSet<FrontendId> = self.frontends.values().copied().collect();
        let free = self.lines.iter().filter(|(id, _)| !used.contains(id));
        let in_use = |(id, backend): (&BackendId, &Backend)| backends.contains(id).then_some((*id, *backend));
        let limited = |(id, limits): (&PoolId, &PoolLimits)| pools.contains(id).then_some((*id, *limits));
        PinnedState {
            hash: FrontendHash::of_set(0),
            frontends,
            free_lines: free.map(|(id, line)| (*id, line.epoch, line.passed)).collect(),
            backends: self.backends.iter().filter_map(in_use).collect(),
            epochs: self.backends.iter().map(|(id, backend)| (*id, backend.epoch)).collect(),
            pools: self.pools.iter().filter_map(limited).collect(),
            pool_epochs: self.pools.iter().map(|(id, limits)| (*id, limits.epoch)).collect(),
        }
    }
}
