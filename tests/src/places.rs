//! The places in which Portolan keeps the states of TCP connections, from outside.

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
/// A place: its owner is the first word, the stage of the connection one of the later ones.
const WORDS: usize = 16;
const PLACES: usize = 0x1_0000;
/// The word that the stage is a half of: in the state, which follows the owner.
const STAGE: usize = 1 + 8;

/// The map of a node, in this process's memory.
pub struct Places {
    words: NonNull<u64>,
}

impl Places {
    /// Those of the agent whose pins are here.
    ///
    /// # Errors
    /// Nothing is pinned.
    pub fn open(pins: &Path) -> Result<Self> {
        let mut folders = fs::read_dir(pins)?.flatten().map(|entry| entry.path());
        let is_ours = |path: &Path| path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"sockets-v"));
        let folder = folders.find(|path| is_ours(path)).context("nothing is pinned for sockets")?;
        let map = open(&folder.join("CONNECTIONS"))?;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping, wherever the kernel has room for it.
        let start = unsafe { mmap(null_mut(), PLACES * WORDS * 8, access, flags, map.as_fd(), 0) };
        let words = NonNull::new(start.context("cannot map it into memory")?.cast()).context("mapped nowhere")?;
        Ok(Self { words })
    }

    /// How many belong to a connection.
    pub fn taken(&self) -> usize {
        (0..PLACES).filter(|place| self.word(place * WORDS) != 0).count()
    }

    /// How many belong to a connection whose SYN a hook has seen.
    pub fn connected(&self) -> usize {
        let is = |place: &usize| self.word(place * WORDS) != 0 && self.word(place * WORDS + STAGE) as u32 != 0;
        (0..PLACES).filter(is).count()
    }

    /// Leaves none: each free one belongs to a connection that stands, and that nobody has.
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

impl Drop for Places {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nobody has a reference into it any more.
        let unmapped = unsafe { munmap(self.words.as_ptr().cast(), PLACES * WORDS * 8) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

fn open(pin: &Path) -> Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut attr = [path.as_ptr().addr() as u64, 0];
    // SAFETY: the attributes are those of the command; the path outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, attr.as_mut_ptr(), size_of_val(&attr)) };
    if fd < 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("cannot open {}", pin.display()));
    }
    // SAFETY: the kernel has just given this descriptor to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
