//! Per-socket state and counts of active connections.
//!
//! Also reconciles both with the sockets that exist, after a time in which no hook saw connections close.

use std::{
    collections::{HashMap, HashSet},
    mem::offset_of,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use aya::maps::{MapData, MapInfo};
use portolan_common::{BackendStats, ClientUse, Connection, ConnectionExtra, ConnectionFlags, EverUsed, PoolStats};
use portolan_core::table::Sizes;
use serde::{Deserialize, Serialize};

use super::socket::{Seen, State};
use crate::{
    error::Result,
    map_specs::{self, MapSpec},
    mmap_array::MmapArray,
    pins::{Pins, Set},
};

/// Word offsets of the counts of active connections.
const BACKEND_ACTIVE: usize = offset_of!(BackendStats, active) / 8;
const POOL_ACTIVE: usize = offset_of!(PoolStats, active) / 8;
/// How often in a row a count must be wrong in the same direction before it is corrected, if it keeps changing.
const CONFIRMATIONS: u32 = 8;
/// Word offset of the number of entries that a client uses.
const CLIENT_CONNECTIONS: usize = offset_of!(ClientUse, connections) / 8;
/// Word offsets of the owner of an entry, and of its flags, which are the upper half of their word.
const OWNER: usize = offset_of!(Connection, owner) / 8;
const FLAGS: usize = offset_of!(Connection, flags) / 8;
const _: () = assert!(offset_of!(Connection, flags) % 8 == 4);
const COUNTED: u64 = (ConnectionFlags::COUNTED as u64) << 32;
const SHARED: u64 = (ConnectionFlags::SHARED as u64) << 32;

/// An entry that has existed for this long is compared with lists of all sockets, and abandoned if two in a row do not
/// contain its socket.
///
/// The kernel does not tell of the end of its own sockets, nor of that of the subflows of MPTCP.
/// A socket that uses TCP_FASTOPEN_CONNECT and has sent nothing, or was disconnected, is in no list.
/// What it does later gets another entry, or is not counted.
const ABANDONED: Duration = Duration::from_secs(600);

/// The maps with per-socket state and counts of active connections.
pub(crate) struct SocketAccounting {
    pub(super) storage: MapData,
    connections: MapData,
    extras: MapData,
    /// The number of entries of both.
    entries: u32,
    clients: MmapArray,
    fallback_used: aya::maps::Array<MapData, u32>,
    backends: MmapArray,
    pools: MmapArray,
    limits: aya::maps::Array<MapData, portolan_common::PoolLimits>,
    set: u16,
}

/// The usage of `CONNECTIONS`, from what the programs count for each client.
pub(crate) struct ConnectionUsage {
    clients: MmapArray,
    entries: u32,
}

impl ConnectionUsage {
    pub(crate) fn open(pins: &Pins, set: Set, sizes: &Sizes) -> Result<Self> {
        let clients = MapData::from_pin(pins.map_pin(set, &map_specs::CLIENTS, sizes))?;
        let clients = MmapArray::open::<ClientUse>(clients.fd(), ClientUse::CAPACITY)?;
        Ok(Self { clients, entries: sizes.connections })
    }

    /// Returns the number of entries in use, the capacity, and the number of connections so far that found their pod's
    /// share used up.
    pub(super) fn read(&self) -> (u32, u32, u64) {
        let (mut used, mut over_share) = (0i64, 0);
        for client in 0..self.clients.len() {
            let Ok(uses) = self.clients.read::<ClientUse>(client) else { continue };
            used += uses.connections as i64;
            over_share += uses.over_share;
        }
        (u32::try_from(used).unwrap_or_default(), self.entries, over_share)
    }
}

/// The state of all connections, mapped into memory: megabytes, and therefore only while they are needed.
pub(super) struct Connections<'a> {
    accounting: &'a SocketAccounting,
    connections: MmapArray,
    extras: MmapArray,
    /// Entries by the cookie of their socket, when the value was made.
    by_cookie: HashMap<u64, u32>,
}

/// The corrections that reconciling made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reconciled {
    /// Entries of `CONNECTIONS` freed, because their sockets no longer exist.
    pub freed: usize,
    /// Counts of active connections corrected, of backends and of pools.
    pub corrected: usize,
    /// Suspected errors that another run must confirm.
    pub unsettled: usize,
}

