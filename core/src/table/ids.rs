//! Identifiers of entries in the BPF maps.
//!
//! Each is an index or a value of one map. They are distinct types so that one cannot be used in the place of another.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Defines identifiers that wrap a `u32`.
macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
            pub struct $name(u32);

            impl $name {
                /// Wraps the number that the BPF maps use.
                pub const fn new(number: u32) -> Self {
                    Self(number)
                }

                /// Returns the number that the BPF maps use.
                pub const fn get(self) -> u32 {
                    self.0
                }
            }

            impl From<u32> for $name {
                fn from(number: u32) -> Self {
                    Self(number)
                }
            }

            impl From<$name> for u32 {
                fn from(id: $name) -> Self {
                    id.0
                }
            }

            impl fmt::Display for $name {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    self.0.fmt(f)
                }
            }
        )*
    };
}

ids! {
    /// A frontend: the index of `FRONTENDS4` or `FRONTENDS6`.
    ///
    /// Stays the same while the frontend exists, whatever version it uses.
    FrontendId;
    /// A backend: the index of `BACKENDS`, `BACKEND_STATS`, `BACKEND_USE` and `FAILURES`.
    ///
    /// Reused for another endpoint after a grace period, then with the next epoch.
    BackendId;
    /// A pool with limits or tracking: the index of `POOLS` and `POOL_STATS`. [`PoolId::NONE`] is a pool without either.
    PoolId;
    /// A version of a frontend: the index of `VERSIONS`. `Frontend::current` holds the one in effect.
    VersionIndex;
    /// The number of a published version, for people: it grows by one with each version of any frontend, and wraps around.
    Generation;
}

impl PoolId {
    /// The entry that no pool uses.
    pub const NONE: Self = Self(0);
}

impl Generation {
    /// Returns the generation that follows.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// The number of a publication.
///
/// What a publication frees may be reused once every program that ran at its end has finished (an RCU grace period).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GraceEpoch(u64);

impl GraceEpoch {
    /// Wraps a number; larger ones are later.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Returns the epoch that follows.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}
