//! The maps: written in the order that the table gives, read for what people and metrics ask.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};
use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, MapData, MapInfo, PerCpuArray},
};
use portolan_common::{Backend, BackendStats, Counter, Frontend, FrontendKey, FrontendStats, Slot};

use super::Pins;
use crate::table::{Held, Op, Sizes};

/// Maps that outlive the agent.
pub(super) const PINNED: [&str; 10] = [
    "FRONTENDS",
    "SLOTS",
    "RUNS",
    "BACKENDS",
    "FRONTEND_STATS",
    "BACKEND_STATS",
    "TROUBLED",
    "SOCKETS",
    "EVENTS",
    "COUNTERS",
];

/// Entries of the maps whose size is a setting.
pub(super) fn sizes(sizes: Sizes) -> [(&'static str, u32); 7] {
    [
        ("FRONTENDS", sizes.frontends),
        ("FRONTEND_STATS", sizes.frontends),
        ("BACKENDS", sizes.backends),
        ("BACKEND_STATS", sizes.backends),
        ("TROUBLED", sizes.backends),
        ("SLOTS", sizes.slots),
        ("RUNS", sizes.slots),
    ]
}

/// A pinned map is reused as it is, whatever its layout. So it is compared before.
pub(super) fn check_pinned(pins: &Pins, wanted: Sizes) -> Result<()> {
    let key_and_value = BTreeMap::from([
        ("FRONTENDS", (size_of::<FrontendKey>(), size_of::<Frontend>())),
        ("FRONTEND_STATS", (4, size_of::<FrontendStats>())),
        ("BACKENDS", (4, size_of::<Backend>())),
        ("BACKEND_STATS", (4, size_of::<BackendStats>())),
        ("TROUBLED", (4, size_of::<u32>())),
        ("SLOTS", (4, size_of::<Slot>())),
        ("RUNS", (4, size_of::<u32>())),
    ]);
    for (name, entries) in sizes(wanted) {
        let pin = pins.map(name);
        if !pin.exists() {
            continue;
        }
        let info = MapInfo::from_pin(&pin).with_context(|| format!("cannot open {}", pin.display()))?;
        let (key, value) = key_and_value[name];
        if (info.key_size(), info.value_size(), info.max_entries()) != (key as u32, value as u32, entries) {
            bail!(
                "{} has another layout (key {}, value {}, entries {}) than this version (key {key}, value {value}, entries {entries}); \
                 use the version that made it, or run: portolan cleanup",
                pin.display(),
                info.key_size(),
                info.value_size(),
                info.max_entries()
            );
        }
    }
    Ok(())
}

/// Totals over all CPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Outcomes that found the ring buffer full.
    pub events_lost: u64,
    /// Connections refused because the table contradicted itself.
    pub inconsistent: u64,
}

/// The maps that the agent reads and writes.
pub struct Maps {
    frontends: HashMap<MapData, FrontendKey, Frontend>,
    slots: Array<MapData, Slot>,
    runs: Array<MapData, u32>,
    backends: Array<MapData, Backend>,
    frontend_stats: Array<MapData, FrontendStats>,
    backend_stats: Array<MapData, BackendStats>,
    troubled: Array<MapData, u32>,
    counters: PerCpuArray<MapData, u64>,
}

impl Maps {
    pub(super) fn open(bpf: &mut Ebpf, sizes: Sizes) -> Result<(Self, Held)> {
        let maps = Self {
            frontends: HashMap::try_from(take(bpf, "FRONTENDS")?)?,
            slots: array(bpf, "SLOTS")?,
            runs: array(bpf, "RUNS")?,
            backends: array(bpf, "BACKENDS")?,
            frontend_stats: array(bpf, "FRONTEND_STATS")?,
            backend_stats: array(bpf, "BACKEND_STATS")?,
            troubled: array(bpf, "TROUBLED")?,
            counters: PerCpuArray::try_from(take(bpf, "COUNTERS")?)?,
        };
        let held = maps.held(sizes).context("cannot read what a former agent left")?;
        Ok((maps, held))
    }

    /// What a former agent left: its frontends, the places that they use, and the backends behind them.
    ///
    /// # Errors
    /// The kernel does not let a map be read.
    pub fn held(&self, sizes: Sizes) -> Result<Held> {
        let mut held = Held::default();
        let mut backends = BTreeMap::new();
        for entry in self.frontends.iter() {
            let (key, frontend) = entry?;
            let (mut first, mut end) = (u32::MAX, 0);
            for i in frontend.base..frontend.base.saturating_add(frontend.period).min(sizes.slots) {
                let slot = self.slots.get(&i, 0)?;
                first = first.min(slot.first);
                end = end.max(slot.first.saturating_add(slot.len));
            }
            let runs = if end == 0 { (0, 0) } else { (first, end.min(sizes.slots) - first) };
            for i in runs.0..runs.0 + runs.1 {
                let id = self.runs.get(&i, 0)?;
                if id < sizes.backends {
                    backends.insert(id, self.backends.get(&id, 0)?);
                }
            }
            held.frontends.push((key, frontend, runs));
        }
        held.backends = backends.into_iter().collect();
        for (id, backend) in (0..sizes.backends).zip(self.backends.iter()) {
            let epoch = backend?.epoch;
            if epoch > 0 {
                held.epochs.push((id, epoch));
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
                self.troubled.set(*id, 0, 0)?;
                self.backends.set(*id, *backend, 0)?;
            }
            Op::SetRuns(first, ids) => {
                for (i, id) in (*first..).zip(ids) {
                    self.runs.set(i, *id, 0)?;
                }
            }
            Op::SetSlots(first, slots) => {
                for (i, slot) in (*first..).zip(slots) {
                    self.slots.set(i, *slot, 0)?;
                }
            }
            Op::ResetFrontend(id) => self.frontend_stats.set(*id, FrontendStats::default(), 0)?,
            Op::SetFrontend(key, frontend) => self.frontends.insert(*key, *frontend, 0)?,
            Op::RemoveFrontend(key) => self.frontends.remove(key)?,
        }
        Ok(())
    }

    /// Whether successes of a backend must be told.
    ///
    /// # Errors
    /// There is no such id.
    pub fn set_troubled(&mut self, id: u32, troubled: bool) -> Result<()> {
        Ok(self.troubled.set(id, u32::from(troubled), 0)?)
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

    /// The frontend as the kernel holds it now.
    pub fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        self.frontends.get(key, 0).ok()
    }

    /// Totals over all CPUs.
    ///
    /// # Errors
    /// The kernel does not let the map be read.
    pub fn counters(&self) -> Result<Counters> {
        let total = |counter: Counter| -> Result<u64> { Ok(self.counters.get(&(counter as u32), 0)?.iter().sum()) };
        Ok(Counters { events_lost: total(Counter::EventsLost)?, inconsistent: total(Counter::Inconsistent)? })
    }
}

fn take(bpf: &mut Ebpf, name: &str) -> Result<aya::maps::Map> {
    bpf.take_map(name).with_context(|| format!("the embedded object has no map {name}"))
}

fn array<V: Pod>(bpf: &mut Ebpf, name: &str) -> Result<Array<MapData, V>> {
    Ok(Array::try_from(take(bpf, name)?)?)
}
