//! Where maps and links are pinned, so that they outlive the agent.
//!
//! ```text
//! <bpffs>/links/<program>            the live links; they stay, whatever is put into them
//!         sockets-v<layout>/<map>    what is kept on sockets, and of who is left alone
//!         v<schema>-<set>/<map>      one set of maps: all the others
//!         current -> v<schema>-<set> the set whose programs are in the links
//! ```
//! A version with another schema, or with other sizes, builds a set of its own beside the current one, fills it, puts its programs into the
//! live links, and only then makes it the current one. Whatever kills it on the way leaves the former one in force.

use std::{
    fs,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt as _, MetadataExt as _, symlink},
    },
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use portolan_common::{SCHEMA_VERSION, SOCKET_LAYOUT};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, open};

use crate::{preflight::is_bpffs, sys};

const CURRENT: &str = "current";
const LINKS: &str = "links";
/// Where agents of this machine say which cgroups they serve.
const RUN: &str = "/run/portolan";
/// A lock is tried so often, with this pause.
const LOCK_TRIES: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// The pins of one node.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
}

/// A set of maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Set {
    pub(crate) schema: u32,
    /// Its name; sockets remember it.
    pub(crate) id: u32,
}

impl Set {
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let (schema, id) = name.strip_prefix('v')?.split_once('-')?;
        Some(Self { schema: schema.parse().ok()?, id: id.parse().ok()? })
    }

    pub(crate) fn folder(self) -> String {
        format!("v{}-{}", self.schema, self.id)
    }
}

impl Pins {
    /// The pins below a folder on a bpffs.
    pub fn new(bpffs: &Path) -> Self {
        Self { root: bpffs.to_owned() }
    }

    /// The folder.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Where a link is pinned.
    pub fn link(&self, name: &str) -> PathBuf {
        self.root.join(LINKS).join(name)
    }

    /// Where a map of a set is pinned.
    pub(crate) fn map(&self, set: Set, name: &str) -> PathBuf {
        self.root.join(set.folder()).join(name)
    }

    /// Where a map is pinned that belongs to no set.
    pub(crate) fn socket_map(&self, name: &str) -> PathBuf {
        self.root.join(format!("sockets-v{SOCKET_LAYOUT}")).join(name)
    }

    /// Where a map of the current set is pinned, if there is one.
    pub fn current_map(&self, name: &str) -> Option<PathBuf> {
        Some(self.map(self.current()?, name))
    }

    /// Makes the folders, for root only.
    pub(crate) fn make_folders(&self) -> Result<()> {
        let folders = [self.root.clone(), self.root.join(LINKS), self.root.join(format!("sockets-v{SOCKET_LAYOUT}"))];
        folders.iter().try_for_each(|folder| make_folder(folder))
    }

    /// Makes the folders, and takes them for this agent alone.
    pub(crate) fn prepare(&self) -> Result<OwnedFd> {
        self.make_folders()?;
        lock_patiently(&self.root)?.with_context(|| {
            format!("another agent is at work on {}; stop it, or give this one its own --bpffs", self.root.display())
        })
    }

    /// The set whose programs are in the links.
    pub(crate) fn current(&self) -> Option<Set> {
        let target = fs::read_link(self.root.join(CURRENT)).ok()?;
        Set::parse(target.to_str()?).filter(|set| self.root.join(set.folder()).exists())
    }

    /// Makes a new set beside the others.
    pub(crate) fn new_set(&self) -> Result<Set> {
        // Sockets may remember a set that has gone, so a name shall not come twice: each of these hashers has another seed.
        let taken: Vec<u32> = self.sets()?.into_iter().map(|set| set.id).collect();
        let drawn = std::iter::repeat_with(|| RandomState::new().build_hasher().finish() as u32);
        let id = drawn.take(100).find(|id| *id != 0 && !taken.contains(id)).context("no name for a set of maps")?;
        let set = Set { schema: SCHEMA_VERSION, id };
        make_folder(&self.root.join(set.folder()))?;
        Ok(set)
    }

    /// Makes a set the current one, in one step.
    pub(crate) fn make_current(&self, set: Set) -> Result<()> {
        let (draft, current) = (self.root.join("next"), self.root.join(CURRENT));
        match fs::remove_file(&draft) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        symlink(set.folder(), &draft)
            .and_then(|()| fs::rename(&draft, &current))
            .with_context(|| format!("cannot make {}", current.display()))
    }

