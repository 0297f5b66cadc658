//! How schedules and limits are written into the kernel's maps.

use std::{
    collections::{BTreeSet, HashMap},
    hash::Hasher as _,
    net::SocketAddr,
    time::Duration,
};

use portolan_common::{Endpoint, Entry, FrontendVersion, PoolLimits, Slot, VersionFlags};
use siphasher::sip::SipHasher13;

use super::{
    FrontendSpec, PoolSpec,
    ids::{BackendId, PoolId},
    refcounted_ids::RefcountedIds,
};
use crate::{model::ConnectionPool, policy::PoolKey};

/// Encodes the schedule of one frontend.
pub(super) struct Encoder<'a> {
    pub(super) spec: &'a FrontendSpec,
    /// The ids of all endpoints of the schedule.
    pub(super) backends: &'a RefcountedIds<SocketAddr, BackendId>,
    /// The entries of `POOLS`, in the order of the frontend's pools.
    pub(super) pools: &'a [PoolId],
}

/// A schedule that is more than a list of endpoints.
pub(super) struct Detailed {
    /// Its version, without such a list.
    pub(super) version: FrontendVersion,
    /// What `SLOTS` holds from the version's base on.
    pub(super) slots: Vec<Slot>,
    /// What `RUNS` holds from the first entry on: the runs, the members, and the pool of each member.
    pub(super) runs: Vec<u32>,
}

impl Encoder<'_> {
    /// Returns the turns of a schedule that is a list of endpoints.
    pub(super) fn entries(&self, turns: &[(u32, u32)]) -> Vec<Entry> {
        let turn = |(run, member): &(u32, u32)| {
            let run = &self.spec.schedule.runs[*run as usize];
            let address = run.members[*member as usize];
            let endpoint = Endpoint::from(address);
            Entry {
                address: if endpoint.is_v4() { endpoint.v4_word() } else { 0 },
                port: endpoint.port_word(),
                epoch: self.backends.epoch(&address) as u16,
                backend_id: self.backends.id(&address).unwrap_or_default().get(),
                pool: self.pool(run.route).get(),
            }
        };
        turns.iter().map(turn).collect()
    }

    /// Returns the version of a schedule that is more than a list of endpoints, with its slots and runs unless it is a
    /// list with something beside it.
    ///
    /// `live` are the endpoints that clients may return to.
    /// The slots begin at this entry of `SLOTS`, and the runs at this one of `RUNS`.
    pub(super) fn version(
        &self,
        live: &BTreeSet<SocketAddr>,
        is_list: bool,
        (first_slot, first_run): (u32, u32),
    ) -> Detailed {
        let schedule = &self.spec.schedule;
        let (mut slots, mut runs) = (Vec::new(), Vec::new());
        if !is_list {
            let mut slots_of = Vec::with_capacity(schedule.runs.len());
            for run in &schedule.runs {
                slots_of.push(Slot {
                    first: first_run + runs.len() as u32,
                    len: run.members.len() as u32,
                    visits: run.visits,
                    visit: 0,
                    pool: self.pool(run.route).get(),
                    choice: run.choice as u16,
                    strict: u16::from(self.spec.pools.get(run.route as usize).is_some_and(|pool| pool.strict)),
                });
                runs.extend(run.members.iter().filter_map(|member| self.backends.id(member)).map(BackendId::get));
            }
            slots.extend(schedule.turns.iter().map(|turn| Slot { visit: turn.visit, ..slots_of[turn.run as usize] }));
        }
        let mut members: Vec<BackendId> = live.iter().filter_map(|member| self.backends.id(member)).collect();
        members.sort_unstable();
        // If several routes lead to a backend, the limits of the first one apply to returning clients.
        let mut pool_of: HashMap<BackendId, PoolId> = HashMap::new();
        for run in &schedule.runs {
            for id in run.members.iter().filter_map(|member| self.backends.id(member)) {
                pool_of.entry(id).or_insert(self.pool(run.route));
            }
        }
        let first_member = first_run + runs.len() as u32;
        runs.extend(members.iter().map(|id| id.get()));
        runs.extend(members.iter().map(|id| pool_of.get(id).copied().unwrap_or(PoolId::NONE).get()));
        let version = FrontendVersion {
            base: first_slot,
            period: slots.len() as u32,
            members: first_member,
            member_count: members.len() as u32,
            affinity_seconds: self.spec.affinity.map_or(0, seconds),
            flags: if self.spec.random { VersionFlags::RANDOM } else { 0 },
            entries: 0,
            entry_count: 0,
        };
        Detailed { version, slots, runs }
    }

    fn pool(&self, route: u32) -> PoolId {
        self.pools.get(route as usize).copied().unwrap_or(PoolId::NONE)
    }
}

/// Converts a pool's limits to the kernel's representation.
pub(super) fn limits(pool: &PoolSpec, epoch: u32) -> PoolLimits {
    let ConnectionPool { connect_timeout, max_connections, keepalive, .. } = &pool.limits;
    let of = keepalive.clone().unwrap_or_default();
    PoolLimits {
        epoch,
        max_connections: max_connections.unwrap_or(0),
        connect_timeout_ms: connect_timeout.map_or(0, milliseconds),
        keepalive: u32::from(keepalive.is_some()),
        keepalive_time: of.time.map_or(0, seconds),
        keepalive_interval: of.interval.map_or(0, seconds),
        keepalive_probes: of.probes.unwrap_or(0),
        watch: pool.watch,
        name: name(&pool.key),
    }
}

/// Hashes a pool's name.
/// The hash must stay the same in every version of Portolan, because adopted maps contain it.
pub(super) fn name(key: &PoolKey) -> u64 {
    let mut hasher = SipHasher13::new();
    let kind = if key.service.is_entry { "ServiceEntry" } else { "Service" };
    hasher.write(format!("{kind} {key}").as_bytes());
    hasher.finish()
}

/// Rounds up to whole seconds; at least one.
fn seconds(time: Duration) -> u32 {
    u32::try_from(time.as_millis().div_ceil(1000)).unwrap_or(u32::MAX).max(1)
}

/// Converts to milliseconds, capped at the largest value that a socket option accepts.
fn milliseconds(limit: Duration) -> u32 {
    u32::try_from(limit.as_millis()).unwrap_or(u32::MAX).min(i32::MAX as u32)
}
