//! The state that outlives the agent, beside the pinned maps: ejections and overrides. One JSON file, replaced atomically.

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

use portolan_core::{
    health::{Overrides, Saved as SavedEjection},
    model::{IpFamily, NamespacedName, Protocol, ServiceId},
    policy::PoolKey,
};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::error::StateFileError;

/// The version of the file's format. Files of another version are set aside.
const VERSION: u32 = 1;
/// Extension of the file that is being written.
const NEXT: &str = "next";
/// Extension of a file that could not be read.
const UNREADABLE: &str = "unreadable";

/// The content of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PersistedState {
    version: u32,
    saved_at: SystemTime,
    pools: Vec<PersistedPool>,
    /// Overrides in effect.
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
    hosts: Vec<(SocketAddr, SavedEjection)>,
}

impl PersistedState {
    /// The state as of now.
    pub fn new(
        now: SystemTime,
        pools: BTreeMap<PoolKey, Vec<(SocketAddr, SavedEjection)>>,
        overrides: Overrides,
    ) -> Self {
        let persisted = |(key, hosts): (PoolKey, _)| PersistedPool {
            service: key.service.name,
            is_entry: key.service.is_entry,
            port: key.port,
            protocol: key.protocol,
            subset: key.subset,
            v6: key.family == IpFamily::V6,
            hosts,
        };
        Self { version: VERSION, saved_at: now, pools: pools.into_iter().map(persisted).collect(), overrides }
    }

    /// Returns the files that may exist for a state file: itself, the next one, and one that could not be read.
    pub fn files(path: &Path) -> [PathBuf; 3] {
        [path.to_owned(), path.with_extension(NEXT), path.with_extension(UNREADABLE)]
    }

    /// Returns how long ago it was saved; zero if the clock was set back.
    pub fn age(&self, now: SystemTime) -> Duration {
        now.duration_since(self.saved_at).unwrap_or_default()
    }

    /// Returns the ejections by pool.
    pub fn pools(&self) -> BTreeMap<PoolKey, Vec<(SocketAddr, SavedEjection)>> {
        let of = |pool: &PersistedPool| {
            let service = ServiceId { name: pool.service.clone(), is_entry: pool.is_entry };
            let family = if pool.v6 { IpFamily::V6 } else { IpFamily::V4 };
            let subset = pool.subset.clone();
            (PoolKey { service, port: pool.port, protocol: pool.protocol, subset, family }, pool.hosts.clone())
        };
        self.pools.iter().map(of).collect()
    }

    /// Reads the file; `None` if there is none.
    ///
    /// # Errors
    /// Returns an error if it cannot be read, or is not what this version writes. Then it is moved aside, because it is going
    /// to be replaced.
    pub fn read(path: &Path) -> Result<Option<Self>, StateFileError> {
        let text = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|source| StateFileError::Read { path: path.to_owned(), source })?,
        };
        let state = serde_json::from_slice(&text).map_err(|error| format!("it is damaged: {error}"));
        let state = state.and_then(|state: Self| {
            let is_known = state.version == VERSION;
            is_known.then_some(state).ok_or_else(|| "it is of another version of Portolan".to_owned())
        });
        state.map(Some).map_err(|reason| {
            let aside = path.with_extension(UNREADABLE);
            let moved_to = if fs::rename(path, &aside).is_ok() { aside } else { path.to_owned() };
            StateFileError::Invalid { moved_to, reason }
        })
    }

    /// Replaces the file: readers see either the previous content or this one.
    fn write(&self, path: &Path) -> io::Result<()> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let next = path.with_extension(NEXT);
        let file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&next)?;
        let mut out = io::BufWriter::new(file);
        serde_json::to_writer(&mut out, self)?;
        out.into_inner()?.sync_data()?;
        fs::rename(&next, path)
    }
}

/// The id of a save, and its result.
pub type Saved = (u64, Result<(), String>);

/// Writes the file on a thread of its own: a disk that hangs blocks nothing else.
#[derive(Debug)]
pub struct StateWriter {
    saves: Sender<(u64, PersistedState)>,
}

