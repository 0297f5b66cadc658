//! Child cgroups. Programs are attached to these, never to the machine's root cgroup.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};

use crate::wait_until;

/// A cgroup that is removed when the value is dropped. Its processes must have exited by then.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Creates a cgroup directly below the cgroup v2 root.
    ///
    /// # Errors
    /// Returns an error if cgroup v2 is not mounted, or if the cgroup cannot be created.
    pub fn new(name: &str) -> Result<Self> {
        let path = root()?.join(name);
        fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path })
    }

    /// Creates a descendant at a relative path, which is removed when the returned value is dropped.
    /// Its ancestors stay.
    ///
    /// # Errors
    /// Returns an error if the kernel refuses to create it.
    pub fn make_inside(&self, path: &str) -> Result<Self> {
        let path = self.path.join(path);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path })
    }

    /// Removes the descendant at a relative path, with all cgroups below it.
    ///
    /// # Errors
    /// Returns an error if one of them does not exist or still has a process.
    pub fn remove_inside(&self, path: &str) -> Result<()> {
        remove(&self.path.join(path))
    }

    /// Returns the absolute path of the cgroup's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that has just exited may still be counted for a moment.
        let removed = wait_until("the cgroup to be empty", Duration::from_secs(5), || remove(&self.path));
        if let Err(error) = removed {
            eprintln!("cannot remove {}: {error:#}", self.path.display());
        }
    }
}

/// Removes a cgroup with all cgroups below it.
pub(crate) fn remove(cgroup: &Path) -> Result<()> {
    for inner in fs::read_dir(cgroup)?.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove(&inner.path())?;
    }
    Ok(fs::remove_dir(cgroup)?)
}

/// Returns the mount point of cgroup v2.
pub(crate) fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mount = fields.find(|fields| fields.get(2) == Some(&"cgroup2"));
    mount.map(|fields| PathBuf::from(fields[1])).ok_or_else(|| anyhow!("cgroup v2 is not mounted"))
}
