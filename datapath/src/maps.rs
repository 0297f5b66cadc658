//! The BPF maps: written in the order that the table prescribes, and read for status and metrics.

use std::{collections::BTreeSet, sync::atomic::Ordering};

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, Map, MapData, MapInfo, PerCpuArray},
};
use portolan_common::{
    Backend, BackendStats, BackendUse, Counter, FailureCount, FrontendKey, FrontendStats, FrontendVersion, PoolLimits,
    PoolStats, Slot, TIME_BUCKETS,
};
use portolan_core::table::{BackendId, FrontendId, Op, PinnedFrontend, PinnedState, PoolId, Sizes, VersionIndex};

use crate::{
    error::{Context as _, Result, bail},
    map_specs::{self, MapSpec, Scope},
    mmap_array::MmapArray,
    pins::{Pins, Set},
};

/// `BPF_F_MMAPABLE` of linux/bpf.h: the array can be memory-mapped.
const BPF_F_MMAPABLE: u32 = 1 << 10;

/// Reports whether the pinned maps of a set are as this version would create them.
///
/// The loader reuses a pinned map as it is, whatever its layout.
pub(crate) fn fits(pins: &Pins, set: Set, sizes: Sizes) -> bool {
    map_specs::of_scope(Scope::Set).all(|spec| {
        MapInfo::from_pin(pins.map(set, spec.name)).is_ok_and(|info| {
            let mmapable = info.map_flags() & BPF_F_MMAPABLE != 0;
            (info.key_size(), info.value_size(), info.max_entries(), mmapable)
                == (spec.key_size, spec.value_size, spec.entries.number(&sizes), spec.mmapable)
        })
    })
}

/// Global counters, summed over all CPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Outcomes dropped because the ring buffer was full or their client exceeded its event budget.
    pub events_lost: u64,
    /// Connections refused because the lookup found inconsistent map contents.
    pub inconsistent: u64,
    /// Sockets for which per-socket state could not be allocated.
    pub no_memory: u64,
    /// Sockets whose state is in socket storage, because `CONNECTIONS` had no entry for it.
    pub fallback: u64,
}

/// The smallest range of `RUNS` entries that covers everything added.
#[derive(Default)]
struct Range {
    bounds: Option<(u32, u32)>,
}

impl Range {
    fn add(&mut self, first: u32, len: u32) {
        if len > 0 {
            let (start, end) = self.bounds.unwrap_or((first, first));
            self.bounds = Some((start.min(first), end.max(first.saturating_add(len))));
        }
    }

    /// Returns the start and length of the range, clamped to a map of `size` entries.
    fn within(&self, size: u32) -> (u32, u32) {
        let (start, end) = self.bounds.unwrap_or_default();
        (start.min(size), end.min(size) - start.min(size))
    }
}

/// The maps that the agent reads and writes.
pub struct Maps {
    frontends: HashMap<MapData, FrontendKey, u32>,
    /// Frontend id → index of the active version. A single atomic store publishes a version.
    current: MmapArray,
    versions: Array<MapData, FrontendVersion>,
    /// Memory-mapped: a version has up to 10,000 slots, and a system call for each would take about a millisecond.
    slots: MmapArray,
    runs: Array<MapData, u32>,
    backends: Array<MapData, Backend>,
    pools: Array<MapData, PoolLimits>,
    frontend_stats: Array<MapData, FrontendStats>,
    backend_stats: Array<MapData, BackendStats>,
    backend_use: Array<MapData, BackendUse>,
    pool_stats: Array<MapData, PoolStats>,
    failures: MmapArray,
    counters: PerCpuArray<MapData, u64>,
    times: PerCpuArray<MapData, u64>,
}

impl Maps {
    pub(crate) fn open(bpf: &mut Ebpf, sizes: Sizes) -> Result<(Self, PinnedState)> {
        let maps = Self {
            frontends: HashMap::try_from(take(bpf, map_specs::FRONTENDS)?)?,
            current: mapped::<u64>(bpf, map_specs::CURRENT, sizes.frontends)?,
            versions: array(bpf, map_specs::VERSIONS)?,
            slots: mapped::<Slot>(bpf, map_specs::SLOTS, sizes.slots)?,
            runs: array(bpf, map_specs::RUNS)?,
            backends: array(bpf, map_specs::BACKENDS)?,
            pools: array(bpf, map_specs::POOLS)?,
            frontend_stats: array(bpf, map_specs::FRONTEND_STATS)?,
            backend_stats: array(bpf, map_specs::BACKEND_STATS)?,
            backend_use: array(bpf, map_specs::BACKEND_USE)?,
            pool_stats: array(bpf, map_specs::POOL_STATS)?,
            failures: mapped::<u64>(bpf, map_specs::FAILURES, sizes.backends)?,
            counters: PerCpuArray::try_from(take(bpf, map_specs::COUNTERS)?)?,
            times: PerCpuArray::try_from(take(bpf, map_specs::TIMES)?)?,
        };
        let pinned = maps.read_back(sizes).context("cannot read the pinned maps of the previous agent")?;
        Ok((maps, pinned))
    }

