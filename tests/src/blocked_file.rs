//! A file whose opens block, as on a disk that does not respond.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags},
};

/// Blocks every open of a file until the value is dropped, through fanotify permission events.
pub struct BlockedFile(Fanotify);

impl BlockedFile {
    /// Starts to block opens of `file`.
    ///
    /// # Errors
    /// Returns an error without root, or if the kernel has no fanotify permission events.
    pub fn open(file: &Path) -> Result<Self> {
        let fanotify = Fanotify::init(InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_CLOEXEC, EventFFlags::O_RDONLY)
            .context("cannot initialize fanotify (needs root and CONFIG_FANOTIFY_ACCESS_PERMISSIONS)")?;
        fanotify
            .mark(MarkFlags::FAN_MARK_ADD, MaskFlags::FAN_OPEN_PERM, nix::fcntl::AT_FDCWD, Some(file))
            .with_context(|| format!("cannot block opens of {}", file.display()))?;
        Ok(Self(fanotify))
    }

    /// Returns once a process is blocked in its open.
    ///
    /// # Errors
    /// Returns an error if no process opens the file within `bound` times [`patience`](crate::patience).
    pub fn wait(&self, bound: Duration) -> Result<()> {
        use std::os::fd::AsFd as _;
        let mut ready = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let bound = bound * crate::wait::patience();
        let waiting = poll(&mut ready, PollTimeout::try_from(bound)?)?;
        ensure!(waiting == 1, "no process opened the file within {bound:?}");
        Ok(())
    }
}