/// An entry of `CONNECTIONS` and the socket that it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Entry {
    index: u32,
    owner: u64,
    cookie: u64,
}

impl SocketAccounting {
    pub(crate) fn open(pins: &Pins, set: Set, sizes: &Sizes) -> Result<Self> {
        let pinned = |spec: &MapSpec| -> Result<(MapData, u32)> {
            let pin = pins.map_pin(set, spec, sizes);
            Ok((MapData::from_pin(&pin)?, MapInfo::from_pin(&pin)?.max_entries()))
        };
        let array = |spec: &MapSpec| -> Result<aya::maps::Map> { Ok(aya::maps::Map::Array(pinned(spec)?.0)) };
        let (connections, entries) = pinned(&map_specs::CONNECTIONS)?;
        let (extras, _) = pinned(&map_specs::CONNECTION_EXTRAS)?;
        let (clients, _) = pinned(&map_specs::CLIENTS)?;
        let (backends, backend_entries) = pinned(&map_specs::BACKEND_STATS)?;
        let (pools, pool_entries) = pinned(&map_specs::POOL_STATS)?;
        Ok(Self {
            storage: pinned(&map_specs::SOCKETS)?.0,
            connections,
            extras,
            entries,
            clients: MmapArray::open::<ClientUse>(clients.fd(), ClientUse::CAPACITY)?,
            fallback_used: aya::maps::Array::try_from(array(&map_specs::FALLBACK_USED)?)?,
            backends: MmapArray::open::<BackendStats>(backends.fd(), backend_entries)?,
            pools: MmapArray::open::<PoolStats>(pools.fd(), pool_entries)?,
            limits: aya::maps::Array::try_from(array(&map_specs::POOLS)?)?,
            set: set.id as u16,
        })
    }

    /// Returns whether any socket has ever had its state in socket storage.
    pub(super) fn uses_storage(&self) -> bool {
        self.fallback_used.get(&0, 0).map_or(true, |used| used & EverUsed::STORAGE != 0)
    }

    /// Returns whether the backend id of a connection still belongs to the same backend.
    fn has_backend(&self, set: u16, id: u32, epoch: u16) -> Result<bool> {
        Ok(set == self.set && self.backends.read::<BackendStats>(id)?.epoch as u16 == epoch)
    }

    /// Returns whether a connection has a pool, which still is the same.
    fn has_pool(&self, set: u16, pool: u32, epoch: u16) -> Result<bool> {
        Ok(pool != 0 && set == self.set && self.limits.get(&pool, 0)?.epoch as u16 == epoch)
    }

    /// Maps the state of all connections into memory.
    pub(super) fn connections(&self) -> Result<Connections<'_>> {
        let mut all = Connections {
            accounting: self,
            connections: MmapArray::open::<Connection>(self.connections.fd(), self.entries)?,
            extras: MmapArray::open::<ConnectionExtra>(self.extras.fd(), self.entries)?,
            by_cookie: HashMap::new(),
        };
        for index in 0..self.entries {
            if let Some(connection) = all.entry(index)? {
                all.by_cookie.insert(connection.cookie, index);
            }
        }
        Ok(all)
    }
}

