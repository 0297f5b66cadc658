//! The table: the desired contents of the kernel's maps as plain values, and the steps from one table to the next.
//!
//! This module is pure.
//! `Table` holds the desired state without ids or positions.
//! `Layout` knows what the kernel holds at which index.
//! `Layout::update` returns the writes that lead from one to the other, ordered so that every prefix leaves a
//! consistent state.

mod demand;
mod encoding;
#[cfg(any(test, feature = "fake"))]
pub mod fake_maps;
mod frontend_lines;
mod ids;
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

pub use ids::{BackendId, FrontendId, Generation, GraceEpoch, PoolId, VersionIndex};
pub use kernel_state::{PinnedFrontend, PinnedState};
pub use layout::Layout;
pub use ops::{Completeness, Op, Rejected, RemovedEndpoints, Sizes};
pub use range_alloc::OutOfCapacity;

/// The desired state of one frontend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrontendSpec {
    /// The turns and runs; if empty, the frontend refuses connections.
    pub schedule: Arc<Schedule>,
    /// All endpoints in ascending order, including those without a turn: the kernel keeps counting their connections.
    pub endpoints: Arc<[SocketAddr]>,
    /// The pool of each route, in route order.
    pub pools: Arc<[PoolSpec]>,
    /// The idle time for which a client returns to its endpoint (`sessionAffinity`); `None` without affinity.
    pub affinity: Option<Duration>,
    /// Whether turns are drawn at random instead of taken in order.
    pub random: bool,
}

/// The settings that apply to all connections of a pool, whichever frontend they use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSpec {
    /// The pool's name; both address families share one pool.
    pub key: PoolKey,
    /// The `connectionPool` limits; none for UDP.
    pub limits: ConnectionPool,
    /// Whether connections must stay in the client's cluster (`clusterLocal`).
    pub strict: bool,
    /// The events that the kernel has to track, as bits of `TrackFlags`.
    pub watch: u32,
}

impl PoolSpec {
    /// Returns whether the pool needs an entry in `POOLS`.
    fn has_limits(&self) -> bool {
        self.limits != ConnectionPool::default() || self.watch != 0
    }
}

/// The desired contents of the kernel's maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// The frontends by Service address, port and protocol.
    pub frontends: BTreeMap<FrontendKey, FrontendSpec>,
}

impl Table {
    /// Builds the table from the policy's assignments, or from some of them.
    /// Passthrough assignments need no frontend and are skipped.
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
            // `connectionPool.tcp` and the tracked events apply to TCP only.
            limits: if assignment.protocol == Protocol::Tcp { pool.limits.clone() } else { ConnectionPool::default() },
            strict: pool.cluster_local == ClusterLocal::Strict,
            watch: if assignment.protocol == Protocol::Tcp { pool.watch() } else { 0 },
        });
        Self {
            schedule: Arc::clone(&assignment.schedule),
            endpoints: endpoints.into_iter().collect(),
            pools: entries.collect(),
            affinity: assignment.affinity,
            // With a traffic split, each destination keeps its own turns.
            random: matches!(assignment.routes.as_slice(), [only] if only.pool.algorithm == Algorithm::Random),
        }
    }

    /// Returns the same frontend without endpoints, so that it refuses all connections.
    fn refusing(&self) -> Self {
        let without_limits = |pool: &PoolSpec| PoolSpec { limits: ConnectionPool::default(), watch: 0, ..pool.clone() };
        let pools = self.pools.iter().map(without_limits).collect();
        Self { schedule: Arc::default(), endpoints: Arc::default(), pools, affinity: None, random: false }
    }

    /// Returns whether connections must stay in the client's cluster.
    fn is_strict(&self) -> bool {
        self.pools.iter().any(|pool| pool.strict)
    }
}

/// Returns the kernel's key for a Service address and protocol.
pub fn key(address: SocketAddr, protocol: Protocol) -> FrontendKey {
    FrontendKey::new(Endpoint::from(address), protocol.number())
}
