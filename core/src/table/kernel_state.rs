//! What the pinned maps hold when an agent starts.

use portolan_common::{Backend, FrontendVersion, PoolLimits};

/// A frontend that a former agent left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinnedFrontend {
    /// Its id.
    pub id: u32,
    /// Where its version lies.
    pub index: u32,
    /// That version.
    pub version: FrontendVersion,
    /// The range of `RUNS` that it uses.
    pub runs: (u32, u32),
}

/// What a former agent left in the maps.
#[derive(Clone, Debug, Default)]
pub struct PinnedState {
    /// Its frontends.
    pub frontends: Vec<PinnedFrontend>,
    /// Backends that these frontends use.
    pub backends: Vec<(u32, Backend)>,
    /// The last epoch of every backend id that was ever given out.
    pub epochs: Vec<(u32, u32)>,
    /// Pools with limits that these frontends use.
    pub pools: Vec<(u32, PoolLimits)>,
    /// The last epoch of every pool's place that was ever given out.
    pub pool_epochs: Vec<(u32, u32)>,
}
