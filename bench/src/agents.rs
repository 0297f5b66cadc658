//! What an agent takes while it serves.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;

use crate::{
    files::agent_memory,
    progress,
    served::{ActiveEndpoints, ENDPOINTS},
    world::spent,
};

/// One agent.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct AgentCost {
    pub(crate) services: u32,
    pub(crate) endpoints: u32,
    /// Seconds from its start to ready, with the objects in files.
    pub(crate) ready: f64,
    /// MiB of its own memory (anonymous), which is what it keeps, and MiB that the maps take in the kernel.
    pub(crate) mib: f64,
    pub(crate) maps_mib: f64,
    /// Part of one processor while nothing changes.
    pub(crate) idle: f64,
}

/// Of agents that have nothing to do.
pub(crate) fn run(served: &[(u32, ActiveEndpoints)], seconds: f64) -> Result<Vec<AgentCost>> {
    progress("agents at rest");
    let spent_by_all =
        || -> Result<Vec<f64>> { served.iter().map(|(_, node)| spent(node.agent.process.id())).collect() };
    let (before, began) = (spent_by_all()?, Instant::now());
    while began.elapsed().as_secs_f64() < seconds {
        std::thread::park_timeout(Duration::from_millis(100));
    }
    let (after, took) = (spent_by_all()?, began.elapsed());
    let cost = |((services, node), (before, after)): (&(u32, ActiveEndpoints), (&f64, &f64))| {
        Ok(AgentCost {
            services: *services,
            endpoints: services * ENDPOINTS,
            ready: node.ready,
            mib: agent_memory(&node.agent)?,
            maps_mib: node.map_bytes()? / f64::from(1 << 20),
            // Threads end, and their time with them.
            idle: ((after - before) / took.as_nanos() as f64).max(0.0),
        })
    };
    served.iter().zip(before.iter().zip(&after)).map(cost).collect()
}
