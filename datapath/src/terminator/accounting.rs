//! Per-socket state and counts of active connections.
//!
//! Also reconciles both with the sockets that exist, after a time in which no hook saw connections close.

use std::{
    collections::{HashMap, HashSet, hash_map},
    mem::offset_of,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use aya::maps::{MapData, MapInfo};
use portolan_common::{BackendStats, ClientUse, Connection, ConnectionExtra, ConnectionFlags, NodeFlags, PoolStats};
use portolan_core::table::Sizes;

use super::{
    counts::{Counts, Drifts, Progress, Reconciled, Side},
    socket::{Seen, State},
};
use crate::{
    error::Result,
    map_specs::{self, MapSpec},
    mmap_array::MmapArray,
    pins::{Pins, Set},
};

/// Word offsets of the counts of active connections.
const BACKEND_ACTIVE: usize = offset_of!(BackendStats, active) / 8;
const POOL_ACTIVE: usize = offset_of!(PoolStats, active) / 8;
/// Word offset of the number of entries that a client uses.
const CLIENT_CONNECTIONS: usize = offset_of!(ClientUse, connections) / 8;
/// Word offsets of the owner of an entry, and of its flags, which are the upper half of their word.
const OWNER: usize = offset_of!(Connection, owner) / 8;
const FLAGS: usize = offset_of!(Connection, flags) / 8;
const _: () = assert!(offset_of!(Connection, flags) % 8 == 4);
const COUNTED: u64 = (ConnectionFlags::COUNTED as u64) << 32;
const GENERATION: u64 = (ConnectionFlags::GENERATION as u64) << 32;
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
    node_flags: MmapArray,
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

    /// Returns how many connections of a client found its share used up: the lower half of the id of its cgroup.
    pub(crate) fn over_share(&self, client: u32) -> u64 {
        self.clients.read::<ClientUse>(ClientUse::index(client)).map_or(0, |uses| uses.over_share)
    }

    /// Returns the number of entries in use, the capacity, and the number of connections so far that found their pod's
    /// share used up.
    pub(crate) fn read(&self) -> (u32, u32, u64) {
        let (mut used, mut over_share) = (0, 0);
        for client in 0..self.clients.len() {
            let Ok(uses) = self.clients.read::<ClientUse>(client) else { continue };
            used += uses.connections.total();
            over_share += uses.over_share;
        }
        (u32::try_from(used).unwrap_or(u32::MAX), self.entries, over_share)
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

/// An entry of `CONNECTIONS`, the socket that it belongs to, and which of its connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Entry {
    index: u32,
    owner: u64,
    cookie: u64,
    generation: u32,
}

impl Entry {
    fn of(index: u32, connection: &Connection) -> Self {
        let Connection { owner, cookie, flags, .. } = *connection;
        Self { index, owner, cookie, generation: flags & ConnectionFlags::GENERATION }
    }
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
        let (node_flags, _) = pinned(&map_specs::NODE_FLAGS)?;
        let (backends, backend_entries) = pinned(&map_specs::BACKEND_STATS)?;
        let (pools, pool_entries) = pinned(&map_specs::POOL_STATS)?;
        Ok(Self {
            storage: pinned(&map_specs::SOCKETS)?.0,
            connections,
            extras,
            entries,
            clients: MmapArray::open::<ClientUse>(clients.fd(), ClientUse::CAPACITY)?,
            node_flags: MmapArray::open::<u64>(node_flags.fd(), 1)?,
            backends: MmapArray::open::<BackendStats>(backends.fd(), backend_entries)?,
            pools: MmapArray::open::<PoolStats>(pools.fd(), pool_entries)?,
            limits: aya::maps::Array::try_from(array(&map_specs::POOLS)?)?,
            set: set.id as u16,
        })
    }

    /// Returns the word with the [`NodeFlags`] bits.
    pub(super) fn node_flags(&self) -> Result<&AtomicU64> {
        self.node_flags.word(0, 0)
    }

    /// Returns whether any socket has ever had its state in socket storage.
    pub(super) fn uses_storage(&self) -> bool {
        self.node_flags().map_or(true, |flags| flags.load(Ordering::SeqCst) & NodeFlags::STORAGE != 0)
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
        let by_cookie = all.scan().map(|read| read.map(|(index, connection)| (connection.cookie, index)));
        all.by_cookie = by_cookie.collect::<Result<_>>()?;
        Ok(all)
    }
}

