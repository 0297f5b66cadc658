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
use portolan_common::{BackendStats, ClientUse, Connection, ConnectionExtra, ConnectionFlags, FallbackUsed, PoolStats};
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

/// An entry is abandoned if no socket list contains its socket, and for this long its connection has not started, its
/// application has closed it, or it has been one of UDP.
///
/// The kernel does not tell of the end of its own sockets, nor of that of the subflows of MPTCP.
/// A socket that uses TCP_FASTOPEN_CONNECT and has sent nothing is in no list; what it does later is not counted.
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

/// A snapshot of the entries of connections, and of active counts.
pub(super) struct Counts {
    entries: Vec<Entry>,
    backends: Vec<u64>,
    pools: Vec<u64>,
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
        self.fallback_used.get(&0, 0).map_or(true, |used| used & FallbackUsed::STORAGE != 0)
    }

    /// Returns whether a backend id still belongs to the same backend.
    fn is_current_backend(&self, id: u32, epoch: u16) -> Result<bool> {
        Ok(self.backends.read::<BackendStats>(id)?.epoch as u16 == epoch)
    }

    /// Returns whether a connection has a pool, which still is the same.
    fn is_current_pool(&self, pool: u32, epoch: u16) -> Result<bool> {
        Ok(pool != 0 && self.limits.get(&pool, 0)?.epoch as u16 == epoch)
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

    /// Returns the entries that no hook may ever free, and that have been like that for [`ABANDONED`].
    pub(super) fn abandoned(&self, waiting: &mut Waiting, now: Instant) -> Result<Vec<Entry>> {
        let mut still = Vec::new();
        for index in 0..self.connections.len() {
            let Some(connection) = self.entry(index)? else { continue };
            if connection.flags & ConnectionFlags::COUNTED == 0 {
                still.push(Entry { index, owner: connection.owner, cookie: connection.cookie });
            }
        }
        Ok(waiting.abandoned(&still, now))
    }

    /// Frees an entry if it still belongs to the same socket, and takes its connection out of the counts of active ones.
    /// Returns the connection as it was, if it was freed.
    pub(super) fn free(&self, entry: Entry) -> Result<Option<Connection>> {
        let own = self.accounting;
        let connection: Connection = self.connections.read(entry.index)?;
        if connection.owner != entry.owner || connection.cookie != entry.cookie {
            return Ok(None);
        }
        let flags = self.connections.word(entry.index, FLAGS)?.fetch_and(!COUNTED, Ordering::SeqCst);
        let owner = self.connections.word(entry.index, OWNER)?;
        if let Err(now) = owner.compare_exchange(entry.owner, 0, Ordering::SeqCst, Ordering::SeqCst) {
            if now != 0 {
                // The entry has another owner already, whose flag this was.
                self.connections.word(entry.index, FLAGS)?.fetch_or(flags & COUNTED, Ordering::SeqCst);
            }
            return Ok(None);
        }
        // Whoever frees an entry takes it out of its client's share.
        if flags & SHARED != 0 {
            let client = ClientUse::index(connection.client);
            own.clients.word(client, CLIENT_CONNECTIONS)?.fetch_sub(1, Ordering::SeqCst);
        }
        if flags & COUNTED != 0 && connection.set == own.set {
            if own.is_current_backend(connection.backend_id, connection.backend_epoch)? {
                own.backends.word(connection.backend_id, BACKEND_ACTIVE)?.fetch_sub(1, Ordering::SeqCst);
            }
            if own.is_current_pool(connection.pool, connection.pool_epoch)? {
                own.pools.word(connection.pool, POOL_ACTIVE)?.fetch_sub(1, Ordering::SeqCst);
            }
        }
        Ok(Some(connection))
    }

    /// Takes a snapshot to compare with a list of all sockets.
    pub(super) fn now(&self) -> Result<Counts> {
        let mut entries = Vec::new();
        for index in 0..self.connections.len() {
            let Some(connection) = self.entry(index)? else { continue };
            // A socket that has not started to connect is in no socket list, and has no cookie here.
            if connection.cookie != 0 && connection.flags & ConnectionFlags::UDP == 0 {
                entries.push(Entry { index, owner: connection.owner, cookie: connection.cookie });
            }
        }
        let own = self.accounting;
        Ok(Counts { entries, backends: all(&own.backends, BACKEND_ACTIVE)?, pools: all(&own.pools, POOL_ACTIVE)? })
    }

    /// Corrects the numbers of entries that clients use to match the entries that say so.
    pub(super) fn recount_clients(&self, unconfirmed: &mut Drifts) -> Result<usize> {
        let clients = &self.accounting.clients;
        let before = all(clients, CLIENT_CONNECTIONS)?;
        let mut shared: HashMap<u32, u64> = HashMap::new();
        for index in 0..self.connections.len() {
            let connection = self.entry(index)?.filter(|connection| connection.flags & ConnectionFlags::SHARED != 0);
            if let Some(connection) = connection {
                *shared.entry(ClientUse::index(connection.client)).or_default() += 1;
            }
        }
        let mut recounted = Reconciled::default();
        let counts = (clients, CLIENT_CONNECTIONS, before.as_slice());
        let after = all(clients, CLIENT_CONNECTIONS)?;
        *unconfirmed = correct(counts, &after, &shared, &std::mem::take(unconfirmed), &mut recounted)?;
        Ok(recounted.corrected)
    }

    /// Corrects entries and counts to match `seen`, all sockets listed since the snapshot `before`.
    ///
    /// A mismatch found for the first time is only recorded in `unconfirmed`.
    /// A socket that was opened or closed during the listing may explain it.
    pub(super) fn recount(&self, before: &Counts, seen: &Seen, unconfirmed: &mut Unconfirmed) -> Result<Reconciled> {
        let own = self.accounting;
        let (backends_after, pools_after) = (all(&own.backends, BACKEND_ACTIVE)?, all(&own.pools, POOL_ACTIVE)?);
        let (mut backends, mut pools): (HashMap<u32, u64>, HashMap<u32, u64>) = Default::default();
        let mut count = |backend: (u32, u16), pool: (u32, u16)| -> Result<()> {
            if own.is_current_backend(backend.0, backend.1)? {
                *backends.entry(backend.0).or_default() += 1;
            }
            if own.is_current_pool(pool.0, pool.1)? {
                *pools.entry(pool.0).or_default() += 1;
            }
            Ok(())
        };
        for state in seen.states.iter().filter(|state| state.set == own.set && state.is_counted()) {
            count((state.backend_id, state.backend_epoch), (state.pool, state.pool_epoch))?;
        }
        let mut recounted = Reconciled::default();
        let previous = std::mem::take(unconfirmed);
        for entry in before.entries.iter().filter(|entry| !seen.cookies.contains(&entry.cookie)) {
            if previous.entries.contains(entry) {
                let Some(freed) = self.free(*entry)? else { continue };
                recounted.freed += 1;
                // The counts compared below are from before, and contain it.
                if freed.flags & ConnectionFlags::COUNTED != 0 && freed.set == own.set {
                    count((freed.backend_id, freed.backend_epoch), (freed.pool, freed.pool_epoch))?;
                }
            } else {
                unconfirmed.entries.insert(*entry);
                recounted.unsettled += 1;
            }
        }
        let backend_counts = (&own.backends, BACKEND_ACTIVE, before.backends.as_slice());
        unconfirmed.backends = correct(backend_counts, &backends_after, &backends, &previous.backends, &mut recounted)?;
        let pool_counts = (&own.pools, POOL_ACTIVE, before.pools.as_slice());
        unconfirmed.pools = correct(pool_counts, &pools_after, &pools, &previous.pools, &mut recounted)?;
        Ok(recounted)
    }
}

