//! Pods of this node that are left alone, because a label asks for it: which they are is the source's to say, and where the kernel finds them is
//! found here.
//!
//! The programs know a pod by its cgroup, which the kubelet makes before anything of the pod runs. The kernel tells the agent of it; what the
//! pod dials before the agent has answered is given to endpoints as that of others.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use portolan_core::model::{Code, Finding};
use portolan_datapath::OptOutMap;
use tokio::{sync::Notify, task::block_in_place, time::sleep};

use super::registry::{ByUid, LABEL, OptOutRegistry};
use crate::source::Sources;

/// While somebody is to be left alone, cgroups are looked through so often, whatever was told of them.
const LOOK: Duration = Duration::from_secs(10);
/// What is made together is looked at together.
const GATHER: Duration = Duration::from_millis(5);
/// Pods' cgroups are no deeper than this.
const DEPTH: u32 = 8;
/// Part of the name of the cgroup below which the kubelet has all pods.
const KUBEPODS: &str = "kubepods";

/// Has the kernel leave alone whom the board names.
pub struct Enforcer {
    /// The cgroup that is served.
    pub root: PathBuf,
    /// The kernel's side.
    pub kernel: OptOutMap,
    /// Who is wanted.
    pub registry: Arc<OptOutRegistry>,
    /// Where what is wrong is noted.
    pub sources: Arc<Sources>,
}

impl Enforcer {
    /// Works until nobody can want anything any more.
    pub async fn run(mut self) {
        let mut watch = Watch::default();
        let mut wanted = self.registry.wanted.subscribe();
        loop {
            let pods = wanted.borrow_and_update().clone();
            let idle = pods.as_ref().is_none_or(ByUid::is_empty);
            if let Some(pods) = pods {
                // What was made before it was watched is seen the second time.
                block_in_place(|| while self.look(&pods, &mut watch) {});
            }
            tokio::select! {
                changed = wanted.changed() => if changed.is_err() { return },
                () = watch.told.notified() => sleep(GATHER).await,
                () = sleep(LOOK), if !idle => {}
            }
        }
    }

    /// Finds the pods and tells the kernel; whether there are cgroups that were not watched until now.
    fn look(&mut self, pods: &ByUid, watch: &mut Watch) -> bool {
        let seen = if pods.is_empty() { Seen::default() } else { Seen::below(&self.root) };
        let mut done = pods.clone();
        let (mut ids, mut own) = (BTreeSet::new(), None);
        for (uid, path, id) in seen.pods {
            let Some(pod) = done.get_mut(&uid) else { continue };
            if has_this_process(&path, DEPTH) {
                own = Some(format!("{}/{}", pod.namespace, pod.name));
                continue;
            }
            let path = path.strip_prefix(&self.root).unwrap_or(&path);
            pod.cgroups.push(path.display().to_string());
            ids.insert(id);
        }
        let own = own.map(|name| {
            let message = format!(
                "Pod {name} is this agent's own, and is not left alone: its connections show whether the programs work"
            );
            Finding::new(Code::OptOutLabel, format!("Pod {name}"), message)
        });
        self.sources.note("opt-out/own", own);
        match self.kernel.set(&ids) {
            Ok(()) => {
                self.sources.note("opt-out/kernel", None);
                let mut shown = self.registry.done();
                if *shown != done {
                    tracing::info!(pods = done.len(), cgroups = ids.len(), "pods that are left alone ({LABEL})");
                    *shown = done;
                }
            }
            Err(error) => {
                let message =
                    format!("pods that ask to be left alone ({LABEL}) are not all: {error:#}; tried again soon");
                self.sources.note("opt-out/kernel", Some(Finding::new(Code::KernelWrite, "Kernel", message)));
            }
        }
        watch.follow(seen.above)
    }
}

/// What tells of cgroups that come and go. Where the kernel has no more watches to give, they are looked through every [`LOOK`].
#[derive(Default)]
struct Watch {
    told: Arc<Notify>,
    watcher: Option<RecommendedWatcher>,
    /// By path, with their ids: another one at the same path has to be watched anew.
    watched: BTreeMap<PathBuf, u64>,
}

impl Watch {
    /// Watches these and no others; whether some were not watched until now.
    fn follow(&mut self, above: BTreeMap<PathBuf, u64>) -> bool {
        if above.is_empty() {
            (self.watcher, self.watched) = (None, BTreeMap::new());
            return false;
        }
        if self.watcher.is_none() {
            let told = Arc::clone(&self.told);
            self.watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
                // To look is an event as well.
                if event.map_or(true, |it| it.kind.is_create() || it.kind.is_remove() || it.need_rescan()) {
                    told.notify_one();
                }
            })
            .inspect_err(|error| {
                tracing::warn!("cgroups cannot be watched: {error}; they are looked through every {LOOK:?}");
            })
            .ok();
        }
        let Some(watcher) = &mut self.watcher else { return false };
        for (gone, _) in self.watched.extract_if(.., |path, id| above.get(path) != Some(id)) {
            // It may be gone itself.
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

/// Whether this process is in a cgroup, or below it.
fn has_this_process(cgroup: &Path, depth: u32) -> bool {
    let own = std::process::id().to_string();
    let here = fs::read_to_string(cgroup.join("cgroup.procs")).is_ok_and(|all| all.lines().any(|line| line == own));
    here || (depth > 0
        && fs::read_dir(cgroup).into_iter().flatten().flatten().any(|entry| {
            entry.file_type().is_ok_and(|kind| kind.is_dir()) && has_this_process(&entry.path(), depth - 1)
        }))
}

/// The cgroups below one.
#[derive(Debug, Default)]
struct Seen {
    /// Those of pods: the pod's id, where it is, and its own id.
    pods: Vec<(String, PathBuf, u64)>,
    /// Those in which cgroups of pods may be made, with their ids.
    above: BTreeMap<PathBuf, u64>,
}

impl Seen {
    fn below(root: &Path) -> Self {
        let mut seen = Self::default();
        // What goes away meanwhile is not there.
        let _ = seen.visit(root, DEPTH, false);
        let paths: Vec<PathBuf> = seen.above.keys().cloned().chain([root.to_owned()]).collect();
        for above in paths.iter().flat_map(|path| path.ancestors().take_while(|above| above.starts_with(root))) {
            if let Ok(metadata) = fs::metadata(above) {
                seen.above.insert(above.to_owned(), metadata.ino());
            }
        }
        seen
    }

    /// `of_kubelet`: whether all in the folder is the kubelet's.
    fn visit(&mut self, folder: &Path, depth: u32, of_kubelet: bool) -> io::Result<()> {
        for entry in fs::read_dir(folder)?.flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let path = entry.path();
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if let Some(uid) = of_kubelet.then(|| pod_of(&name)).flatten() {
                if let Ok(metadata) = entry.metadata() {
                    self.pods.push((uid, path, metadata.ino()));
                }
                continue;
            }
            let of_kubelet = of_kubelet || name.contains(KUBEPODS);
            if of_kubelet {
                self.above.insert(path.clone(), 0);
            }
            if depth > 0 {
                let _ = self.visit(&path, depth - 1, of_kubelet);
            }
        }
        Ok(())
    }
}

/// The id of the pod whose cgroup has this name: `pod<uid>`, or with systemd `kubepods-burstable-pod<uid>.slice`, in which `_` stands for `-`.
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
    fn cgroups_of_pods_are_told_by_their_names() {
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
    fn only_below_kubepods_and_not_within_pods() {
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
