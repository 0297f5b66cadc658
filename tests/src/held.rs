//! A file that nobody gets to open, as on a disk that does not answer.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags},
};

/// Whoever opens the file waits until the value is dropped.
pub struct Held(Fanotify);

impl Held {
    /// Holds this file.
    ///
    /// # Errors
    /// Not root, or a kernel without fanotify permissions.
    pub fn open(file: &Path) -> Result<Self> {
        let held = Fanotify::init(InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_CLOEXEC, EventFFlags::O_RDONLY)
            .context("the kernel has no fanotify, or root is missing")?;
        held.mark(MarkFlags::FAN_MARK_ADD, MaskFlags::FAN_OPEN_PERM, nix::fcntl::AT_FDCWD, Some(file))
            .with_context(|| format!("cannot hold {}", file.display()))?;
        Ok(Self(held))
    }

    /// Returns once somebody waits.
    ///
    /// # Errors
    /// Nobody does, for that long.
    pub fn wait(&self, bound: Duration) -> Result<()> {
        use std::os::fd::AsFd as _;
        let mut ready = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let bound = bound * crate::wait::patience();
        let waiting = poll(&mut ready, PollTimeout::try_from(bound)?)?;
        ensure!(waiting == 1, "nobody opened the file within {bound:?}");
        Ok(())
    }
}
