//! Whom the programs leave alone.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData},
};
use portolan_common::OptOut;

use crate::maps::{array, take};

/// Cgroups whose processes are left alone. The maps belong to no set: who is left alone stays so while programs are exchanged.
pub struct OptOutMap {
    cgroups: HashMap<MapData, u64, u32>,
    filter: Array<MapData, u64>,
}

impl OptOutMap {
    pub(crate) fn open(bpf: &mut Ebpf) -> Result<Self> {
        Ok(Self { cgroups: HashMap::try_from(take(bpf, "OPTED_OUT")?)?, filter: array(bpf, "OPT_OUT_FILTER")? })
    }

    /// Leaves these alone, by their ids, and no others.
    ///
    /// # Errors
    /// There are more than [`OptOut::CAPACITY`], or the kernel does not take them; the others are as they were.
    pub fn set(&mut self, cgroups: &BTreeSet<u64>) -> Result<()> {
        let held: BTreeSet<u64> = self.cgroups.keys().collect::<Result<_, _>>()?;
        for gone in held.difference(cgroups) {
            self.cgroups.remove(gone)?;
        }
        // The programs look at the filter first.
        let added = cgroups.difference(&held).try_for_each(|cgroup| {
            self.cgroups.insert(*cgroup, 1, 0).with_context(|| format!("cannot leave cgroup {cgroup} alone"))
        });
        let mut filter = 0;
        for cgroup in self.cgroups.keys() {
            filter |= OptOut::bit(cgroup?);
        }
        self.filter.set(0, filter, 0)?;
        added
    }
}
