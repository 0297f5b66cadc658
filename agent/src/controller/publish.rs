//! Publishing: from the desired table to writes, what does not fit, what fails, and when to try again.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use portolan_common::FrontendKey;
use portolan_core::{
    model::{Code, Finding, ObjectRef},
    table::{Completeness, GraceEpoch, Layout, Op, PinnedState, Rejected, Sizes, Table},
};

use super::now::Now;
use crate::kernel::Kernel;

/// The delay before a failed publication is retried; it doubles with each failure.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// The longest such delay.
const LAST_RETRY: Duration = Duration::from_secs(60);
/// A map that is this full, in percent, is reported.
const NEARLY_FULL_PERCENT: u64 = 90;

/// What the kernel is to hold.
#[derive(Debug, Default)]
pub(super) struct Desired {
    /// All frontends, or those that changed.
    pub(super) table: Table,
    /// Frontends to remove, where the table does not hold all.
    pub(super) removed: Vec<FrontendKey>,
    /// Whether the table holds all frontends.
    pub(super) full: bool,
    /// How much of the input was read.
    pub(super) completeness: Completeness,
}

/// Leads the kernel's maps to the desired table.
#[derive(Debug)]
pub(super) struct Publisher {
    layout: Layout,
    /// How complete the input was at the last publication; `None` if the next one has to compare the full table.
    completeness: Option<Completeness>,
    /// Frontends that did not fit.
    rejected: BTreeMap<FrontendKey, Finding>,
    /// Whether some of them are not in the kernel at all, so that their connections bypass Portolan.
    bypassing: bool,
    /// What went wrong in the last publication.
    write_errors: Vec<Finding>,
    nearly_full: Vec<Finding>,
    retry_at: Option<Instant>,
    retry_delay: Duration,
    /// Whether a grace period has elapsed since lists were last moved.
    moves_lists: bool,
}

impl Publisher {
    /// Adopts what a previous agent left in the maps.
    pub(super) fn new(sizes: Sizes, pinned: PinnedState) -> Self {
        Self {
            layout: Layout::adopt(sizes, pinned),
            completeness: None,
            rejected: BTreeMap::new(),
            bypassing: false,
            write_errors: Vec::new(),
            nearly_full: Vec::new(),
            retry_at: None,
            retry_delay: FIRST_RETRY,
            moves_lists: false,
        }
    }

    /// Returns what the kernel holds, and where.
    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Returns the layout, to take the removed endpoints out of it.
    pub(super) fn layout_mut(&mut self) -> &mut Layout {
        &mut self.layout
    }

    /// Reports whether the next publication has to compare the full table, and not only what changed.
    pub(super) fn needs_full_table(&self, completeness: Completeness) -> bool {
        self.completeness != Some(completeness)
    }

    /// Reports whether connections to some frontends bypass Portolan, because they do not fit.
    pub(super) fn is_bypassing(&self) -> bool {
        self.bypassing
    }

    /// Returns what did not fit, and what the kernel refused, in the last publication.
    pub(super) fn write_errors(&self) -> &[Finding] {
        &self.write_errors
    }

    /// Returns all findings about the maps.
    pub(super) fn findings(&self) -> impl Iterator<Item = &Finding> {
        self.write_errors.iter().chain(&self.nearly_full)
    }

    /// Computes the writes that lead to the desired table. They must be committed before the next plan.
    ///
    /// `own` is the table of the self-probe, which does not depend on the input.
    pub(super) fn plan(&mut self, own: &Table, desired: &Desired) -> Vec<Op> {
        let Desired { table, removed, full, completeness } = desired;
        let (mut ops, _) = self.layout.change(own, &[], Completeness::Complete);
        let (rest, rejected) = if *full {
            self.layout.update(table, *completeness)
        } else {
            self.layout.change(table, removed, *completeness)
        };
        ops.extend(rest);
        self.completeness = Some(*completeness);
        if *full {
            self.rejected.clear();
        }
        self.rejected.retain(|key, _| !table.frontends.contains_key(key) && !removed.contains(key));
        let still_bypassing = self.bypassing && !full && !self.rejected.is_empty();
        self.bypassing = still_bypassing || rejected.iter().any(|rejected| !rejected.held);
        self.rejected.extend(rejected.iter().map(|rejected| (rejected.key, does_not_fit(rejected))));
        self.write_errors = self.rejected.values().cloned().collect();
        ops
    }

