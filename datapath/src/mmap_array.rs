//! Arrays of the kernel that lie in this process's memory as well: what is written by a single store no program sees half done, and what is
//! added to is added to whatever programs do meanwhile.

use std::{
    os::fd::AsFd,
    ptr::{NonNull, null_mut},
    sync::atomic::AtomicU64,
};

use anyhow::{Context as _, Result, ensure};
use aya::Pod;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Values of eight bytes or a multiple of that, one behind the other.
#[derive(Debug)]
pub(crate) struct MmapArray {
    start: NonNull<AtomicU64>,
    entries: u32,
    /// Words of a value.
    words: usize,
}

// SAFETY: the memory is shared with the kernel anyway, and every access to it is atomic or volatile.
unsafe impl Send for MmapArray {}
// SAFETY: as above.
unsafe impl Sync for MmapArray {}

impl MmapArray {
    /// Maps an array with values of type `T` into memory.
    ///
    /// # Errors
    /// The kernel does not let it be mapped.
    pub(crate) fn open<T>(map: impl AsFd, entries: u32) -> Result<Self> {
        const { assert!(size_of::<T>().is_multiple_of(8)) };
        let words = size_of::<T>() / 8;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping, wherever the kernel has room for it.
        let start = unsafe { mmap(null_mut(), Self::bytes(entries, words), access, flags, map, 0) };
        let start = start.context("cannot map an array into memory")?;
        Ok(Self { start: NonNull::new(start.cast()).context("an array was mapped nowhere")?, entries, words })
    }

    pub(crate) fn len(&self) -> u32 {
        self.entries
    }

    /// A word of a value.
    ///
    /// # Errors
    /// There is no such value.
    pub(crate) fn word(&self, index: u32, word: usize) -> Result<&AtomicU64> {
        ensure!(index < self.entries && word < self.words, "there is no entry {index}");
        // SAFETY: within the mapping, which lives as long as `self`; the kernel's arrays are aligned to eight bytes.
        Ok(unsafe { self.start.add(index as usize * self.words + word).as_ref() })
    }

    /// A value as it is now. Programs may be changing it: what belongs together in it may be read apart.
    ///
    /// # Errors
    /// There is no such value.
    pub(crate) fn read<T: Pod>(&self, index: u32) -> Result<T> {
        ensure!(size_of::<T>() == self.words * 8, "values are {} words long", self.words);
        ensure!(index < self.entries, "there is no entry {index}");
        // SAFETY: a whole value within the mapping, of plain data.
        Ok(unsafe { self.start.add(index as usize * self.words).cast::<T>().read_volatile() })
    }

    /// Writes a value that no program reads yet. What is published by a later store is seen with it.
    ///
    /// # Errors
    /// There is no such value.
    pub(crate) fn write<T: Pod>(&self, index: u32, value: T) -> Result<()> {
        ensure!(size_of::<T>() == self.words * 8, "values are {} words long", self.words);
        ensure!(index < self.entries, "there is no entry {index}");
        // SAFETY: a whole value within the mapping, of plain data.
        unsafe { self.start.add(index as usize * self.words).cast::<T>().write_volatile(value) };
        Ok(())
    }

    fn bytes(entries: u32, words: usize) -> usize {
        (entries as usize * words * 8).next_multiple_of(rustix::param::page_size())
    }
}

impl Drop for MmapArray {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nobody has a reference into it any more.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), Self::bytes(self.entries, self.words)) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}
