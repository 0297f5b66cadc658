//! The map of excluded cgroups.

use std::collections::BTreeSet;

use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData},
};
use portolan_common::OptOut;

use crate::{
    error::{Context as _, Result},
    map_specs,
    maps::{array, take},
};

/// The cgroups whose connections Portolan does not touch.
///
/// All map sets share these maps, so pods stay excluded while programs are replaced.
pub struct OptOutMap {
    cgroups: HashMap<MapData, u64, u32>,
    filter: Array<MapData, u64>,
}

impl OptOutMap {
    pub(crate) fn open(bpf: &mut Ebpf) -> Result<Self> {
        Ok(Self {
            cgroups: HashMap::try_from(take(bpf, map_specs::OPTED_OUT)?)?,
            filter: array(bpf, map_specs::OPT_OUT_FILTER)?,
        })
    }

    /// Replaces the excluded cgroups with those that have these ids.
    ///
    /// # Errors
    /// Returns an error if there are more than [`OptOut::CAPACITY`] ids or the kernel rejects a write.
    /// Changes made before the failure stay in effect.
    pub fn set(&mut self, cgroups: &BTreeSet<u64>) -> Result<()> {
        let current: BTreeSet<u64> = self.cgroups.keys().collect::<Result<_, _>>()?;
        for gone in current.difference(cgroups) {
            self.cgroups.remove(gone)?;
        }
        // The programs check the filter first, so it changes last.
        let added = cgroups.difference(&current).try_for_each(|cgroup| {
            self.cgroups.insert(*cgroup, 1, 0).with_context(|| format!("cannot add cgroup {cgroup} to the opt-out map"))
        });
        let mut filter = 0;
        for cgroup in self.cgroups.keys() {
            filter |= OptOut::bit(cgroup?);
        }
        self.filter.set(0, filter, 0)?;
        added
    }
}
