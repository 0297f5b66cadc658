//! The bpffs layout: maps and links are pinned so that they outlive the agent.
//!
//! ```text
//! <bpffs>/links/<program>            live links; programs are replaced inside them
//!         sockets-v1/<map>           flows of UDP sockets, and excluded cgroups
//!         sockets-v3/<map>           the state of connected sockets
//!         v<schema>-<set>/<map>      one map set: all other maps
//!         current -> v<schema>-<set> the set that the linked programs use
//! ```
//! An agent with a different schema or different map sizes builds a new set beside the current one and fills it.
//! It then replaces the programs in the live links, and only after that makes the new set current.
//! If the agent is killed on the way, the previous set stays in effect.

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

use portolan_common::{SCHEMA_VERSION, SHARED_LAYOUT, SOCKET_LAYOUT};
use portolan_core::table::Sizes;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, open};

use crate::{
    error::{Context as _, Result, bail, ensure},
    map_specs::{self, MapSpec, Scope},
    preflight::is_bpffs,
    sys,
};

const CURRENT: &str = "current";
const LINKS: &str = "links";
/// The directory of the lock files by which agents claim their cgroups.
const RUN: &str = "/run/portolan";
/// Attempts to take a lock at startup, [`LOCK_PAUSE`] apart.
const LOCK_TRIES: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// The pin paths below one bpffs directory.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
}

