//! A pinned array of Portolan's, accessed from outside the agent.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr::{NonNull, null_mut},
    sync::atomic::AtomicU64,
};

use anyhow::{Context as _, Result};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

const BPF_OBJ_GET: libc::c_long = 7;

/// An array of 64-bit words, mapped into this process. The kernel and the agent read and write it at the same time.
pub(crate) struct PinnedArray {
    words: NonNull<AtomicU64>,
    len: usize,
}

impl PinnedArray {
    /// Maps the first `len` words of the array pinned at `path`.
    pub(crate) fn open(path: &Path, len: usize) -> Result<Self> {
        let map = open(path)?;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: this creates a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap(null_mut(), len * 8, access, flags, map.as_fd(), 0) };
        let start = start.with_context(|| format!("cannot mmap {}", path.display()))?;
        Ok(Self { words: NonNull::new(start.cast()).context("mmap returned null")?, len })
    }

    /// Returns the mapped part of the array, which others may change at any time.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has this length and lives as long as `self`; its pages are zero at first.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.len) }
    }
}

impl Drop for PinnedArray {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and no reference into it is left.
        let unmapped = unsafe { munmap(self.words.as_ptr().cast(), self.len * 8) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

fn open(pin: &Path) -> Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut attr = [path.as_ptr().addr() as u64, 0];
    // SAFETY: the attributes match the command, and the path outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, attr.as_mut_ptr(), size_of_val(&attr)) };
    if fd < 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("cannot open {}", pin.display()));
    }
    // SAFETY: the kernel just returned this descriptor, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
