//! When nobody reads any more what was in force a moment ago.
//!
//! Programs run inside the kernel's RCU read sections. The membarrier system call waits until every section that has begun has ended, so what
//! it returns from is a fact, not a guess about how long a program may be held up.

use std::{
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use portolan_core::table::GraceEpoch;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::capabilities;

/// `MEMBARRIER_CMD_GLOBAL` of linux/membarrier.h, which is the kernel's `synchronize_rcu()`.
const GLOBAL: libc::c_int = 1;
/// Where a kernel with isolated CPUs has no such barrier: longer by far than a program of some hundred instructions is held up.
const WITHOUT_BARRIER: Duration = Duration::from_secs(1);

/// Waits on a thread of its own, for the call takes some milliseconds.
pub struct GracePeriods {
    epochs: Sender<GraceEpoch>,
    elapsed: UnboundedReceiver<GraceEpoch>,
}

impl GracePeriods {
    /// Starts the thread.
    ///
    /// # Errors
    /// There is none to be had.
    pub fn start() -> Result<Self> {
        let (epochs, wanted) = channel();
        let (done, elapsed) = unbounded_channel();
        thread::Builder::new()
            .name("grace".to_owned())
            .spawn(move || {
                // Nothing is lost where that is refused: a thread that waits.
                let _ = capabilities::drop_capabilities();
                wait_for(&wanted, &done);
            })
            .context("cannot start a thread")?;
        Ok(Self { epochs, elapsed })
    }

    /// Begins to wait for those who may be reading what this round has freed.
    pub fn begin(&self, epoch: GraceEpoch) {
        // It ends with this value only.
        let _ = self.epochs.send(epoch);
    }

    /// The next round whose readers have ended; earlier ones have as well.
    pub async fn elapsed(&mut self) -> GraceEpoch {
        match self.elapsed.recv().await {
            Some(epoch) => epoch,
            None => std::future::pending().await,
        }
    }
}

fn wait_for(epochs: &Receiver<GraceEpoch>, done: &UnboundedSender<GraceEpoch>) {
    while let Ok(epoch) = epochs.recv() {
        // One barrier for all that wait.
        let epoch = epochs.try_iter().last().unwrap_or(epoch);
        barrier();
        if done.send(epoch).is_err() {
            return;
        }
    }
}

/// Waits until every program that runs now has ended.
pub fn barrier() {
    // SAFETY: a system call without pointers.
    if unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) } != 0 {
        thread::sleep(WITHOUT_BARRIER);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_settle_in_order() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut grace = GracePeriods::start().unwrap();
        (1..=5).for_each(|epoch| grace.begin(epoch));
        let mut last = 0;
        while last < 5 {
            let next = runtime.block_on(grace.elapsed());
            assert!(next > last);
            last = next;
        }
    }
}