    /// Reads back what the maps contain: frontends, the ranges that they use, and their backends and pools.
    ///
    /// # Errors
    /// Returns an error if the kernel rejects a read.
    pub fn read_back(&self, sizes: Sizes) -> Result<PinnedState> {
        let mut state = PinnedState::default();
        let (mut backends, mut pools) = (BTreeSet::new(), BTreeSet::new());
        for entry in self.frontends.iter() {
            let (_, id) = entry?;
            let id = FrontendId::new(id);
            let index = self.current_version(id)?;
            let version = self.versions.get(&index.get(), 0)?;
            let mut range = Range::default();
            for i in version.base..version.base.saturating_add(version.period).min(sizes.slots) {
                let slot: Slot = self.slots.read(i)?;
                range.add(slot.first, slot.len);
                pools.insert(slot.pool);
            }
            let slot_runs = range.within(sizes.slots);
            for i in slot_runs.0..slot_runs.0 + slot_runs.1 {
                backends.insert(self.runs.get(&i, 0)?);
            }
            // The members are among the backends of the slots. Their pools follow, one entry each.
            range.add(version.members, version.member_count.saturating_mul(2));
            let runs = range.within(sizes.slots);
            state.frontends.push(PinnedFrontend { id, index, version, runs });
        }
        for (id, backend) in (0..sizes.backends).zip(self.backends.iter()) {
            let backend = backend?;
            let (id, is_used) = (BackendId::new(id), backends.contains(&id));
            if is_used {
                state.backends.push((id, backend));
            }
            if backend.epoch > 0 {
                state.epochs.push((id, backend.epoch));
            }
        }
        for (id, limits) in (0..sizes.pools()).zip(self.pools.iter()).skip(1) {
            let limits = limits?;
            let (id, is_used) = (PoolId::new(id), pools.contains(&id));
            if is_used {
                state.pools.push((id, limits));
            }
            if limits.epoch > 0 {
                state.pool_epochs.push((id, limits.epoch));
            }
        }
        Ok(state)
    }

    /// Applies the writes in order.
    ///
    /// # Errors
    /// Returns an error at the first write that the kernel rejects.
    /// Earlier writes stay in effect; later ones are not attempted.
    pub fn apply(&mut self, ops: &[Op]) -> Result<()> {
        for op in ops {
            self.write(op).with_context(|| format!("kernel rejected write {op:?}"))?;
        }
        Ok(())
    }

