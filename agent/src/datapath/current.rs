//! `CURRENT`, the map that publishes: it lies in this process's memory as well, so that a version is published by a single store, which no
//! program sees half done.

use std::{
    ptr::{NonNull, null_mut},
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::Map;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Frontend id → which version counts.
#[derive(Debug)]
pub(super) struct Current {
    words: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: the memory is shared with the kernel anyway, and every access to it is atomic.
unsafe impl Send for Current {}
// SAFETY: as above.
unsafe impl Sync for Current {}

impl Current {
    /// Maps it into memory.
    pub(super) fn open(map: &Map, entries: u32) -> Result<Self> {
        let Map::Array(data) = map else { anyhow::bail!("CURRENT is not an array") };
        let len = entries as usize;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping, wherever the kernel has room for it.
        let start = unsafe { mmap(null_mut(), Self::bytes(len), access, flags, data.fd(), 0) };
        let start = start.context("cannot map CURRENT into memory")?;
        let words = NonNull::new(start.cast()).context("CURRENT was mapped nowhere")?;
        Ok(Self { words, len })
    }

    /// Makes a version of a frontend the one that counts.
    pub(super) fn publish(&self, id: u32, index: u32) -> Result<()> {
        // The version, its slots and its runs were written by system calls before.
        self.word(id)?.store(u64::from(index), Ordering::SeqCst);
        Ok(())
    }

    /// The version of a frontend that counts.
    pub(super) fn get(&self, id: u32) -> Result<u32> {
        Ok(self.word(id)?.load(Ordering::SeqCst) as u32)
    }

    fn word(&self, id: u32) -> Result<&AtomicU64> {
        ensure!((id as usize) < self.len, "there is no frontend id {id}");
        // SAFETY: within the mapping, which lives as long as `self`; the kernel's arrays of eight bytes are aligned to them.
        Ok(unsafe { self.words.add(id as usize).as_ref() })
    }

    fn bytes(len: usize) -> usize {
        let page = rustix::param::page_size();
        (len * size_of::<AtomicU64>()).next_multiple_of(page)
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nobody has a reference into it any more.
        let unmapped = unsafe { munmap(self.words.as_ptr().cast(), Self::bytes(self.len)) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}
