//! Where things lie in the kernel's maps, and the writes from what is there to what is wanted.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use portolan_common::{Backend, Endpoint, Frontend, FrontendKey, Slot};

use super::{
    Entry, Table,
    alloc::{Full, Ranges},
};

/// One write to the kernel's maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// A backend id gets an endpoint, and counters at zero.
    SetBackend(u32, Backend),
    /// Backend ids of runs, from this entry on.
    SetRuns(u32, Vec<u32>),
    /// Slots of a schedule, from this entry on.
    SetSlots(u32, Vec<Slot>),
    /// A frontend id's cursor and counters start at zero.
    ResetFrontend(u32),
    /// Publishes a frontend: from here on connections use it.
    SetFrontend(FrontendKey, Frontend),
    /// Takes a frontend away: its address is nobody's any more.
    RemoveFrontend(FrontendKey),
}

/// How many entries the maps have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Frontends.
    pub frontends: u32,
    /// Backends.
    pub backends: u32,
    /// Slots; runs have as many entries.
    pub slots: u32,
}

impl Default for Sizes {
    /// For 10,000 services and 100,000 endpoints, with room for a change: what is new is written before what is old goes.
    fn default() -> Self {
        Self { frontends: 1 << 14, backends: 1 << 17, slots: 1 << 20 }
    }
}

/// How much is known of what should be. It matters for what a former agent has published, while this one has not read everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Knowledge {
    /// Everything: the table is the truth.
    Complete,
    /// Some services or endpoints are not known: what the former agent has published is not removed, and where it has published somebody,
    /// nobody does not take the place.
    Partial,
    /// The settings that say what must stay in its cluster are not known either: what the former agent has published stays as it is.
    WithoutSettings,
}

/// A frontend that does not fit: it stays as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Which one.
    pub key: FrontendKey,
    /// The map that is full.
    pub map: &'static str,
    /// By how much.
    pub full: Full,
}

/// A frontend as the kernel holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Placed {
    frontend: Frontend,
    /// `None` where a former agent wrote it and its schedule was not read back.
    entry: Option<Entry>,
    /// Whether a former agent wrote it, and this one has not since.
    inherited: bool,
    runs: (u32, u32),
}

/// What a former agent left in the maps.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// Its frontends, each with the range of runs that it uses.
    pub frontends: Vec<(FrontendKey, Frontend, (u32, u32))>,
    /// Backends that these frontends use.
    pub backends: Vec<(u32, Backend)>,
    /// The last epoch of every backend id that was ever given out.
    pub epochs: Vec<(u32, u32)>,
}

/// What the kernel holds, and where.
#[derive(Clone, Debug)]
pub struct Layout {
    sizes: Sizes,
    frontends: BTreeMap<FrontendKey, Placed>,
    frontend_ids: Ranges,
    slots: Ranges,
    runs: Ranges,
    backend_ids: Ranges,
    backends: HashMap<SocketAddr, BackendUse>,
    /// Endpoints of a former agent that no frontend uses yet.
    inherited: BTreeSet<SocketAddr>,
    /// The last epoch of each backend id that was ever in use.
    epochs: HashMap<u32, u32>,
}

#[derive(Clone, Copy, Debug)]
struct BackendUse {
    id: u32,
    frontends: u32,
}

impl Layout {
    /// Empty maps.
    pub fn new(sizes: Sizes) -> Self {
        Self {
            sizes,
            frontends: BTreeMap::new(),
            frontend_ids: Ranges::new(sizes.frontends),
            slots: Ranges::new(sizes.slots),
            runs: Ranges::new(sizes.slots),
            backend_ids: Ranges::new(sizes.backends),
            backends: HashMap::new(),
            inherited: BTreeSet::new(),
            epochs: HashMap::new(),
        }
    }

    /// Maps that a former agent has filled. Its frontends stay until the first table is published, and their backends keep
    /// their ids, so that open connections go on being counted.
    pub fn from_held(sizes: Sizes, held: Held) -> Self {
        let mut layout = Self::new(sizes);
        layout.epochs.extend(held.epochs);
        for (id, backend) in held.backends {
            layout.backend_ids.claim(id, 1);
            let address = backend.endpoint.socket_addr();
            layout.backends.insert(address, BackendUse { id, frontends: 0 });
            layout.inherited.insert(address);
        }
        for (key, frontend, runs) in held.frontends {
            layout.frontend_ids.claim(frontend.id, 1);
            layout.slots.claim(frontend.base, frontend.period);
            layout.runs.claim(runs.0, runs.1);
            layout.frontends.insert(key, Placed { frontend, entry: None, inherited: true, runs });
        }
        layout
    }

