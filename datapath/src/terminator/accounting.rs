//! What is remembered on sockets, and what is counted of them; and how both are put right after a time in which no hook saw connections end.

use std::{
    collections::{HashMap, HashSet},
    mem::offset_of,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::Result;
use aya::maps::{MapData, MapInfo};
use portolan_common::{BackendStats, Connection, PoolStats, SocketStage, SocketState};
use serde::{Deserialize, Serialize};

use super::socket::Seen;
use crate::{
    maps,
    mmap_array::MmapArray,
    pins::{Pins, Set},
};

/// Words of the counters of what there is now.
const BACKEND_ACTIVE: usize = offset_of!(BackendStats, active) / 8;
const POOL_ACTIVE: usize = offset_of!(PoolStats, active) / 8;
/// The word in which a place says whose it is.
const OWNER: usize = offset_of!(Connection, owner) / 8;

/// A place whose connect has not begun for so long belongs to one that failed before it could, if no list of sockets has it. (Or to one of
/// TCP_FASTOPEN_CONNECT that has sent nothing for so long: what it does then is not counted.)
const ABANDONED: Duration = Duration::from_secs(600);

/// The maps that say so.
pub(crate) struct SocketAccounting {
    pub(super) storage: MapData,
    connections: MmapArray,
    backends: MmapArray,
    pools: MmapArray,
    limits: aya::maps::Array<MapData, portolan_common::PoolLimits>,
    set: u32,
}

/// What a recount has put right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reconciled {
    /// Places that belonged to connections that there are not.
    pub freed: usize,
    /// Counts of connections, of endpoints and of pools, that were wrong.
    pub corrected: usize,
    /// What looks wrong, but has to be looked at again.
    pub unsettled: usize,
}

/// How things are at one moment.
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
        let connections = MapData::from_pin(pins.socket_map(maps::CONNECTIONS))?;
        let (backends, of_backends) = mapped("BACKEND_STATS")?;
        let (pools, of_pools) = mapped("POOL_STATS")?;
        Ok(Self {
            storage: MapData::from_pin(pins.socket_map(maps::SOCKETS))?,
            connections: MmapArray::open::<Connection>(connections.fd(), Connection::CAPACITY)?,
            backends: MmapArray::open::<BackendStats>(backends.fd(), of_backends)?,
            pools: MmapArray::open::<PoolStats>(pools.fd(), of_pools)?,
            limits: aya::maps::Array::try_from(aya::maps::Map::Array(mapped("POOLS")?.0))?,
            set: set.id,
        })
    }

    /// What is remembered of the TCP connection with this cookie, if it has a place of its own.
    pub(super) fn connection(&self, cookie: u64) -> Option<SocketState> {
        let connection: Connection = self.connections.read(cookie as u32 & (Connection::CAPACITY - 1)).ok()?;
        (connection.owner == cookie).then_some(connection.state)
    }

    /// Places that are somebody's.
    pub(super) fn taken(&self) -> u32 {
        let taken =
            |place: &u32| self.connections.word(*place, OWNER).is_ok_and(|owner| owner.load(Ordering::Relaxed) != 0);
        (0..self.connections.len()).filter(taken).count() as u32
    }

    /// Places whose connect has not begun for too long.
    pub(super) fn abandoned(&self, waiting: &mut Waiting, now: Instant) -> Result<Vec<(u32, u64)>> {
        let mut still = Vec::new();
        for place in 0..self.connections.len() {
            if self.connections.word(place, OWNER)?.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let connection: Connection = self.connections.read(place)?;
            if connection.owner != 0 && connection.state.stage == SocketStage::None as u32 {
                still.push((place, connection.owner));
            }
        }
        Ok(waiting.abandoned(&still, now))
    }

    /// Frees a place, if it still is this socket's.
    pub(super) fn free(&self, (place, owner): (u32, u64)) -> Result<bool> {
        let word = self.connections.word(place, OWNER)?;
        Ok(word.compare_exchange(owner, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok())
    }

    /// Takes down how things are.
    pub(super) fn now(&self) -> Result<Counts> {
        let mut owners = Vec::new();
        for place in 0..self.connections.len() {
            if self.connections.word(place, OWNER)?.load(Ordering::SeqCst) == 0 {
                continue;
            }
            let connection: Connection = self.connections.read(place)?;
            // One that has not begun to connect is in no list of sockets.
            if connection.owner != 0 && connection.state.stage != SocketStage::None as u32 {
                owners.push((place, connection.owner));
            }
        }
        let all = |of: &MmapArray, word| -> Result<Vec<u64>> {
            (0..of.len()).map(|id| Ok(of.word(id, word)?.load(Ordering::SeqCst))).collect()
        };
        Ok(Counts { owners, backends: all(&self.backends, BACKEND_ACTIVE)?, pools: all(&self.pools, POOL_ACTIVE)? })
    }

    /// Leads places and counts to what was seen of all sockets since `before`. What is found for the first time is only remembered: a socket that came
    /// or went while others were looked at may explain it.
    pub(super) fn recount(&self, before: &Counts, seen: &Seen, doubts: &mut Doubts) -> Result<Reconciled> {
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
        let former = std::mem::take(doubts);
        let of_backends = (&self.backends, BACKEND_ACTIVE, before.backends.as_slice(), &backends);
        doubts.backends = correct(of_backends, &former.backends, &mut recounted)?;
        let of_pools = (&self.pools, POOL_ACTIVE, before.pools.as_slice(), &pools);
        doubts.pools = correct(of_pools, &former.pools, &mut recounted)?;
        for owner in before.owners.iter().filter(|(_, owner)| !seen.cookies.contains(owner)) {
            if former.owners.contains(owner) {
                recounted.freed += usize::from(self.free(*owner)?);
            } else {
                doubts.owners.insert(*owner);
                recounted.unsettled += 1;
            }
        }
        Ok(recounted)
    }
}

