//! The configuration directory: `DIR/*.yaml` for the mesh, `DIR/<cluster-id>/**/*.yaml` for a cluster.
//!
//! Watched, not polled. A file that somebody still has open for writing is left as it was until it is closed; a
//! scan once a minute mends what a lost event may have missed.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use notify::{
    Event, EventKind, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode, ModifyKind},
};
use portolan_core::{
    decode::{DecodeOptions, fingerprint, read_text},
    model::{Code, Finding, Scope},
    store::{Contents, Update},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout_at},
};

use super::status::{Sources, Trouble};

/// Directories below a cluster's that are still looked into.
const MAX_DEPTH: usize = 8;
/// Files that are larger are not read.
const MAX_BYTES: u64 = 128 << 20;
/// Events of one change come in bursts; they are waited for this long.
const BURST: Duration = Duration::from_millis(20);
/// A file that is written without end does not hold up the others for longer than this.
const LONGEST_BURST: Duration = Duration::from_millis(200);
/// What `get sources` counts.
const FILES: &str = "files";

/// What is known of a configuration directory.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
    reader: DecodeOptions,
    seen: BTreeMap<String, Seen>,
    /// What was known of files before the last scan, as far as it found them changed.
    before: BTreeMap<String, Option<Seen>>,
    /// Files and folders that could not be read, and never were.
    unread: BTreeSet<String>,
    /// Those of them that the last scan took out.
    cleared: BTreeSet<String>,
}

/// A file as it was read last.
#[derive(Clone, Copy, Debug)]
struct Seen {
    fingerprint: u64,
    /// Whether objects from it are in force.
    holds: bool,
}

impl Directory {
    /// A directory that was not looked at yet.
    pub fn new(root: PathBuf, reader: DecodeOptions) -> Self {
        Self {
            root,
            reader,
            seen: BTreeMap::new(),
            before: BTreeMap::new(),
            unread: BTreeSet::new(),
            cleared: BTreeSet::new(),
        }
    }

    /// Looks at the whole directory and reports what is not as it was. Files in `being_written` count as
    /// unchanged.
    ///
    /// # Errors
    /// The directory itself cannot be read; nothing has changed then.
    pub fn scan(&mut self, being_written: &BTreeSet<PathBuf>) -> io::Result<Vec<Update>> {
        let root = identity(&self.root)?;
        let mut found = Found::default();
        for (path, is_directory) in list(&self.root)? {
            if is_directory {
                let cluster = Scope::Cluster(file_name(&path));
                found.visited.clear();
                found.walk(&path, &cluster, MAX_DEPTH);
            } else if is_yaml(&path) {
                found.files.insert(path, Scope::Mesh);
            }
        }
        // Had it been moved away meanwhile, all that was in it would seem to be gone.
        if identity(&self.root)? != root {
            return Err(io::Error::other("it was exchanged while it was looked at"));
        }
        let Found { files, unreadable, mut troubles, .. } = found;
        let mut updates = Vec::new();
        let is_gone = |origin: &String| {
            let path = self.root.join(origin);
            // Where a folder could not be read, its files may still be there.
            !files.contains_key(&path) && !unreadable.keys().any(|folder| path.starts_with(folder))
        };
        let gone: Vec<_> = self.seen.keys().filter(|origin| is_gone(origin)).cloned().collect();
        for origin in gone {
            self.seen.remove(&origin);
            updates.push(Update::Remove { origin });
        }
        self.before.clear();
        let (mut unread, mut read) = (BTreeMap::new(), Vec::new());
        for (folder, error) in &unreadable {
            let message = format!("cannot be read: {error}. What its files last said stays in force");
            unread.insert(self.origin(folder), message);
        }
        for (path, scope) in files {
            let origin = self.origin(&path);
            if being_written.contains(&path) {
                continue;
            }
            match read_file(&path) {
                Ok(text) => read.extend(self.changed(origin, &scope, &text)),
                Err(error) if self.seen.contains_key(&origin) => {
                    let message = format!("cannot be read: {error}. What it last said stays in force");
                    troubles.push(Finding::new(Code::Unreadable, &origin, message));
                }
                Err(error) => drop(unread.insert(origin, format!("cannot be read: {error}"))),
            }
        }
        let root = &self.root;
        let is_over = |origin: &String| !unread.contains_key(origin) && !being_written.contains(&root.join(origin));
        self.cleared = self.unread.extract_if(.., |origin| is_over(origin)).collect();
        // What could be read now is reported as such.
        for origin in self.cleared.iter().filter(|origin| !self.seen.contains_key(*origin)) {
            updates.push(Update::Remove { origin: origin.clone() });
        }
        for (origin, message) in unread {
            if self.unread.insert(origin.clone()) {
                let findings = vec![Finding::new(Code::Unreadable, &origin, message).from_source(&origin)];
                updates.push(Update::Replace { origin, contents: Contents { findings, ..Contents::default() } });
            }
        }
        updates.extend(read);
        updates.push(Update::SourceFindings(troubles));
        Ok(updates)
    }