    /// Removes all sets but these. Programs that are in a link keep their maps, pinned or not.
    pub(crate) fn remove_sets_but(&self, kept: &[Set]) -> Result<()> {
        for set in self.sets()?.into_iter().filter(|set| !kept.contains(set)) {
            remove_all(&self.root.join(set.folder()), &mut |_| {})?;
        }
        Ok(())
    }

    fn sets(&self) -> Result<Vec<Set>> {
        let names = entries(&self.root)?.into_iter().filter_map(|path| Set::parse(path.file_name()?.to_str()?));
        Ok(names.collect())
    }
}

/// A folder, locked for this process; `None` where another one has it.
pub(crate) fn lock(folder: &Path) -> Result<Option<OwnedFd>> {
    let directory = open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("cannot open {}", folder.display()))?;
    match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(directory)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot lock {}", folder.display())),
    }
}

/// The same for an agent that starts: the former one may be ending, or somebody may be looking whether there is one.
fn lock_patiently(folder: &Path) -> Result<Option<OwnedFd>> {
    for _ in 0..LOCK_TRIES {
        if let Some(locked) = lock(folder)? {
            return Ok(Some(locked));
        }
        thread::sleep(LOCK_PAUSE);
    }
    lock(folder)
}

/// Takes a cgroup for this agent alone, whatever its pins. The lock is a file that only root may open: a cgroup's own folder everybody may.
pub(crate) fn own_cgroup(cgroup: &Path) -> Result<OwnedFd> {
    let id = fs::metadata(cgroup).with_context(|| format!("cannot read {}", cgroup.display()))?.ino();
    let run = Path::new(RUN);
    fs::create_dir_all(run).with_context(|| format!("cannot create {}", run.display()))?;
    remove_locks(&mut |_| {})?;
    lock_file(&run.join(format!("cgroup-{id}.lock")), LOCK_TRIES)?.with_context(|| {
        format!("another agent serves the cgroup {}; stop it, or give this one another --cgroup", cgroup.display())
    })
}

/// Removes the locks that agents have left which have ended, and tells each; whoever holds one still has it.
///
/// # Errors
/// Their folder cannot be read.
pub fn remove_locks(tell: &mut dyn FnMut(&Path)) -> Result<()> {
    for lock in entries(Path::new(RUN))?.into_iter().filter(|path| path.extension().is_some_and(|it| it == "lock")) {
        if let Ok(Some(_held)) = lock_file(&lock, 1)
            && fs::remove_file(&lock).is_ok()
        {
            tell(&lock);
        }
    }
    Ok(())
}

/// A file, locked for this process; `None` where another one has it.
fn lock_file(path: &Path, tries: u32) -> Result<Option<OwnedFd>> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    for _ in 0..tries {
        let file =
            open(path, flags, Mode::RUSR | Mode::WUSR).with_context(|| format!("cannot open {}", path.display()))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            // One that was removed in between locks nobody out.
            Ok(()) if fs::metadata(path).is_ok_and(|now| fstat(&file).is_ok_and(|own| own.st_ino == now.ino())) => {
                return Ok(Some(file));
            }
            Ok(()) => continue,
            Err(rustix::io::Errno::WOULDBLOCK) if tries > 1 => thread::sleep(LOCK_PAUSE),
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
    }
    Ok(None)
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
    // Links first, so that nothing is rewritten any more when the rest goes.
    let mut all = entries(bpffs)?;
    all.sort_by_key(|path| path.file_name().is_none_or(|name| name != LINKS));
    for link in entries(&bpffs.join(LINKS))? {
        // At once; one for which that fails goes with its pin, a moment later.
        let _ = sys::open(&link).and_then(sys::detach);
    }
    for path in all {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name == CURRENT || name == "next" {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            tell(&path);
        } else if name == LINKS || name.starts_with('v') || name.starts_with("sockets-v") {
            remove_all(&path, &mut tell)?;
        }
    }
    remove_folder(bpffs)
}

fn make_folder(folder: &Path) -> Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("cannot create {}", folder.display()))
        }
        _ => Ok(()),
    }
}

fn remove_all(folder: &Path, tell: &mut dyn FnMut(&Path)) -> Result<()> {
    for pin in entries(folder)? {
        if pin.is_dir() {
            remove_all(&pin, tell)?;
            continue;
        }
        fs::remove_file(&pin).with_context(|| format!("cannot remove {}", pin.display()))?;
        tell(&pin);
    }
    remove_folder(folder)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_sets() {
        let set = Set { schema: 2, id: 17 };
        assert_eq!(Set::parse(&set.folder()), Some(set));
        for other in ["v1", "links", "sockets-v1", "v2-", "v-3", "current", "v2-x"] {
            assert_eq!(Set::parse(other), None, "{other}");
        }
    }
}
