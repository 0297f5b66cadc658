//! The kernel's run-time statistics of BPF programs.

use std::os::fd::{FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};

use crate::foreign_program::bpf;

const BPF_ENABLE_STATS: libc::c_long = 32;

/// While this value exists, the kernel counts the runs and the run time of every BPF program.
/// Counting also stops when the process exits for any reason.
#[derive(Debug)]
pub struct CountingServer(#[allow(dead_code, reason = "dropping it stops the counting")] OwnedFd);

impl CountingServer {
    /// Enables the statistics, for all programs on the machine.
    ///
    /// # Errors
    /// Returns an error if the kernel refuses `BPF_ENABLE_STATS`.
    pub fn begin() -> Result<Self> {
        // The zero is BPF_STATS_RUN_TIME.
        let mut attr = [0u32; 32];
        let fd = bpf(BPF_ENABLE_STATS, &mut attr).context("cannot enable BPF run-time statistics")?;
        // SAFETY: the kernel just returned this descriptor, so nothing else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}
