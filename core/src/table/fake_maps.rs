//! The BPF maps of a table in ordinary memory: what the programs would do with them, without a kernel.
//!
//! For tests of everything above the data path. `kernel::facts` of the agent runs the same checks on this fake and
//! on the kernel's maps, so that it may be trusted for what those checks cover and for nothing else.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use portolan_common::{
    Backend, BackendStats, BackendUse, FrontendKey, FrontendStats, FrontendVersion, PoolLimits, PoolStats, Slot,
};

use super::{
    ids::{BackendId, FrontendId, PoolId, VersionIndex},
    kernel_state::{PinnedFrontend, PinnedState},
    ops::Op,
};

/// What the maps hold.
#[derive(Clone, Debug, Default)]
pub struct FakeMaps {
    frontends: BTreeMap<FrontendKey, FrontendId>,
    active_versions: BTreeMap<FrontendId, VersionIndex>,
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
            Op::SetVersion(index, version) => drop(self.versions.insert(*index, *version)),
            Op::ResetFrontend(id) => drop(self.frontend_stats.insert(*id, FrontendStats::default())),
            Op::Publish(id, index) => drop(self.active_versions.insert(*id, *index)),
            Op::AddFrontend(key, id) => drop(self.frontends.insert(*key, *id)),
            Op::RemoveFrontend(key) => drop(self.frontends.remove(key)),
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

    /// Returns a frontend's id and its version in effect.
    pub fn frontend(&self, key: &FrontendKey) -> Option<(FrontendId, FrontendVersion)> {
        let id = self.frontends.get(key)?;
        Some((*id, *self.versions.get(self.active_versions.get(id)?)?))
    }

    /// Returns the version in effect of a frontend.
    ///
    /// # Panics
    /// There is no such frontend, or the version belongs to another one: then a write came too early.
    pub fn version(&self, key: &FrontendKey) -> FrontendVersion {
        let version = self.versions[&self.active_versions[&self.frontends[key]]];
        assert_eq!(version.key, *key, "the published version belongs to another frontend");
        version
    }

    /// Returns the endpoint of each of the first `count` connections to a frontend, as the programs choose it: `None` where
    /// the connection is refused.
    ///
    /// # Panics
    /// An entry that the programs would read is missing.
    pub fn picks(&self, key: &FrontendKey, count: u64) -> Vec<Option<SocketAddr>> {
        self.picks_of(&self.version(key), count)
    }

    /// Returns the same as [`Self::picks`] for a version that a program may still be reading.
    ///
    /// # Panics
    /// An entry that the programs would read is missing.
    pub fn picks_of(&self, version: &FrontendVersion, count: u64) -> Vec<Option<SocketAddr>> {
        let period = u64::from(version.period);
        let count = if period == 0 { 0 } else { count };
        let pick = |turn: u64| {
            let slot = self.slots[&(version.base + (turn % period) as u32)];
            let id = || BackendId::new(self.runs[&slot.entry(turn / period)]);
            (slot.len > 0).then(|| self.backends[&id()].endpoint.socket_addr())
        };
        (0..count).map(pick).collect()
    }

    /// Returns the endpoints that a client with session affinity may return to.
    ///
    /// # Panics
    /// They are not sorted by id, as the programs' binary search needs them.
    pub fn members(&self, key: &FrontendKey) -> BTreeSet<SocketAddr> {
        let version = self.version(key);
        let ids: Vec<u32> = (version.members..version.members + version.member_count).map(|i| self.runs[&i]).collect();
        assert!(ids.is_sorted(), "the programs search the members by bisection");
        ids.iter().map(|id| self.backends[&BackendId::new(*id)].endpoint.socket_addr()).collect()
    }

    /// Returns what an agent that starts now finds.
    pub fn read_back(&self) -> PinnedState {
        let (mut backends, mut pools) = (BTreeSet::new(), BTreeSet::new());
        let mut frontends = Vec::new();
        for (key, id) in &self.frontends {
            let version = self.version(key);
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
            let index = self.active_versions[id];
            frontends.push(PinnedFrontend { id: *id, index, version, runs: (start, end - start) });
        }
        let in_use = |(id, backend): (&BackendId, &Backend)| backends.contains(id).then_some((*id, *backend));
        let limited = |(id, limits): (&PoolId, &PoolLimits)| pools.contains(id).then_some((*id, *limits));
        PinnedState {
            frontends,
            backends: self.backends.iter().filter_map(in_use).collect(),
            epochs: self.backends.iter().map(|(id, backend)| (*id, backend.epoch)).collect(),
            pools: self.pools.iter().filter_map(limited).collect(),
            pool_epochs: self.pools.iter().map(|(id, limits)| (*id, limits.epoch)).collect(),
        }
    }
}
