//! Where maps and links are pinned, so that they outlive the agent: `<bpffs>/v<schema>/{maps,links}/`.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::DirBuilderExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use portolan_common::SCHEMA_VERSION;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};

use super::environment::is_bpffs;

/// The pins of one version of the layout.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
    version: PathBuf,
}

impl Pins {
    /// The pins below a folder on a bpffs.
    pub fn new(bpffs: &Path) -> Self {
        Self { root: bpffs.to_owned(), version: bpffs.join(format!("v{SCHEMA_VERSION}")) }
    }

    /// Where a map is pinned.
    pub fn map(&self, name: &str) -> PathBuf {
        self.version.join("maps").join(name)
    }

    /// Where a link is pinned.
    pub fn link(&self, name: &str) -> PathBuf {
        self.version.join("links").join(name)
    }

    /// Makes the folders, for root only, and takes them for this agent alone.
    pub(super) fn prepare(&self) -> Result<OwnedFd> {
        for folder in [&self.root, &self.version, &self.version.join("maps"), &self.version.join("links")] {
            match fs::DirBuilder::new().mode(0o700).create(folder) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(error).with_context(|| format!("cannot create {}", folder.display()));
                }
                _ => {}
            }
        }
        lock(&self.root)?.with_context(|| {
            format!("another agent is at work on {}; stop it, or give this one its own --bpffs", self.root.display())
        })
    }
}

/// The folder, locked for this process; `None` where another one has it.
fn lock(folder: &Path) -> Result<Option<OwnedFd>> {
    let directory = open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("cannot open {}", folder.display()))?;
    match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(directory)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot lock {}", folder.display())),
    }
}

/// Takes everything off the kernel that is pinned below the folder, of every version, and tells each thing.
///
/// # Errors
/// An agent is still at work, or something cannot be removed.
pub fn cleanup(bpffs: &Path, mut tell: impl FnMut(&Path)) -> Result<()> {
    if !bpffs.exists() {
        return Ok(());
    }
    ensure!(is_bpffs(bpffs), "{} is not on a bpffs: nothing of Portolan can be pinned there", bpffs.display());
    let Some(_lock) = lock(bpffs)? else {
        bail!("an agent is at work on {}; stop it first", bpffs.display());
    };
    for version in entries(bpffs)? {
        if !version.file_name().is_some_and(|name| name.to_string_lossy().starts_with('v')) {
            continue;
        }
        // Links first: without their maps, programs would refuse.
        for folder in ["links", "maps"].map(|folder| version.join(folder)) {
            for pin in entries(&folder)? {
                fs::remove_file(&pin).with_context(|| format!("cannot remove {}", pin.display()))?;
                tell(&pin);
            }
            remove_folder(&folder)?;
        }
        remove_folder(&version)?;
    }
    remove_folder(bpffs)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => {
            let entries: io::Result<Vec<PathBuf>> =
                entries.and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
            let mut entries = entries.with_context(|| format!("cannot read {}", folder.display()))?;
            entries.sort();
            Ok(entries)
        }
    }
}

fn remove_folder(folder: &Path) -> Result<()> {
    match fs::remove_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}
