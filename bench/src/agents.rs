//! Memory and CPU time of idle agents.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;

use crate::{
    files::agent_memory,
    progress,
    served::{ActiveEndpoints, ENDPOINTS},
    world::spent,
};

/// Processor time and memory of one agent process.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct AgentCost {
    pub(crate) services: u32,
    pub(crate) endpoints: u32,
    /// Seconds from start to ready, with the objects in files.
    pub(crate) ready: f64,
    /// Anonymous memory of the agent and its helper process, in MiB.
    pub(crate) mib: f64,
    /// Kernel memory of the maps, in MiB.
    pub(crate) maps_mib: f64,
    /// Fraction of one CPU that the agent uses while nothing changes.
    pub(crate) idle: f64,
}

/// Measures agents whose objects do not change, over this many seconds.
pub(crate) fn run(served: &[(u32, ActiveEndpoints)], seconds: f64) -> Result<Vec<AgentCost>> {
    progress("idle agents");
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
            // The CPU time of threads that exit is lost, so the difference can be negative.
            idle: ((after - before) / took.as_nanos() as f64).max(0.0),
        })
    };
    served.iter().zip(before.iter().zip(&after)).map(cost).collect()
}