impl Connections<'_> {
    /// Returns the maps that do not belong to connections.
    pub(super) fn accounting(&self) -> &SocketAccounting {
        self.accounting
    }

    /// Reads an entry, if it has an owner, and the same one before and after the read.
    fn entry(&self, index: u32) -> Result<Option<Connection>> {
        let owner = self.connections.word(index, OWNER)?;
        let before = owner.load(Ordering::SeqCst);
        if before == 0 || before == Connection::BUSY {
            return Ok(None);
        }
        let connection: Connection = self.connections.read(index)?;
        Ok((owner.load(Ordering::SeqCst) == before).then_some(Connection { owner: before, ..connection }))
    }

    /// Returns whether an entry still is that of the same connect of the same socket.
    fn is_still(&self, entry: Entry) -> Result<bool> {
        Ok(self.entry(entry.index)?.is_some_and(|now| Entry::of(entry.index, &now) == entry))
    }

    /// Returns the state of the socket with this cookie, or `None` if it has no entry in `CONNECTIONS`.
    pub(super) fn connection(&self, cookie: u64) -> Option<State> {
        let index = *self.by_cookie.get(&cookie)?;
        let connection = self.entry(index).ok()?.filter(|connection| connection.cookie == cookie)?;
        Some(State::new(&connection, &self.extras.read(index).ok()?))
    }

    /// Reads all entries that have an owner, with their index.
    fn scan(&self) -> impl Iterator<Item = Result<(u32, Connection)>> {
        (0..self.connections.len()).filter_map(|index| Some(self.entry(index).transpose()?.map(|read| (index, read))))
    }

    /// Returns all entries, to find those that no hook may ever free.
    pub(super) fn all(&self) -> Result<Vec<Entry>> {
        self.scan().map(|read| read.map(|(index, connection)| Entry::of(index, &connection))).collect()
    }

    /// Frees an entry if it still is that of the same connect of the same socket, and takes its connection out of the
    /// counts of active ones.
    /// Returns whether it did.
    pub(super) fn free(&self, entry: Entry) -> Result<bool> {
        let (own, flags) = (self.accounting, self.connections.word(entry.index, FLAGS)?);
        let seen = flags.load(Ordering::SeqCst);
        let connection: Connection = self.connections.read(entry.index)?;
        // Read after the flags, so that the generation in them is that of this connection.
        let owner = self.connections.word(entry.index, OWNER)?;
        let found = Connection { owner: owner.load(Ordering::SeqCst), flags: (seen >> 32) as u32, ..connection };
        if Entry::of(entry.index, &found) != entry {
            return Ok(false);
        }
        let side = Side::of(found.flags);
        let was_counted = flags.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |now| {
            ((now ^ seen) & GENERATION == 0 && now & COUNTED != 0).then_some(now & !COUNTED)
        });
        let freed = owner.compare_exchange(entry.owner, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        // Whoever frees an entry takes it out of its client's share.
        if freed && seen & SHARED != 0 {
            let client = ClientUse::index(connection.client);
            side.subtract(own.clients.word(client, CLIENT_CONNECTIONS)?, 1);
        }
        // Whoever clears the flag decrements the counts, even if a program has freed the entry in between.
        if was_counted.is_ok() {
            if own.has_backend(connection.set, connection.backend_id, connection.backend_epoch)? {
                side.subtract(own.backends.word(connection.backend_id, BACKEND_ACTIVE)?, 1);
            }
            if own.has_pool(connection.set, connection.pool, connection.pool_epoch)? {
                side.subtract(own.pools.word(connection.pool, POOL_ACTIVE)?, 1);
            }
        }
        Ok(freed)
    }

    /// Returns what there is before all sockets are listed.
    pub(super) fn before_list(&self, unconfirmed: &mut Unconfirmed) -> Result<BeforeList<'_>> {
        let (own, mut entries) = (self.accounting, Vec::new());
        unconfirmed.progress.begin(own.node_flags()?);
        for read in self.scan() {
            let (index, connection) = read?;
            // A socket that has not started to connect is in no socket list, and has no cookie here.
            if connection.cookie != 0 && connection.flags & ConnectionFlags::UDP == 0 {
                entries.push(Entry::of(index, &connection));
            }
        }
        let side = Side::at_rest(own.node_flags()?);
        let backends = Counts::new(&own.backends, BACKEND_ACTIVE, side)?;
        Ok(BeforeList { entries, side, backends, pools: Counts::new(&own.pools, POOL_ACTIVE, side)? })
    }

    /// Counts the entries that count as active, on one side.
    fn tally(&self, side: Side) -> Result<Tally> {
        let (own, mut tally) = (self.accounting, Tally::default());
        for read in self.scan() {
            let (_, connection) = read?;
            if connection.flags & ConnectionFlags::COUNTED != 0 && Side::of(connection.flags) == side {
                let Connection { set, backend_id, backend_epoch, pool, pool_epoch, .. } = connection;
                tally.add(own, set, (backend_id, backend_epoch), (pool, pool_epoch))?;
            }
        }
        Ok(tally)
    }

    /// Corrects the numbers of entries that clients use, on the side at rest, to match the entries that say so.
    /// The next run is about the other side. Returns how many were wrong.
    pub(super) fn recount_clients(&self, unconfirmed: &mut Drifts) -> Result<usize> {
        let flags = self.accounting.node_flags()?;
        let side = Side::at_rest(flags);
        let clients = Counts::new(&self.accounting.clients, CLIENT_CONNECTIONS, side)?;
        let (mut shared, mut recounted) = (HashMap::<u32, u64>::new(), Reconciled::default());
        for read in self.scan() {
            let (_, connection) = read?;
            if connection.flags & ConnectionFlags::SHARED != 0 && Side::of(connection.flags) == side {
                *shared.entry(ClientUse::index(connection.client)).or_default() += 1;
            }
        }
        clients.correct(&shared, unconfirmed, &mut recounted)?;
        Side::change(flags);
        Ok(recounted.corrected)
    }

    /// Frees the entries of sockets that no longer exist, and corrects the counts of active connections, on the side at
    /// rest, to match the others.
    ///
    /// `seen` lists all sockets.
    /// What is found for the first time is only recorded in `unconfirmed`.
    pub(super) fn recount(
        &self,
        before: BeforeList<'_>,
        seen: &Seen,
        unconfirmed: &mut Unconfirmed,
    ) -> Result<Reconciled> {
        let (own, mut recounted) = (self.accounting, Reconciled::default());
        let previous = std::mem::take(&mut unconfirmed.entries);
        for entry in before.entries.into_iter().filter(|entry| !seen.has(*entry)) {
            if previous.contains(&entry) {
                recounted.freed += usize::from(self.free(entry)?);
            } else if self.is_still(entry)? {
                unconfirmed.entries.insert(entry);
                recounted.unsettled += 1;
            }
        }
        // Entries are compared with the counts where they are. Only what is in socket storage comes from the list, which
        // is older: hence the counts from before it.
        let is_here = |state: &&State| state.is_counted() && state.side() == before.side;
        let stored: Vec<&State> = seen.stored.iter().filter(is_here).collect();
        let (mut backends, mut pools) = (before.backends, before.pools);
        if stored.is_empty() {
            backends = Counts::new(&own.backends, BACKEND_ACTIVE, before.side)?;
            pools = Counts::new(&own.pools, POOL_ACTIVE, before.side)?;
        }
        let mut tally = self.tally(before.side)?;
        for state in stored {
            let (backend, pool) = ((state.backend_id, state.backend_epoch), (state.pool, state.pool_epoch));
            tally.add(own, state.set, backend, pool)?;
        }
        let entries = recounted.unsettled;
        backends.correct(&tally.backends, &mut unconfirmed.backends, &mut recounted)?;
        pools.correct(&tally.pools, &mut unconfirmed.pools, &mut recounted)?;
        let is_settled = recounted.unsettled == entries;
        let is_done = unconfirmed.progress.end(before.side, is_settled, recounted.corrected > 0);
        recounted.unsettled += usize::from(!is_done);
        Ok(recounted)
    }
}

