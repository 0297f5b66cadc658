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
use portolan_common::{BackendStats, Connection, PoolStats, SocketStage, SocketState};
use serde::{Deserialize, Serialize};

use super::socket::Seen;
use crate::{
    error::Result,
    map_specs,
    mmap_array::MmapArray,
    pins::{Pins, Set},
};

/// Word offsets of the counts of active connections.
const BACKEND_ACTIVE: usize = offset_of!(BackendStats, active) / 8;
const POOL_ACTIVE: usize = offset_of!(PoolStats, active) / 8;
/// Word offset of the cookie of the socket that owns a slot.
const OWNER: usize = offset_of!(Connection, owner) / 8;

/// A slot is abandoned if its connect has not started for this long and no socket list contains its owner.
///
/// Its connect failed before a SYN was sent.
/// Or the socket uses TCP_FASTOPEN_CONNECT and has sent nothing since; what it does later is not counted.
const ABANDONED: Duration = Duration::from_secs(600);

/// The maps with per-socket state and counts of active connections.
pub(crate) struct SocketAccounting {
    pub(super) storage: MapData,
    connections: MmapArray,
    backends: MmapArray,
    pools: MmapArray,
    limits: aya::maps::Array<MapData, portolan_common::PoolLimits>,
    set: u32,
}

/// The corrections that reconciling made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reconciled {
    /// `CONNECTIONS` slots freed, because their sockets no longer exist.
    pub freed: usize,
    /// Counts of active connections corrected, of backends and of pools.
    pub corrected: usize,
    /// Suspected errors that another run must confirm.
    pub unsettled: usize,
}

/// A snapshot of slot owners and active counts.
pub(super) struct Counts {
    owners: Vec<(u32, u64)>,
    backends: Vec<u64>,
    pools: Vec<u64>,
}

impl SocketAccounting {
    pub(crate) fn open(pins: &Pins, set: Set) -> Result<Self> {
        let mapped = |name: &str| -> Result<(MapData, u32)> {
            let pin = pins.map(set, name);
            Ok((MapData::from_pin(&pin)?, MapInfo::from_pin(&pin)?.max_entries()))
        };
        let connections = MapData::from_pin(pins.socket_map(map_specs::CONNECTIONS.name))?;
        let (backends, backend_entries) = mapped(map_specs::BACKEND_STATS.name)?;
        let (pools, pool_entries) = mapped(map_specs::POOL_STATS.name)?;
        Ok(Self {
            storage: MapData::from_pin(pins.socket_map(map_specs::SOCKETS.name))?,
            connections: MmapArray::open::<Connection>(connections.fd(), Connection::CAPACITY)?,
            backends: MmapArray::open::<BackendStats>(backends.fd(), backend_entries)?,
            pools: MmapArray::open::<PoolStats>(pools.fd(), pool_entries)?,
            limits: aya::maps::Array::try_from(aya::maps::Map::Array(mapped(map_specs::POOLS.name)?.0))?,
            set: set.id,
        })
    }

    /// Returns the state of the TCP socket with this cookie, or `None` if it has no `CONNECTIONS` slot.
    pub(super) fn connection(&self, cookie: u64) -> Option<SocketState> {
        let connection: Connection = self.connections.read(cookie as u32 & (Connection::CAPACITY - 1)).ok()?;
        (connection.owner == cookie).then_some(connection.state)
    }

    /// Counts the slots in use.
    pub(super) fn taken(&self) -> u32 {
        let taken =
            |slot: &u32| self.connections.word(*slot, OWNER).is_ok_and(|owner| owner.load(Ordering::Relaxed) != 0);
        (0..self.connections.len()).filter(taken).count() as u32
    }

    /// Returns the slots whose connect has not started for [`ABANDONED`], as (slot, owner).
    pub(super) fn abandoned(&self, waiting: &mut Waiting, now: Instant) -> Result<Vec<(u32, u64)>> {
        let mut still = Vec::new();
        for slot in 0..self.connections.len() {
            if self.connections.word(slot, OWNER)?.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let connection: Connection = self.connections.read(slot)?;
            if connection.owner != 0 && connection.state.stage == SocketStage::None as u32 {
                still.push((slot, connection.owner));
            }
        }
        Ok(waiting.abandoned(&still, now))
    }

