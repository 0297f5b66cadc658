//! Startup checks of the machine. Each missing requirement is a one-line error.

use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use rustix::{
    fs::statfs,
    time::{ClockId, clock_getres},
};

use crate::{
    btf::{self, Offsets},
    error::Unsupported,
};

/// What the programs and the loader need to know about the machine.
#[derive(Debug)]
pub(crate) struct Environment {
    /// The cgroup v2 directory whose processes are served.
    pub(crate) cgroup: PathBuf,
    /// Offsets of the socket fields that the programs read.
    pub(crate) offsets: Offsets,
    /// Depth of the cgroups that count as clients, see [`client_level`].
    pub(crate) client_level: i32,
    /// Length of a kernel tick (`1 / CONFIG_HZ`), in nanoseconds.
    pub(crate) tick_ns: u32,
}

const CGROUP2_MAGIC: u64 = 0x6367_7270;
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
const DEFAULT_BPFFS: &str = "/sys/fs/bpf";

impl Environment {
    pub(crate) fn check(given: Option<&Path>, bpffs: &Path) -> Result<Self, Unsupported> {
        if !rustix::process::geteuid().is_root() {
            return Err(Unsupported("root is needed to load eBPF programs; start the agent as root".to_owned()));
        }
        let cgroup = cgroup(given)?;
        check_bpffs(bpffs)?;
        let offsets = btf::offsets(Path::new("/sys/kernel/btf/vmlinux"))?;
        // The coarse clocks advance once per tick, so their resolution is the tick length.
        let tick = clock_getres(ClockId::MonotonicCoarse);
        let client_level = client_level(&cgroup);
        Ok(Self { cgroup, offsets, client_level, tick_ns: u32::try_from(tick.tv_nsec).unwrap_or_default() })
    }
}

/// Returns the cgroup to serve: `given`, or the root of the cgroup v2 hierarchy.
///
/// # Errors
/// Returns an error if the cgroup does not exist, is not cgroup v2, or no cgroup v2 is mounted.
pub fn cgroup(given: Option<&Path>) -> Result<PathBuf, Unsupported> {
    let cgroup = match given {
        Some(path) => path.to_owned(),
        None => {
            let root = cgroup2_root()?;
            check_is_root(&root)?;
            root
        }
    };
    let unsupported = |what: String| Err(Unsupported(what));
    match filesystem(&cgroup) {
        Some(CGROUP2_MAGIC) => Ok(cgroup),
        Some(_) => {
            unsupported(format!("{} is not on a cgroup v2 file system; set --cgroup to one that is", cgroup.display()))
        }
        None => {
            unsupported(format!("cgroup {} does not exist; create it, or set a different --cgroup", cgroup.display()))
        }
    }
}

/// Checks that a mounted cgroup is the root of the machine's hierarchy.
///
/// In a cgroup namespace, what looks like the root is the cgroup of the container, in which there are no other pods.
fn check_is_root(cgroup: &Path) -> Result<(), Unsupported> {
    /// The kernel numbers the cgroups of a hierarchy from its root on.
    const ROOT: u64 = 1;
    match std::fs::metadata(cgroup).map(|metadata| metadata.ino()) {
        Ok(ROOT) => Ok(()),
        Ok(_) => Err(Unsupported(format!(
            "{} is the cgroup of this container, not of the machine: no pod would be served; mount the host's /sys/fs/cgroup into the container, and set --cgroup to that path",
            cgroup.display()
        ))),
        Err(error) => Err(Unsupported(format!("cannot read {}: {error}", cgroup.display()))),
    }
}

/// Finds the mount point of the cgroup v2 root.
fn cgroup2_root() -> Result<PathBuf, Unsupported> {
    let mounts = procfs::process::Process::myself().and_then(|process| process.mountinfo());
    let mounts = mounts.map_err(|error| Unsupported(format!("cannot read the mount table: {error}")))?;
    let mut roots = mounts.into_iter().filter(|mount| mount.fs_type == "cgroup2" && mount.root == "/");
    roots.next().map(|mount| mount.mount_point).ok_or_else(|| {
        Unsupported("no cgroup v2 is mounted; mount it (mount -t cgroup2 none /sys/fs/cgroup) or boot with systemd.unified_cgroup_hierarchy=1".to_owned())
    })
}

/// The depth of the cgroups that count as clients, below the served cgroup.
///
/// With either driver of the kubelet, these are the pods of the classes Burstable and BestEffort, and the containers of
/// Guaranteed ones.
/// A process cannot leave them, even where it may make cgroups of its own below.
pub(crate) const CLIENT_DEPTH: u32 = 3;

/// Returns the same depth, seen from the root of the hierarchy.
fn client_level(cgroup: &Path) -> i32 {
    let depth = cgroup.ancestors().skip(1).take_while(|above| filesystem(above) == Some(CGROUP2_MAGIC)).count();
    CLIENT_DEPTH as i32 + i32::try_from(depth).unwrap_or_default()
}

/// Checks that `folder` is on a bpffs. Mounts one at [`DEFAULT_BPFFS`] if `folder` is below it and none is mounted.
fn check_bpffs(folder: &Path) -> Result<(), Unsupported> {
    let existing = folder.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    if filesystem(existing) == Some(BPF_FS_MAGIC) {
        return Ok(());
    }
    if existing == Path::new(DEFAULT_BPFFS) {
        let flags =
            rustix::mount::MountFlags::NOSUID | rustix::mount::MountFlags::NODEV | rustix::mount::MountFlags::NOEXEC;
        if rustix::mount::mount("bpf", DEFAULT_BPFFS, "bpf", flags, None).is_ok() {
            tracing::info!("mounted a bpffs at {DEFAULT_BPFFS}");
            return Ok(());
        }
    }
    Err(Unsupported(format!(
        "{} is not on a bpffs; mount one (mount -t bpf bpf {DEFAULT_BPFFS}) or set --bpffs to a directory on one",
        folder.display()
    )))
}

/// Returns whether `path` exists and is on a bpffs.
pub(crate) fn is_bpffs(path: &Path) -> bool {
    filesystem(path) == Some(BPF_FS_MAGIC)
}

fn filesystem(path: &Path) -> Option<u64> {
    statfs(path).ok().map(|stat| stat.f_type as u64 & 0xffff_ffff)
}