    /// The same maps, read once more, for what was written last is not known. What this agent has published is its own still.
    #[must_use]
    pub fn read_again(&self, held: Held) -> Self {
        let mut layout = Self::from_held(self.sizes, held);
        for (key, placed) in &mut layout.frontends {
            placed.inherited = self.frontends.get(key).is_none_or(|before| before.inherited);
        }
        layout
    }

    /// How many frontends are still as a former agent has published them.
    pub fn inherited(&self) -> usize {
        self.frontends.values().filter(|placed| placed.inherited).count()
    }

    /// The id of a frontend.
    pub fn frontend_id(&self, key: &FrontendKey) -> Option<u32> {
        self.frontends.get(key).map(|placed| placed.frontend.id)
    }

    /// The backend id of an endpoint.
    pub fn backend_id(&self, address: &SocketAddr) -> Option<u32> {
        self.backends.get(address).map(|backend| backend.id)
    }

    /// The endpoints that have a backend id.
    pub fn backends(&self) -> impl Iterator<Item = (SocketAddr, u32)> {
        self.backends.iter().map(|(address, backend)| (*address, backend.id))
    }

    /// Entries in use, by map.
    pub fn used(&self) -> Sizes {
        Sizes {
            frontends: self.frontend_ids.used(),
            backends: self.backend_ids.used(),
            slots: self.slots.used().max(self.runs.used()),
        }
    }

    /// Entries that there are, by map.
    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// The writes that lead to `table`, which is all there shall be. Frontends that stay as they are cost none. Those that the table does
    /// not have are removed; how far that goes for what a former agent has published, `knowledge` says.
    pub fn update(&mut self, now: Instant, table: &Table, knowledge: Knowledge) -> (Vec<Op>, Vec<Refused>) {
        let complete = knowledge == Knowledge::Complete;
        let gone: Vec<_> = self.frontends.keys().filter(|key| !table.frontends.contains_key(key)).copied().collect();
        let written = self.change(now, table, &gone, knowledge);
        if complete && self.inherited() == 0 {
            for address in std::mem::take(&mut self.inherited) {
                self.drop_if_unused(now, &address);
            }
        }
        written
    }

    /// The writes that bring these frontends to what `table` says, and take the `gone` ones away. All others stay.
    pub fn change(
        &mut self,
        now: Instant,
        table: &Table,
        gone: &[FrontendKey],
        knowledge: Knowledge,
    ) -> (Vec<Op>, Vec<Refused>) {
        let (mut ops, mut refused) = (Vec::new(), Vec::new());
        let mut freed = Vec::new();
        let complete = knowledge == Knowledge::Complete;
        for (key, entry) in &table.frontends {
            if self.frontends.get(key).is_some_and(|placed| placed.entry.as_ref() == Some(entry)) {
                continue;
            }
            let kept = |placed: &Placed| match knowledge {
                Knowledge::Complete => false,
                Knowledge::Partial => placed.inherited && placed.frontend.period > 0 && entry.schedule.is_empty(),
                Knowledge::WithoutSettings => placed.inherited,
            };
            if self.frontends.get(key).is_some_and(kept) {
                continue;
            }
            let mut placed = self.place(now, key, entry, &mut ops);
            if let Err((map, full)) = placed {
                refused.push(Refused { key: *key, map, full });
                if self.frontends.contains_key(key) {
                    continue;
                }
                // A new one that does not fit refuses: its connections must not go past Portolan to somewhere else.
                let nobody = Entry { schedule: Arc::default(), endpoints: Arc::default(), connect_timeout: None };
                placed = self.place(now, key, &nobody, &mut ops);
            }
            if let Ok(placed) = placed {
                freed.extend(self.frontends.insert(*key, placed).map(|old| (old, false)));
            }
        }
        for key in gone {
            // What a former agent has published is removed only by one who knows everything.
            if self.frontends.get(key).is_some_and(|placed| placed.inherited && !complete) {
                continue;
            }
            if let Some(old) = self.frontends.remove(key) {
                ops.push(Op::RemoveFrontend(*key));
                freed.push((old, true));
            }
        }
        // Only now: until the writes above are done, the kernel reads the old places.
        for (old, whole) in freed {
            self.free(now, &old, whole);
        }
        (ops, refused)
    }