/// By how much a count is too high, by id.
type Drifts = HashMap<u32, i64>;

/// What looked wrong the last time.
#[derive(Debug, Default)]
pub(super) struct Doubts {
    owners: HashSet<(u32, u64)>,
    backends: Drifts,
    pools: Drifts,
}

/// Takes off what counts are too high by twice in a row, where nobody changed them while it was looked. Gives back what looked wrong for the first time.
fn correct(
    (of, word, before, seen): (&MmapArray, usize, &[u64], &HashMap<u32, u64>),
    former: &Drifts,
    recounted: &mut Reconciled,
) -> Result<Drifts> {
    let mut drifts = Drifts::new();
    for (id, before) in (0..).zip(before) {
        let drift = before.wrapping_sub(seen.get(&id).copied().unwrap_or(0)) as i64;
        if drift == 0 {
            continue;
        }
        let active = of.word(id, word)?;
        if active.load(Ordering::SeqCst) == *before && former.get(&id) == Some(&drift) {
            active.fetch_sub(drift as u64, Ordering::SeqCst);
            recounted.corrected += 1;
        } else {
            drifts.insert(id, drift);
            recounted.unsettled += 1;
        }
    }
    Ok(drifts)
}

/// Places whose connect had not begun when they were looked at: whose they were, and since when.
#[derive(Debug, Default)]
pub(super) struct Waiting(HashMap<u32, (u64, Instant)>);

impl Waiting {
    /// Of those that wait now, the ones that have waited for too long.
    fn abandoned(&mut self, still: &[(u32, u64)], now: Instant) -> Vec<(u32, u64)> {
        let mut abandoned = Vec::new();
        let mut waiting = HashMap::with_capacity(still.len());
        for (place, owner) in still {
            let since = self.0.get(place).filter(|(former, _)| former == owner).map_or(now, |(_, since)| *since);
            if now.saturating_duration_since(since) >= ABANDONED {
                abandoned.push((*place, *owner));
            }
            waiting.insert(*place, (*owner, since));
        }
        self.0 = waiting;
        abandoned
    }
}

impl Seen {
    /// Nothing yet.
    pub(super) fn nothing() -> Self {
        Self { cookies: HashSet::new(), states: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connect_that_never_began_gives_its_place_back() {
        let (mut waiting, start) = (Waiting::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(waiting.abandoned(&[(1, 10), (2, 20)], start), []);
        // The place of the second is another one's meanwhile.
        assert_eq!(waiting.abandoned(&[(1, 10), (2, 21)], after(300)), []);
        assert_eq!(waiting.abandoned(&[(1, 10), (2, 21)], after(599)), []);
        assert_eq!(waiting.abandoned(&[(1, 10), (2, 21)], after(600)), [(1, 10)]);
        // Gone for a moment is begun anew.
        assert_eq!(waiting.abandoned(&[], after(700)), []);
        assert_eq!(waiting.abandoned(&[(2, 21)], after(1000)), []);
    }
}
