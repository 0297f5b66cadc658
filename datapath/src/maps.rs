//! The maps: written in the order that the table gives, read for what people and metrics ask.

use std::{collections::BTreeSet, sync::atomic::Ordering};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, Map, MapData, MapInfo, PerCpuArray},
};
use portolan_common::{
    Affinity, AffinityKey, Backend, BackendStats, BackendUse, Counter, FrontendKey, FrontendStats, FrontendVersion,
    PoolLimits, PoolStats, Slot, TIME_BUCKETS,
};
use portolan_core::table::{Op, PinnedFrontend, PinnedState, Sizes};

use crate::{
    mmap_array::MmapArray,
    pins::{Pins, Set},
};

/// Maps of a set that have no size of their own to choose.
pub(crate) const OF_FIXED_SIZE: [&str; 4] = ["EVENTS", "BUDGETS", "COUNTERS", "TIMES"];
/// Maps that belong to no set: of sockets, and of who is left alone.
pub(crate) const OF_ALL_SETS: [&str; 5] = [SOCKETS, CONNECTIONS, "DATAGRAMS", "OPTED_OUT", "OPT_OUT_FILTER"];
pub(crate) const SOCKETS: &str = "SOCKETS";
pub(crate) const CONNECTIONS: &str = "CONNECTIONS";

/// Maps whose entries in use can be counted from outside.
pub(crate) const COUNTABLE: [&str; 2] = ["FRONTENDS", "AFFINITY"];

/// The kernel's flag for arrays that can be mapped into memory.
const BPF_F_MMAPABLE: u32 = 1 << 10;

/// A map of a set whose size is a setting: bytes of its keys and values, and its entries.
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    key: usize,
    value: usize,
    pub(crate) entries: u32,
    /// Whether it can be mapped into memory.
    mapped: bool,
}

/// All of them.
pub(crate) fn shapes(sizes: Sizes) -> [Shape; 13] {
    let array = |name, value, entries| Shape { name, key: size_of::<u32>(), value, entries, mapped: false };
    let mapped = |name, value, entries| Shape { mapped: true, ..array(name, value, entries) };
    let hash = |name, key, value, entries| Shape { name, key, value, entries, mapped: false };
    [
        hash("FRONTENDS", size_of::<FrontendKey>(), size_of::<u32>(), sizes.frontends),
        mapped("CURRENT", size_of::<u64>(), sizes.frontends),
        mapped("VERSIONS", size_of::<FrontendVersion>(), sizes.versions()),
        mapped("SLOTS", size_of::<Slot>(), sizes.slots),
        array("RUNS", size_of::<u32>(), sizes.slots),
        array("BACKENDS", size_of::<Backend>(), sizes.backends),
        array("POOLS", size_of::<PoolLimits>(), sizes.pools()),
        mapped("FRONTEND_STATS", size_of::<FrontendStats>(), sizes.frontends),
        mapped("BACKEND_STATS", size_of::<BackendStats>(), sizes.backends),
        mapped("BACKEND_USE", size_of::<BackendUse>(), sizes.backends),
        mapped("POOL_STATS", size_of::<PoolStats>(), sizes.pools()),
        array("TROUBLED", size_of::<u32>(), sizes.backends),
        hash("AFFINITY", size_of::<AffinityKey>(), size_of::<Affinity>(), sizes.affinities),
    ]
}

/// Names of all maps of a set.
pub(crate) fn of_set() -> impl Iterator<Item = &'static str> {
    shapes(Sizes::default()).map(|shape| shape.name).into_iter().chain(OF_FIXED_SIZE)
}

/// Whether the maps of a set are as this version would make them. A pinned map is reused as it is, whatever its layout, so they are compared
/// before.
pub(crate) fn fits(pins: &Pins, set: Set, sizes: Sizes) -> bool {
    shapes(sizes).iter().all(|shape| {
        MapInfo::from_pin(pins.map(set, shape.name)).is_ok_and(|info| {
            let mapped = info.map_flags() & BPF_F_MMAPABLE != 0;
            (info.key_size(), info.value_size(), info.max_entries(), mapped)
                == (shape.key as u32, shape.value as u32, shape.entries, shape.mapped)
        })
    })
}

/// Totals over all CPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Outcomes that found the ring buffer full, or of a network namespace that floods it.
    pub events_lost: u64,
    /// Connections refused because the table contradicted itself.
    pub inconsistent: u64,
    /// Sockets on which nothing could be remembered.
    pub no_memory: u64,
}