    /// Reports files that nothing is known of, for they are being written, as such that could not be read.
    fn doubt(&mut self, being_written: &BTreeSet<PathBuf>) -> Vec<Update> {
        let mut updates = Vec::new();
        for path in being_written.iter().filter(|path| is_yaml(path) && !file_name(path).starts_with('.')) {
            let origin = self.origin(path);
            if !self.seen.contains_key(&origin) && self.unread.insert(origin.clone()) {
                let findings = vec![Finding::new(Code::EmptyFile, &origin, "is being written").from_source(&origin)];
                updates.push(Update::Replace { origin, contents: Contents { findings, ..Contents::default() } });
            }
        }
        updates
    }

    fn origin(&self, path: &Path) -> String {
        path.strip_prefix(&self.root).unwrap_or(path).to_string_lossy().into_owned()
    }

    fn changed(&mut self, origin: String, scope: &Scope, text: &str) -> Option<Update> {
        let before = self.seen.get(&origin).copied();
        if before.is_some_and(|before| before.fingerprint == fingerprint(text)) {
            return None;
        }
        let mut contents = read_text(self.reader, scope, &origin, text);
        let held = before.is_some_and(|before| before.holds);
        if held && contents.empty {
            contents.findings.clear();
            contents.complete = false;
            let message =
                "the file is empty all of a sudden: what it held stays in force; delete the file if it shall go";
            contents.findings.push(Finding::new(Code::Emptied, &origin, message).from_source(&origin));
        }
        let holds = !contents.objects.is_empty() || (held && !contents.complete);
        self.seen.insert(origin.clone(), Seen { fingerprint: contents.fingerprint, holds });
        self.before.insert(origin.clone(), before);
        Some(Update::Replace { origin, contents })
    }

    /// Takes back what the last scan saw of these files, for it may have seen them half written.
    fn forget(&mut self, updates: &mut Vec<Update>, being_written: &BTreeSet<PathBuf>) {
        updates.retain(|update| match update {
            Update::Replace { origin, .. } if being_written.contains(&self.root.join(origin)) => {
                match self.before.remove(origin).flatten() {
                    Some(before) => self.seen.insert(origin.clone(), before),
                    None => self.seen.remove(origin),
                };
                // Of what never was read, nothing is known still; what was only now found unreadable is found so again.
                if self.cleared.contains(origin) {
                    self.unread.insert(origin.clone());
                } else {
                    self.unread.remove(origin);
                }
                false
            }
            _ => true,
        });
    }
}

/// A file of any other kind could be without end, and so could reading it.
fn read_file(path: &Path) -> io::Result<String> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no ordinary file"));
    }
    if metadata.len() > MAX_BYTES {
        let mib = MAX_BYTES >> 20;
        return Err(io::Error::other(format!("it is larger than {mib} MiB; make several of it")));
    }
    std::fs::read_to_string(path)
}

/// What a walk through the folders has found.
#[derive(Default)]
struct Found {
    files: BTreeMap<PathBuf, Scope>,
    unreadable: BTreeMap<PathBuf, String>,
    troubles: Vec<Finding>,
    /// Device and inode of each folder on the way: symbolic links may lead in circles.
    visited: BTreeSet<(u64, u64)>,
}

impl Found {
    fn walk(&mut self, folder: &Path, scope: &Scope, depth: usize) {
        if identity(folder).is_ok_and(|identity| !self.visited.insert(identity)) {
            return;
        }
        let entries = match list(folder) {
            Ok(entries) => entries,
            Err(error) => {
                self.unreadable.insert(folder.to_owned(), error.to_string());
                return;
            }
        };
        for (path, is_directory) in entries {
            match is_directory {
                true if depth == 0 => {
                    let message = format!("is nested deeper than {MAX_DEPTH} folders: left out");
                    self.troubles.push(Finding::new(Code::TooLarge, path.display(), message));
                }
                true => self.walk(&path, scope, depth - 1),
                false if is_yaml(&path) => {
                    self.files.insert(path, scope.clone());
                }
                false => {}
            }
        }
    }
}

/// What tells a directory from another one in its place.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Entries and whether they are directories, in order, without hidden ones (editors' and Kubernetes' own).
fn list(directory: &Path) -> io::Result<Vec<(PathBuf, bool)>> {
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if file_name(&path).starts_with('.') {
            continue;
        }
        match std::fs::metadata(&path) {
            Ok(metadata) => entries.push((path, metadata.is_dir())),
            // It is gone by now, or a link to nowhere.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Whoever reads it will say what is wrong.
            Err(_) => entries.push((path, false)),
        }
    }
    entries.sort();
    Ok(entries)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn is_yaml(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml" || extension == "json")
}

