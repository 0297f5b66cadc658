//! The layout of the kernel's maps, and the writes that lead from the current contents to the desired table.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    sync::Arc,
};

use portolan_common::{
    Backend, Endpoint, Frontend, FrontendHash, FrontendKey, FrontendVersion, PoolLimits, Published, PublishedFlags,
    VersionFlags,
};

use super::{
    FrontendSpec, PoolSpec, Table,
    demand::Demand,
    encoding::{Encoder, limits, name},
    frontend_lines::FrontendLines,
    ids::{BackendId, FrontendId, Generation, GraceEpoch, PoolId, VersionIndex},
    kernel_state::{PinnedFrontend, PinnedState},
    ops::{Completeness, Op, Rejected, RemovedEndpoints, Sizes},
    range_alloc::{OutOfCapacity, RangeAllocator},
    refcounted_ids::{Id, RefcountedIds},
};
use crate::{model::Protocol, policy::PoolKey};

/// A frontend as the kernel holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct PlacedFrontend {
    id: FrontendId,
    /// The epoch of its line.
    epoch: u32,
    published: Published,
    /// The active version and its index in `VERSIONS`; `None` if the schedule is a list of endpoints.
    version: Option<(VersionIndex, FrontendVersion)>,
    /// `None` if a previous agent wrote the frontend and its schedule was not read back.
    entry: Option<FrontendSpec>,
    /// Whether a previous agent wrote the frontend and this agent has not replaced it yet.
    adopted: bool,
    runs: (u32, u32),
    /// The last epoch in which programs may have begun to read turns of an earlier version behind the frontend's line.
    inline_until: Option<GraceEpoch>,
}

/// The contents of the kernel's maps, and the index of each item.
#[derive(Clone, Debug)]
pub struct Layout {
    sizes: Sizes,
    frontends: BTreeMap<FrontendKey, PlacedFrontend>,
    lines: FrontendLines,
    entries: RangeAllocator,
    versions: RangeAllocator,
    slots: RangeAllocator,
    runs: RangeAllocator,
    backends: RefcountedIds<SocketAddr, BackendId>,
    /// Entries of `POOLS`, by the hash of the pool's name.
    pools: RefcountedIds<u64, PoolId>,
    /// The limits that the kernel holds, by entry of `POOLS`.
    limits: HashMap<PoolId, PoolLimits>,
    /// The generation of the last published version.
    generation: Generation,
    /// Tags the ranges that the current publication frees.
    /// [`Self::reclaim`] makes them reusable.
    epoch: GraceEpoch,
    /// The last epoch in which a version with turns behind its frontend's line was replaced.
    inline_freed: Option<GraceEpoch>,
    /// The last epoch that has been reclaimed.
    reclaimed: Option<GraceEpoch>,
    /// Frontends whose short lists are not behind their lines, because programs could read an earlier one there.
    displaced: BTreeSet<FrontendKey>,
    /// The endpoints that frontends have lost since the last [`Self::drain_removed`].
    lost: BTreeMap<Protocol, RemovedEndpoints>,
}

impl Layout {
    /// Returns the layout of empty maps.
    pub fn new(sizes: Sizes) -> Self {
        Self::with_hash(sizes, FrontendHash::of_set(0))
    }

    fn with_hash(sizes: Sizes, hash: FrontendHash) -> Self {
        let mut pools = RangeAllocator::new(sizes.pools());
        pools.claim(0, 1);
        Self {
            sizes,
            frontends: BTreeMap::new(),
            lines: FrontendLines::new(&sizes, hash),
            entries: RangeAllocator::new(sizes.slots),
            versions: RangeAllocator::new(sizes.versions()),
            slots: RangeAllocator::new(sizes.slots),
            runs: RangeAllocator::new(sizes.slots),
            backends: RefcountedIds::new(RangeAllocator::new(sizes.backends)),
            pools: RefcountedIds::new(pools),
            limits: HashMap::new(),
            generation: Generation::default(),
            epoch: GraceEpoch::new(1),
            inline_freed: None,
            reclaimed: None,
            displaced: BTreeSet::new(),
            lost: BTreeMap::new(),
        }
    }