/// The entries of `RUNS` that a version uses.
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

    /// First and number.
    fn within(&self, size: u32) -> (u32, u32) {
        let (start, end) = self.bounds.unwrap_or_default();
        (start.min(size), end.min(size) - start.min(size))
    }
}

/// The maps that the agent reads and writes.
pub struct Maps {
    frontends: HashMap<MapData, FrontendKey, u32>,
    /// Frontend id → which version counts. One store publishes.
    current: MmapArray,
    versions: Array<MapData, FrontendVersion>,
    /// Up to 10,000 for one version: a system call for each would take a millisecond.
    slots: MmapArray,
    runs: Array<MapData, u32>,
    backends: Array<MapData, Backend>,
    pools: Array<MapData, PoolLimits>,
    frontend_stats: Array<MapData, FrontendStats>,
    backend_stats: Array<MapData, BackendStats>,
    backend_use: Array<MapData, BackendUse>,
    pool_stats: Array<MapData, PoolStats>,
    report_success: Array<MapData, u32>,
    counters: PerCpuArray<MapData, u64>,
    times: PerCpuArray<MapData, u64>,
}

impl Maps {
    pub(crate) fn open(bpf: &mut Ebpf, sizes: Sizes) -> Result<(Self, PinnedState)> {
        let maps = Self {
            frontends: HashMap::try_from(take(bpf, "FRONTENDS")?)?,
            current: mapped::<u64>(bpf, "CURRENT", sizes.frontends)?,
            versions: array(bpf, "VERSIONS")?,
            slots: mapped::<Slot>(bpf, "SLOTS", sizes.slots)?,
            runs: array(bpf, "RUNS")?,
            backends: array(bpf, "BACKENDS")?,
            pools: array(bpf, "POOLS")?,
            frontend_stats: array(bpf, "FRONTEND_STATS")?,
            backend_stats: array(bpf, "BACKEND_STATS")?,
            backend_use: array(bpf, "BACKEND_USE")?,
            pool_stats: array(bpf, "POOL_STATS")?,
            report_success: array(bpf, "TROUBLED")?,
            counters: PerCpuArray::try_from(take(bpf, "COUNTERS")?)?,
            times: PerCpuArray::try_from(take(bpf, "TIMES")?)?,
        };
        let held = maps.read_back(sizes).context("cannot read what a former agent left")?;
        Ok((maps, held))
    }

    /// What the maps hold: frontends, the places that they use, and the backends and pools behind them.
    ///
    /// # Errors
    /// The kernel does not let a map be read.
    pub fn read_back(&self, sizes: Sizes) -> Result<PinnedState> {
        let mut held = PinnedState::default();
        let (mut backends, mut pools) = (BTreeSet::new(), BTreeSet::new());
        for entry in self.frontends.iter() {
            let (_, id) = entry?;
            let index = self.current_version(id)?;
            let version = self.versions.get(&index, 0)?;
            let mut range = Range::default();
            for i in version.base..version.base.saturating_add(version.period).min(sizes.slots) {
                let slot: Slot = self.slots.read(i)?;
                range.add(slot.first, slot.len);
                pools.insert(slot.pool);
            }
            let of_slots = range.within(sizes.slots);
            for i in of_slots.0..of_slots.0 + of_slots.1 {
                backends.insert(self.runs.get(&i, 0)?);
            }
            // Members are among those of the slots; behind them are their pools.
            range.add(version.members, version.member_count.saturating_mul(2));
            let runs = range.within(sizes.slots);
            held.frontends.push(PinnedFrontend { id, index, version, runs });
        }
        for (id, backend) in (0..sizes.backends).zip(self.backends.iter()) {
            let backend = backend?;
            if backends.contains(&id) {
                held.backends.push((id, backend));
            }
            if backend.epoch > 0 {
                held.epochs.push((id, backend.epoch));
            }
        }
        for (id, limits) in (0..sizes.pools()).zip(self.pools.iter()).skip(1) {
            let limits = limits?;
            if pools.contains(&id) {
                held.pools.push((id, limits));
            }
            if limits.epoch > 0 {
                held.pool_epochs.push((id, limits.epoch));
            }
        }
        Ok(held)
    }

    /// Does the writes, in their order.
    ///
    /// # Errors
    /// The first write that the kernel did not take; those before it stand.
    pub fn apply(&mut self, ops: &[Op]) -> Result<()> {
        for op in ops {
            self.write(op).with_context(|| format!("the kernel did not take {op:?}"))?;
        }
        Ok(())
    }