/// Identifies one pinned map set, in the directory `v<schema>-<id>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Set {
    pub(crate) schema: u32,
    /// Its lower half is not 0, and per-socket state refers to that. The upper half is random, for [`FrontendHash`].
    ///
    /// [`FrontendHash`]: portolan_common::FrontendHash
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
    /// Returns the pin paths below `bpffs`, a directory on a bpffs. It need not exist yet.
    pub fn new(bpffs: &Path) -> Self {
        Self { root: bpffs.to_owned() }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the pin path of the link of program `name`.
    pub fn link(&self, name: &str) -> PathBuf {
        self.root.join(LINKS).join(name)
    }

    pub(crate) fn map(&self, set: Set, name: &str) -> PathBuf {
        self.root.join(set.folder()).join(name)
    }

    /// Where a map is pinned, with this set as the current one, and these sizes.
    pub(crate) fn map_pin(&self, set: Set, spec: &MapSpec, sizes: &Sizes) -> PathBuf {
        match spec.scope {
            Scope::Set => self.map(set, spec.name),
            Scope::Shared => self.shared_folder(SHARED_LAYOUT).join(spec.name),
            Scope::Sockets => self.shared_folder(SOCKET_LAYOUT).join(spec.name),
            Scope::Connections => {
                self.shared_folder(SOCKET_LAYOUT).join(format!("{}-{}", spec.name, sizes.connections))
            }
        }
    }

    fn shared_folder(&self, layout: u32) -> PathBuf {
        self.root.join(format!("sockets-v{layout}"))
    }

    /// Returns the sizes with which `CONNECTIONS` is pinned, whatever the number of connections is.
    pub(crate) fn connections(&self) -> Option<Sizes> {
        let of_pin = |pin: &PathBuf| {
            let connections = pin.file_name()?.to_str()?.strip_prefix("CLIENTS-")?.parse().ok()?;
            Some(Sizes { connections, ..Sizes::default() })
        };
        entries(&self.shared_folder(SOCKET_LAYOUT)).ok()?.iter().find_map(of_pin)
    }

    /// Removes the pins of maps that all sets share but that these programs do not use: those of another layout or
    /// another number of connections.
    pub(crate) fn remove_unused_shared(&self, set: Set, sizes: &Sizes) -> Result<()> {
        let used: Vec<PathBuf> = map_specs::MAPS.iter().map(|spec| self.map_pin(set, spec, sizes)).collect();
        let is_shared = |path: &PathBuf| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("sockets-v")) && path.is_dir()
        };
        for folder in entries(&self.root)?.into_iter().filter(is_shared) {
            for pin in entries(&folder)?.into_iter().filter(|pin| !used.contains(pin)) {
                fs::remove_file(&pin).with_context(|| format!("cannot remove {}", pin.display()))?;
            }
        }
        Ok(())
    }

    /// Returns the pin path of map `name` in the current set, or `None` if there is no current set.
    pub fn current_map(&self, name: &str) -> Option<PathBuf> {
        Some(self.map(self.current()?, name))
    }

    /// Creates the directories that do not exist, accessible to root only.
    pub(crate) fn make_folders(&self) -> Result<()> {
        let shared = [SHARED_LAYOUT, SOCKET_LAYOUT].map(|layout| self.shared_folder(layout));
        let folders = [self.root.clone(), self.root.join(LINKS)].into_iter().chain(shared);
        folders.into_iter().try_for_each(|folder| make_folder(&folder))
    }

    /// Creates the directories and locks them for this agent.
    pub(crate) fn prepare(&self) -> Result<OwnedFd> {
        self.make_folders()?;
        lock_with_retry(&self.root)?.with_context(|| {
            format!("another agent already uses {}; stop it, or give this one its own --bpffs", self.root.display())
        })
    }

    /// Returns the set that the linked programs use, or `None` if there is none.
    pub(crate) fn current(&self) -> Option<Set> {
        let target = fs::read_link(self.root.join(CURRENT)).ok()?;
        Set::parse(target.to_str()?).filter(|set| self.root.join(set.folder()).exists())
    }

    /// Creates the directory of a new, empty set beside the existing ones.
    pub(crate) fn new_set(&self) -> Result<Set> {
        // Sockets may refer to a removed set by the lower half of its id, so these must not repeat.
        // Each `RandomState` has a different seed, which makes its hash a random number.
        let taken: Vec<u16> = self.sets()?.into_iter().map(|set| set.id as u16).collect();
        let next = taken.iter().max().map(|last| last.wrapping_add(1));
        let drawn = std::iter::repeat_with(|| RandomState::new().build_hasher().finish() as u16);
        let mut candidates = next.into_iter().chain(drawn.take(100));
        let lower = candidates.find(|id| *id != 0 && !taken.contains(id)).context("no unused map set id")?;
        let upper = RandomState::new().build_hasher().finish() as u16;
        let set = Set { schema: SCHEMA_VERSION, id: u32::from(upper) << 16 | u32::from(lower) };
        make_folder(&self.root.join(set.folder()))?;
        Ok(set)
    }

    /// Makes `set` the current one, atomically.
    pub(crate) fn make_current(&self, set: Set) -> Result<()> {
        let (draft, current) = (self.root.join("next"), self.root.join(CURRENT));
        match fs::remove_file(&draft) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        symlink(set.folder(), &draft)
            .and_then(|()| fs::rename(&draft, &current))
            .with_context(|| format!("cannot create {}", current.display()))
    }

    /// Removes all sets except `retained`.
    /// Linked programs hold references to their maps, so removing the pins does not affect them.
    pub(crate) fn remove_sets_but(&self, retained: &[Set]) -> Result<()> {
        for set in self.sets()?.into_iter().filter(|set| !retained.contains(set)) {
            remove_all(&self.root.join(set.folder()), &mut |_| {})?;
        }
        Ok(())
    }

    fn sets(&self) -> Result<Vec<Set>> {
        let names = entries(&self.root)?.into_iter().filter_map(|path| Set::parse(path.file_name()?.to_str()?));
        Ok(names.collect())
    }
}

/// Locks a directory for this process. Returns `None` if another process holds the lock.
pub(crate) fn lock(folder: &Path) -> Result<Option<OwnedFd>> {
    let directory = open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("cannot open {}", folder.display()))?;
    match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(directory)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot lock {}", folder.display())),
    }
}

/// Like [`lock`], with retries, for agent startup.
/// A previous agent may still be shutting down, or `portolan doctor` may hold the lock for a moment.
fn lock_with_retry(folder: &Path) -> Result<Option<OwnedFd>> {
    for _ in 0..LOCK_TRIES {
        if let Some(locked) = lock(folder)? {
            return Ok(Some(locked));
        }
        thread::sleep(LOCK_PAUSE);
    }
    lock(folder)
}

