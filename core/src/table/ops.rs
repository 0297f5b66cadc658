//! What goes between the table and the kernel: writes, sizes, what a former agent left, what is refused and what is lost.

use std::{collections::BTreeSet, net::SocketAddr};

use portolan_common::{Backend, FrontendKey, FrontendVersion, PoolLimits, Slot};
use serde::{Deserialize, Serialize};

use super::range_alloc::OutOfCapacity;

/// One write to the kernel's maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// A backend id gets an endpoint, and counters at zero.
    SetBackend(u32, Backend),
    /// A place for a pool's limits gets a pool, and counters at zero.
    ResetPool(u32, PoolLimits),
    /// A pool has other limits.
    SetPool(u32, PoolLimits),
    /// Backend ids of runs, from this entry on.
    SetRuns(u32, Vec<u32>),
    /// Slots of a schedule, from this entry on.
    SetSlots(u32, Vec<Slot>),
    /// A version of a frontend, which nobody reads yet.
    SetVersion(u32, FrontendVersion),
    /// A frontend id's cursor and counters start at zero.
    ResetFrontend(u32),
    /// Publishes: from here on connections to this frontend id use this version.
    Publish(u32, u32),
    /// An address is a frontend's from here on.
    AddFrontend(FrontendKey, u32),
    /// Takes a frontend away: its address is nobody's any more.
    RemoveFrontend(FrontendKey),
}

/// How many entries the maps have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Frontends; twice as many versions, and twice as many pools with limits.
    pub frontends: u32,
    /// Backends.
    pub backends: u32,
    /// Slots; runs have as many entries.
    pub slots: u32,
    /// Clients that come back to their endpoint.
    pub affinities: u32,
}

impl Default for Sizes {
    /// For 10,000 services and 100,000 endpoints, with room for a change: what is new is written before what is old goes.
    fn default() -> Self {
        Self { frontends: 1 << 14, backends: 1 << 17, slots: 1 << 20, affinities: 1 << 16 }
    }
}

impl Sizes {
    /// Versions of frontends: each may change while it is used.
    pub fn versions(&self) -> u32 {
        self.frontends.saturating_mul(2)
    }

    /// Places for the limits of pools; the first is nobody's.
    pub fn pools(&self) -> u32 {
        self.frontends.saturating_mul(2).saturating_add(1)
    }
}

/// How much is known of what should be. It matters for what a former agent has published, while this one has not read everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completeness {
    /// Everything: the table is the truth.
    Complete,
    /// Some services or endpoints are not known: what the former agent has published is not removed, and where it has published somebody,
    /// nobody does not take the place.
    Partial,
    /// The settings that say what must stay in its cluster are not known either: what the former agent has published stays as it is.
    WithoutSettings,
}

/// A frontend that does not fit: it stays as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Which one.
    pub key: FrontendKey,
    /// The map that is full.
    pub map: &'static str,
    /// By how much.
    pub full: OutOfCapacity,
    /// Whether its address is a frontend's all the same: with what it had before, or refusing. If not, its connections go past Portolan.
    pub held: bool,
}

/// Endpoints that a frontend has lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RemovedEndpoints {
    /// These.
    These(BTreeSet<SocketAddr>),
    /// Any: what a former agent had published is not known in full.
    Any,
}

impl Default for RemovedEndpoints {
    fn default() -> Self {
        Self::These(BTreeSet::new())
    }
}

impl RemovedEndpoints {
    /// These as well.
    pub fn add(&mut self, more: Self) {
        match (&mut *self, more) {
            (Self::These(all), Self::These(more)) => all.extend(more),
            _ => *self = Self::Any,
        }
    }

    /// Whether an endpoint may be one of them.
    pub fn may_be(&self, endpoint: &SocketAddr) -> bool {
        match self {
            Self::These(all) => all.contains(endpoint),
            Self::Any => true,
        }
    }
}
