//! A kernel in memory: the maps of [`FakeMaps`], counters that a test sets, and errors that a test asks for.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
};

use portolan_common::{BackendStats, BackendUse, FrontendKey, FrontendStats, PoolStats, Published, TIME_BUCKETS};
use portolan_core::table::{
    BackendId, FrontendId, Generation, GraceEpoch, Op, PinnedState, PoolId, Sizes, fake_maps::FakeMaps,
};
use portolan_datapath::{Counters, Error, Result, SweepRequest};

use super::Kernel;

/// What a test sees of the kernel, and sets in it.
#[derive(Debug, Default)]
pub struct FakeKernel {
    /// The maps, with the counters of the programs.
    pub maps: FakeMaps,
    /// Counters of the programs over all CPUs.
    pub counters: Counters,
    /// The write that fails next: 0 for the first of the next [`Kernel::apply`]. It fails once.
    pub fail_write: Option<usize>,
    /// What [`Kernel::set_http_sniffing`] fails with.
    pub fail_http_sniffing: Option<String>,
    /// Whether programs of another map set serve.
    pub replaces_another: bool,
    /// Whether the programs are attached.
    pub attached: bool,
    /// What is wrong with the hooks until they are repaired.
    pub broken_hooks: Vec<String>,
    /// Whether the program that reads HTTP responses is attached.
    pub http_sniffing: bool,
    /// Failures of backends that the programs have reported, or tried to.
    pub failures: BTreeMap<BackendId, u32>,
    /// Failures up to which those of a backend are acknowledged.
    pub acknowledged: BTreeMap<BackendId, u32>,
    /// Slots for connection state: in use, how many there are, and connections over their pod's share.
    pub connection_slots: (u32, u32, u64),
    /// Sweeps that were asked for, until a test takes them.
    pub sweeps: RefCell<Vec<SweepRequest>>,
    /// The last epoch whose grace period was begun.
    pub grace_epoch: Cell<Option<GraceEpoch>>,
}

impl Kernel for FakeKernel {
    fn apply(&mut self, ops: &[Op]) -> Result<()> {
        for (i, op) in ops.iter().enumerate() {
            if self.fail_write.take_if(|at| *at == i).is_some() {
                return Err(Error::State(format!("cannot write {op:?}")));
            }
            if let Op::SetBackend(id, _) = op {
                self.acknowledged.remove(id);
            }
            self.maps.write(op);
        }
        Ok(())
    }

    fn read_back(&self, _sizes: Sizes) -> Result<PinnedState> {
        Ok(self.maps.read_back())
    }

    fn wait_for_readers(&self) {}

    fn begin_grace_period(&self, epoch: GraceEpoch) {
        self.grace_epoch.set(Some(epoch));
    }

    fn attach(&mut self) -> Result<()> {
        (self.attached, self.replaces_another) = (true, false);
        Ok(())
    }

    fn replaces_another(&self) -> bool {
        self.replaces_another
    }

    fn check_hooks(&self) -> Result<()> {
        if !self.attached {
            return Err(Error::State("the programs are not attached yet".to_owned()));
        }
        self.broken_hooks.first().map_or(Ok(()), |hook| Err(Error::State(hook.clone())))
    }

    fn repair_hooks(&mut self) -> Result<Vec<String>> {
        Ok(std::mem::take(&mut self.broken_hooks))
    }

    fn set_http_sniffing(&mut self, wanted: bool) -> Result<()> {
        match &self.fail_http_sniffing {
            Some(why) => Err(Error::State(why.clone())),
            None => {
                self.http_sniffing = wanted;
                Ok(())
            }
        }
    }

    fn failures(&self, id: BackendId) -> Result<u32> {
        Ok(self.failures.get(&id).copied().unwrap_or_default())
    }

    fn acknowledge_failures(&mut self, id: BackendId, failures: u32) -> Result<()> {
        self.acknowledged.insert(id, failures);
        Ok(())
    }

    fn frontend(&self, key: &FrontendKey) -> Option<(FrontendId, Published, Generation)> {
        self.maps.frontend(key)
    }

    fn frontend_stats(&self, id: FrontendId) -> Result<FrontendStats> {
        Ok(self.maps.frontend_stats.get(&id).copied().unwrap_or_default())
    }

    fn backend_stats(&self, id: BackendId) -> Result<BackendStats> {
        Ok(self.maps.backend_stats.get(&id).copied().unwrap_or_default())
    }

    fn backend_use(&self, id: BackendId) -> Result<BackendUse> {
        Ok(self.maps.backend_use.get(&id).copied().unwrap_or_default())
    }

    fn pool_stats(&self, id: PoolId) -> Result<PoolStats> {
        Ok(self.maps.pool_stats.get(&id).copied().unwrap_or_default())
    }

    fn counters(&self) -> Result<Counters> {
        Ok(self.counters)
    }

    fn latencies(&self) -> Result<[Vec<u64>; 2]> {
        let empty = || vec![0; TIME_BUCKETS as usize];
        Ok([empty(), empty()])
    }

    fn connection_slots(&self) -> (u32, u32, u64) {
        self.connection_slots
    }

    fn sweep(&self, request: SweepRequest) {
        self.sweeps.borrow_mut().push(request);
    }

    fn location(&self) -> String {
        "memory".to_owned()
    }
}
