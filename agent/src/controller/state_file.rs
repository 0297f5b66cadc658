//! What outlives the agent beside the kernel's maps: ejections, and orders by hand. One JSON file, written whole or not at all.

use std::{
    collections::BTreeMap,
    fs, io,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use portolan_core::{
    health::{Overrides, Saved},
    model::{NamespacedName, Protocol, ServiceId},
    policy::PoolKey,
};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

/// The file's own version: one of another is not read.
const VERSION: u32 = 1;
/// Extensions of what lies beside it.
const NEXT: &str = "next";
const UNREADABLE: &str = "unreadable";

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PersistedState {
    version: u32,
    saved_at: SystemTime,
    pools: Vec<PersistedPool>,
    /// Orders in force.
    #[serde(rename = "byHand")]
    pub overrides: Overrides,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PersistedPool {
    service: NamespacedName,
    #[serde(default)]
    is_entry: bool,
    port: u16,
    protocol: Protocol,
    #[serde(default)]
    subset: Option<String>,
    #[serde(default)]
    v6: bool,
    hosts: Vec<(SocketAddr, Saved)>,
}

impl PersistedState {
    /// What is to be kept, as of now.
    pub fn new(now: SystemTime, pools: BTreeMap<PoolKey, Vec<(SocketAddr, Saved)>>, overrides: Overrides) -> Self {
        let kept = |(key, hosts): (PoolKey, _)| PersistedPool {
            service: key.service.name,
            is_entry: key.service.is_entry,
            port: key.port,
            protocol: key.protocol,
            subset: key.subset,
            v6: key.v6,
            hosts,
        };
        Self { version: VERSION, saved_at: now, pools: pools.into_iter().map(kept).collect(), overrides }
    }

    /// The files that may lie where one is kept: itself, one that was being written, one that could not be read.
    pub fn files(path: &Path) -> [PathBuf; 3] {
        [path.to_owned(), path.with_extension(NEXT), path.with_extension(UNREADABLE)]
    }

    /// How long ago that was; nothing, where the clock was set back.
    pub fn age(&self, now: SystemTime) -> Duration {
        now.duration_since(self.saved_at).unwrap_or_default()
    }

    /// By pool.
    pub fn pools(&self) -> BTreeMap<PoolKey, Vec<(SocketAddr, Saved)>> {
        let of = |pool: &PersistedPool| {
            let service = ServiceId { name: pool.service.clone(), is_entry: pool.is_entry };
            let key =
                PoolKey { service, port: pool.port, protocol: pool.protocol, subset: pool.subset.clone(), v6: pool.v6 };
            (key, pool.hosts.clone())
        };
        self.pools.iter().map(of).collect()
    }

    /// Reads the file; nothing where there is none.
    ///
    /// # Errors
    /// It cannot be read, or is not what this version writes.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let text = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.with_context(|| format!("cannot read {}", path.display()))?,
        };
        let kept = serde_json::from_slice(&text).context("it is damaged").and_then(|kept: Self| {
            anyhow::ensure!(kept.version == VERSION, "it is of another version of Portolan");
            Ok(kept)
        });
        kept.map(Some).map_err(|error| {
            // It will be written anew; what was in it stays beside.
            let aside = path.with_extension(UNREADABLE);
            let place = if fs::rename(path, &aside).is_ok() { aside } else { path.to_owned() };
            error.context(format!("what a former agent has left cannot be read, and is in {}", place.display()))
        })
    }

    /// Writes it: whoever reads sees the whole of the former one or of this one.
    fn write(&self, path: &Path) -> Result<()> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let next = path.with_extension(NEXT);
        let file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&next)?;
        let mut out = io::BufWriter::new(file);
        serde_json::to_writer(&mut out, self)?;
        out.into_inner()?.sync_data()?;
        Ok(fs::rename(&next, path)?)
    }
}

/// Writes the file on a thread of its own: a disk that hangs holds up nobody.
#[derive(Debug)]
pub struct StateWriter {
    wanted: Sender<(PersistedState, oneshot::Sender<Result<(), String>>)>,
}

impl StateWriter {
    /// Begins to keep what it is given in this file.
    ///
    /// # Errors
    /// There is no thread for it.
    pub fn start(path: PathBuf) -> io::Result<Self> {
        let (wanted, given) = channel();
        thread::Builder::new().name("keeper".to_owned()).spawn(move || keep(&path, &given))?;
        Ok(Self { wanted })
    }

    /// Has this kept, in the place of what was before; what is given says when, or why not.
    pub fn keep(&self, kept: PersistedState) -> oneshot::Receiver<Result<(), String>> {
        let (written, told) = oneshot::channel();
        // The thread ends with the agent only.
        let _ = self.wanted.send((kept, written));
        told
    }
}

fn keep(path: &Path, given: &Receiver<(PersistedState, oneshot::Sender<Result<(), String>>)>) {
    let mut failing = false;
    while let Ok(first) = given.recv() {
        // Of those that came meanwhile the last one is enough.
        let (mut last, mut waiting) = (first.0, vec![first.1]);
        for (kept, written) in given.try_iter() {
            last = kept;
            waiting.push(written);
        }
        let result = last.write(path).map_err(|error| format!("{}: {error:#}", path.display()));
        if let Err(error) = &result
            && !failing
        {
            tracing::warn!("ejections and orders will be forgotten at a restart: {error}");
        }
        failing = result.is_err();
        for written in waiting {
            // Nobody may be waiting.
            let _ = written.send(result.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_core::health::{Cause, Threshold};

    #[test]
    fn what_is_written_is_read_and_what_is_damaged_is_told() {
        let folder = std::env::temp_dir().join(format!("portolan-kept-{}", std::process::id()));
        let path = folder.join("below/kept.json");
        assert!(PersistedState::read(&path).unwrap().is_none());
        let key = PoolKey {
            service: ServiceId::service(NamespacedName::new("default", "web")),
            port: 80,
            protocol: Protocol::Tcp,
            subset: Some("v1".to_owned()),
            v6: false,
        };
        let cause = Cause { threshold: Threshold::Errors, failures: 5 };
        let saved = Saved { ejected: Some((Duration::from_secs(3), cause)), multiplier: 2 };
        let pools = BTreeMap::from([(key, vec![(SocketAddr::from(([10, 0, 0, 1], 80)), saved)])]);
        let now = SystemTime::now();
        let kept = PersistedState::new(now, pools.clone(), Overrides::default());
        kept.write(&path).unwrap();
        let read = PersistedState::read(&path).unwrap().unwrap();
        assert_eq!((&read, read.pools()), (&kept, pools));
        assert_eq!(read.age(now + Duration::from_secs(5)), Duration::from_secs(5));
        assert_eq!(read.age(now - Duration::from_secs(5)), Duration::ZERO);
        fs::write(&path, "{").unwrap();
        assert!(format!("{:#}", PersistedState::read(&path).unwrap_err()).contains("damaged"));
        fs::remove_dir_all(&folder).unwrap();
    }
}