impl Connections<'_> {
    /// Returns the maps that do not belong to connections.
    pub(super) fn accounting(&self) -> &SocketAccounting {
        self.accounting
    }

    /// Reads an entry, if it has an owner and is not being written.
    fn entry(&self, index: u32) -> Result<Option<Connection>> {
        let is_owned = |owner| owner != 0 && owner != Connection::BUSY;
        if !is_owned(self.connections.word(index, OWNER)?.load(Ordering::SeqCst)) {
            return Ok(None);
        }
        Ok(Some(self.connections.read::<Connection>(index)?).filter(|connection| is_owned(connection.owner)))
    }

    /// Returns the state of the socket with this cookie, or `None` if it has no entry in `CONNECTIONS`.
    pub(super) fn connection(&self, cookie: u64) -> Option<State> {
        let index = *self.by_cookie.get(&cookie)?;
        let connection = self.entry(index).ok()?.filter(|connection| connection.cookie == cookie)?;
        Some(State::new(&connection, &self.extras.read(index).ok()?))
    }

    /// Returns all entries, to find those that no hook may ever free.
    pub(super) fn all(&self) -> Result<Vec<Entry>> {
        let mut all = Vec::new();
        for index in 0..self.connections.len() {
            let Some(connection) = self.entry(index)? else { continue };
            all.push(Entry { index, owner: connection.owner, cookie: connection.cookie });
        }
        Ok(all)
    }

    /// Frees an entry if it still belongs to the same socket, and takes its connection out of the counts of active ones.
    /// Returns whether it did.
    pub(super) fn free(&self, entry: Entry) -> Result<bool> {
        let own = self.accounting;
        let connection: Connection = self.connections.read(entry.index)?;
        if connection.owner != entry.owner || connection.cookie != entry.cookie {
            return Ok(false);
        }
        let flags = self.connections.word(entry.index, FLAGS)?.fetch_and(!COUNTED, Ordering::SeqCst);
        let owner = self.connections.word(entry.index, OWNER)?;
        let freed = owner.compare_exchange(entry.owner, 0, Ordering::SeqCst, Ordering::SeqCst);
        if freed.is_err_and(|now| now != 0) {
            // The entry has another owner already, whose flag this was.
            self.connections.word(entry.index, FLAGS)?.fetch_or(flags & COUNTED, Ordering::SeqCst);
            return Ok(false);
        }
        // Whoever frees an entry takes it out of its client's share.
        if freed.is_ok() && flags & SHARED != 0 {
            let client = ClientUse::index(connection.client);
            own.clients.word(client, CLIENT_CONNECTIONS)?.fetch_sub(1, Ordering::SeqCst);
        }
        // Whoever clears the flag decrements the counts, even if a program has freed the entry in between.
        if flags & COUNTED != 0 {
            if own.has_backend(connection.set, connection.backend_id, connection.backend_epoch)? {
                own.backends.word(connection.backend_id, BACKEND_ACTIVE)?.fetch_sub(1, Ordering::SeqCst);
            }
            if own.has_pool(connection.set, connection.pool, connection.pool_epoch)? {
                own.pools.word(connection.pool, POOL_ACTIVE)?.fetch_sub(1, Ordering::SeqCst);
            }
        }
        Ok(freed.is_ok())
    }

    /// Returns the entries of TCP connections, to compare with a list of all sockets.
    pub(super) fn of_tcp(&self) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for index in 0..self.connections.len() {
            let Some(connection) = self.entry(index)? else { continue };
            // A socket that has not started to connect is in no socket list, and has no cookie here.
            if connection.cookie != 0 && connection.flags & ConnectionFlags::UDP == 0 {
                entries.push(Entry { index, owner: connection.owner, cookie: connection.cookie });
            }
        }
        Ok(entries)
    }

    /// Counts the entries that count as active or are in a client's share.
    fn tally(&self) -> Result<Tally> {
        let (own, mut tally) = (self.accounting, Tally::default());
        for index in 0..self.connections.len() {
            let Some(connection) = self.entry(index)? else { continue };
            if connection.flags & ConnectionFlags::SHARED != 0 {
                *tally.clients.entry(ClientUse::index(connection.client)).or_default() += 1;
            }
            if connection.flags & ConnectionFlags::COUNTED != 0 {
                let Connection { set, backend_id, backend_epoch, pool, pool_epoch, .. } = connection;
                tally.add(own, set, (backend_id, backend_epoch), (pool, pool_epoch))?;
            }
        }
        Ok(tally)
    }

    /// Corrects the numbers of entries that clients use to match the entries that say so.
    /// Returns how many were wrong.
    pub(super) fn recount_clients(&self, unconfirmed: &mut Drifts) -> Result<usize> {
        let clients = Counts::new(&self.accounting.clients, CLIENT_CONNECTIONS)?;
        let tally = self.tally()?;
        let mut recounted = Reconciled::default();
        clients.correct(&tally.clients, unconfirmed, &mut recounted)?;
        Ok(recounted.corrected)
    }

    /// Frees the entries of sockets that no longer exist, and corrects the counts of active connections to match the rest.
    ///
    /// `entries` are those from before all sockets were listed in `seen`.
    /// What is found for the first time is only recorded in `unconfirmed`.
    pub(super) fn recount(&self, entries: &[Entry], seen: &Seen, unconfirmed: &mut Unconfirmed) -> Result<Reconciled> {
        let own = self.accounting;
        let mut recounted = Reconciled::default();
        let previous = std::mem::take(&mut unconfirmed.entries);
        for entry in entries.iter().filter(|entry| !seen.has(**entry)) {
            if previous.contains(entry) {
                recounted.freed += usize::from(self.free(*entry)?);
            } else {
                unconfirmed.entries.insert(*entry);
                recounted.unsettled += 1;
            }
        }
        // Entries are compared with the counts where they are, within milliseconds. Only what is in socket storage comes
        // from the list, which takes longer.
        let backends = Counts::new(&own.backends, BACKEND_ACTIVE)?;
        let pools = Counts::new(&own.pools, POOL_ACTIVE)?;
        let mut tally = self.tally()?;
        for state in seen.stored.iter().filter(|state| state.is_counted()) {
            tally.add(own, state.set, (state.backend_id, state.backend_epoch), (state.pool, state.pool_epoch))?;
        }
        backends.correct(&tally.backends, &mut unconfirmed.backends, &mut recounted)?;
        pools.correct(&tally.pools, &mut unconfirmed.pools, &mut recounted)?;
        Ok(recounted)
    }
}