/// The entries of TCP connections, and the counts of one side, from before a list of all sockets.
pub(super) struct BeforeList<'a> {
    entries: Vec<Entry>,
    side: Side,
    backends: Counts<'a>,
    pools: Counts<'a>,
}

/// Active connections by what counts them: backend ids, and entries of `POOLS`.
#[derive(Default)]
struct Tally {
    backends: HashMap<u32, u64>,
    pools: HashMap<u32, u64>,
    /// The epochs of entries of `POOLS`, each read once.
    pool_epochs: HashMap<u32, u16>,
}

impl Tally {
    /// Adds an active connection, with the epochs of its ids.
    fn add(
        &mut self,
        own: &SocketAccounting,
        set: u16,
        (backend, backend_epoch): (u32, u16),
        (pool, pool_epoch): (u32, u16),
    ) -> Result<()> {
        if own.has_backend(set, backend, backend_epoch)? {
            *self.backends.entry(backend).or_default() += 1;
        }
        if pool != 0 && set == own.set {
            let epoch = match self.pool_epochs.entry(pool) {
                hash_map::Entry::Occupied(known) => *known.get(),
                hash_map::Entry::Vacant(new) => *new.insert(own.limits.get(&pool, 0)?.epoch as u16),
            };
            if epoch == pool_epoch {
                *self.pools.entry(pool).or_default() += 1;
            }
        }
        Ok(())
    }
}