impl StateWriter {
    /// Starts the thread; results of saves arrive on the channel, by their ids.
    ///
    /// # Errors
    /// Returns an error if no thread can be started.
    pub fn start(path: PathBuf) -> io::Result<(Self, UnboundedReceiver<Saved>)> {
        let ((saves, pending), (results, saved)) = (channel(), unbounded_channel());
        thread::Builder::new().name("state-writer".to_owned()).spawn(move || write_all(&path, &pending, &results))?;
        Ok((Self { saves }, saved))
    }

    /// Saves a state. Of several that wait, only the last one is written.
    pub fn save(&self, id: u64, state: PersistedState) {
        // The thread ends only with the agent.
        let _ = self.saves.send((id, state));
    }
}

fn write_all(path: &Path, pending: &Receiver<(u64, PersistedState)>, results: &UnboundedSender<Saved>) {
    let mut failing = false;
    while let Ok((id, state)) = pending.recv() {
        let (mut ids, mut last) = (vec![id], state);
        for (id, state) in pending.try_iter() {
            ids.push(id);
            last = state;
        }
        let result = last.write(path).map_err(|error| format!("cannot write {}: {error}", path.display()));
        if let Err(error) = &result
            && !failing
        {
            tracing::warn!("ejections and overrides are lost when the agent restarts: {error}");
        }
        failing = result.is_err();
        for id in ids {
            if results.send((id, result.clone())).is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use portolan_core::health::{Cause, Threshold};

    use super::*;

    fn state(now: SystemTime) -> (PersistedState, BTreeMap<PoolKey, Vec<(SocketAddr, SavedEjection)>>) {
        let key = PoolKey {
            service: ServiceId::service(NamespacedName::new("default", "web")),
            port: 80,
            protocol: Protocol::Tcp,
            subset: Some("v1".to_owned()),
            family: IpFamily::V6,
        };
        let cause = Cause { threshold: Threshold::Errors, failures: 5 };
        let saved = SavedEjection { ejected: Some((Duration::from_secs(3), cause)), multiplier: 2 };
        let pools = BTreeMap::from([(key, vec![(SocketAddr::from(([10, 0, 0, 1], 80)), saved)])]);
        (PersistedState::new(now, pools.clone(), Overrides::default()), pools)
    }

    fn folder(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("portolan-{name}-{}", std::process::id()))
    }

    #[test]
    fn state_is_read_back_and_damage_is_reported() {
        let folder = folder("state");
        let path = folder.join("below/state.json");
        assert!(PersistedState::read(&path).unwrap().is_none());
        let now = SystemTime::now();
        let (state, pools) = state(now);
        state.write(&path).unwrap();
        let read = PersistedState::read(&path).unwrap().unwrap();
        assert_eq!((&read, read.pools()), (&state, pools));
        assert_eq!(read.age(now + Duration::from_secs(5)), Duration::from_secs(5));
        assert_eq!(read.age(now - Duration::from_secs(5)), Duration::ZERO);
        fs::write(&path, "{").unwrap();
        let error = PersistedState::read(&path).unwrap_err().to_string();
        assert!(error.contains("damaged") && error.contains("state.unreadable"), "{error}");
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn interrupted_write_leaves_the_previous_state() {
        let folder = folder("interrupted");
        let path = folder.join("state.json");
        let (state, _) = state(SystemTime::now());
        state.write(&path).unwrap();
        // The agent was killed between the first byte and the rename.
        fs::write(path.with_extension(NEXT), "{\"version\":1,").unwrap();
        assert_eq!(PersistedState::read(&path).unwrap(), Some(state.clone()));
        // The next agent replaces what was left.
        state.write(&path).unwrap();
        assert!(!path.with_extension(NEXT).exists());
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn writer_reports_each_save_by_its_id() {
        let folder = folder("writer");
        let (writer, mut saved) = StateWriter::start(folder.join("state.json")).unwrap();
        let (state, _) = state(SystemTime::now());
        for id in 0..3 {
            writer.save(id, state.clone());
        }
        for id in 0..3 {
            assert_eq!(saved.blocking_recv(), Some((id, Ok(()))));
        }
        fs::remove_dir_all(&folder).unwrap();
        // A path below a file cannot be created.
        fs::write(&folder, "").unwrap();
        writer.save(3, state);
        let (id, result) = saved.blocking_recv().unwrap();
        assert!(id == 3 && result.is_err_and(|error| error.contains("cannot write")));
        fs::remove_file(&folder).unwrap();
    }
}