/// Whether there is such a directory.
///
/// # Errors
/// There is none, or it cannot be read.
pub fn check(root: &Path) -> anyhow::Result<()> {
    use anyhow::Context as _;
    std::fs::read_dir(root).map(drop).with_context(|| format!("--config {}: cannot be read", root.display()))
}

/// Reports the directory's contents, and then each change, until the receiver is gone. It looks at all of it `every` so often, whatever
/// the watch says.
///
/// # Errors
/// The directory cannot be read or watched at the start.
pub async fn run(
    root: PathBuf,
    reader: DecodeOptions,
    every: Duration,
    sources: Arc<Sources>,
    updates: mpsc::Sender<Vec<Update>>,
) -> anyhow::Result<()> {
    use anyhow::Context as _;
    let root = std::fs::canonicalize(&root).with_context(|| format!("--config {}: cannot be read", root.display()))?;
    let (sender, mut events) = mpsc::unbounded_channel();
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        if event.as_ref().is_ok_and(|event| is_mere_reading(event.kind)) {
            return;
        }
        // The receiver is gone only when the agent ends.
        let _ = sender.send(event);
    })?;
    watcher.watch(&root, RecursiveMode::Recursive).with_context(|| format!("cannot watch {}", root.display()))?;

    let mut directory = Directory::new(root.clone(), reader);
    let mut being_written = BTreeSet::new();
    let first;
    (directory, first) = scan(directory, &being_written).await?;
    let mut first = first.with_context(|| format!("cannot read {}", root.display()))?;
    // Files that somebody is writing just now are not believed yet.
    let mut again = drain(&mut events, &mut being_written).await;
    directory.forget(&mut first, &being_written);
    first.extend(directory.doubt(&being_written));
    first.push(Update::Synced);
    sources.synced("", FILES, directory.seen.len(), None);
    if updates.send(first).await.is_err() {
        return Ok(());
    }
    let mut rescan = Instant::now() + every;
    loop {
        if !again {
            tokio::select! {
                Some(event) = events.recv() => note(event, &mut being_written),
                () = sleep_until(rescan) => {}
                () = updates.closed() => return Ok(()),
            }
            drain(&mut events, &mut being_written).await;
        }
        let seen;
        (directory, seen) = scan(directory, &being_written).await?;
        let mut changes = match seen {
            Ok(changes) => {
                sources.synced("", FILES, directory.seen.len(), None);
                changes
            }
            Err(error) => {
                sources.trouble("", FILES, Trouble::Unreachable(error.to_string()));
                vec![Update::SourceFindings(vec![Finding::new(
                    Code::Unreadable,
                    root.display(),
                    format!("cannot be read: {error}. All that it last said stays in force"),
                )])]
            }
        };
        // A write that began while the scan was under way has sent its event by now, and is looked at in another scan.
        again = drain(&mut events, &mut being_written).await;
        directory.forget(&mut changes, &being_written);
        rescan = Instant::now() + every;
        // All at once: an object that moves from one file to another is never gone.
        if updates.send(changes).await.is_err() {
            return Ok(());
        }
    }
}

/// The scans themselves open and read files, which is no change.
fn is_mere_reading(kind: EventKind) -> bool {
    matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

/// Scans on a thread of its own: a disk that hangs shall not keep the agent from anything else.
async fn scan(
    mut directory: Directory,
    being_written: &BTreeSet<PathBuf>,
) -> anyhow::Result<(Directory, io::Result<Vec<Update>>)> {
    let being_written = being_written.clone();
    let scanned = tokio::task::spawn_blocking(move || {
        let updates = directory.scan(&being_written);
        (directory, updates)
    });
    Ok(scanned.await?)
}

/// Takes the events of a burst, until there is a pause. Returns whether there were any.
async fn drain(
    events: &mut mpsc::UnboundedReceiver<notify::Result<Event>>,
    being_written: &mut BTreeSet<PathBuf>,
) -> bool {
    let end = Instant::now() + LONGEST_BURST;
    let mut any = false;
    while let Ok(Some(event)) = timeout_at(end.min(Instant::now() + BURST), events.recv()).await {
        note(event, being_written);
        any = true;
    }
    any
}

/// Keeps track of which files are open for writing.
fn note(event: notify::Result<Event>, being_written: &mut BTreeSet<PathBuf>) {
    let Some(event) = event.ok().filter(|event| !event.need_rescan()) else {
        // Events were lost: what was open may have been closed.
        being_written.clear();
        return;
    };
    match event.kind {
        EventKind::Modify(ModifyKind::Data(_)) => being_written.extend(event.paths),
        EventKind::Access(AccessKind::Close(AccessMode::Write))
        | EventKind::Remove(_)
        | EventKind::Modify(ModifyKind::Name(_)) => {
            for path in &event.paths {
                being_written.remove(path);
            }
        }
        _ => {}
    }
}
