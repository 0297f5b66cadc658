//! The table: what the kernel shall hold, as plain values, and the steps from one table to the next.
//!
//! Pure. `Table` says what is wanted, free of ids and positions; `Layout` knows what the kernel holds and where;
//! `Layout::update` gives the writes that lead from one to the other, in an order in which each prefix is sound.

mod kernel_state;
mod layout;
mod ops;
mod range_alloc;
mod refcounted_ids;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use portolan_common::{Endpoint, FrontendKey};

use crate::{
    model::{Algorithm, ClusterLocal, ConnectionPool, Protocol},
    policy::{Assignment, PoolKey, Schedule},
};

pub use kernel_state::{PinnedFrontend, PinnedState};
pub use layout::Layout;
pub use ops::{Completeness, Op, Rejected, RemovedEndpoints, Sizes};
pub use range_alloc::{GraceEpoch, OutOfCapacity};

/// What one frontend shall do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrontendSpec {
    /// Turns and runs; empty: refuse.
    pub schedule: Arc<Schedule>,
    /// All endpoints, in order, those without a turn as well: the kernel goes on counting their connections.
    pub endpoints: Arc<[SocketAddr]>,
    /// The pools of its routes, in their order.
    pub pools: Arc<[PoolSpec]>,
    /// How long a client comes back to its endpoint; `None`: it does not.
    pub affinity: Option<Duration>,
    /// Whether turns are drawn instead of taken in order.
    pub random: bool,
}

/// What counts for all connections to a pool, whichever frontend they come through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSpec {
    /// Which pool; both address families are one.
    pub key: PoolKey,
    /// Its limits.
    pub limits: ConnectionPool,
    /// Whether its connections must not leave their cluster.
    pub strict: bool,
    /// What the kernel has to look at (bits of `TrackFlags`).
    pub watch: u32,
}

impl PoolSpec {
    /// Whether the kernel has anything to do for it.
    fn has_limits(&self) -> bool {
        self.limits != ConnectionPool::default() || self.watch != 0
    }
}

/// What the kernel shall hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// By Service address, port and protocol.
    pub frontends: BTreeMap<FrontendKey, FrontendSpec>,
}

impl Table {
    /// From the policy's verdict, or a part of it. Where connections go where they were going, there is nothing to hold.
    pub fn new<'a>(assignments: impl IntoIterator<Item = &'a Arc<Assignment>>) -> Self {
        let mut frontends = BTreeMap::new();
        for assignment in assignments.into_iter().filter(|assignment| !assignment.passthrough) {
            let entry = FrontendSpec::new(assignment);
            for frontend in &assignment.frontends {
                frontends.insert(key(*frontend, assignment.protocol), entry.clone());
            }
        }
        Self { frontends }
    }
}

impl FrontendSpec {
    fn new(assignment: &Assignment) -> Self {
        let pools = || assignment.routes.iter().map(|route| &route.pool);
        let listed = pools().flat_map(|pool| &pool.endpoints).map(|endpoint| endpoint.address);
        let endpoints: BTreeSet<SocketAddr> = listed.chain(pools().flat_map(|pool| &pool.leaving).copied()).collect();
        let entries = pools().map(|pool| PoolSpec {
            key: pool.key.both_families(),
            // All of them are of TCP.
            limits: if assignment.protocol == Protocol::Tcp { pool.limits.clone() } else { ConnectionPool::default() },
            strict: pool.cluster_local == ClusterLocal::Strict,
            watch: if assignment.protocol == Protocol::Tcp { pool.watch() } else { 0 },
        });
        Self {
            schedule: Arc::clone(&assignment.schedule),
            endpoints: endpoints.into_iter().collect(),
            pools: entries.collect(),
            affinity: assignment.affinity,
            // Where a route splits connections, each destination has its turns.
            random: matches!(assignment.routes.as_slice(), [only] if only.pool.algorithm == Algorithm::Random),
        }
    }

    /// The same, without anybody to take.
    fn refusing(&self) -> Self {
        let without_limits = |pool: &PoolSpec| PoolSpec { limits: ConnectionPool::default(), watch: 0, ..pool.clone() };
        let pools = self.pools.iter().map(without_limits).collect();
        Self { schedule: Arc::default(), endpoints: Arc::default(), pools, affinity: None, random: false }
    }

    /// Whether its connections must not leave their cluster.
    fn is_strict(&self) -> bool {
        self.pools.iter().any(|pool| pool.strict)
    }
}

/// The kernel's key for a frontend.
pub fn key(address: SocketAddr, protocol: Protocol) -> FrontendKey {
    FrontendKey::new(Endpoint::from(address), protocol.number())
}
