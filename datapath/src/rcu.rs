//! Grace periods: when no in-flight program can still read map entries that were replaced.
//!
//! BPF programs run inside RCU read-side critical sections.
//! The membarrier system call returns only after every section that had begun has ended.
//! Kernels with isolated CPUs (`nohz_full`) do not offer it, and with a single CPU it returns at once, although a program
//! may have been preempted. There, replacing an inner map waits for the same.
//! So the end of a grace period is certain, not an estimate of how long a program may be delayed.

use std::{
    os::fd::OwnedFd,
    sync::{
        OnceLock,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Duration,
};

use portolan_core::table::GraceEpoch;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::{
    capabilities,
    error::{Context as _, Result},
    sys,
};

/// `MEMBARRIER_CMD_GLOBAL` of linux/membarrier.h, which calls `synchronize_rcu()` in the kernel.
const GLOBAL: libc::c_int = 1;
/// Delay if the kernel offers neither way to wait.
/// Far longer than a program of a few hundred instructions can be delayed.
const WITHOUT_BARRIER: Duration = Duration::from_secs(1);

/// Waits for grace periods where membarrier does not; set by [`prepare`].
static MAP_BARRIER: OnceLock<MapBarrier> = OnceLock::new();

/// A map of maps: the kernel returns from replacing its entry only once no program can be reading the former one.
#[derive(Debug)]
pub struct MapBarrier {
    outer: OwnedFd,
    inner: OwnedFd,
}

impl MapBarrier {
    /// Creates the maps, which takes `CAP_BPF`.
    ///
    /// # Errors
    /// Returns an error if the kernel rejects a map.
    pub fn new() -> Result<Self> {
        let inner = sys::create_array(None).context("cannot create a map")?;
        let outer = sys::create_array(Some(&inner)).context("cannot create a map of maps")?;
        Ok(Self { outer, inner })
    }

    /// Blocks until every BPF program that is running now has returned.
    ///
    /// # Errors
    /// Returns an error if the kernel rejects the update.
    pub fn wait(&self) -> Result<()> {
        Ok(sys::set_inner(&self.outer, &self.inner)?)
    }
}

/// Prepares [`barrier`] for a kernel where membarrier does not wait, while the agent still has its capabilities.
pub(crate) fn prepare() {
    /// `MEMBARRIER_CMD_QUERY` of linux/membarrier.h, which returns the commands that are offered.
    const QUERY: libc::c_int = 0;
    // SAFETY: the system call takes no pointers.
    let offered = unsafe { libc::syscall(libc::SYS_membarrier, QUERY, 0, 0) };
    // SAFETY: as above.
    let cpus = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    if offered >= 0 && offered & libc::c_long::from(GLOBAL) != 0 && cpus > 1 {
        return;
    }
    match MapBarrier::new() {
        Ok(created) => drop(MAP_BARRIER.set(created)),
        Err(error) => {
            tracing::warn!("freed map entries are reused after a second, not after a grace period: {error:#}");
        }
    }
}

/// Waits for grace periods on a dedicated thread, because the system call takes several milliseconds.
pub struct GracePeriods {
    epochs: Sender<GraceEpoch>,
    elapsed: UnboundedReceiver<GraceEpoch>,
}

impl GracePeriods {
    /// Starts the waiting thread. It exits when the value is dropped.
    ///
    /// # Errors
    /// Returns an error if the thread cannot be started.
    pub fn start() -> Result<Self> {
        let (epochs, pending) = channel();
        let (done, elapsed) = unbounded_channel();
        thread::Builder::new()
            .name("grace".to_owned())
            .spawn(move || {
                // Best effort: this thread only waits.
                let _ = capabilities::drop_capabilities();
                wait_for(&pending, &done);
            })
            .context("cannot start the grace period thread")?;
        Ok(Self { epochs, elapsed })
    }

    /// Starts waiting for programs that may still read what `epoch` freed.
    /// [`Self::elapsed`] reports the end.
    pub fn begin(&self, epoch: GraceEpoch) {
        // Cannot fail: the thread lives as long as this value.
        let _ = self.epochs.send(epoch);
    }

    /// Waits for the next epoch whose readers have all returned; that also covers every earlier epoch.
    /// Cancel safe.
    pub async fn elapsed(&mut self) -> GraceEpoch {
        match self.elapsed.recv().await {
            Some(epoch) => epoch,
            None => std::future::pending().await,
        }
    }
}

fn wait_for(epochs: &Receiver<GraceEpoch>, done: &UnboundedSender<GraceEpoch>) {
    while let Ok(epoch) = epochs.recv() {
        // One barrier covers all queued epochs.
        let epoch = epochs.try_iter().last().unwrap_or(epoch);
        barrier();
        if done.send(epoch).is_err() {
            return;
        }
    }
}

/// Blocks until every BPF program that is running now has returned.
///
/// Takes several milliseconds, or one second if the kernel offers no way to wait.
pub fn barrier() {
    if MAP_BARRIER.get().is_some_and(|maps| maps.wait().is_ok()) {
        return;
    }
    // SAFETY: the system call takes no pointers.
    if unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) } != 0 {
        thread::sleep(WITHOUT_BARRIER);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grace_epochs_elapse_in_order() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut grace = GracePeriods::start().unwrap();
        (1..=5).for_each(|epoch| grace.begin(GraceEpoch::new(epoch)));
        let mut last = GraceEpoch::new(0);
        while last < GraceEpoch::new(5) {
            let next = runtime.block_on(grace.elapsed());
            assert!(next > last);
            last = next;
        }
    }
}
