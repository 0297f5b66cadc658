//! The BPF maps: written in the order that the table prescribes, and read for status and metrics.

use std::{
    collections::BTreeSet,
    mem::offset_of,
    sync::atomic::{AtomicU64, Ordering},
};

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, Map, MapData, MapInfo, PerCpuArray},
};
use portolan_common::{
    Backend, BackendStats, BackendUse, Counter, Entry, FailureCount, Frontend, Frontend4, Frontend6, FrontendHash,
    FrontendKey, FrontendStats, FrontendVersion, PoolLimits, PoolStats, Published, PublishedFlags, Slot, TIME_BUCKETS,
    VersionFlags,
};
use portolan_core::table::{
    BackendId, FrontendId, Generation, Op, PinnedFrontend, PinnedState, PoolId, Sizes, VersionIndex,
};

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
///
/// Most are memory-mapped: a schedule has up to 10,000 slots, and a system call for each would take about a millisecond.
pub struct Maps {
    hash: FrontendHash,
    sizes: Sizes,
    frontends4: MmapArray,
    frontends6: MmapArray,
    frontend_overflow: HashMap<MapData, u64, u32>,
    entries: MmapArray,
    versions: MmapArray,
    slots: MmapArray,
    runs: Array<MapData, u32>,
    backends: Array<MapData, Backend>,
    pools: Array<MapData, PoolLimits>,
    backend_stats: MmapArray,
    backend_use: MmapArray,
    pool_stats: MmapArray,
    failures: MmapArray,
    counters: PerCpuArray<MapData, u64>,
    times: PerCpuArray<MapData, u64>,
}

impl Maps {
    /// `hash` is that by which the programs find frontends.
    pub(crate) fn open(bpf: &mut Ebpf, sizes: Sizes, hash: FrontendHash) -> Result<(Self, PinnedState)> {
        let lines = sizes.frontend_lines();
        let maps = Self {
            hash,
            sizes,
            frontends4: mapped::<Frontend4>(bpf, map_specs::FRONTENDS4, lines)?,
            frontends6: mapped::<Frontend6>(bpf, map_specs::FRONTENDS6, lines)?,
            frontend_overflow: HashMap::try_from(take(bpf, map_specs::FRONTEND_OVERFLOW)?)?,
            entries: mapped::<Entry>(bpf, map_specs::ENTRIES, sizes.slots)?,
            versions: mapped::<FrontendVersion>(bpf, map_specs::VERSIONS, sizes.versions())?,
            slots: mapped::<Slot>(bpf, map_specs::SLOTS, sizes.slots)?,
            runs: array(bpf, map_specs::RUNS)?,
            backends: array(bpf, map_specs::BACKENDS)?,
            pools: array(bpf, map_specs::POOLS)?,
            backend_stats: mapped::<BackendStats>(bpf, map_specs::BACKEND_STATS, sizes.backends)?,
            backend_use: mapped::<BackendUse>(bpf, map_specs::BACKEND_USE, sizes.backends)?,
            pool_stats: mapped::<PoolStats>(bpf, map_specs::POOL_STATS, sizes.pools())?,
            failures: mapped::<u64>(bpf, map_specs::FAILURES, sizes.backends)?,
            counters: PerCpuArray::try_from(take(bpf, map_specs::COUNTERS)?)?,
            times: PerCpuArray::try_from(take(bpf, map_specs::TIMES)?)?,
        };
        let pinned = maps.read_back(sizes).context("cannot read the pinned maps of the previous agent")?;
        Ok((maps, pinned))
    }

    /// Reads the line of a frontend.
    fn line(&self, id: FrontendId) -> Result<Frontend> {
        match id.is_v6() {
            false => Ok(self.frontends4.read::<Frontend4>(id.index())?.line),
            true => Ok(self.frontends6.read::<Frontend6>(id.index())?.line),
        }
    }

    /// Reads the turns of a list: its first entry in `ENTRIES`, its length, and whether it is behind the frontend's line
    /// instead.
    fn turns(&self, id: FrontendId, (base, len, is_inline): (u32, u32, bool)) -> Result<Vec<Entry>> {
        if !is_inline {
            return (base..base.saturating_add(len).min(self.sizes.slots)).map(|i| self.entries.read(i)).collect();
        }
        let inline = match id.is_v6() {
            false => self.frontends4.read::<Frontend4>(id.index())?.inline,
            true => self.frontends6.read::<Frontend6>(id.index())?.inline,
        };
        Ok(inline.into_iter().take(len as usize).collect())
    }

