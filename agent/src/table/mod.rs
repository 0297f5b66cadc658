//! The table: what the kernel shall hold, as plain values, and the steps from one table to the next.
//!
//! Pure. `Table` says what is wanted, free of ids and positions; `Layout` knows what the kernel holds and where;
//! `Layout::update` gives the writes that lead from one to the other, in an order in which each prefix is sound.

mod alloc;
mod layout;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
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
    pub schedule: Schedule,
    /// All endpoints, in order, those without a turn as well: the kernel goes on counting their connections.
    pub endpoints: Vec<SocketAddr>,
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
    /// From the policy's verdict.
    pub fn new(assignments: &[Assignment]) -> Self {
        let mut frontends = BTreeMap::new();
        for assignment in assignments {
            let pools = assignment.routes.iter().map(|route| &route.pool);
            let endpoints: BTreeSet<SocketAddr> =
                pools.flat_map(|pool| &pool.endpoints).map(|endpoint| endpoint.address).collect();
            for frontend in &assignment.frontends {
                let entry = Entry {
                    schedule: assignment.schedule.clone(),
                    endpoints: endpoints.iter().copied().collect(),
                    connect_timeout: assignment.connect_timeout,
                };
                frontends.insert(key(*frontend, assignment.protocol.number()), entry);
            }
        }
        Self { frontends }
    }
}

/// The kernel's key for a frontend.
pub fn key(address: SocketAddr, protocol: u32) -> FrontendKey {
    FrontendKey::new(Endpoint::from(address), protocol)
}
