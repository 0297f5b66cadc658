//! Excludes the opted-out pods of this node: finds their cgroups and writes these to the BPF maps.
//!
//! The source decides which pods opt out.
//! The BPF programs identify a pod by its cgroup, which the kubelet creates before any process of the pod runs.
//! The agent learns of new cgroups through inotify.
//! Connections that a pod makes before the agent has reacted are load-balanced as usual.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use portolan_core::model::{Code, Finding, NamespacedName, ObjectRef};
use portolan_datapath::OptOutMap;
use tokio::{sync::Notify, task::block_in_place, time::sleep};

use super::registry::{ByUid, LABEL, OptOutRegistry};

/// Interval of full cgroup scans while any pod opts out, independent of inotify events.
const RESCAN_INTERVAL: Duration = Duration::from_secs(10);
/// Delay between an event and the scan, so that one scan covers a burst of events.
const DEBOUNCE: Duration = Duration::from_millis(5);
/// Maximum depth at which cgroups are searched.
const MAX_DEPTH: u32 = 8;
/// Part of the name of the cgroups below which the kubelet creates those of pods.
const KUBEPODS: &str = "kubepods";

/// Receives a finding by what it is about; `None` ends it.
pub type Note = Box<dyn Fn(&str, Option<Finding>) + Send>;

/// Keeps the kernel's set of excluded cgroups in sync with the [`OptOutRegistry`].
pub struct Enforcer {
    /// Path of the served cgroup, to which the programs are attached.
    pub root: PathBuf,
    /// The BPF maps that hold the excluded cgroups.
    pub kernel: OptOutMap,
    /// The pods to exclude, and those that are excluded.
    pub registry: Arc<OptOutRegistry>,
    /// Receives findings about opt-outs without effect, and about failed writes.
    pub report: Note,
}

impl Enforcer {
    /// Runs until the registry is dropped.
    pub async fn run(mut self) {
        let mut watch = Watch::default();
        let mut wanted = self.registry.wanted.subscribe();
        loop {
            let pods = wanted.borrow_and_update().clone();
            let mut idle = pods.as_ref().is_none_or(ByUid::is_empty);
            if let Some(pods) = pods {
                // A second scan finds the cgroups that appeared before their parents were watched.
                let written = block_in_place(|| {
                    loop {
                        let (written, found) = self.scan(&pods, &mut watch);
                        if !found {
                            break written;
                        }
                    }
                });
                // A failed write is retried even when there is no pod to exclude any more.
                idle &= written;
            }
            tokio::select! {
                changed = wanted.changed() => if changed.is_err() { return },
                () = watch.wakeup.notified() => sleep(DEBOUNCE).await,
                () = sleep(RESCAN_INTERVAL), if !idle => {}
            }
        }
    }

    /// Finds the pods' cgroups and writes them to the kernel. Returns whether the kernel took them, and whether new cgroups
    /// are now watched.
    fn scan(&mut self, pods: &ByUid, watch: &mut Watch) -> (bool, bool) {
        let seen = if pods.is_empty() { Seen::default() } else { Seen::below(&self.root) };
        let mut done = pods.clone();
        let (mut ids, mut own) = (BTreeSet::new(), None);
        for (uid, path, id) in seen.pods {
            let Some(pod) = done.get_mut(&uid) else { continue };
            if has_this_process(&path, MAX_DEPTH) {
                own = Some(NamespacedName::new(&pod.namespace, &pod.name));
                continue;
            }
            let path = path.strip_prefix(&self.root).unwrap_or(&path);
            pod.cgroups.push(path.display().to_string());
            ids.insert(id);
        }
        let own = own.map(|name| {
            let message = format!(
                "Pod {name} runs this agent and cannot opt out: its connections verify that the BPF programs work"
            );
            Finding::new(Code::OptOutLabel, ObjectRef::new("Pod", &name), message)
        });
        (self.report)("opt-out/own", own);
        let written = self.kernel.set(&ids);
        let is_written = written.is_ok();
        match written {
            Ok(()) => {
                (self.report)("opt-out/kernel", None);
                let mut shown = self.registry.done();
                if *shown != done {
                    tracing::info!(pods = done.len(), cgroups = ids.len(), "excluded pods changed ({LABEL})");
                    *shown = done;
                }
            }
            Err(error) => {
                let message = format!("cannot update the excluded pods ({LABEL}): {error:#}; retrying");
                (self.report)(
                    "opt-out/kernel",
                    Some(Finding::new(Code::KernelWrite, ObjectRef::global("Kernel", ""), message)),
                );
            }
        }
        (is_written, watch.follow(seen.above))
    }
}

/// Watches for created and removed cgroups.
///
/// If the kernel's limit of inotify watches is reached, scans every [`RESCAN_INTERVAL`] replace the events.
#[derive(Default)]
struct Watch {
    wakeup: Arc<Notify>,
    watcher: Option<RecommendedWatcher>,
    /// Inode of each watched cgroup by path. A new cgroup at the same path needs a new watch.
    watched: BTreeMap<PathBuf, u64>,
}