    /// Finds room for a frontend and adds its writes, from the bottom up: backends, runs, slots, and last the one value that
    /// publishes them.
    fn place(
        &mut self,
        now: Instant,
        key: &FrontendKey,
        entry: &Entry,
        ops: &mut Vec<Op>,
    ) -> Result<Placed, (&'static str, Full)> {
        let schedule = &entry.schedule;
        let run_entries = schedule.runs.iter().map(|run| run.members.len() as u32).sum();
        let period = schedule.turns.len() as u32;
        let before = self.frontends.get(key).map(|placed| placed.frontend);
        let id = match before {
            Some(frontend) => frontend.id,
            None => self.frontend_ids.take(now, 1).map_err(|full| ("FRONTENDS", full))?,
        };
        // What a failure further on has to give back.
        let room = (|| {
            let slots = if period == 0 { 0 } else { self.slots.take(now, period).map_err(|full| ("SLOTS", full))? };
            let runs = match run_entries {
                0 => Ok(0),
                _ => self.runs.take(now, run_entries).map_err(|full| ("RUNS", full)),
            };
            runs.map(|runs| (slots, runs)).inspect_err(|_| self.slots.untake(slots, period))
        })();
        let placed = room.and_then(|(base, runs)| {
            self.take_backends(now, entry, ops).map(|()| (base, runs)).inspect_err(|_| {
                self.slots.untake(base, period);
                self.runs.untake(runs, run_entries);
            })
        });
        let (base, runs) = placed.inspect_err(|_| {
            if before.is_none() {
                self.frontend_ids.untake(id, 1);
            }
        })?;

        let mut first = runs;
        let mut slots_of = Vec::with_capacity(schedule.runs.len());
        let mut ids = Vec::with_capacity(run_entries as usize);
        for run in &schedule.runs {
            let len = run.members.len() as u32;
            slots_of.push(Slot { first, len, visits: run.visits, visit: 0 });
            ids.extend(run.members.iter().filter_map(|member| self.backend_id(member)));
            first += len;
        }
        let slots: Vec<Slot> =
            schedule.turns.iter().map(|turn| Slot { visit: turn.visit, ..slots_of[turn.run as usize] }).collect();
        let frontend = Frontend {
            id,
            base,
            period,
            generation: before.map_or(1, |frontend| frontend.generation.wrapping_add(1)),
            connect_timeout_ms: entry.connect_timeout.map_or(0, milliseconds),
            reserved: 0,
        };
        if before.is_none() {
            ops.push(Op::ResetFrontend(id));
        }
        if period > 0 {
            if run_entries > 0 {
                ops.push(Op::SetRuns(runs, ids));
            }
            ops.push(Op::SetSlots(base, slots));
        }
        ops.push(Op::SetFrontend(*key, frontend));
        Ok(Placed { frontend, entry: Some(entry.clone()), inherited: false, runs: (runs, run_entries) })
    }

    /// Ids for all endpoints of an entry, each used once more by it.
    fn take_backends(&mut self, now: Instant, entry: &Entry, ops: &mut Vec<Op>) -> Result<(), (&'static str, Full)> {
        let members = &entry.endpoints;
        let missing = members.iter().filter(|member| !self.backends.contains_key(member)).count() as u32;
        let mut fresh = Vec::new();
        for _ in 0..missing {
            match self.backend_ids.take(now, 1) {
                Ok(id) => fresh.push(id),
                Err(full) => {
                    fresh.into_iter().for_each(|id| self.backend_ids.untake(id, 1));
                    return Err(("BACKENDS", full));
                }
            }
        }
        for member in members.iter() {
            let epochs = &mut self.epochs;
            let backend = self.backends.entry(*member).or_insert_with(|| {
                let id = fresh.pop().unwrap_or_default();
                let epoch = epochs.entry(id).and_modify(|epoch| *epoch = epoch.wrapping_add(1)).or_insert(1);
                ops.push(Op::SetBackend(id, Backend { endpoint: Endpoint::from(*member), epoch: *epoch }));
                BackendUse { id, frontends: 0 }
            });
            backend.frontends += 1;
        }
        Ok(())
    }

    fn free(&mut self, now: Instant, old: &Placed, whole: bool) {
        self.slots.release(now, old.frontend.base, old.frontend.period);
        self.runs.release(now, old.runs.0, old.runs.1);
        if whole {
            self.frontend_ids.release(now, old.frontend.id, 1);
        }
        for address in old.entry.iter().flat_map(|entry| entry.endpoints.iter()) {
            if let Some(backend) = self.backends.get_mut(address) {
                backend.frontends -= 1;
            }
            self.drop_if_unused(now, address);
        }
    }

    fn drop_if_unused(&mut self, now: Instant, address: &SocketAddr) {
        // An inherited frontend may use it, and how is not known.
        if self.inherited.contains(address) {
            return;
        }
        if let Some(backend) = self.backends.get(address).copied().filter(|backend| backend.frontends == 0) {
            self.backends.remove(address);
            self.backend_ids.release(now, backend.id, 1);
        }
    }
}

/// As much of it as a socket option takes.
fn milliseconds(limit: Duration) -> u32 {
    u32::try_from(limit.as_millis()).unwrap_or(u32::MAX).min(i32::MAX as u32)
}

#[cfg(test)]
mod tests;