/// Connections by what counts them: backend ids, entries of `POOLS`, and indices of clients.
#[derive(Default)]
struct Tally {
    backends: HashMap<u32, u64>,
    pools: HashMap<u32, u64>,
    clients: HashMap<u32, u64>,
}

impl Tally {
    /// Adds an active connection, with the epochs of its ids.
    fn add(&mut self, own: &SocketAccounting, set: u16, backend: (u32, u16), pool: (u32, u16)) -> Result<()> {
        if own.has_backend(set, backend.0, backend.1)? {
            *self.backends.entry(backend.0).or_default() += 1;
        }
        if own.has_pool(set, pool.0, pool.1)? {
            *self.pools.entry(pool.0).or_default() += 1;
        }
        Ok(())
    }
}

/// Id → how its count has been wrong.
pub(super) type Drifts = HashMap<u32, Drift>;

/// A count that was wrong in the same direction in each of the last runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Drift {
    /// By how much it is too high: the least of these runs. Negative if it is too low.
    least: i64,
    /// What the last run found.
    last: i64,
    runs: u32,
}

impl Drift {
    /// Compares a count before and after a tally with the number found; `None` if it may be right.
    ///
    /// What begins or ends meanwhile may be found or not, so that any number between the two counts may be right.
    fn of(before: u64, after: u64, found: u64) -> Option<i64> {
        let (before, after) = (before.wrapping_sub(found) as i64, after.wrapping_sub(found) as i64);
        let is_known = before != 0 && after != 0 && (before > 0) == (after > 0);
        is_known.then(|| if before.abs() < after.abs() { before } else { after })
    }

    /// Adds a run that found the count to be too high by `found`.
    fn follow(previous: Option<&Self>, found: i64) -> Self {
        match previous {
            Some(before) if (before.least > 0) == (found > 0) => {
                let least = if found.abs() < before.least.abs() { found } else { before.least };
                Self { least, last: found, runs: before.runs + 1 }
            }
            _ => Self { least: found, last: found, runs: 1 },
        }
    }
}

/// What earlier runs found, and later ones must confirm.
#[derive(Debug, Default)]
pub(super) struct Unconfirmed {
    entries: HashSet<Entry>,
    backends: Drifts,
    pools: Drifts,
}

/// One count of each value of an array, as it was before a tally.
struct Counts<'a> {
    of: &'a MmapArray,
    word: usize,
    before: Vec<u64>,
}

impl<'a> Counts<'a> {
    fn new(of: &'a MmapArray, word: usize) -> Result<Self> {
        Ok(Self { of, word, before: Self::read(of, word)? })
    }

