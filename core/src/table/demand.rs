//! How much room a frontend needs in the kernel's maps, and whether its schedule is a plain list of endpoints.

use std::{collections::BTreeSet, net::SocketAddr};

use num_integer::Integer as _;
use portolan_common::{FrontendKey, LbPolicy};

use super::FrontendSpec;
use crate::{model::Protocol, policy::Schedule};

/// What a frontend needs for itself alone.
#[derive(Default)]
pub(super) struct Demand {
    /// The schedule as a list of endpoints: this member of this run at each turn.
    /// Empty if it is none, or refuses all connections.
    pub(super) turns: Vec<(u32, u32)>,
    /// What is beside the list, or instead of it; `None` if the list is all.
    pub(super) version: Option<VersionDemand>,
}

/// What a version needs beside a list of endpoints.
pub(super) struct VersionDemand {
    /// The number of slots; 0 with a list.
    pub(super) period: u32,
    /// The number of entries of `RUNS`.
    pub(super) run_entries: u32,
    /// The endpoints that clients may return to.
    pub(super) live: BTreeSet<SocketAddr>,
}

/// The longest list of endpoints that a schedule with several runs is turned into.
/// One run alone may be longer.
const MAX_TURNS: u64 = 1_024;

impl Demand {
    /// Returns what a frontend needs, with its schedule as a list of endpoints if that is possible.
    pub(super) fn of(key: &FrontendKey, entry: &FrontendSpec) -> Self {
        Self::with(key, entry, if entry.random { None } else { turns(&entry.schedule) })
    }

    /// Returns what a frontend needs with its schedule in slots, which are fewer than the turns of a long list.
    pub(super) fn in_slots(key: &FrontendKey, entry: &FrontendSpec) -> Self {
        Self::with(key, entry, None)
    }

    fn with(key: &FrontendKey, entry: &FrontendSpec, list: Option<Vec<(u32, u32)>>) -> Self {
        let schedule = &entry.schedule;
        if schedule.is_empty() {
            return Self::default();
        }
        let has_returning_clients = entry.affinity.is_some() || key.protocol() == Protocol::Udp.number();
        let is_limited = entry.pools.iter().any(|pool| pool.limits.max_connections.is_some());
        if !has_returning_clients
            && !is_limited
            && let Some(turns) = list
        {
            return Self { turns, version: None };
        }
        // Frontends with returning clients also list their members.
        let live: BTreeSet<SocketAddr> = if has_returning_clients {
            let visited = schedule.runs.iter().filter(|run| run.visits > 0);
            visited.flat_map(|run| run.members.iter().copied()).collect()
        } else {
            BTreeSet::new()
        };
        let (period, run_members) = match &list {
            Some(_) => (0, 0),
            None => {
                (schedule.turns.len() as u32, schedule.runs.iter().map(|run| run.members.len() as u32).sum::<u32>())
            }
        };
        let run_entries = run_members + 2 * live.len() as u32;
        Self { turns: list.unwrap_or_default(), version: Some(VersionDemand { period, run_entries, live }) }
    }
}

/// Returns a schedule as a list of (run, member) that repeats, or `None` if it is none, or a long one.
///
/// The kernel visits the runs in the order of the turns, and each time takes the next member of the run.
fn turns(schedule: &Schedule) -> Option<Vec<(u32, u32)>> {
    let period = schedule.turns.len() as u64;
    let mut rounds = 1u64;
    for run in schedule.runs.iter().filter(|run| run.visits > 0) {
        let (len, visits) = (run.members.len() as u64, u64::from(run.visits));
        if len == 0 || run.choice != LbPolicy::RoundRobin {
            return None;
        }
        // After this many rounds the run is where it began.
        let own = len / len.gcd(&visits);
        rounds = rounds.lcm(&own);
        if period * rounds > MAX_TURNS && schedule.runs.len() > 1 {
            return None;
        }
    }
    let all = u16::try_from(period * rounds).ok()?;
    let turn = |i: u16| {
        let (round, place) = (u64::from(i) / period, u64::from(i) % period);
        let turn = schedule.turns[place as usize];
        let run = &schedule.runs[turn.run as usize];
        let visit = round * u64::from(run.visits) + u64::from(turn.visit);
        (turn.run, (visit % run.members.len() as u64) as u32)
    };
    Some((0..all).map(turn).collect())
}
