//! Memory-mapped BPF arrays.
//!
//! A single 8-byte store is atomic to programs, and atomic additions are not lost to concurrent updates by programs.

use std::{
    os::fd::AsFd,
    ptr::{NonNull, null_mut},
    sync::atomic::AtomicU64,
};

use aya::Pod;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::error::{Context as _, Result, ensure};

/// A memory-mapped BPF array, whose values are contiguous and a multiple of eight bytes long.
#[derive(Debug)]
pub(crate) struct MmapArray {
    start: NonNull<AtomicU64>,
    entries: u32,
    /// Length of a value, in 8-byte words.
    words: usize,
}

// SAFETY: the memory is shared with the kernel, and every access is atomic or volatile.
unsafe impl Send for MmapArray {}
// SAFETY: as above.
unsafe impl Sync for MmapArray {}

impl MmapArray {
    /// Maps an array of `entries` values of type `T` into memory.
    ///
    /// # Errors
    /// Returns an error if the kernel rejects the mapping.
    pub(crate) fn open<T>(map: impl AsFd, entries: u32) -> Result<Self> {
        const { assert!(size_of::<T>().is_multiple_of(8)) };
        let words = size_of::<T>() / 8;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice replaces no existing one.
        let start = unsafe { mmap(null_mut(), Self::bytes(entries, words), access, flags, map, 0) };
        let start = start.context("cannot map a BPF array into memory")?;
        Ok(Self { start: NonNull::new(start.cast()).context("mmap returned null")?, entries, words })
    }

    pub(crate) fn len(&self) -> u32 {
        self.entries
    }

    /// Returns word `word` of the value at `index`.
    ///
    /// # Errors
    /// Returns an error if either is out of range.
    pub(crate) fn word(&self, index: u32, word: usize) -> Result<&AtomicU64> {
        ensure!(index < self.entries && word < self.words, "no word {word} at index {index} of the array");
        // SAFETY: the word is within the mapping, which lives as long as `self`; BPF arrays are aligned to eight bytes.
        Ok(unsafe { self.start.add(index as usize * self.words + word).as_ref() })
    }

    /// Reads the value at `index`.
    /// The read is not atomic: while a program writes the value, its words may be inconsistent with each other.
    ///
    /// # Errors
    /// Returns an error if `index` is out of range or `T` does not have the size of a value.
    pub(crate) fn read<T: Pod>(&self, index: u32) -> Result<T> {
        ensure!(size_of::<T>() == self.words * 8, "wrong value type: values are {} words long", self.words);
        ensure!(index < self.entries, "index {index} is out of range");
        // SAFETY: the value is plain data, entirely within the mapping.
        Ok(unsafe { self.start.add(index as usize * self.words).cast::<T>().read_volatile() })
    }

    /// Writes a value that no program reads yet.
    /// A later atomic store publishes it.
    ///
    /// # Errors
    /// Returns an error if `index` is out of range or `T` does not have the size of a value.
    pub(crate) fn write<T: Pod>(&self, index: u32, value: T) -> Result<()> {
        ensure!(size_of::<T>() == self.words * 8, "wrong value type: values are {} words long", self.words);
        ensure!(index < self.entries, "index {index} is out of range");
        // SAFETY: the value is plain data, entirely within the mapping.
        unsafe { self.start.add(index as usize * self.words).cast::<T>().write_volatile(value) };
        Ok(())
    }

    fn bytes(entries: u32, words: usize) -> usize {
        (entries as usize * words * 8).next_multiple_of(rustix::param::page_size())
    }
}

impl Drop for MmapArray {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and no reference into it outlives the value.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), Self::bytes(self.entries, self.words)) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}