    fn write(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::SetBackend(id, backend) => {
                // The new epoch comes first: sockets of the previous endpoint stop counting here before the new one
                // becomes visible.
                let stats = BackendStats { epoch: backend.epoch, ..BackendStats::default() };
                self.backend_stats.set(id.get(), stats, 0)?;
                self.backend_use.set(id.get(), BackendUse::default(), 0)?;
                self.failures.word(id.get(), 0)?.store(0, Ordering::SeqCst);
                self.backends.set(id.get(), *backend, 0)?;
            }
            Op::ResetPool(id, limits) => {
                // The reverse order: the epoch of a pool is in its limits, not in its counters.
                self.pools.set(id.get(), *limits, 0)?;
                self.pool_stats.set(id.get(), PoolStats::default(), 0)?;
            }
            Op::SetPool(id, limits) => self.pools.set(id.get(), *limits, 0)?,
            Op::SetRuns(first, ids) => {
                for (i, id) in (*first..).zip(ids) {
                    self.runs.set(i, *id, 0)?;
                }
            }
            Op::SetSlots(first, slots) => {
                for (i, slot) in (*first..).zip(slots) {
                    self.slots.write(i, *slot)?;
                }
            }
            Op::SetVersion(index, version) => self.versions.set(index.get(), *version, 0)?,
            Op::ResetFrontend(id) => self.frontend_stats.set(id.get(), FrontendStats::default(), 0)?,
            // Everything reachable from this version is already written.
            Op::Publish(id, index) => self.current.word(id.get(), 0)?.store(u64::from(index.get()), Ordering::SeqCst),
            Op::AddFrontend(key, id) => self.frontends.insert(*key, id.get(), 0)?,
            Op::RemoveFrontend(key) => self.frontends.remove(key)?,
        }
        Ok(())
    }

    /// Lets the programs stop to report successes of backend `id`, unless it has failed more often than `failures`.
    /// They always report failures.
    ///
    /// # Errors
    /// Returns an error if `id` is out of range.
    pub fn acknowledge_failures(&mut self, id: BackendId, failures: u32) -> Result<()> {
        let word = self.failures.word(id.get(), 0)?;
        let mut value = word.load(Ordering::SeqCst);
        // A program that counts a failure meanwhile makes the exchange fail; it does so at most a few times.
        while let Err(now) = word.compare_exchange(
            value,
            FailureCount::acknowledged(value, failures),
            Ordering::SeqCst,
            Ordering::SeqCst,
        ) {
            value = now;
        }
        Ok(())
    }

    /// Returns the counters of frontend `id`.
    ///
    /// # Errors
    /// Returns an error if `id` is out of range.
    pub fn frontend_stats(&self, id: FrontendId) -> Result<FrontendStats> {
        Ok(self.frontend_stats.get(&id.get(), 0)?)
    }

    /// Returns the counters of backend `id`.
    ///
    /// # Errors
    /// Returns an error if `id` is out of range.
    pub fn backend_stats(&self, id: BackendId) -> Result<BackendStats> {
        Ok(self.backend_stats.get(&id.get(), 0)?)
    }

    /// Returns which network namespaces used backend `id` last, and its HTTP/1 response counts.
    ///
    /// # Errors
    /// Returns an error if `id` is out of range.
    pub fn backend_use(&self, id: BackendId) -> Result<BackendUse> {
        Ok(self.backend_use.get(&id.get(), 0)?)
    }

    /// Returns two histograms, summed over all CPUs: connect times, and round-trip times.
    ///
    /// Each has [`TIME_BUCKETS`] elements.
    /// Element `i` counts times from 2^(i-1) to below 2^i microseconds.
    /// The last but one counts everything longer, and the last is the sum in microseconds.
    ///
    /// # Errors
    /// Returns an error if the kernel rejects the read.
    pub fn times(&self) -> Result<[Vec<u64>; 2]> {
        let half = |half: u32| -> Result<Vec<u64>> {
            let buckets = half * TIME_BUCKETS..(half + 1) * TIME_BUCKETS;
            buckets.map(|bucket| Ok(self.times.get(&bucket, 0)?.iter().sum())).collect()
        };
        Ok([half(0)?, half(1)?])
    }

    /// Returns the counters of the pool at index `id` of `POOLS`.
    ///
    /// # Errors
    /// Returns an error if `id` is out of range.
    pub fn pool_stats(&self, id: PoolId) -> Result<PoolStats> {
        Ok(self.pool_stats.get(&id.get(), 0)?)
    }

    /// Looks up a frontend in the kernel: its id and its active version. Returns `None` if there is no entry for `key`.
    pub fn frontend(&self, key: &FrontendKey) -> Option<(FrontendId, FrontendVersion)> {
        let id = FrontendId::new(self.frontends.get(key, 0).ok()?);
        Some((id, self.versions.get(&self.current_version(id).ok()?.get(), 0).ok()?))
    }

    fn current_version(&self, id: FrontendId) -> Result<VersionIndex> {
        Ok(VersionIndex::new(self.current.word(id.get(), 0)?.load(Ordering::SeqCst) as u32))
    }

    /// Returns the global counters, summed over all CPUs.
    ///
    /// # Errors
    /// Returns an error if the kernel rejects the read.
    pub fn counters(&self) -> Result<Counters> {
        let total = |counter: Counter| -> Result<u64> { Ok(self.counters.get(&(counter as u32), 0)?.iter().sum()) };
        Ok(Counters {
            events_lost: total(Counter::EventsLost)?,
            inconsistent: total(Counter::Inconsistent)?,
            no_memory: total(Counter::NoMemory)?,
            fallback: total(Counter::Fallback)?,
        })
    }
}

/// Takes a map out of the loaded object.
pub(crate) fn take(bpf: &mut Ebpf, spec: MapSpec) -> Result<Map> {
    bpf.take_map(spec.name).with_context(|| format!("BPF object is missing map {}", spec.name))
}

fn mapped<T>(bpf: &mut Ebpf, spec: MapSpec, entries: u32) -> Result<MmapArray> {
    let Map::Array(data) = take(bpf, spec)? else { bail!("map {} is not an array", spec.name) };
    MmapArray::open::<T>(data.fd(), entries)
}

pub(crate) fn array<V: Pod>(bpf: &mut Ebpf, spec: MapSpec) -> Result<Array<MapData, V>> {
    Ok(Array::try_from(take(bpf, spec)?)?)
}