    /// Returns the layout of maps that a previous agent has filled.
    /// The adopted frontends stay until the first table is published.
    /// Their backends keep their ids, so open connections stay accounted for.
    pub fn adopt(sizes: Sizes, held: PinnedState) -> Self {
        let mut layout = Self::with_hash(sizes, held.hash);
        for (id, epoch, removed) in held.free_lines {
            layout.lines.restore(id, epoch, removed);
        }
        layout.backends.restore_epochs(held.epochs);
        layout.pools.restore_epochs(held.pool_epochs);
        for (id, backend) in held.backends {
            layout.backends.adopt(backend.endpoint.socket_addr(), id);
        }
        for (id, limits) in held.pools {
            layout.pools.adopt(limits.name, id);
            layout.limits.insert(id, limits);
        }
        for PinnedFrontend { key, id, epoch, published, generation, version, runs } in held.frontends {
            layout.lines.claim(&key, id, epoch);
            layout.generation = layout.generation.max(generation);
            if let Some((index, version)) = &version {
                layout.versions.claim(index.get(), 1);
                layout.slots.claim(version.base, version.period);
                layout.runs.claim(runs.0, runs.1);
            }
            let placed =
                PlacedFrontend { id, epoch, published, version, entry: None, adopted: true, runs, inline_until: None };
            let (first, len) = placed.entries();
            layout.entries.claim(first, len);
            layout.frontends.insert(key, placed);
        }
        layout
    }

    /// Rebuilds the layout from a second read of the same maps, for use when the outcome of the last writes is unknown.
    /// Frontends that this agent has published stay its own.
    /// Deferred ranges become free at once, so no program that started before the read may still be running.
    #[must_use]
    pub fn resync(&self, held: PinnedState) -> Self {
        let mut layout = Self::adopt(self.sizes, held);
        layout.epoch = self.epoch;
        for (key, placed) in &mut layout.frontends {
            placed.adopted = self.frontends.get(key).is_none_or(|before| before.adopted);
        }
        layout
    }

    /// Ends a publication whose writes are done.
    /// Returns the epoch to pass to [`Self::reclaim`] after a grace period, or `None` if the publication freed nothing.
    pub fn end_epoch(&mut self) -> Option<GraceEpoch> {
        let epoch = self.epoch;
        let ranges =
            [&self.entries, &self.versions, &self.slots, &self.runs, self.backends.ranges(), self.pools.ranges()];
        let is_inline = self.inline_freed == Some(epoch);
        if !is_inline && !self.lines.has_deferred(epoch) && !ranges.into_iter().any(|ranges| ranges.has_deferred(epoch))
        {
            return None;
        }
        self.epoch = epoch.next();
        Some(epoch)
    }

    /// Makes everything that was freed up to `epoch` reusable.
    /// Call this once every program that was running when the epoch ended has finished.
    pub fn reclaim(&mut self, epoch: GraceEpoch) {
        self.lines.reclaim(epoch);
        self.reclaimed = self.reclaimed.max(Some(epoch));
        let ranges = [
            &mut self.entries,
            &mut self.versions,
            &mut self.slots,
            &mut self.runs,
            self.backends.ranges_mut(),
            self.pools.ranges_mut(),
        ];
        ranges.into_iter().for_each(|ranges| ranges.reclaim(epoch));
    }

    /// Returns the writes that move short lists back behind the lines of their frontends, as far as no program reads an
    /// earlier one there any longer. Call this after [`Self::reclaim`].
    pub fn move_inline(&mut self) -> Vec<Op> {
        let (mut ops, mut freed) = (Vec::new(), Vec::new());
        for key in std::mem::take(&mut self.displaced) {
            let Some(placed) = self.frontends.get(&key).filter(|placed| !placed.is_inline()) else { continue };
            if placed.inline_until > self.reclaimed {
                self.displaced.insert(key);
                continue;
            }
            let Some(entry) = placed.entry.clone() else { continue };
            if let Ok(moved) = self.place(&key, &entry, &mut ops) {
                freed.extend(self.frontends.insert(key, moved).map(|old| (key, old)));
            }
        }
        for (key, old) in freed {
            self.free(&key, &old, false);
        }
        ops
    }

