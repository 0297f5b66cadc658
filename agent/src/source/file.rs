//! The configuration directory: `DIR/*.yaml` for the mesh, `DIR/<cluster-id>/**/*.yaml` for a cluster.
//!
//! Changes arrive through inotify.
//! A file that is open for writing keeps its last known state until the writer closes it.
//! A periodic rescan (`--rescan`) makes up for lost events.

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
    model::{Code, Finding, ObjectRef, Scope},
    store::{Contents, Origin, Update},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout_at},
};

use super::status::{Sources, Trouble};
use crate::error::{Context as _, Result};

/// Maximum depth of subdirectories that are read below a cluster's directory.
const MAX_DEPTH: usize = 8;
/// Maximum size of a file in bytes. Larger files are reported as unreadable.
const MAX_BYTES: u64 = 128 << 20;
/// Quiet period that ends a burst of events. One change usually causes several events.
const BURST: Duration = Duration::from_millis(20);
/// Maximum duration of a burst, so that a file under constant writes does not delay the others.
const LONGEST_BURST: Duration = Duration::from_millis(200);
/// Resource name under which `get sources` reports the directory.
const FILES: &str = "files";

/// A configuration directory and the state of its files as of the last scan.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
    reader: DecodeOptions,
    seen: BTreeMap<String, Seen>,
    /// State before the last scan of each file that the scan found changed; `None` for a new file.
    before: BTreeMap<String, Option<Seen>>,
    /// Files and directories that could not be read so far.
    unread: BTreeSet<String>,
    /// Entries that the last scan removed from `unread`.
    cleared: BTreeSet<String>,
}

/// The state of a file when it was last read.
#[derive(Clone, Copy, Debug)]
struct Seen {
    fingerprint: u64,
    /// Whether objects from this file are in effect.
    has_objects: bool,
}

impl Directory {
    /// Creates the state of a directory that has not been scanned yet.
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

    /// Scans the whole directory and returns the changes since the last scan.
    ///
    /// Files in `being_written` count as unchanged.
    ///
    /// # Errors
    /// Returns an error if the directory itself cannot be read. The recorded state is then unchanged.
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
        // If the directory was replaced during the scan, all of its files would seem deleted.
        if identity(&self.root)? != root {
            return Err(io::Error::other("the directory was replaced during the scan"));
        }
        let Found { files, unreadable, mut troubles, .. } = found;
        let mut updates = Vec::new();
        let is_gone = |origin: &String| {
            let path = self.root.join(origin);
            // Files of an unreadable directory may still exist.
            !files.contains_key(&path) && !unreadable.keys().any(|folder| path.starts_with(folder))
        };
        let gone: Vec<_> = self.seen.keys().filter(|origin| is_gone(origin)).cloned().collect();
        for origin in gone {
            self.seen.remove(&origin);
            updates.push(Update::Remove { origin: Origin::file(origin) });
        }
        self.before.clear();
        let (mut unread, mut read) = (BTreeMap::new(), Vec::new());
        for (folder, error) in &unreadable {
            let message = format!("cannot be read: {error}; the last known objects of its files stay in effect");
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
                    let message = format!("cannot be read: {error}; its last known objects stay in effect");
                    troubles.push(Finding::new(Code::Unreadable, ObjectRef::file(&origin), message));
                }
                Err(error) => drop(unread.insert(origin, format!("cannot be read: {error}"))),
            }
        }
        let root = &self.root;
        let is_over = |origin: &String| !unread.contains_key(origin) && !being_written.contains(&root.join(origin));
        self.cleared = self.unread.extract_if(.., |origin| is_over(origin)).collect();
        // Clear the findings of files that are no longer unreadable.
        for origin in self.cleared.iter().filter(|origin| !self.seen.contains_key(*origin)) {
            updates.push(Update::Remove { origin: Origin::file(origin) });
        }
        for (origin, message) in unread {
            if self.unread.insert(origin.clone()) {
                let findings =
                    vec![Finding::new(Code::Unreadable, ObjectRef::file(&origin), message).from_source(&origin)];
                let contents = Contents { findings, ..Contents::default() };
                updates.push(Update::Replace { origin: Origin::file(origin), contents });
            }
        }
        updates.extend(read);
        updates.push(Update::SourceFindings(troubles));
        Ok(updates)
    }

    /// Reports files as unread that are open for writing and were never read before.
    fn report_unread(&mut self, being_written: &BTreeSet<PathBuf>) -> Vec<Update> {
        let mut updates = Vec::new();
        for path in being_written.iter().filter(|path| is_yaml(path) && !file_name(path).starts_with('.')) {
            let origin = self.origin(path);
            if !self.seen.contains_key(&origin) && self.unread.insert(origin.clone()) {
                let findings = vec![
                    Finding::new(Code::EmptyFile, ObjectRef::file(&origin), "is open for writing").from_source(&origin),
                ];
                let contents = Contents { findings, ..Contents::default() };
                updates.push(Update::Replace { origin: Origin::file(origin), contents });
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
        let had_objects = before.is_some_and(|before| before.has_objects);
        if had_objects && contents.empty {
            contents.findings.clear();
            contents.complete = false;
            let message =
                "the file became empty: its last known objects stay in effect; to remove them, delete the file";
            contents.findings.push(Finding::new(Code::Emptied, ObjectRef::file(&origin), message).from_source(&origin));
        }
        let has_objects = !contents.objects.is_empty() || (had_objects && !contents.complete);
        self.seen.insert(origin.clone(), Seen { fingerprint: contents.fingerprint, has_objects });
        self.before.insert(origin.clone(), before);
        Some(Update::Replace { origin: Origin::file(origin), contents })
    }

    /// Reverts the last scan's results for these files, which it may have read half-written.
    fn revert(&mut self, updates: &mut Vec<Update>, being_written: &BTreeSet<PathBuf>) {
        updates.retain(|update| match update {
            Update::Replace { origin, .. } if being_written.contains(&self.root.join(origin.as_str())) => {
                match self.before.remove(origin.as_str()).flatten() {
                    Some(before) => self.seen.insert(origin.to_string(), before),
                    None => self.seen.remove(origin.as_str()),
                };
                // A file that was unread before the scan stays unread.
                // One that only this scan found unreadable is reported again by the next scan.
                if self.cleared.contains(origin.as_str()) {
                    self.unread.insert(origin.to_string());
                } else {
                    self.unread.remove(origin.as_str());
                }
                false
            }
            _ => true,
        });
    }
}

/// Reads a regular file of at most [`MAX_BYTES`]. Reading a device or FIFO might never end.
fn read_file(path: &Path) -> io::Result<String> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    if metadata.len() > MAX_BYTES {
        let mib = MAX_BYTES >> 20;
        return Err(io::Error::other(format!("larger than {mib} MiB; split it into several files")));
    }
    std::fs::read_to_string(path)
}