/// Locks a cgroup for this agent, independently of the pins in use.
/// The lock is a file that only root can open; any user could lock the cgroup directory itself.
pub(crate) fn own_cgroup(cgroup: &Path) -> Result<OwnedFd> {
    let id = fs::metadata(cgroup).with_context(|| format!("cannot read {}", cgroup.display()))?.ino();
    let run = Path::new(RUN);
    fs::create_dir_all(run).with_context(|| format!("cannot create {}", run.display()))?;
    remove_locks(&mut |_| {})?;
    lock_file(&run.join(format!("cgroup-{id}.lock")), LOCK_TRIES)?.with_context(|| {
        format!("another agent serves the cgroup {}; stop it, or give this one a different --cgroup", cgroup.display())
    })
}

/// Removes stale cgroup lock files of agents that have exited, and calls `on_removed` with each path.
/// Locks that a running agent holds stay.
///
/// # Errors
/// Returns an error if the lock directory cannot be read.
pub fn remove_locks(on_removed: &mut dyn FnMut(&Path)) -> Result<()> {
    for lock in entries(Path::new(RUN))?.into_iter().filter(|path| path.extension().is_some_and(|it| it == "lock")) {
        if let Ok(Some(_held)) = lock_file(&lock, 1)
            && fs::remove_file(&lock).is_ok()
        {
            on_removed(&lock);
        }
    }
    Ok(())
}

/// Locks a file for this process, creating it if necessary. Returns `None` if another process holds the lock.
fn lock_file(path: &Path, tries: u32) -> Result<Option<OwnedFd>> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    for _ in 0..tries {
        let file =
            open(path, flags, Mode::RUSR | Mode::WUSR).with_context(|| format!("cannot open {}", path.display()))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            // A file that was removed before it was locked excludes no other process.
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

/// Detaches all programs and removes all state pinned below `bpffs`, of every version.
/// Calls `on_removed` with the path of each removed pin.
///
/// # Errors
/// Returns an error if an agent is still running, `bpffs` is not on a bpffs, or a pin cannot be removed.
pub fn cleanup(bpffs: &Path, mut on_removed: impl FnMut(&Path)) -> Result<()> {
    if !bpffs.exists() {
        return Ok(());
    }
    ensure!(is_bpffs(bpffs), "{} is not on a bpffs, so Portolan cannot have pinned anything there", bpffs.display());
    let Some(_lock) = lock(bpffs)? else {
        bail!("an agent is running on {}; stop it first", bpffs.display());
    };
    // Links first, so that no connection is rewritten while the maps are removed.
    let mut all = entries(bpffs)?;
    all.sort_by_key(|path| path.file_name().is_none_or(|name| name != LINKS));
    for link in entries(&bpffs.join(LINKS))? {
        // Best effort: without an explicit detach, the kernel detaches the link some time after its pin is removed.
        let _ = sys::open(&link).and_then(sys::detach);
    }
    for path in all {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name == CURRENT || name == "next" {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            on_removed(&path);
        } else if name == LINKS || name.starts_with('v') || name.starts_with("sockets-v") {
            remove_all(&path, &mut on_removed)?;
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

fn remove_all(folder: &Path, on_removed: &mut dyn FnMut(&Path)) -> Result<()> {
    for pin in entries(folder)? {
        if pin.is_dir() {
            remove_all(&pin, on_removed)?;
            continue;
        }
        fs::remove_file(&pin).with_context(|| format!("cannot remove {}", pin.display()))?;
        on_removed(&pin);
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
    fn set_folder_name_round_trips() {
        let set = Set { schema: 2, id: 17 };
        assert_eq!(Set::parse(&set.folder()), Some(set));
        for other in ["v1", "links", "sockets-v1", "v2-", "v-3", "current", "v2-x"] {
            assert_eq!(Set::parse(other), None, "{other}");
        }
    }
}
