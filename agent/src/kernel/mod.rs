//! What the agent asks of the kernel, as a trait: the data path implements it, and so does a fake in memory.
//!
//! The fake makes the controller testable without root. Every fact that it models is a check in [`facts`], which a test runs
//! on the fake and another one on the kernel.

#[cfg(any(test, feature = "fake-kernel"))]
pub mod facts;
#[cfg(any(test, feature = "fake-kernel"))]
pub mod fake;

use portolan_common::{BackendStats, BackendUse, FrontendKey, FrontendStats, PoolStats, Published};
use portolan_core::table::{BackendId, FrontendId, Generation, GraceEpoch, Op, PinnedState, PoolId, Sizes};
use portolan_datapath::{Counters, Datapath, Result, SweepRequest, barrier};

/// The programs, maps and hooks of a node.
///
/// Errors are those of the kernel; each says what was being done, and on what.
pub trait Kernel {
    /// Does the writes in their order. Those before the one that fails stand.
    ///
    /// # Errors
    /// Returns the error of the first write that fails.
    fn apply(&mut self, ops: &[Op]) -> Result<()>;

    /// Reads what the maps hold now.
    ///
    /// # Errors
    /// Returns an error if a map cannot be read.
    fn read_back(&self, sizes: Sizes) -> Result<PinnedState>;

    /// Waits until every program that runs now has finished: milliseconds.
    fn wait_for_readers(&self);

    /// Begins to wait, in the background, for the programs that may still read what this epoch has freed.
    fn begin_grace_period(&self, epoch: GraceEpoch);

    /// Attaches the programs, or replaces those of a previous agent, each atomically. Then removes the previous map set.
    ///
    /// # Errors
    /// Returns the error of the first hook that cannot be attached.
    fn attach(&mut self) -> Result<()>;

    /// Reports whether programs of another map set serve until [`Self::attach`] replaces them.
    fn replaces_another(&self) -> bool;

    /// Verifies that every hook is attached to the cgroup that it should be on, and that the maps are pinned.
    ///
    /// # Errors
    /// Returns the first hook or pin that is missing.
    fn check_hooks(&self) -> Result<()>;

    /// Repairs every hook that is missing; returns what was wrong with each.
    ///
    /// # Errors
    /// Returns the error of the first hook that cannot be repaired.
    fn repair_hooks(&mut self) -> Result<Vec<String>>;

    /// Attaches the program that reads HTTP responses, or detaches it. Idempotent.
    ///
    /// # Errors
    /// Returns the kernel's error.
    fn set_http_sniffing(&mut self, wanted: bool) -> Result<()>;

    /// Returns how many failures of a backend the programs have reported, or tried to; it wraps around.
    ///
    /// # Errors
    /// Returns an error if the id is beyond the size of the map.
    fn failures(&self, id: BackendId) -> Result<u32>;

    /// Lets the programs stop reporting successes of a backend, unless it has failed more often than `failures`, which is
    /// [`Outcome::failures`](portolan_datapath::Outcome::failures). They always report failures.
    ///
    /// # Errors
    /// Returns an error if the id is beyond the size of the map.
    fn acknowledge_failures(&mut self, id: BackendId, failures: u32) -> Result<()>;

    /// Returns a frontend's id, what is published for it, and the number of that publication.
    fn frontend(&self, key: &FrontendKey) -> Option<(FrontendId, Published, Generation)>;

    /// Returns the counters of a frontend.
    ///
    /// # Errors
    /// Returns an error if the id is beyond the size of the map. An id that is not in use has counters of zero.
    fn frontend_stats(&self, id: FrontendId) -> Result<FrontendStats>;

    /// Returns the counters of a backend.
    ///
    /// # Errors
    /// Returns an error if the id is beyond the size of the map. An id that is not in use has counters of zero.
    fn backend_stats(&self, id: BackendId) -> Result<BackendStats>;

    /// Returns which network namespaces used a backend last, and the statuses of its responses.
    ///
    /// # Errors
    /// Returns an error if the id is beyond the size of the map. An id that is not in use has counters of zero.
    fn backend_use(&self, id: BackendId) -> Result<BackendUse>;

    /// Returns the counters of a pool.
    ///
    /// # Errors
    /// Returns an error if the id is beyond the size of the map. An id that is not in use has counters of zero.
    fn pool_stats(&self, id: PoolId) -> Result<PoolStats>;

    /// Returns the counters of the programs, summed over all CPUs.
    ///
    /// # Errors
    /// Returns an error if the map cannot be read.
    fn counters(&self) -> Result<Counters>;

    /// Returns the histograms of connect and round-trip times: counts by power of two of microseconds, then the sum.
    ///
    /// # Errors
    /// Returns an error if the map cannot be read.
    fn latencies(&self) -> Result<[Vec<u64>; 2]>;

    /// Returns the slots for connection state that are in use, how many there are, and how many connections so far found
    /// their pod's share used up.
    fn connection_slots(&self) -> (u32, u32, u64);

    /// Asks the helper to look through all sockets. Requests that wait are merged.
    fn sweep(&self, request: SweepRequest);

    /// Names what is served, for the log: the cgroup's path.
    fn location(&self) -> String;
}

impl Kernel for Datapath {
    fn apply(&mut self, ops: &[Op]) -> Result<()> {
        self.maps.apply(ops)
    }

    fn read_back(&self, sizes: Sizes) -> Result<PinnedState> {
        self.maps.read_back(sizes)
    }

    fn wait_for_readers(&self) {
        barrier();
    }

    fn begin_grace_period(&self, epoch: GraceEpoch) {
        self.grace.begin(epoch);
    }

    fn attach(&mut self) -> Result<()> {
        Self::attach(self)
    }

    fn replaces_another(&self) -> bool {
        Self::replaces_another(self)
    }

    fn check_hooks(&self) -> Result<()> {
        Self::check_hooks(self)
    }

    fn repair_hooks(&mut self) -> Result<Vec<String>> {
        Self::repair_hooks(self)
    }

    fn set_http_sniffing(&mut self, wanted: bool) -> Result<()> {
        self.watch_responses(wanted).map(drop)
    }

    fn failures(&self, id: BackendId) -> Result<u32> {
        self.maps.failures(id)
    }

    fn acknowledge_failures(&mut self, id: BackendId, failures: u32) -> Result<()> {
        self.maps.acknowledge_failures(id, failures)
    }

    fn frontend(&self, key: &FrontendKey) -> Option<(FrontendId, Published, Generation)> {
        self.maps.frontend(key)
    }

    fn frontend_stats(&self, id: FrontendId) -> Result<FrontendStats> {
        self.maps.frontend_stats(id)
    }

    fn backend_stats(&self, id: BackendId) -> Result<BackendStats> {
        self.maps.backend_stats(id)
    }

    fn backend_use(&self, id: BackendId) -> Result<BackendUse> {
        self.maps.backend_use(id)
    }

    fn pool_stats(&self, id: PoolId) -> Result<PoolStats> {
        self.maps.pool_stats(id)
    }

    fn counters(&self) -> Result<Counters> {
        self.maps.counters()
    }

    fn latencies(&self) -> Result<[Vec<u64>; 2]> {
        self.maps.times()
    }

    fn connection_slots(&self) -> (u32, u32, u64) {
        self.terminator.connection_slots()
    }

    fn sweep(&self, request: SweepRequest) {
        self.terminator.request(request);
    }

    fn location(&self) -> String {
        self.cgroup().display().to_string()
    }
}
