//! Portolan's slots for the state of connections (the pinned map `CONNECTIONS`), accessed from outside the agent.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr::{NonNull, null_mut},
};

use anyhow::{Context as _, Result};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

const BPF_OBJ_GET: libc::c_long = 7;
/// Length of a slot in 64-bit words. The first word is the owner: the socket's address, or 0 if the slot is free.
const WORDS: usize = 8;
/// Index of the word whose upper half holds the flags.
const FLAGS: usize = 4;
/// The flags that say how far the connection has come.
const STAGE: u32 = 0xff;
/// The flag of a UDP socket, whose slot is freed only with the socket.
const UDP: u32 = 1 << 10;

/// The connection slots of a node, mapped into this process.
pub struct ConnectionSlots {
    words: NonNull<u64>,
    slots: usize,
}

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
        let map = open(&path)?;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: this creates a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap(null_mut(), slots * WORDS * 8, access, flags, map.as_fd(), 0) };
        let words = NonNull::new(start.context("cannot mmap CONNECTIONS")?.cast()).context("mmap returned null")?;
        Ok(Self { words, slots })
    }

    /// Returns the number of slots.
    pub fn size(&self) -> usize {
        self.slots
    }

    /// Counts the slots that a connection owns.
    pub fn taken(&self) -> usize {
        (0..self.slots).filter(|slot| self.word(slot * WORDS) != 0).count()
    }

    /// Counts the slots of connections whose SYN a hook has seen.
    pub fn connected(&self) -> usize {
        let stage = |slot: &usize| (self.word(slot * WORDS + FLAGS) >> 32) as u32 & STAGE;
        (0..self.slots).filter(|slot| self.word(slot * WORDS) != 0 && stage(slot) != 0).count()
    }

    /// Fills every free slot, as if a socket that does not exist owned it.
    pub fn take_all(&self) {
        for slot in (0..self.slots).filter(|slot| self.word(slot * WORDS) == 0) {
            // SAFETY: within the mapping, which lives as long as `self`.
            unsafe {
                self.words.add(slot * WORDS + FLAGS).write_volatile(u64::from(UDP) << 32);
                self.words.add(slot * WORDS).write_volatile(u64::MAX);
            }
        }
    }

    fn word(&self, at: usize) -> u64 {
        // SAFETY: within the mapping, which lives as long as `self`.
        unsafe { self.words.add(at).read_volatile() }
    }
}

impl Drop for ConnectionSlots {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and no reference into it is left.
        let unmapped = unsafe { munmap(self.words.as_ptr().cast(), self.slots * WORDS * 8) };
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