    /// Does the planned writes. If one fails, the maps are read again and the full table is retried later.
    ///
    /// # Errors
    /// Returns an error if a write failed and the maps cannot be read: then what the kernel holds is unknown.
    pub(super) fn commit(&mut self, now: Now, ops: &[Op], kernel: &mut impl Kernel) -> portolan_datapath::Result<()> {
        if let Err(error) = kernel.apply(ops) {
            let message = format!("{error:#}; the agent retries");
            self.write_errors.push(Finding::new(Code::KernelWrite, ObjectRef::global("Kernel", ""), message));
            // Which writes were done is unknown. Once no program reads what they replaced, the maps tell.
            kernel.wait_for_readers();
            self.layout = self.layout.resync(kernel.read_back(self.layout.sizes())?);
            self.completeness = None;
        }
        if let Some(epoch) = self.layout.end_epoch() {
            kernel.begin_grace_period(epoch);
        }
        self.nearly_full = nearly_full(&self.layout);
        if self.write_errors.is_empty() {
            (self.retry_at, self.retry_delay) = (None, FIRST_RETRY);
        } else if self.retry_at.is_none() {
            self.retry_at = Some(now.instant + self.retry_delay);
            self.retry_delay = (self.retry_delay * 2).min(LAST_RETRY);
        }
        Ok(())
    }

    /// Returns when [`Self::handle_timeout`] wants to be called.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Reports whether a retry is due; then the next publication compares the full table.
    pub(super) fn handle_timeout(&mut self, now: Now) -> bool {
        let due = self.retry_at.take_if(|at| *at <= now.instant).is_some();
        if due {
            self.completeness = None;
        }
        due
    }

    /// Makes what this epoch freed available; reports whether findings change, or a frontend that did not fit may fit now.
    pub(super) fn on_grace_elapsed(&mut self, epoch: GraceEpoch) -> bool {
        self.layout.reclaim(epoch);
        self.moves_lists = true;
        let before = std::mem::replace(&mut self.nearly_full, nearly_full(&self.layout));
        let waiting = !self.rejected.is_empty() && self.retry_at.take().is_some();
        if waiting {
            self.completeness = None;
        }
        waiting || before != self.nearly_full
    }

    /// Moves short lists of endpoints behind the lines of their frontends, if a grace period has made room there.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub(super) fn move_lists(&mut self, now: Now, kernel: &mut impl Kernel) -> portolan_datapath::Result<()> {
        if !std::mem::take(&mut self.moves_lists) {
            return Ok(());
        }
        let ops = self.layout.move_inline();
        if ops.is_empty() { Ok(()) } else { self.commit(now, &ops, kernel) }
    }
}

/// Returns whether so much of a map is in use that it is a finding.
pub(super) fn is_nearly_full(used: u32, size: u32) -> bool {
    u64::from(used) * 100 >= u64::from(size) * NEARLY_FULL_PERCENT && size > 0
}

fn nearly_full(layout: &Layout) -> Vec<Finding> {
    let finding = |(map, used, size): (&str, u32, u32)| {
        let message =
            format!("{used} of {size} entries are in use; restart the agent with a larger {}", Sizes::option(map));
        Finding::new(Code::MapNearlyFull, ObjectRef::global("Map", map), message)
    };
    layout.occupancy().into_iter().filter(|(_, used, size)| is_nearly_full(*used, *size)).map(finding).collect()
}

fn does_not_fit(rejected: &Rejected) -> Finding {
    let (address, full) = (rejected.key.endpoint().socket_addr(), rejected.full);
    let effect = if rejected.held {
        "the frontend keeps its last version; a new one refuses connections"
    } else {
        "connections to it bypass Portolan"
    };
    let message = format!(
        "map {} ({} entries) has no room for {} more: {effect}; restart the agent with a larger {}",
        rejected.map,
        full.size,
        full.wanted,
        Sizes::option(rejected.map)
    );
    Finding::new(Code::MapFull, ObjectRef::global("Frontend", address), message)
}