    fn read(of: &MmapArray, word: usize) -> Result<Vec<u64>> {
        (0..of.len()).map(|id| Ok(of.word(id, word)?.load(Ordering::SeqCst))).collect()
    }

    /// Compares the counts with what was found since. Subtracts the excess of each count that was too high by the same
    /// amount twice in a row and did not change meanwhile.
    /// A count that keeps changing is corrected by the least excess of [`CONFIRMATIONS`] runs.
    /// What is not confirmed yet remains in `drifts`.
    fn correct(self, found: &HashMap<u32, u64>, drifts: &mut Drifts, recounted: &mut Reconciled) -> Result<()> {
        let previous = std::mem::take(drifts);
        let after = Self::read(self.of, self.word)?;
        for (id, (before, after)) in (0..).zip(self.before.into_iter().zip(after)) {
            let Some(excess) = Drift::of(before, after, found.get(&id).copied().unwrap_or(0)) else { continue };
            let drift = Drift::follow(previous.get(&id), excess);
            let is_at_rest = before == after && previous.get(&id).is_some_and(|previous| previous.last == excess);
            if is_at_rest || drift.runs >= CONFIRMATIONS {
                let excess = if is_at_rest { excess } else { drift.least };
                self.of.word(id, self.word)?.fetch_sub(excess as u64, Ordering::SeqCst);
                recounted.corrected += 1;
            } else {
                drifts.insert(id, drift);
                recounted.unsettled += 1;
            }
        }
        Ok(())
    }
}

/// The entries at the last scan, with when their socket was last known to exist, and whether it was missing from a list
/// since.
#[derive(Debug, Default)]
pub(super) struct Waiting(HashMap<Entry, (Instant, bool)>);

impl Waiting {
    /// Records all entries, and returns those whose sockets have not been seen for [`ABANDONED`].
    pub(super) fn abandoned(&mut self, all: &[Entry], now: Instant) -> Vec<Entry> {
        let since = |entry: &Entry| self.0.get(entry).copied().unwrap_or((now, false));
        self.0 = all.iter().map(|entry| (*entry, since(entry))).collect();
        let is_over = |(_, (since, _)): &(&Entry, &(Instant, bool))| now.saturating_duration_since(*since) >= ABANDONED;
        self.0.iter().filter(is_over).map(|(entry, _)| *entry).collect()
    }

    /// Records whether the sockets of these entries exist, and returns those that were missing twice in a row.
    /// Those that exist are not asked about again for [`ABANDONED`].
    pub(super) fn gone(&mut self, entries: Vec<Entry>, exists: impl Fn(Entry) -> bool) -> Vec<Entry> {
        let mut gone = Vec::new();
        for entry in entries {
            if exists(entry) {
                self.0.remove(&entry);
            } else if let Some((_, is_missing)) = self.0.get_mut(&entry)
                && std::mem::replace(is_missing, true)
            {
                gone.push(entry);
            }
        }
        gone
    }
}

impl Seen {
    /// Returns an empty list.
    pub(super) fn nothing() -> Self {
        Self { cookies: HashSet::new(), stored: Vec::new() }
    }