    /// Returns the number of frontends that are still as a previous agent published them.
    pub fn adopted(&self) -> usize {
        self.frontends.values().filter(|placed| placed.adopted).count()
    }

    /// Returns the id of a frontend, or `None` if the kernel does not have it.
    pub fn frontend_id(&self, key: &FrontendKey) -> Option<FrontendId> {
        self.frontends.get(key).map(|placed| placed.id)
    }

    /// Returns the epoch of a frontend's id, or `None` if the kernel does not have it.
    pub fn frontend_epoch(&self, key: &FrontendKey) -> Option<u32> {
        self.frontends.get(key).map(|placed| placed.epoch)
    }

    /// Returns the backend id of an endpoint, or `None` if no frontend uses it.
    pub fn backend_id(&self, address: &SocketAddr) -> Option<BackendId> {
        self.backends.id(address)
    }

    /// Returns the endpoints of every frontend whose endpoints are known.
    /// Frontends that were read back from the maps are missing until they are written again.
    pub fn endpoints(&self) -> HashMap<FrontendKey, Arc<[SocketAddr]>> {
        let known = self.frontends.iter().filter_map(|(key, placed)| Some((*key, &placed.entry.as_ref()?.endpoints)));
        known.map(|(key, endpoints)| (key, Arc::clone(endpoints))).collect()
    }

    /// Returns the endpoints that frontends have lost since the last call, by protocol, and resets the list.
    pub fn drain_removed(&mut self) -> BTreeMap<Protocol, RemovedEndpoints> {
        std::mem::take(&mut self.lost)
    }

    /// Returns the entry of `POOLS` that holds a pool's limits, and its epoch.
    /// `None` if the pool has no limits.
    pub fn pool(&self, key: &PoolKey) -> Option<(PoolId, u32)> {
        let id = self.pools.id(&name(&key.both_families()))?;
        Some((id, self.limits.get(&id)?.epoch))
    }

    /// Returns every endpoint that has a backend id, with that id, in no particular order.
    pub fn backends(&self) -> impl Iterator<Item = (SocketAddr, BackendId)> {
        self.backends.iter()
    }