    /// Frees a slot if the same socket still owns it. Returns whether it did.
    pub(super) fn free(&self, (slot, owner): (u32, u64)) -> Result<bool> {
        let word = self.connections.word(slot, OWNER)?;
        Ok(word.compare_exchange(owner, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok())
    }

    /// Takes a snapshot to compare with a list of all sockets.
    pub(super) fn now(&self) -> Result<Counts> {
        let mut owners = Vec::new();
        for slot in 0..self.connections.len() {
            if self.connections.word(slot, OWNER)?.load(Ordering::SeqCst) == 0 {
                continue;
            }
            let connection: Connection = self.connections.read(slot)?;
            // A socket that has not started to connect is in no socket list.
            if connection.owner != 0 && connection.state.stage != SocketStage::None as u32 {
                owners.push((slot, connection.owner));
            }
        }
        let all = |of: &MmapArray, word| -> Result<Vec<u64>> {
            (0..of.len()).map(|id| Ok(of.word(id, word)?.load(Ordering::SeqCst))).collect()
        };
        Ok(Counts { owners, backends: all(&self.backends, BACKEND_ACTIVE)?, pools: all(&self.pools, POOL_ACTIVE)? })
    }

    /// Corrects slots and counts to match `seen`, all sockets listed since the snapshot `before`.
    ///
    /// A mismatch found for the first time is only recorded in `unconfirmed`.
    /// A socket that was opened or closed during the listing may explain it.
    pub(super) fn recount(&self, before: &Counts, seen: &Seen, unconfirmed: &mut Unconfirmed) -> Result<Reconciled> {
        let (mut backends, mut pools): (HashMap<u32, u64>, HashMap<u32, u64>) = Default::default();
        for state in seen.states.iter().filter(|state| state.set == self.set && state.stage != SocketStage::None as u32)
        {
            let stats: BackendStats = self.backends.read(state.backend_id)?;
            if stats.epoch == state.epoch {
                *backends.entry(state.backend_id).or_default() += 1;
            }
            if state.pool != 0 && self.limits.get(&state.pool, 0)?.epoch == state.pool_epoch {
                *pools.entry(state.pool).or_default() += 1;
            }
        }
        let mut recounted = Reconciled::default();
        let previous = std::mem::take(unconfirmed);
        let backend_counts = (&self.backends, BACKEND_ACTIVE, before.backends.as_slice(), &backends);
        unconfirmed.backends = correct(backend_counts, &previous.backends, &mut recounted)?;
        let pool_counts = (&self.pools, POOL_ACTIVE, before.pools.as_slice(), &pools);
        unconfirmed.pools = correct(pool_counts, &previous.pools, &mut recounted)?;
        for owner in before.owners.iter().filter(|(_, owner)| !seen.cookies.contains(owner)) {
            if previous.owners.contains(owner) {
                recounted.freed += usize::from(self.free(*owner)?);
            } else {
                unconfirmed.owners.insert(*owner);
                recounted.unsettled += 1;
            }
        }
        Ok(recounted)
    }
}

/// Id → by how much its count is too high.
type Drifts = HashMap<u32, i64>;

/// Mismatches that the previous run found and the next one must confirm.
#[derive(Debug, Default)]
pub(super) struct Unconfirmed {
    owners: HashSet<(u32, u64)>,
    backends: Drifts,
    pools: Drifts,
}

/// Subtracts the excess of each count that was too high by the same amount twice in a row and has not changed since
/// the snapshot.
/// Returns the mismatches that are not confirmed yet.
fn correct(
    (of, word, before, seen): (&MmapArray, usize, &[u64], &HashMap<u32, u64>),
    previous: &Drifts,
    recounted: &mut Reconciled,
) -> Result<Drifts> {
    let mut drifts = Drifts::new();
    for (id, before) in (0..).zip(before) {
        let drift = before.wrapping_sub(seen.get(&id).copied().unwrap_or(0)) as i64;
        if drift == 0 {
            continue;
        }
        let active = of.word(id, word)?;
        if active.load(Ordering::SeqCst) == *before && previous.get(&id) == Some(&drift) {
            active.fetch_sub(drift as u64, Ordering::SeqCst);
            recounted.corrected += 1;
        } else {
            drifts.insert(id, drift);
            recounted.unsettled += 1;
        }
    }
    Ok(drifts)
}

/// Slots whose connect had not started at the last scan: slot → owner, and when that owner was first seen.
#[derive(Debug, Default)]
pub(super) struct Waiting(HashMap<u32, (u64, Instant)>);

impl Waiting {
    /// Records `still`, the slots that wait now, and returns those that have waited for [`ABANDONED`].
    fn abandoned(&mut self, still: &[(u32, u64)], now: Instant) -> Vec<(u32, u64)> {
        let mut abandoned = Vec::new();
        let mut waiting = HashMap::with_capacity(still.len());
        for (slot, owner) in still {
            let since = self.0.get(slot).filter(|(previous, _)| previous == owner).map_or(now, |(_, since)| *since);
            if now.saturating_duration_since(since) >= ABANDONED {
                abandoned.push((*slot, *owner));
            }
            waiting.insert(*slot, (*owner, since));
        }
        self.0 = waiting;
        abandoned
    }
}

impl Seen {
    /// Returns an empty list.
    pub(super) fn nothing() -> Self {
        Self { cookies: HashSet::new(), states: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_of_connect_that_never_starts_is_reclaimed() {
        let (mut waiting, start) = (Waiting::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(waiting.abandoned(&[(1, 10), (2, 20)], start), []);
        // The second slot has a different owner by now.
        assert_eq!(waiting.abandoned(&[(1, 10), (2, 21)], after(300)), []);
        assert_eq!(waiting.abandoned(&[(1, 10), (2, 21)], after(599)), []);
        assert_eq!(waiting.abandoned(&[(1, 10), (2, 21)], after(600)), [(1, 10)]);
        // A slot that was free for a moment starts over.
        assert_eq!(waiting.abandoned(&[], after(700)), []);
        assert_eq!(waiting.abandoned(&[(2, 21)], after(1000)), []);
    }
}