    fn write(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::SetBackend(id, backend) => {
                // Counters of sockets of the former endpoint stop with the epoch, before the new one is seen.
                let stats = BackendStats { epoch: backend.epoch, ..BackendStats::default() };
                self.backend_stats.set(*id, stats, 0)?;
                self.backend_use.set(*id, BackendUse::default(), 0)?;
                self.report_success.set(*id, 0, 0)?;
                self.backends.set(*id, *backend, 0)?;
            }
            Op::ResetPool(id, limits) => {
                // The other way round: the counters of a pool have no epoch of their own.
                self.pools.set(*id, *limits, 0)?;
                self.pool_stats.set(*id, PoolStats::default(), 0)?;
            }
            Op::SetPool(id, limits) => self.pools.set(*id, *limits, 0)?,
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
            Op::SetVersion(index, version) => self.versions.set(*index, *version, 0)?,
            Op::ResetFrontend(id) => self.frontend_stats.set(*id, FrontendStats::default(), 0)?,
            // All that leads from it was written before.
            Op::Publish(id, index) => self.current.word(*id, 0)?.store(u64::from(*index), Ordering::SeqCst),
            Op::AddFrontend(key, id) => self.frontends.insert(*key, *id, 0)?,
            Op::RemoveFrontend(key) => self.frontends.remove(key)?,
        }
        Ok(())
    }

    /// Whether successes of a backend must be told.
    ///
    /// # Errors
    /// There is no such id.
    pub fn set_report_success(&mut self, id: u32, report_success: bool) -> Result<()> {
        Ok(self.report_success.set(id, u32::from(report_success), 0)?)
    }

    /// The counters of a frontend.
    ///
    /// # Errors
    /// There is no such id.
    pub fn frontend_stats(&self, id: u32) -> Result<FrontendStats> {
        Ok(self.frontend_stats.get(&id, 0)?)
    }

    /// The counters of a backend.
    ///
    /// # Errors
    /// There is no such id.
    pub fn backend_stats(&self, id: u32) -> Result<BackendStats> {
        Ok(self.backend_stats.get(&id, 0)?)
    }

    /// Who used a backend last, and what its responses said.
    ///
    /// # Errors
    /// There is no such id.
    pub fn backend_use(&self, id: u32) -> Result<BackendUse> {
        Ok(self.backend_use.get(&id, 0)?)
    }

    /// How long connects and round trips took, in microseconds: how many were below each power of two, and last the sum.
    ///
    /// # Errors
    /// The kernel does not let the map be read.
    pub fn times(&self) -> Result<[Vec<u64>; 2]> {
        let half = |half: u32| -> Result<Vec<u64>> {
            let buckets = half * TIME_BUCKETS..(half + 1) * TIME_BUCKETS;
            buckets.map(|bucket| Ok(self.times.get(&bucket, 0)?.iter().sum())).collect()
        };
        Ok([half(0)?, half(1)?])
    }

    /// The counters of a pool's place.
    ///
    /// # Errors
    /// There is no such place.
    pub fn pool_stats(&self, id: u32) -> Result<PoolStats> {
        Ok(self.pool_stats.get(&id, 0)?)
    }

    /// The frontend as the kernel holds it now: its id, and the version that counts.
    pub fn frontend(&self, key: &FrontendKey) -> Option<(u32, FrontendVersion)> {
        let id = self.frontends.get(key, 0).ok()?;
        Some((id, self.versions.get(&self.current_version(id).ok()?, 0).ok()?))
    }

    fn current_version(&self, id: u32) -> Result<u32> {
        Ok(self.current.word(id, 0)?.load(Ordering::SeqCst) as u32)
    }

    /// Totals over all CPUs.
    ///
    /// # Errors
    /// The kernel does not let the map be read.
    pub fn counters(&self) -> Result<Counters> {
        let total = |counter: Counter| -> Result<u64> { Ok(self.counters.get(&(counter as u32), 0)?.iter().sum()) };
        Ok(Counters {
            events_lost: total(Counter::EventsLost)?,
            inconsistent: total(Counter::Inconsistent)?,
            no_memory: total(Counter::NoMemory)?,
        })
    }
}

pub(crate) fn take(bpf: &mut Ebpf, name: &str) -> Result<Map> {
    bpf.take_map(name).with_context(|| format!("the embedded object has no map {name}"))
}

fn mapped<T>(bpf: &mut Ebpf, name: &str, entries: u32) -> Result<MmapArray> {
    let Map::Array(data) = take(bpf, name)? else { anyhow::bail!("{name} is not an array") };
    MmapArray::open::<T>(data.fd(), entries)
}

pub(crate) fn array<V: Pod>(bpf: &mut Ebpf, name: &str) -> Result<Array<MapData, V>> {
    Ok(Array::try_from(take(bpf, name)?)?)
}
