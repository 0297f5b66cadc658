//! Child cgroups: programs are attached there, never to the machine's root.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};

use crate::wait_until;

/// A cgroup that is removed with the value; its processes must have ended by then.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// A new one, directly below the cgroup v2 root.
    ///
    /// # Errors
    /// There is no cgroup v2, or it does not let one be made.
    pub fn new(name: &str) -> Result<Self> {
        let path = root()?.join(name);
        fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path })
    }

    /// A new one in it, at this path, which is removed with the value; those above it stay.
    ///
    /// # Errors
    /// The kernel does not let it be made.
    pub fn make_inside(&self, path: &str) -> Result<Self> {
        let path = self.path.join(path);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path })
    }

    /// Removes one in it, and those that were made in that.
    ///
    /// # Errors
    /// Somebody is in one of them.
    pub fn remove_inside(&self, path: &str) -> Result<()> {
        remove(&self.path.join(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that has just ended may still be counted for a moment.
        let removed = wait_until("the cgroup to be empty", Duration::from_secs(5), || remove(&self.path));
        if let Err(error) = removed {
            eprintln!("cannot remove {}: {error:#}", self.path.display());
        }
    }
}

/// Removes one with those that were made in it.
pub(crate) fn remove(cgroup: &Path) -> Result<()> {
    for inner in fs::read_dir(cgroup)?.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove(&inner.path())?;
    }
    Ok(fs::remove_dir(cgroup)?)
}

/// Where cgroup v2 is mounted.
pub(crate) fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mount = fields.find(|fields| fields.get(2) == Some(&"cgroup2"));
    mount.map(|fields| PathBuf::from(fields[1])).ok_or_else(|| anyhow!("no cgroup v2 is mounted"))
}