    /// Returns a word of a frontend, at this offset in bytes; those of its line and its turns are the same for both families.
    fn line_word(&self, id: FrontendId, offset: usize) -> Result<&AtomicU64> {
        let lines = if id.is_v6() { &self.frontends6 } else { &self.frontends4 };
        lines.word(id.index(), offset / 8)
    }

    /// Reads back what the maps contain: frontends, the ranges that they use, and their backends and pools.
    ///
    /// # Errors
    /// Returns an error if the kernel rejects a read.
    pub fn read_back(&self, sizes: Sizes) -> Result<PinnedState> {
        let mut state = PinnedState::empty(self.hash);
        let (mut backends, mut pools) = (BTreeSet::new(), BTreeSet::new());
        let ids = [false, true].into_iter().flat_map(|v6| (0..sizes.frontend_lines()).map(move |i| (i, v6)));
        for (index, v6) in ids {
            let id = FrontendId::of_line(index, v6);
            let line = self.line(id)?;
            let key = match line.key {
                Frontend::EMPTY | Frontend::REMOVED => {
                    if line.epoch > 0 || line.key == Frontend::REMOVED {
                        state.free_lines.push((id, line.epoch, line.key == Frontend::REMOVED));
                    }
                    continue;
                }
                _ if v6 => self.frontends6.read::<Frontend6>(index)?.key,
                fingerprint => FrontendKey::from_v4_fingerprint(fingerprint).context("a frontend has no valid key")?,
            };
            let (epoch, published, generation) =
                (line.epoch, Published(line.current), Generation::new(line.generation));
            let mut pinned = PinnedFrontend { key, id, epoch, published, generation, version: None, runs: (0, 0) };
            let mut list = (published.base(), published.period(), published.has(PublishedFlags::INLINE));
            if published.has(PublishedFlags::DETAILED) {
                let index = VersionIndex::new(published.base());
                let version: FrontendVersion = self.versions.read(index.get())?;
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
                // The members are among the backends of the slots or of the list. Their pools follow, one entry each.
                range.add(version.members, version.member_count.saturating_mul(2));
                pinned.runs = range.within(sizes.slots);
                pinned.version = Some((index, version));
                list = (version.entries, version.entry_count, version.flags & VersionFlags::INLINE != 0);
            }
            for entry in self.turns(id, list)? {
                backends.insert(entry.backend_id);
                pools.insert(entry.pool);
            }
            state.frontends.push(pinned);
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
                self.backend_stats.write(id.get(), stats)?;
                self.backend_use.write(id.get(), BackendUse::default())?;
                self.failures.word(id.get(), 0)?.store(0, Ordering::SeqCst);
                self.backends.set(id.get(), *backend, 0)?;
            }
            Op::ResetPool(id, limits) => {
                // The reverse order: the epoch of a pool is in its limits, not in its counters.
                self.pools.set(id.get(), *limits, 0)?;
                self.pool_stats.write(id.get(), PoolStats::default())?;
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
            Op::SetEntries(first, entries) => {
                for (i, entry) in (*first..).zip(entries) {
                    self.entries.write(i, *entry)?;
                }
            }
            Op::SetInline(id, entries) => {
                for (i, entry) in entries.iter().enumerate() {
                    let offset = offset_of!(Frontend4, inline) + i * size_of::<Entry>();
                    // A later atomic store publishes the words.
                    for (half, word) in entry.words().into_iter().enumerate() {
                        self.line_word(*id, offset + half * 8)?.store(word, Ordering::Relaxed);
                    }
                }
            }
            Op::SetVersion(index, version) => self.versions.write(index.get(), *version)?,
            Op::ResetFrontend(id, epoch) => {
                // Nothing is published for it until the next write.
                let key = self.line_word(*id, offset_of!(Frontend, key))?.load(Ordering::SeqCst);
                let line = Frontend { key, epoch: *epoch, ..Frontend::default() };
                match id.is_v6() {
                    false => self.frontends4.write(id.index(), Frontend4 { line, ..Frontend4::default() })?,
                    true => self.frontends6.write(id.index(), Frontend6 { line, ..Frontend6::default() })?,
                }
            }
            // Everything reachable from this word is already written.
            Op::Publish(id, published, generation) => {
                self.line_word(*id, offset_of!(Frontend, current))?.store(published.0, Ordering::SeqCst);
                let word = self.line_word(*id, offset_of!(Frontend, epoch))?;
                let epoch = word.load(Ordering::SeqCst) & 0xffff_ffff;
                word.store(epoch | u64::from(generation.get()) << 32, Ordering::SeqCst);
            }
            Op::PassLine(id) => self.write_key(*id, Frontend::REMOVED)?,
            Op::AddFrontend(key, id) => {
                if id.is_v6() {
                    let mut value: Frontend6 = self.frontends6.read(id.index())?;
                    value.key = *key;
                    self.frontends6.write(id.index(), value)?;
                }
                // In this order, and the reverse one below: a frontend whose line has its key can be found.
                if self.is_overflow(*id) {
                    self.frontend_overflow.insert(key.fingerprint(&self.hash.multipliers), id.index(), 0)?;
                }
                self.write_key(*id, key.fingerprint(&self.hash.multipliers))?;
            }
            Op::RemoveFrontend(key, id, is_passed) => {
                self.write_key(*id, if *is_passed { Frontend::REMOVED } else { Frontend::EMPTY })?;
                if self.is_overflow(*id) {
                    self.frontend_overflow.remove(&key.fingerprint(&self.hash.multipliers))?;
                }
            }
        }
        Ok(())
    }

