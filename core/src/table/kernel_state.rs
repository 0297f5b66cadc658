//! The state that pinned maps hold when an agent starts.

use portolan_common::{Backend, FrontendHash, FrontendKey, FrontendVersion, PoolLimits, Published};

use super::ids::{BackendId, FrontendId, Generation, PoolId, VersionIndex};

/// A frontend that a previous agent left in the pinned maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinnedFrontend {
    /// Its address, port and protocol.
    pub key: FrontendKey,
    /// The frontend id: where its line is.
    pub id: FrontendId,
    /// The epoch of that line.
    pub epoch: u32,
    /// What is in effect.
    pub published: Published,
    /// The number of the publication.
    pub generation: Generation,
    /// The active version and its index in `VERSIONS`; `None` if the schedule is a list of endpoints.
    pub version: Option<(VersionIndex, FrontendVersion)>,
    /// The range of `RUNS` that the version uses: first entry and number of entries.
    pub runs: (u32, u32),
}

/// The contents that a previous agent left in the pinned maps.
#[derive(Clone, Debug)]
pub struct PinnedState {
    /// The hash by which frontends are found.
    pub hash: FrontendHash,
    /// Those of both address families, in the order of their lines.
    pub frontends: Vec<PinnedFrontend>,
    /// Lines that were in use and are free, with the epoch of their last use, and whether searches pass them.
    pub free_lines: Vec<(FrontendId, u32, bool)>,
    /// The backends that these frontends use, by backend id.
    pub backends: Vec<(BackendId, Backend)>,
    /// The last epoch of every backend id that was ever allocated, as (id, epoch).
    pub epochs: Vec<(BackendId, u32)>,
    /// The limits of the pools that these frontends use, by entry of `POOLS`.
    pub pools: Vec<(PoolId, PoolLimits)>,
    /// The last epoch of every entry of `POOLS` that was ever allocated, as (entry, epoch).
    pub pool_epochs: Vec<(PoolId, u32)>,
}

impl PinnedState {
    /// Returns the state of empty maps.
    pub fn empty(hash: FrontendHash) -> Self {
        let (frontends, free_lines, backends, epochs, pools, pool_epochs) = Default::default();
        Self { hash, frontends, free_lines, backends, epochs, pools, pool_epochs }
    }
}