impl Watch {
    /// Watches exactly the cgroups in `above`. Returns whether any of them is newly watched.
    fn follow(&mut self, above: BTreeMap<PathBuf, u64>) -> bool {
        if above.is_empty() {
            (self.watcher, self.watched) = (None, BTreeMap::new());
            return false;
        }
        if self.watcher.is_none() {
            let wakeup = Arc::clone(&self.wakeup);
            self.watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
                // Ignore accesses: the scans themselves cause them.
                if event.map_or(true, |it| it.kind.is_create() || it.kind.is_remove() || it.need_rescan()) {
                    wakeup.notify_one();
                }
            })
            .inspect_err(|error| {
                tracing::warn!("cannot watch cgroups: {error}; scanning every {RESCAN_INTERVAL:?} instead");
            })
            .ok();
        }
        let Some(watcher) = &mut self.watcher else { return false };
        for (gone, _) in self.watched.extract_if(.., |path, id| above.get(path) != Some(id)) {
            // Best effort: the cgroup may no longer exist.
            let _ = watcher.unwatch(&gone);
        }
        let before = self.watched.len();
        for (path, id) in above {
            if !self.watched.contains_key(&path) && watcher.watch(&path, RecursiveMode::NonRecursive).is_ok() {
                self.watched.insert(path, id);
            }
        }
        self.watched.len() > before
    }
}

/// Returns whether this process is in the cgroup or, down to `depth` levels, below it.
fn has_this_process(cgroup: &Path, depth: u32) -> bool {
    let own = std::process::id().to_string();
    let here = fs::read_to_string(cgroup.join("cgroup.procs")).is_ok_and(|all| all.lines().any(|line| line == own));
    here || (depth > 0
        && fs::read_dir(cgroup).into_iter().flatten().flatten().any(|entry| {
            entry.file_type().is_ok_and(|kind| kind.is_dir()) && has_this_process(&entry.path(), depth - 1)
        }))
}

/// The relevant cgroups below the served one.
#[derive(Debug, Default)]
struct Seen {
    /// The cgroups of pods: the pod's UID, the cgroup's path and its ID (the inode).
    pods: Vec<(String, PathBuf, u64)>,
    /// Cgroups in which those of pods, or their ancestors, may appear, each with its ID (the inode).
    above: BTreeMap<PathBuf, u64>,
}

impl Seen {
    fn below(root: &Path) -> Self {
        let mut seen = Self::default();
        // Best effort: a cgroup that disappears meanwhile is skipped.
        let _ = seen.visit(root, MAX_DEPTH, false);
        let paths: Vec<PathBuf> = seen.above.keys().cloned().chain([root.to_owned()]).collect();
        for above in paths.iter().flat_map(|path| path.ancestors().take_while(|above| above.starts_with(root))) {
            if let Ok(metadata) = fs::metadata(above) {
                seen.above.insert(above.to_owned(), metadata.ino());
            }
        }
        seen
    }

    /// `in_kubepods`: whether the folder is a `kubepods` cgroup or below one.
    fn visit(&mut self, folder: &Path, depth: u32, in_kubepods: bool) -> io::Result<()> {
        for entry in fs::read_dir(folder)?.flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let path = entry.path();
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if let Some(uid) = in_kubepods.then(|| pod_of(&name)).flatten() {
                if let Ok(metadata) = entry.metadata() {
                    self.pods.push((uid, path, metadata.ino()));
                }
                continue;
            }
            let in_kubepods = in_kubepods || name.contains(KUBEPODS);
            if in_kubepods {
                self.above.insert(path.clone(), 0);
            }
            if depth > 0 {
                let _ = self.visit(&path, depth - 1, in_kubepods);
            }
        }
        Ok(())
    }
}

/// Returns the UID of the pod whose cgroup has this name; `None` if it is not a pod's cgroup.
///
/// The format is `pod<uid>`, or `kubepods-burstable-pod<uid>.slice` with systemd, where `_` replaces `-` in the UID.
fn pod_of(name: &str) -> Option<String> {
    let uid = match name.strip_suffix(".slice") {
        Some(slice) => slice.rsplit_once("-pod")?.1.replace('_', "-"),
        None => name.strip_prefix("pod")?.to_owned(),
    };
    (!uid.is_empty()).then_some(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pod_uid_is_parsed_from_cgroup_name() {
        let uid = "7c5e0b7e-9a1f-4d2c-8f2e-0123456789ab";
        let of = |name: &str| pod_of(name);
        assert_eq!(of(&format!("pod{uid}")).as_deref(), Some(uid));
        let slice = uid.replace('-', "_");
        assert_eq!(of(&format!("kubepods-pod{slice}.slice")).as_deref(), Some(uid));
        assert_eq!(of(&format!("kubelet-kubepods-besteffort-pod{slice}.slice")).as_deref(), Some(uid));
        assert_eq!(of("kubepods-burstable.slice"), None);
        assert_eq!(of("burstable"), None);
        assert_eq!(of("pod"), None);
    }

    #[test]
    fn pod_cgroups_are_found_below_kubepods_but_not_inside_pods() {
        let root = std::env::temp_dir().join(format!("portolan-opt-out-{}", std::process::id()));
        for path in
            ["system.slice/poda", "kubelet/kubepods/burstable/podb/podc", "kubelet/kubepods/podd", "kubepods.slice"]
        {
            fs::create_dir_all(root.join(path)).unwrap();
        }
        let seen = Seen::below(&root);
        let mut pods: Vec<String> = seen.pods.iter().map(|(uid, ..)| uid.clone()).collect();
        pods.sort();
        let above: Vec<_> =
            seen.above.keys().map(|path| path.strip_prefix(&root).unwrap().display().to_string()).collect();
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(pods, ["b", "d"]);
        assert_eq!(above, ["", "kubelet", "kubelet/kubepods", "kubelet/kubepods/burstable", "kubepods.slice"]);
    }
}
