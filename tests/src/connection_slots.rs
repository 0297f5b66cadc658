//! Portolan's slots for TCP connection state (the pinned map `CONNECTIONS`), accessed from outside the agent.

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
/// Length of a slot in 64-bit words. The first word is the owner: the socket's cookie, or 0 if the slot is free.
const WORDS: usize = 16;
const PLACES: usize = 0x1_0000;
/// Index of the word whose lower half is the connection's stage. The state follows the owner.
const STAGE: usize = 1 + 8;

/// The connection slots of a node, mapped into this process.
pub struct ConnectionSlots {
    words: NonNull<u64>,
}

impl ConnectionSlots {
    /// Maps the slots of the agent that pins its objects below `pins`.
    ///
    /// # Errors
    /// Returns an error if no `sockets-v*` directory is pinned there, or if the map cannot be opened or mapped.
    pub fn open(pins: &Path) -> Result<Self> {
        let mut folders = fs::read_dir(pins)?.flatten().map(|entry| entry.path());
        let is_ours = |path: &Path| path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"sockets-v"));
        let folder = folders.find(|path| is_ours(path)).context("no sockets-v* directory is pinned")?;
        let map = open(&folder.join("CONNECTIONS"))?;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: this creates a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap(null_mut(), PLACES * WORDS * 8, access, flags, map.as_fd(), 0) };
        let words = NonNull::new(start.context("cannot mmap CONNECTIONS")?.cast()).context("mmap returned null")?;
        Ok(Self { words })
    }

    /// Counts the slots that a connection owns.
    pub fn taken(&self) -> usize {
        (0..PLACES).filter(|place| self.word(place * WORDS) != 0).count()
    }

    /// Counts the slots of connections whose SYN a hook has seen.
    pub fn connected(&self) -> usize {
        let is = |place: &usize| self.word(place * WORDS) != 0 && self.word(place * WORDS + STAGE) as u32 != 0;
        (0..PLACES).filter(is).count()
    }

    /// Fills every free slot, as if an established connection of a nonexistent socket owned it.
    pub fn take_all(&self) {
        for place in (0..PLACES).filter(|place| self.word(place * WORDS) == 0) {
            // SAFETY: within the mapping, which lives as long as `self`.
            unsafe {
                self.words.add(place * WORDS + STAGE).write_volatile(u64::MAX);
                self.words.add(place * WORDS).write_volatile(u64::MAX);
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
        let unmapped = unsafe { munmap(self.words.as_ptr().cast(), PLACES * WORDS * 8) };
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