/// What earlier runs found, and later ones must confirm.
#[derive(Debug, Default)]
pub(super) struct Unconfirmed {
    entries: HashSet<Entry>,
    backends: Drifts,
    pools: Drifts,
    progress: Progress,
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

    /// Records which sockets exist, and returns those of these entries whose socket was missing twice in a row.
    /// No list is needed again for those that exist until [`ABANDONED`] has passed.
    pub(super) fn gone(&mut self, old: &[Entry], now: Instant, exists: impl Fn(Entry) -> bool) -> Vec<Entry> {
        for (entry, state) in &mut self.0 {
            if exists(*entry) {
                *state = (now, false);
            }
        }
        let is_gone = |entry: &&Entry| match self.0.get_mut(*entry) {
            Some((since, is_missing)) if *since < now => std::mem::replace(is_missing, true),
            _ => false,
        };
        old.iter().filter(is_gone).copied().collect()
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
        let entry = |index, cookie| Entry { index, owner: 1, cookie, generation: 0 };
        assert_eq!(waiting.abandoned(&[entry(1, 10), entry(2, 20)], start), []);
        // The second entry belongs to another socket by now, at the same address.
        assert_eq!(waiting.abandoned(&[entry(1, 10), entry(2, 21)], after(300)), []);
        assert_eq!(waiting.abandoned(&[entry(1, 10), entry(2, 21)], after(599)), []);
        let old = waiting.abandoned(&[entry(1, 10), entry(2, 21)], after(600));
        assert_eq!(old, [entry(1, 10)]);
        assert_eq!(waiting.gone(&old, after(600), |_| false), [], "it is missing for the first time");
        let old = waiting.abandoned(&[entry(1, 10)], after(660));
        assert_eq!(waiting.gone(&old, after(660), |_| false), [entry(1, 10)]);
        // One whose socket exists starts over.
        let old = waiting.abandoned(&[entry(1, 10)], after(720));
        assert_eq!(waiting.gone(&old, after(720), |_| true), []);
        assert_eq!(waiting.abandoned(&[entry(1, 10)], after(780)), []);
        let old = waiting.abandoned(&[entry(1, 10)], after(1380));
        assert_eq!(old, [entry(1, 10)]);
        assert_eq!(waiting.gone(&old, after(1380), |_| false), []);
        // An entry that was free for a moment starts over.
        assert_eq!(waiting.abandoned(&[], after(1440)), []);
        assert_eq!(waiting.abandoned(&[entry(1, 10)], after(1500)), []);
    }
}
