//! The values that pass between the table and the kernel: writes, map sizes, completeness of the input, rejected
//! frontends and removed endpoints.

use std::{collections::BTreeSet, net::SocketAddr};

use portolan_common::{Backend, Entry, Frontend, FrontendKey, FrontendVersion, PoolLimits, Published, Slot};
use serde::{Deserialize, Serialize};

use super::{
    ids::{BackendId, FrontendId, Generation, PoolId, VersionIndex},
    range_alloc::OutOfCapacity,
};

/// One write to the kernel's maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Assigns an endpoint to a backend id and resets its counters.
    SetBackend(BackendId, Backend),
    /// Assigns a pool to an entry of `POOLS` and resets its counters.
    ResetPool(PoolId, PoolLimits),
    /// Replaces the limits of a pool.
    SetPool(PoolId, PoolLimits),
    /// Writes backend ids to `RUNS`, starting at this entry.
    SetRuns(u32, Vec<u32>),
    /// Writes slots of a schedule to `SLOTS`, starting at this entry.
    SetSlots(u32, Vec<Slot>),
    /// Writes turns to `ENTRIES`, starting at this entry.
    SetEntries(u32, Vec<Entry>),
    /// Writes all turns of a frontend behind its line, where no program reads them yet.
    SetInline(FrontendId, Vec<Entry>),
    /// Writes a version of a frontend to an index that no program reads yet.
    SetVersion(VersionIndex, FrontendVersion),
    /// Resets the cursor and counters of a frontend's line, for this epoch.
    ResetFrontend(FrontendId, u32),
    /// Publishes: from now on, connections to this frontend use this schedule.
    Publish(FrontendId, Published, Generation),
    /// Marks a line that is free as removed, so that searches pass it.
    PassLine(FrontendId),
    /// Adds a Service address: from now on, a search finds it at this line.
    AddFrontend(FrontendKey, FrontendId),
    /// Removes a Service address: from now on, its connections bypass Portolan.
    /// The last value says whether searches must pass its line.
    RemoveFrontend(FrontendKey, FrontendId, bool),
}

/// The capacity of each map, in entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Frontends. `FRONTENDS4` and `FRONTENDS6` have more than four times as many lines; `VERSIONS` and `POOLS` have twice as
    /// many entries.
    pub frontends: u32,
    /// Backends, one for each distinct endpoint.
    pub backends: u32,
    /// Schedule slots; `RUNS` and `ENTRIES` have as many entries.
    pub slots: u32,
    /// Clients with session affinity (an LRU map).
    pub affinities: u32,
    /// Sockets whose state is in `CONNECTIONS`; a power of two.
    pub connections: u32,
}

impl Default for Sizes {
    /// Fits 10,000 services and 100,000 endpoints.
    /// The rest is headroom for changes: new entries are written before old ones are freed.
    fn default() -> Self {
        Self { frontends: 1 << 14, backends: 1 << 17, slots: 1 << 20, affinities: 1 << 16, connections: 1 << 18 }
    }
}