    /// Returns, for each map with allocated ranges, its name, the entries in use, and the capacity.
    pub fn occupancy(&self) -> [(&'static str, u32, u32); 7] {
        let of = |name, ranges: &RangeAllocator| (name, ranges.used(), ranges.size());
        [
            ("frontends", self.lines.used(), self.lines.size()),
            of("entries", &self.entries),
            of("versions", &self.versions),
            of("backends", self.backends.ranges()),
            of("slots", &self.slots),
            of("runs", &self.runs),
            of("pools", self.pools.ranges()),
        ]
    }

    /// Returns the capacity of each map.
    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// Returns the writes that lead to `table`, which is the complete desired state, and the frontends that do not fit.
    /// Unchanged frontends cause no writes.
    /// Frontends that are missing from the table are removed; `completeness` limits this for adopted ones.
    pub fn update(&mut self, table: &Table, completeness: Completeness) -> (Vec<Op>, Vec<Rejected>) {
        let complete = completeness == Completeness::Complete;
        let gone: Vec<_> = self.frontends.keys().filter(|key| !table.frontends.contains_key(key)).copied().collect();
        let written = self.change(table, &gone, completeness);
        if complete && self.adopted() == 0 {
            self.backends.drop_adopted(self.epoch);
            self.pools.drop_adopted(self.epoch);
        }
        written
    }

    /// Returns the writes that bring the frontends of `table` to their desired state and remove those in `gone`.
    /// All other frontends stay unchanged.
    pub fn change(
        &mut self,
        table: &Table,
        gone: &[FrontendKey],
        completeness: Completeness,
    ) -> (Vec<Op>, Vec<Rejected>) {
        let (mut ops, mut refused) = (Vec::new(), Vec::new());
        let mut freed = Vec::new();
        let complete = completeness == Completeness::Complete;
        for (key, entry) in &table.frontends {
            if self.frontends.get(key).is_some_and(|placed| placed.entry.as_ref() == Some(entry)) {
                continue;
            }
            let must_keep = |placed: &PlacedFrontend| match completeness {
                Completeness::Complete => false,
                Completeness::Partial => placed.adopted && placed.period() > 0 && entry.schedule.is_empty(),
                Completeness::WithoutSettings => placed.adopted,
            };
            if self.frontends.get(key).is_some_and(must_keep) {
                continue;
            }
            let mut placed = self.place(key, entry, &mut ops);
            if let Err((map, full)) = placed {
                let known = self.frontends.contains_key(key);
                if !known {
                    // A new frontend that does not fit refuses: its connections must not bypass Portolan.
                    placed = self.place(key, &entry.refusing(), &mut ops);
                }
                refused.push(Rejected { key: *key, map, full, held: known || placed.is_ok() });
            }
            if let Ok(placed) = placed {
                freed.extend(self.frontends.insert(*key, placed).map(|old| (*key, old, false)));
            }
        }
        for key in gone {
            // Frontends of a previous agent are removed only once all input is known.
            if self.frontends.get(key).is_some_and(|placed| placed.adopted && !complete) {
                continue;
            }
            if let Some(old) = self.frontends.remove(key) {
                ops.push(Op::RemoveFrontend(*key, old.id, self.lines.remove(key, old.id)));
                freed.push((*key, old, true));
            }
        }
        // Deferred to here: until the writes above are done, the kernel reads the old ranges.
        for (key, old, whole) in freed {
            self.free(&key, &old, whole);
        }
        (ops, refused)
    }

    /// Allocates everything a frontend needs and appends its writes, bottom up: backends, limits, the schedule, and last
    /// the single word that publishes it.
    fn place(
        &mut self,
        key: &FrontendKey,
        entry: &FrontendSpec,
        ops: &mut Vec<Op>,
    ) -> Result<PlacedFrontend, (&'static str, OutOfCapacity)> {
        let before = self.frontends.get(key).map(|placed| (placed.id, placed.epoch));
        let free = match before {
            Some(_) => 0,
            None => self.lines.find_free(key).map_err(|full| ("FRONTENDS", full))?,
        };
        let mut demand = Demand::of(key, entry);
        let inline_until = self.inline_until(key);
        let is_short = !demand.turns.is_empty() && demand.turns.len() <= Frontend::INLINE;
        let is_inline = is_short && inline_until <= self.reclaimed;
        let mut room = self.reserve(&demand, is_inline);
        if matches!(room, Err(("ENTRIES", _))) {
            demand = Demand::in_slots(key, entry);
            room = self.reserve(&demand, false);
        }
        let room = room?;
        let taken = self
            .acquire_backends(entry, ops)
            .and_then(|()| self.acquire_pools(entry, ops).inspect_err(|_| self.unalloc_backends(entry)));
        let pools = match taken {
            Ok(pools) => pools,
            Err(full) => {
                self.release_reservation(&room);
                return Err(full);
            }
        };
        let (id, epoch) = before.unwrap_or_else(|| {
            let placement = self.lines.place(key, free);
            ops.extend(placement.passed.into_iter().map(Op::PassLine));
            ops.push(Op::ResetFrontend(placement.id, placement.epoch));
            (placement.id, placement.epoch)
        });
        let encoder = Encoder { spec: entry, backends: &self.backends, pools: &pools };
        if !demand.turns.is_empty() {
            let entries = encoder.entries(&demand.turns);
            ops.push(if is_inline { Op::SetInline(id, entries) } else { Op::SetEntries(room.entries.0, entries) });
        }
        let mut flags = if entry.is_strict() { PublishedFlags::STRICT } else { 0 };
        let (mut version, mut runs) = (None, (0, 0));
        let published = match &demand.version {
            None => {
                flags |= if is_inline { PublishedFlags::INLINE } else { 0 };
                Published::new(room.entries.0, demand.turns.len() as u16, flags)
            }
            Some(needed) => {
                let starts = (room.slots.0, room.runs.0);
                let mut detailed = encoder.version(&needed.live, !demand.turns.is_empty(), starts);
                if !detailed.runs.is_empty() {
                    ops.push(Op::SetRuns(room.runs.0, detailed.runs));
                }
                if !detailed.slots.is_empty() {
                    ops.push(Op::SetSlots(room.slots.0, detailed.slots));
                }
                let own = &mut detailed.version;
                (own.entries, own.entry_count) = (room.entries.0, demand.turns.len() as u32);
                own.flags |= if is_inline { VersionFlags::INLINE } else { 0 };
                let index = VersionIndex::new(room.version.0);
                ops.push(Op::SetVersion(index, *own));
                let period = own.period.max(own.entry_count) as u16;
                version = Some((index, *own));
                runs = room.runs;
                Published::new(index.get(), period, flags | PublishedFlags::DETAILED)
            }
        };
        self.generation = self.generation.next();
        ops.push(Op::Publish(id, published, self.generation));
        if before.is_none() {
            ops.push(Op::AddFrontend(*key, id));
        }
        if is_short && !is_inline {
            self.displaced.insert(*key);
        }
        let entry = Some(entry.clone());
        Ok(PlacedFrontend { id, epoch, published, version, entry, adopted: false, runs, inline_until })
    }

    /// Returns the last epoch in which programs may have begun to read turns behind a frontend's line, once its current
    /// version is replaced.
    fn inline_until(&self, key: &FrontendKey) -> Option<GraceEpoch> {
        let placed = self.frontends.get(key)?;
        if placed.is_inline() { Some(self.epoch) } else { placed.inline_until }
    }

    /// Allocates the ranges that belong to one frontend alone; its turns need none if they are `inline`.
    /// Allocates nothing if one of them does not fit.
    fn reserve(&mut self, demand: &Demand, inline: bool) -> Result<Reservation, (&'static str, OutOfCapacity)> {
        let mut room = Reservation::default();
        let fits = self.take_ranges(demand, inline, &mut room);
        if fits.is_err() {
            self.release_reservation(&room);
        }
        fits.map(|()| room)
    }

    fn take_ranges(
        &mut self,
        demand: &Demand,
        inline: bool,
        room: &mut Reservation,
    ) -> Result<(), (&'static str, OutOfCapacity)> {
        let take = |ranges: &mut RangeAllocator, len, map| match len {
            0 => Ok((0, 0)),
            len => ranges.alloc(len).map(|first| (first, len)).map_err(|full| (map, full)),
        };
        room.entries = take(&mut self.entries, if inline { 0 } else { demand.turns.len() as u32 }, "ENTRIES")?;
        if let Some(needed) = &demand.version {
            room.version = take(&mut self.versions, 1, "VERSIONS")?;
            room.slots = take(&mut self.slots, needed.period, "SLOTS")?;
            room.runs = take(&mut self.runs, needed.run_entries, "RUNS")?;
        }
        Ok(())
    }

    fn release_reservation(&mut self, room: &Reservation) {
        let ranges = [
            (&mut self.entries, room.entries),
            (&mut self.versions, room.version),
            (&mut self.slots, room.slots),
            (&mut self.runs, room.runs),
        ];
        for (ranges, (first, len)) in ranges.into_iter().filter(|(_, (_, len))| *len > 0) {
            ranges.unalloc(first, len);
        }
    }

    /// Acquires a backend id for every endpoint of an entry.
    /// Acquires none if one does not fit.
    fn acquire_backends(
        &mut self,
        entry: &FrontendSpec,
        ops: &mut Vec<Op>,
    ) -> Result<(), (&'static str, OutOfCapacity)> {
        for (i, member) in entry.endpoints.iter().enumerate() {
            match self.backends.acquire(*member) {
                Ok(Id { id, epoch, is_new: true }) => {
                    ops.push(Op::SetBackend(id, Backend { endpoint: Endpoint::from(*member), epoch }));
                }
                Ok(_) => {}
                Err(full) => {
                    entry.endpoints[..i].iter().for_each(|member| self.backends.unalloc(*member));
                    return Err(("BACKENDS", full));
                }
            }
        }
        Ok(())
    }

    fn unalloc_backends(&mut self, entry: &FrontendSpec) {
        entry.endpoints.iter().for_each(|member| self.backends.unalloc(*member));
    }

    fn release_backends(&mut self, entry: &FrontendSpec) {
        entry.endpoints.iter().for_each(|member| self.backends.release(self.epoch, *member));
    }

    /// Acquires an entry of `POOLS` for each pool of a frontend; 0 stands for a pool without limits.
    fn acquire_pools(
        &mut self,
        entry: &FrontendSpec,
        ops: &mut Vec<Op>,
    ) -> Result<Vec<PoolId>, (&'static str, OutOfCapacity)> {
        // All or nothing: a frontend that does not fit must not change any limit.
        let mut places = Vec::with_capacity(entry.pools.len());
        for (i, pool) in entry.pools.iter().enumerate() {
            match pool.has_limits().then(|| self.pools.acquire(name(&pool.key))).transpose() {
                Ok(place) => places.push(place),
                Err(full) => {
                    let before = entry.pools[..i].iter().filter(|pool| pool.has_limits());
                    before.for_each(|pool| self.pools.unalloc(name(&pool.key)));
                    return Err(("POOLS", full));
                }
            }
        }
        let mut ids = Vec::with_capacity(places.len());
        for (pool, place) in entry.pools.iter().zip(places) {
            let Some(place) = place else {
                ids.push(PoolId::NONE);
                continue;
            };
            let wanted = limits(pool, place.epoch);
            let known = self.limits.insert(place.id, wanted);
            if place.is_new {
                ops.push(Op::ResetPool(place.id, wanted));
            } else if known != Some(wanted) {
                // Each limit is a separate word and takes effect as soon as it is written.
                ops.push(Op::SetPool(place.id, wanted));
            }
            ids.push(place.id);
        }
        Ok(ids)
    }

    fn release_pools(&mut self, pools: &[PoolSpec]) {
        for pool in pools.iter().filter(|pool| pool.has_limits()) {
            self.pools.release(self.epoch, name(&pool.key));
        }
    }

    fn free(&mut self, key: &FrontendKey, old: &PlacedFrontend, whole: bool) {
        let epoch = self.epoch;
        let now = self.frontends.get(key).and_then(|placed| placed.entry.as_ref());
        let has = |member: &SocketAddr| now.is_some_and(|entry| entry.endpoints.binary_search(member).is_ok());
        let protocol = if key.protocol() == Protocol::Udp.number() { Protocol::Udp } else { Protocol::Tcp };
        let lost = old.entry.as_ref().map(|entry| entry.endpoints.iter().filter(|it| !has(it)).copied().collect());
        match lost.map_or(RemovedEndpoints::Any, RemovedEndpoints::These) {
            RemovedEndpoints::These(none) if none.is_empty() => {}
            lost => self.lost.entry(protocol).or_default().add(lost),
        }
        if let Some((index, version)) = &old.version {
            self.slots.defer_free(epoch, version.base, version.period);
            self.runs.defer_free(epoch, old.runs.0, old.runs.1);
            self.versions.defer_free(epoch, index.get(), 1);
        }
        if old.is_inline() {
            self.inline_freed = Some(epoch);
        }
        let (first, len) = old.entries();
        self.entries.defer_free(epoch, first, len);
        if whole {
            self.lines.defer_free(epoch, old.id);
        }
        if let Some(entry) = &old.entry {
            self.release_backends(entry);
            self.release_pools(&entry.pools);
        }
    }
}

impl PlacedFrontend {
    /// Returns the number of turns, or of slots; 0 if the frontend refuses all connections.
    fn period(&self) -> u32 {
        self.published.period()
    }

    /// Returns whether its turns are behind its line.
    fn is_inline(&self) -> bool {
        match &self.version {
            Some((_, version)) => version.flags & VersionFlags::INLINE != 0,
            None => self.published.has(PublishedFlags::INLINE),
        }
    }

    /// Returns the range of `ENTRIES` that it uses: first entry and number of entries.
    fn entries(&self) -> (u32, u32) {
        match &self.version {
            _ if self.is_inline() => (0, 0),
            Some((_, version)) => (version.entries, version.entry_count),
            None => (self.published.base(), self.published.period()),
        }
    }
}

/// The ranges that belong to one frontend alone: first entry and number of entries.
#[derive(Default)]
struct Reservation {
    entries: (u32, u32),
    version: (u32, u32),
    slots: (u32, u32),
    runs: (u32, u32),
}

#[cfg(test)]
mod tests;