    fn write_key(&self, id: FrontendId, word: u64) -> Result<()> {
        self.line_word(id, offset_of!(Frontend, key))?.store(word, Ordering::SeqCst);
        Ok(())
    }

    fn is_overflow(&self, id: FrontendId) -> bool {
        id.index() >= self.sizes.hashed_frontend_lines()
    }

    /// Returns how many failures of backend `id` the programs have reported, or tried to; it wraps around.
    ///
    /// # Errors
    /// Returns an error if `id` is out of range.
    pub fn failures(&self, id: BackendId) -> Result<u32> {
        Ok(self.failures.word(id.get(), 0)?.load(Ordering::SeqCst) as u32)
    }

    /// Lets the programs stop reporting successes of backend `id`, unless it has failed more often than `failures`.
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
        Ok(FrontendStats::from(&self.line(id)?))
    }

    /// Returns the counters of backend `id`.
    ///
    /// # Errors
    /// Returns an error if `id` is out of range.
    pub fn backend_stats(&self, id: BackendId) -> Result<BackendStats> {
        self.backend_stats.read(id.get())
    }

    /// Returns which network namespaces used backend `id` last, and its HTTP/1 response counts.
    ///
    /// # Errors
    /// Returns an error if `id` is out of range.
    pub fn backend_use(&self, id: BackendId) -> Result<BackendUse> {
        self.backend_use.read(id.get())
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
        self.pool_stats.read(id.get())
    }

    /// Looks up a frontend in the kernel as the programs do: its id, what is published for it, and the number of that
    /// publication.
    /// Returns `None` if it is not there.
    pub fn frontend(&self, key: &FrontendKey) -> Option<(FrontendId, Published, Generation)> {
        let (fingerprint, v6) = (key.fingerprint(&self.hash.multipliers), !key.endpoint().is_v4());
        let (hash, shift) = (Frontend::hash(fingerprint, self.hash.seed), self.sizes.frontend_shift());
        let line = |index| {
            let id = FrontendId::of_line(index, v6);
            Some((id, self.line(id).ok()?))
        };
        let is_it = |(id, line): &(FrontendId, Frontend)| {
            let has_key = || self.frontends6.read::<Frontend6>(id.index()).is_ok_and(|value| value.key == *key);
            line.key == fingerprint && (!v6 || has_key())
        };
        let published =
            |(id, line): (FrontendId, Frontend)| (id, Published(line.current), Generation::new(line.generation));
        for bucket in [Frontend::first_bucket(hash, shift), Frontend::second_bucket(hash, shift)] {
            let lines: Vec<_> = (bucket..bucket + Frontend::BUCKET).filter_map(line).collect();
            if let Some(found) = lines.iter().copied().find(is_it) {
                return Some(published(found));
            }
            if lines.iter().any(|(_, line)| line.key == Frontend::EMPTY) {
                return None;
            }
        }
        let behind = self.frontend_overflow.get(&fingerprint, 0).ok();
        behind.and_then(line).filter(is_it).map(published)
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