/// Results of a walk through the directory tree.
#[derive(Default)]
struct Found {
    files: BTreeMap<PathBuf, Scope>,
    unreadable: BTreeMap<PathBuf, String>,
    troubles: Vec<Finding>,
    /// Device and inode of each visited directory, to break symbolic link loops.
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
                    let message = format!("is nested deeper than {MAX_DEPTH} directories and is not read");
                    self.troubles.push(Finding::new(Code::TooLarge, ObjectRef::file(path.display()), message));
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

/// Returns the device and inode of a path, which identify a directory even if another one takes its place.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Lists the entries of a directory in order, each with whether it is a directory.
///
/// Skips hidden entries, which editors and Kubernetes volume mounts create.
fn list(directory: &Path) -> io::Result<Vec<(PathBuf, bool)>> {
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if file_name(&path).starts_with('.') {
            continue;
        }
        match std::fs::metadata(&path) {
            Ok(metadata) => entries.push((path, metadata.is_dir())),
            // Deleted meanwhile, or a dangling symbolic link.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Reading the file later reports the error.
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

/// Checks that the configuration directory can be read.
///
/// # Errors
/// Returns an error if the directory does not exist or cannot be read.
pub fn check(root: &Path) -> Result<()> {
    std::fs::read_dir(root).map(drop).with_context(|| format!("--config {}: cannot read the directory", root.display()))
}

/// Sends the directory's contents, and then each change, until the receiver is gone.
///
/// Rescans the whole directory at the interval `every`, even without events.
///
/// # Errors
/// Returns an error if the directory cannot be read or watched at startup.
pub async fn run(
    root: PathBuf,
    reader: DecodeOptions,
    every: Duration,
    sources: Arc<Sources>,
    updates: mpsc::Sender<Vec<Update>>,
) -> Result<()> {
    let root = std::fs::canonicalize(&root)
        .with_context(|| format!("--config {}: cannot read the directory", root.display()))?;
    let (sender, mut events) = mpsc::unbounded_channel();
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        if event.as_ref().is_ok_and(|event| is_read_access(event.kind)) {
            return;
        }
        // The receiver is dropped only when the agent shuts down.
        let _ = sender.send(event);
    })?;
    watcher.watch(&root, RecursiveMode::Recursive).with_context(|| format!("cannot watch {}", root.display()))?;

    let mut directory = Directory::new(root.clone(), reader);
    let mut being_written = BTreeSet::new();
    let first;
    (directory, first) = scan(directory, &being_written).await?;
    let mut first = first.with_context(|| format!("--config {}: cannot read the directory", root.display()))?;
    // Ignore what was read of files that are being written.
    let mut again = drain(&mut events, &mut being_written).await;
    directory.revert(&mut first, &being_written);
    first.extend(directory.report_unread(&being_written));
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
                    ObjectRef::file(root.display()),
                    format!("cannot be read: {error}; its last known objects stay in effect"),
                )])]
            }
        };
        // The event of a write that began during the scan has arrived by now. Another scan follows for it.
        again = drain(&mut events, &mut being_written).await;
        directory.revert(&mut changes, &being_written);
        rescan = Instant::now() + every;
        // One batch, so that an object that moves between files never disappears.
        if updates.send(changes).await.is_err() {
            return Ok(());
        }
    }
}

/// Returns whether an event is a mere read access. The scans themselves cause such events.
fn is_read_access(kind: EventKind) -> bool {
    matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

/// Scans on a blocking thread, so that a hung disk does not block the rest of the agent.
async fn scan(
    mut directory: Directory,
    being_written: &BTreeSet<PathBuf>,
) -> Result<(Directory, io::Result<Vec<Update>>)> {
    let being_written = being_written.clone();
    let scanned = tokio::task::spawn_blocking(move || {
        let updates = directory.scan(&being_written);
        (directory, updates)
    });
    Ok(scanned.await?)
}

/// Consumes the events of a burst until there is a pause. Returns whether there were any.
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

/// Updates the set of files that are open for writing.
fn note(event: notify::Result<Event>, being_written: &mut BTreeSet<PathBuf>) {
    let Some(event) = event.ok().filter(|event| !event.need_rescan()) else {
        // Events were lost, so open files may have been closed.
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
