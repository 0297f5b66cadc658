//! The table: what the kernel shall hold, as plain values, and the steps from one table to the next.
//!
//! Pure. `Table` says what is wanted, free of ids and positions; `Layout` knows what the kernel holds and where;
//! `Layout::update` gives the writes that lead from one to the other, in an order in which each prefix is sound.

mod alloc;
mod layout;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use portolan_common::{Endpoint, FrontendKey};

pub use alloc::Full;
pub use layout::{Held, Knowledge, Layout, Op, Refused, Sizes};

use crate::policy::{Assignment, Schedule};

/// What one frontend shall do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Turns and runs; empty: refuse.
    pub schedule: Arc<Schedule>,
    /// All endpoints, in order, those without a turn as well: the kernel goes on counting their connections.
    pub endpoints: Arc<[SocketAddr]>,
    /// Limit for the connect.
    pub connect_timeout: Option<Duration>,
}

/// What the kernel shall hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// By Service address, port and protocol.
    pub frontends: BTreeMap<FrontendKey, Entry>,
}

impl Table {
    /// From the policy's verdict, or a part of it. Where connections go where they were going, there is nothing to hold.
    pub fn new<'a>(assignments: impl IntoIterator<Item = &'a Arc<Assignment>>) -> Self {
        let mut frontends = BTreeMap::new();
        for assignment in assignments.into_iter().filter(|assignment| !assignment.passthrough) {
            let pools = assignment.routes.iter().map(|route| &route.pool);
            let endpoints: BTreeSet<SocketAddr> =
                pools.flat_map(|pool| &pool.endpoints).map(|endpoint| endpoint.address).collect();
            let entry = Entry {
                schedule: Arc::clone(&assignment.schedule),
                endpoints: endpoints.into_iter().collect(),
                connect_timeout: assignment.connect_timeout,
            };
            for frontend in &assignment.frontends {
                frontends.insert(key(*frontend, assignment.protocol.number()), entry.clone());
            }
        }
        Self { frontends }
    }
}

/// The kernel's key for a frontend.
pub fn key(address: SocketAddr, protocol: u32) -> FrontendKey {
    FrontendKey::new(Endpoint::from(address), protocol)
}