/// Reads one word of each value.
fn all(of: &MmapArray, word: usize) -> Result<Vec<u64>> {
    (0..of.len()).map(|id| Ok(of.word(id, word)?.load(Ordering::SeqCst))).collect()
}

/// Id → by how much its count is too high.
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
    /// Compares a count before and after a listing with the number listed; `None` if it may be right.
    ///
    /// What is opened or closed meanwhile may be listed or not, so that any number between the two counts may be right.
    fn of(before: u64, after: u64, listed: u64) -> Option<i64> {
        let (before, after) = (before.wrapping_sub(listed) as i64, after.wrapping_sub(listed) as i64);
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

/// Mismatches that the previous run found and the next one must confirm.
#[derive(Debug, Default)]
pub(super) struct Unconfirmed {
    entries: HashSet<Entry>,
    backends: Drifts,
    pools: Drifts,
}

/// Subtracts the excess of each count that was too high by the same amount twice in a row and did not change meanwhile.
/// A count that keeps changing is corrected by the least excess of [`CONFIRMATIONS`] runs, so that no leak stays.
/// Returns the mismatches that are not confirmed yet.
fn correct(
    (of, word, before): (&MmapArray, usize, &[u64]),
    after: &[u64],
    listed: &HashMap<u32, u64>,
    previous: &Drifts,
    recounted: &mut Reconciled,
) -> Result<Drifts> {
    let mut drifts = Drifts::new();
    for (id, (before, after)) in (0..).zip(before.iter().zip(after)) {
        let Some(found) = Drift::of(*before, *after, listed.get(&id).copied().unwrap_or(0)) else { continue };
        let drift = Drift::follow(previous.get(&id), found);
        let is_at_rest = before == after && previous.get(&id).is_some_and(|previous| previous.last == found);
        if is_at_rest || drift.runs >= CONFIRMATIONS {
            let excess = if is_at_rest { found } else { drift.least };
            of.word(id, word)?.fetch_sub(excess as u64, Ordering::SeqCst);
            recounted.corrected += 1;
        } else {
            drifts.insert(id, drift);
            recounted.unsettled += 1;
        }
    }
    Ok(drifts)
}

/// Entries that were like that at the last scan, and since when.
#[derive(Debug, Default)]
pub(super) struct Waiting(HashMap<Entry, Instant>);

impl Waiting {
    /// Starts over with entries whose sockets exist, so that these are not listed again soon.
    pub(super) fn found(&mut self, entries: &[Entry]) {
        self.0.retain(|entry, _| !entries.contains(entry));
    }

    /// Records `still`, the entries that wait now, and returns those that have waited for [`ABANDONED`].
    fn abandoned(&mut self, still: &[Entry], now: Instant) -> Vec<Entry> {
        let since = |entry: &Entry| self.0.get(entry).copied().unwrap_or(now);
        self.0 = still.iter().map(|entry| (*entry, since(entry))).collect();
        let is_over = |(_, since): &(&Entry, &Instant)| now.saturating_duration_since(**since) >= ABANDONED;
        self.0.iter().filter(is_over).map(|(entry, _)| *entry).collect()
    }
}

impl Seen {
    /// Returns an empty list.
    pub(super) fn nothing() -> Self {
        Self { cookies: HashSet::new(), states: Vec::new() }
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
    fn entry_of_connect_that_never_starts_is_reclaimed() {
        let (mut waiting, start) = (Waiting::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        let entry = |index, cookie| Entry { index, owner: 1, cookie };
        assert_eq!(waiting.abandoned(&[entry(1, 10), entry(2, 20)], start), []);
        // The second entry belongs to another socket by now, at the same address.
        assert_eq!(waiting.abandoned(&[entry(1, 10), entry(2, 21)], after(300)), []);
        assert_eq!(waiting.abandoned(&[entry(1, 10), entry(2, 21)], after(599)), []);
        assert_eq!(waiting.abandoned(&[entry(1, 10), entry(2, 21)], after(600)), [entry(1, 10)]);
        // One whose socket exists starts over.
        waiting.found(&[entry(1, 10)]);
        assert_eq!(waiting.abandoned(&[entry(1, 10)], after(610)), []);
        assert_eq!(waiting.abandoned(&[entry(1, 10)], after(1210)), [entry(1, 10)]);
        // An entry that was free for a moment starts over.
        assert_eq!(waiting.abandoned(&[], after(1300)), []);
        assert_eq!(waiting.abandoned(&[entry(2, 21)], after(2000)), []);
    }

    #[test]
    fn number_between_two_counts_may_be_right() {
        assert_eq!(Drift::of(5, 5, 5), None);
        assert_eq!(Drift::of(5, 9, 7), None, "connections were opened during the listing");
        assert_eq!(Drift::of(9, 5, 5), None, "connections were closed during the listing");
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
