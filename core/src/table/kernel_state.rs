//! The state that pinned maps hold when an agent starts.

use portolan_common::{Backend, FrontendVersion, PoolLimits};

use super::ids::{BackendId, FrontendId, PoolId, VersionIndex};

/// A frontend that a previous agent left in the pinned maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinnedFrontend {
    /// The frontend id: the index into `CURRENT` and `FRONTEND_STATS`.
    pub id: FrontendId,
    /// The index of the active version in `VERSIONS`.
    pub index: VersionIndex,
    /// The active version, as read from `VERSIONS`.
    pub version: FrontendVersion,
    /// The range of `RUNS` that the version uses: first entry and number of entries.
    pub runs: (u32, u32),
}

/// The contents that a previous agent left in the pinned maps.
#[derive(Clone, Debug, Default)]
pub struct PinnedState {
    /// All frontends in `FRONTENDS`.
    pub frontends: Vec<PinnedFrontend>,
    /// The backends that these frontends use, by backend id.
    pub backends: Vec<(BackendId, Backend)>,
    /// The last epoch of every backend id that was ever allocated, as (id, epoch).
    pub epochs: Vec<(BackendId, u32)>,
    /// The limits of the pools that these frontends use, by entry of `POOLS`.
    pub pools: Vec<(PoolId, PoolLimits)>,
    /// The last epoch of every entry of `POOLS` that was ever allocated, as (entry, epoch).
    pub pool_epochs: Vec<(PoolId, u32)>,
}