impl Sizes {
    /// Returns the option of the agent that sets the size of a map, by its name in metrics and findings.
    pub fn option(map: &str) -> &'static str {
        match map {
            "backends" => "--max-backends",
            "entries" | "slots" | "runs" => "--max-slots",
            "affinity" => "--max-affinities",
            "connections" => "--max-connections",
            _ => "--max-frontends",
        }
    }

    /// The smallest and the largest number of entries of `CONNECTIONS`.
    pub const CONNECTIONS: (u32, u32) = (1 << 10, 1 << 24);

    /// Returns the default number of entries of `CONNECTIONS` for a machine with this many bytes of memory.
    ///
    /// One entry, of 128 bytes, for each 32 KiB: 2^18 entries (32 MiB) with 8 GiB.
    pub fn connections_for_memory(bytes: u64) -> u32 {
        let entries = (bytes >> 15).max(1).checked_next_power_of_two().unwrap_or(u64::MAX);
        u32::try_from(entries).unwrap_or(u32::MAX).clamp(1 << 14, 1 << 22)
    }

    /// Returns the base 2 logarithm of the number of buckets in `FRONTENDS4` and in `FRONTENDS6`: at most a quarter of
    /// their lines are in use.
    fn frontend_bucket_bits(&self) -> u32 {
        self.frontends.max(1).checked_next_power_of_two().map_or(31, u32::trailing_zeros).min(27) + 1
    }

    /// Returns the number of lines in buckets.
    pub fn hashed_frontend_lines(&self) -> u32 {
        Frontend::BUCKET << self.frontend_bucket_bits()
    }

    /// Returns the number of lines of `FRONTENDS4`, and of `FRONTENDS6`: those in buckets, and those behind.
    pub fn frontend_lines(&self) -> u32 {
        self.hashed_frontend_lines() + self.frontend_overflow()
    }

    /// Returns the number of lines behind the buckets, and the capacity of `FRONTEND_OVERFLOW` for one family.
    /// Of a full table, less than one frontend in a hundred goes there.
    pub fn frontend_overflow(&self) -> u32 {
        self.frontends / 16 + 16
    }

    /// Returns the number of frontends that goes with this many lines behind the buckets, rounded down to a multiple of 16.
    pub fn frontends_with_overflow(lines: u32) -> u32 {
        lines.saturating_sub(16) * 16
    }

    /// Returns the `shift` of [`Frontend::first_bucket`].
    pub fn frontend_shift(&self) -> u32 {
        64 - self.frontend_bucket_bits()
    }

    /// Returns the capacity of `VERSIONS`: during a change, a frontend has two versions.
    pub fn versions(&self) -> u32 {
        self.frontends.saturating_mul(2)
    }

    /// Returns the capacity of `POOLS`; entry 0 stands for a pool without limits.
    pub fn pools(&self) -> u32 {
        self.frontends.saturating_mul(2).saturating_add(1)
    }
}

/// How complete the agent's input is.
/// This matters for what a previous agent has published while the initial sync is incomplete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Completeness {
    /// All input is known: the table is authoritative.
    Complete,
    /// Some services or endpoints are unknown.
    /// Adopted frontends are not removed, and one that has endpoints is not replaced by one that refuses.
    #[default]
    Partial,
    /// The settings that say which services are cluster-local are unknown as well: adopted frontends stay unchanged.
    WithoutSettings,
}

/// A frontend that does not fit into the maps.
/// An existing one keeps its last published version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// The frontend's address, port and protocol.
    pub key: FrontendKey,
    /// The name of the map that is full.
    pub map: &'static str,
    /// The number of entries requested and the size of the map.
    pub full: OutOfCapacity,
    /// Whether the address still belongs to a frontend, with its previous version or refusing.
    /// If `false`, connections to it bypass Portolan.
    pub held: bool,
}

/// The endpoints that frontends have lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RemovedEndpoints {
    /// Exactly these endpoints.
    These(BTreeSet<SocketAddr>),
    /// Possibly any endpoint: the endpoints that a previous agent published are not fully known.
    Any,
}

impl Default for RemovedEndpoints {
    fn default() -> Self {
        Self::These(BTreeSet::new())
    }
}

impl RemovedEndpoints {
    /// Adds more endpoints; `Any` absorbs all others.
    pub fn add(&mut self, more: Self) {
        match (&mut *self, more) {
            (Self::These(all), Self::These(more)) => all.extend(more),
            _ => *self = Self::Any,
        }
    }

    /// Returns whether the endpoint may be among the removed ones.
    pub fn may_be(&self, endpoint: &SocketAddr) -> bool {
        match self {
            Self::These(all) => all.contains(endpoint),
            Self::Any => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_follow_the_memory_of_the_machine() {
        const GIB: u64 = 1 << 30;
        let sizes = [0, GIB, 8 * GIB, 24 * GIB, 1_024 * GIB].map(Sizes::connections_for_memory);
        assert_eq!(sizes, [1 << 14, 1 << 15, 1 << 18, 1 << 20, 1 << 22]);
    }

    #[test]
    fn frontends_follow_from_the_size_of_the_overflow() {
        for frontends in [16, 1 << 14, 100_000] {
            let sizes = Sizes { frontends, ..Sizes::default() };
            assert_eq!(Sizes::frontends_with_overflow(sizes.frontend_overflow()), frontends);
        }
    }
}
