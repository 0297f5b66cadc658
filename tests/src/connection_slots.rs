//! Portolan's slots for the state of connections (the pinned map `CONNECTIONS`), accessed from outside the agent.

use std::{fs, os::unix::ffi::OsStrExt as _, path::Path, sync::atomic::Ordering::SeqCst};

use anyhow::{Context as _, Result};

use crate::pinned_array::PinnedArray;

/// Length of a slot in 64-bit words. The first word is the owner: the socket's address, or 0 if the slot is free.
const WORDS: usize = 8;
/// Index of the word whose upper half holds the flags.
const FLAGS: usize = 4;
/// The flags that say how far the connection has come.
const STAGE: u32 = 0xff;
/// The flag of a UDP socket, whose slot is freed only with the socket.
const UDP: u32 = 1 << 10;

/// In place of an owner: the slot is in use, and no other socket may take it now.
const BUSY: u64 = 1;

/// The connection slots of a node.
pub struct ConnectionSlots(PinnedArray);

impl ConnectionSlots {
    /// Maps the slots of the agent that pins its objects below `pins`.
    ///
    /// # Errors
    /// Returns an error if no such map is pinned there, or if it cannot be opened or mapped.
    pub fn open(pins: &Path) -> Result<Self> {
        let slots =
            |path: &Path| -> Option<usize> { path.file_name()?.to_str()?.strip_prefix("CONNECTIONS-")?.parse().ok() };
        let folders = fs::read_dir(pins)?.flatten().map(|entry| entry.path());
        let ours =
            folders.filter(|path| path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"sockets-v")));
        let mut pinned = ours.filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
        let found = pinned.find_map(|entry| Some((slots(&entry.path())?, entry.path())));
        let (slots, path) = found.context("no map CONNECTIONS is pinned")?;
        Ok(Self(PinnedArray::open(&path, slots * WORDS)?))
    }

    /// Returns the number of slots.
    pub fn size(&self) -> usize {
        self.0.words().len() / WORDS
    }

    /// Counts the slots that are marked as busy.
    pub fn busy(&self) -> usize {
        (0..self.size()).filter(|slot| self.word(*slot, 0) == BUSY).count()
    }

    /// Counts the slots that a connection owns.
    pub fn taken(&self) -> usize {
        (0..self.size()).filter(|slot| self.word(*slot, 0) != 0).count()
    }

    /// Counts the slots of connections whose SYN a hook has seen.
    pub fn connected(&self) -> usize {
        let stage = |slot: &usize| (self.word(*slot, FLAGS) >> 32) as u32 & STAGE;
        (0..self.size()).filter(|slot| self.word(*slot, 0) != 0 && stage(slot) != 0).count()
    }

    /// Fills every free slot, as if a socket that does not exist owned it.
    pub fn take_all(&self) {
        for slot in self.0.words().chunks_exact(WORDS).filter(|slot| slot[0].load(SeqCst) == 0) {
            slot[FLAGS].store(u64::from(UDP) << 32, SeqCst);
            slot[0].store(u64::MAX, SeqCst);
        }
    }

    /// Marks every free slot as that of a socket that is just being connected.
    pub fn mark_all_busy(&self) {
        for slot in self.0.words().chunks_exact(WORDS).filter(|slot| slot[0].load(SeqCst) == 0) {
            slot[FLAGS].store(0, SeqCst);
            slot[0].store(BUSY, SeqCst);
        }
    }

    fn word(&self, slot: usize, word: usize) -> u64 {
        self.0.words()[slot * WORDS + word].load(SeqCst)
    }
}
