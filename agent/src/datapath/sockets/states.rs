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

use super::diag::Seen;
use crate::datapath::{
    mapped::Mapped,
    maps,
    pins::{Pins, Set},
};

/// Words of the counters of what there is now.
const BACKEND_ACTIVE: usize = offset_of!(BackendStats, active) / 8;
const POOL_ACTIVE: usize = offset_of!(PoolStats, active) / 8;
/// The word in which a place says whose it is.
const OWNER: usize = offset_of!(Connection, owner) / 8;

/// A place whose connect has not begun for so long belongs to one that failed before it could. (Or to one of TCP_FASTOPEN_CONNECT that has sent
/// nothing for so long: what it does then is not counted.)
const ABANDONED: Duration = Duration::from_secs(600);

/// The maps that say so.
pub(super) struct States {
    pub(super) storage: MapData,
    connections: Mapped,
    backends: Mapped,
    pools: Mapped,
    limits: aya::maps::Array<MapData, portolan_common::Limits>,
    set: u32,
}

/// What a recount has put right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recounted {
    /// Places that belonged to connections that there are not.
    pub freed: usize,
    /// Counts of connections, of endpoints and of pools, that were wrong.
    pub corrected: usize,
    /// Counts that changed meanwhile, so that nothing can be said of them.
    pub unsettled: usize,
}

/// How things were before the sockets were looked at.
pub(super) struct Before {
    owners: Vec<(u32, u64)>,
    backends: Vec<u64>,
    pools: Vec<u64>,
}

impl States {
    pub(super) fn open(pins: &Pins, set: Set) -> Result<Self> {
        let mapped = |name: &str| -> Result<(MapData, u32)> {
            let pin = pins.map(set, name);
            Ok((MapData::from_pin(&pin)?, MapInfo::from_pin(&pin)?.max_entries()))
        };
        let connections = MapData::from_pin(pins.socket_map(maps::CONNECTIONS))?;
        let (backends, of_backends) = mapped("BACKEND_STATS")?;
        let (pools, of_pools) = mapped("POOL_STATS")?;
        Ok(Self {
            storage: MapData::from_pin(pins.socket_map(maps::SOCKETS))?,
            connections: Mapped::open::<Connection>(connections.fd(), Connection::PLACES)?,
            backends: Mapped::open::<BackendStats>(backends.fd(), of_backends)?,
            pools: Mapped::open::<PoolStats>(pools.fd(), of_pools)?,
            limits: aya::maps::Array::try_from(aya::maps::Map::Array(mapped("POOLS")?.0))?,
            set: set.id,
        })
    }

    /// What is remembered of the TCP connection with this cookie, if it has a place of its own.
    pub(super) fn connection(&self, cookie: u64) -> Option<SocketState> {
        let connection: Connection = self.connections.read(cookie as u32 & (Connection::PLACES - 1)).ok()?;
        (connection.owner == cookie).then_some(connection.state)
    }

    /// Places that are somebody's.
    pub(super) fn taken(&self) -> u32 {
        let taken =
            |place: &u32| self.connections.word(*place, OWNER).is_ok_and(|owner| owner.load(Ordering::Relaxed) != 0);
        (0..self.connections.len()).filter(taken).count() as u32
    }

    /// Frees the places of connects that failed before they began: no hook hears of those.
    pub(super) fn tidy(&self, waiting: &mut Waiting, now: Instant) -> Result<usize> {
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
        let mut freed = 0;
        for (place, owner) in waiting.take_abandoned(&still, now) {
            let word = self.connections.word(place, OWNER)?;
            freed += usize::from(word.compare_exchange(owner, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok());
        }
        Ok(freed)
    }

    /// Takes down how things are.
    pub(super) fn before(&self) -> Result<Before> {
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
        let all = |of: &Mapped, word| -> Result<Vec<u64>> {
            (0..of.len()).map(|id| Ok(of.word(id, word)?.load(Ordering::SeqCst))).collect()
        };
        Ok(Before { owners, backends: all(&self.backends, BACKEND_ACTIVE)?, pools: all(&self.pools, POOL_ACTIVE)? })
    }

    /// Leads places and counts to what was seen of all sockets since.
    pub(super) fn recount(&self, before: &Before, seen: &Seen) -> Result<Recounted> {
        let mut recounted = Recounted::default();
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
        correct(&self.backends, BACKEND_ACTIVE, &before.backends, &backends, &mut recounted)?;
        correct(&self.pools, POOL_ACTIVE, &before.pools, &pools, &mut recounted)?;
        for (place, owner) in before.owners.iter().filter(|(_, owner)| !seen.cookies.contains(owner)) {
            let word = self.connections.word(*place, OWNER)?;
            let freed = word.compare_exchange(*owner, 0, Ordering::SeqCst, Ordering::SeqCst);
            recounted.freed += usize::from(freed.is_ok());
        }
        Ok(recounted)
    }
}

/// Corrects those counts that nobody has changed meanwhile.
fn correct(
    of: &Mapped,
    word: usize,
    before: &[u64],
    seen: &HashMap<u32, u64>,
    recounted: &mut Recounted,
) -> Result<()> {
    for (id, before) in (0..).zip(before) {
        let there_are = seen.get(&id).copied().unwrap_or(0);
        if *before == there_are {
            continue;
        }
        let active = of.word(id, word)?;
        match active.compare_exchange(*before, there_are, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => recounted.corrected += 1,
            Err(_) => recounted.unsettled += 1,
        }
    }
    Ok(())
}

/// Places whose connect had not begun when they were looked at: whose they were, and since when.
#[derive(Debug, Default)]
pub(super) struct Waiting(HashMap<u32, (u64, Instant)>);

impl Waiting {
    /// Of those that wait now, the ones that have waited for too long.
    fn take_abandoned(&mut self, still: &[(u32, u64)], now: Instant) -> Vec<(u32, u64)> {
        let mut abandoned = Vec::new();
        let mut waiting = HashMap::with_capacity(still.len());
        for (place, owner) in still {
            let since = self.0.get(place).filter(|(former, _)| former == owner).map_or(now, |(_, since)| *since);
            if now.saturating_duration_since(since) >= ABANDONED {
                abandoned.push((*place, *owner));
            } else {
                waiting.insert(*place, (*owner, since));
            }
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
        assert_eq!(waiting.take_abandoned(&[(1, 10), (2, 20)], start), []);
        // The place of the second is another one's meanwhile.
        assert_eq!(waiting.take_abandoned(&[(1, 10), (2, 21)], after(300)), []);
        assert_eq!(waiting.take_abandoned(&[(1, 10), (2, 21)], after(599)), []);
        assert_eq!(waiting.take_abandoned(&[(1, 10), (2, 21)], after(600)), [(1, 10)]);
        // Gone for a moment is begun anew.
        assert_eq!(waiting.take_abandoned(&[], after(700)), []);
        assert_eq!(waiting.take_abandoned(&[(2, 21)], after(1000)), []);
    }
}