    /// Returns whether the list contains the socket of this entry.
    pub(super) fn has(&self, entry: Entry) -> bool {
        self.cookies.contains(&entry.cookie)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_whose_socket_is_missing_twice_is_reclaimed() {
        let (mut waiting, start) = (Waiting::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        let entry = |index, cookie| Entry { index, owner: 1, cookie };
        assert_eq!(waiting.abandoned(&[entry(1, 10), entry(2, 20)], start), []);
        // The second entry belongs to another socket by now, at the same address.
        assert_eq!(waiting.abandoned(&[entry(1, 10), entry(2, 21)], after(300)), []);
        assert_eq!(waiting.abandoned(&[entry(1, 10), entry(2, 21)], after(599)), []);
        let old = waiting.abandoned(&[entry(1, 10), entry(2, 21)], after(600));
        assert_eq!(old, [entry(1, 10)]);
        assert_eq!(waiting.gone(old, |_| false), [], "it is missing for the first time");
        let old = waiting.abandoned(&[entry(1, 10)], after(660));
        assert_eq!(waiting.gone(old, |_| false), [entry(1, 10)]);
        // One whose socket exists starts over.
        let old = waiting.abandoned(&[entry(1, 10)], after(720));
        assert_eq!(waiting.gone(old, |_| true), []);
        assert_eq!(waiting.abandoned(&[entry(1, 10)], after(780)), []);
        let old = waiting.abandoned(&[entry(1, 10)], after(1380));
        assert_eq!(old, [entry(1, 10)]);
        assert_eq!(waiting.gone(old, |_| false), []);
        // An entry that was free for a moment starts over.
        assert_eq!(waiting.abandoned(&[], after(1440)), []);
        assert_eq!(waiting.abandoned(&[entry(1, 10)], after(1500)), []);
    }

    /// Counts in memory in place of a BPF array.
    fn counts(values: &[u64]) -> (MmapArray, impl Fn(&[u64])) {
        let file = rustix::fs::memfd_create("counts", rustix::fs::MemfdFlags::empty()).unwrap();
        rustix::fs::ftruncate(&file, 8 * values.len() as u64).unwrap();
        let array = MmapArray::open::<u64>(&file, values.len() as u32).unwrap();
        let other = MmapArray::open::<u64>(&file, values.len() as u32).unwrap();
        let set = move |values: &[u64]| {
            (0..).zip(values).for_each(|(i, value)| other.word(i, 0).unwrap().store(*value, Ordering::SeqCst));
        };
        set(values);
        (array, set)
    }

    #[test]
    fn count_at_rest_is_corrected_once_two_runs_agree() {
        let (array, _) = counts(&[5, 3, 0]);
        let (found, mut drifts) = (HashMap::from([(0, 5), (1, 1)]), Drifts::new());
        for (corrected, second) in [(0, 3), (1, 1), (0, 1)] {
            let mut recounted = Reconciled::default();
            Counts::new(&array, 0).unwrap().correct(&found, &mut drifts, &mut recounted).unwrap();
            assert_eq!(recounted.corrected, corrected);
            assert_eq!(Counts::read(&array, 0).unwrap(), [5, second, 0]);
        }
        assert!(drifts.is_empty());
    }

    #[test]
    fn count_that_never_rests_is_corrected_by_what_is_certain() {
        let (array, set) = counts(&[0]);
        let mut drifts = Drifts::new();
        for run in 1..=u64::from(CONFIRMATIONS) {
            // Twenty ends were lost; three to six connections are open.
            set(&[23 + run % 3]);
            let counts = Counts::new(&array, 0).unwrap();
            set(&[24 + run % 3]);
            let mut recounted = Reconciled::default();
            counts.correct(&HashMap::from([(0, 4 + run % 3)]), &mut drifts, &mut recounted).unwrap();
            assert_eq!(recounted.corrected, usize::from(run == u64::from(CONFIRMATIONS)));
        }
        assert_eq!(Counts::read(&array, 0).unwrap(), [24 + 8 % 3 - 19]);
    }

    #[test]
    fn number_between_two_counts_may_be_right() {
        assert_eq!(Drift::of(5, 5, 5), None);
        assert_eq!(Drift::of(5, 9, 7), None, "connections began during the tally");
        assert_eq!(Drift::of(9, 5, 5), None, "connections ended during the tally");
        assert_eq!(Drift::of(9, 7, 4), Some(3));
        assert_eq!(Drift::of(1, 2, 4), Some(-2));
        assert_eq!(Drift::of(u64::MAX, u64::MAX, 0), Some(-1), "a decrement came twice");
    }

    #[test]
    fn changing_count_is_corrected_by_the_least_excess() {
        let runs = |found: &[i64]| {
            found.iter().fold(None, |previous: Option<Drift>, found| Some(Drift::follow(previous.as_ref(), *found)))
        };
        assert_eq!(runs(&[7, 4, 9]), Some(Drift { least: 4, last: 9, runs: 3 }));
        assert_eq!(runs(&[-7, -4]), Some(Drift { least: -4, last: -4, runs: 2 }));
        assert_eq!(runs(&[7, 4, -1]), Some(Drift { least: -1, last: -1, runs: 1 }), "it was too low once");
    }
}
