//! The kernel's own count of what programs take.

use std::os::fd::{FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};

use crate::foreign::bpf;

const BPF_ENABLE_STATS: libc::c_long = 32;

/// As long as this lives, the kernel counts how often each program runs and for how long. It ends with the process, however that ends.
#[derive(Debug)]
pub struct Counting(#[allow(dead_code, reason = "held")] OwnedFd);

impl Counting {
    /// Has it count.
    ///
    /// # Errors
    /// The kernel does not.
    pub fn begin() -> Result<Self> {
        // BPF_STATS_RUN_TIME
        let mut attr = [0u32; 32];
        let fd = bpf(BPF_ENABLE_STATS, &mut attr).context("the kernel does not count what programs take")?;
        // SAFETY: the kernel has just given this descriptor to nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}
