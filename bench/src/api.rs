//! An agent that reads from an API server: initial sync of a mesh, and time until a changed endpoint is published.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use portolan::admin::Stream;
use portolan_tests::{
    Api, TestBed,
    objects::{destination_rule, node},
};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    figures::percentile,
    files::{agent_memory, memory},
    progress,
    served::{ENDPOINTS, NODES, other},
    world::spent,
};

/// Silence after which the backlog of events is considered read.
const SILENCE: Duration = Duration::from_millis(300);
/// Time limit for the publication of one change.
const BOUND: Duration = Duration::from_secs(10);

/// Cost of the initial sync, and latency of changes.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct OnApi {
    pub(crate) services: u32,
    pub(crate) endpoints: u32,
    /// Seconds from the agent's start to ready.
    pub(crate) ready: f64,
    /// CPU time of the agent until then, in seconds.
    pub(crate) spent: f64,
    /// Memory in MiB: peak resident memory of the agent, then anonymous memory of agent and helper when ready.
    pub(crate) mib: [f64; 2],
    /// Milliseconds from a changed endpoint on the API server to the agent's `published` event: p50, p99.
    pub(crate) change: [f64; 2],
    pub(crate) changes: u32,
}

/// Measures an agent on a mesh of `services` Services, with this many changes.
pub(crate) fn run(services: u32, changes: u32) -> Result<OnApi> {
    progress(&format!("an agent on an API server with {services} services"));
    let bed = TestBed::named("api")?;
    let mut api = Api::new()?;
    let kubeconfig = api.reach(&bed.namespace)?;
    let rule = json!({"trafficPolicy": {
        "outlierDetection": {"consecutive5xxErrors": 3, "maxEjectionPercent": 50},
        "loadBalancer": {"localityLbSetting": {"failover": [{"from": "r0", "to": "r1"}]}}}});
    let mut objects = vec![destination_rule("*.default.svc.cluster.local", &rule)];
    objects.extend((0..NODES).map(|i| node(&format!("node-{i}"), &format!("r{}/z{}", i % 3, i % 9))));
    objects.extend((1..=services).flat_map(other));
    api.apply(&objects);
    drop(objects);

    let began = Instant::now();
    let agent = bed.agent_on_api(&kubeconfig, "c1", "node-0", &[])?;
    let ready = began.elapsed().as_secs_f64();
    let id = agent.process.id();
    let of = |field: &str| memory(id, field).context("the agent has exited");
    let (spent, peak, anonymous) = (spent(id)? / 1e9, of("VmHWM:")?, agent_memory(&agent)?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut times = runtime.block_on(follow(&bed, &api, services, changes))?;
    times.sort_by(f64::total_cmp);
    let at = |part| percentile(&times, part).unwrap_or(f64::NAN);
    let endpoints = services * ENDPOINTS;
    Ok(OnApi { services, endpoints, ready, spent, mib: [peak, anonymous], change: [at(0.5), at(0.99)], changes })
}

/// Changes endpoints one at a time, each after the previous change is published. Returns the milliseconds of each.
async fn follow(bed: &TestBed, api: &Api, services: u32, changes: u32) -> Result<Vec<f64>> {
    let mut events = Stream::open(&bed.admin(), "/v1/events?follow=true").await?;
    // Skip the events of the initial sync.
    while let Ok(line) = timeout(SILENCE, events.next_line()).await {
        line?.context("the agent closed the event stream")?;
    }
    let mut times = Vec::with_capacity(changes as usize);
    for turn in 0..changes {
        // Even turns make an endpoint of the next Service unready; odd turns make it ready again.
        let service = (turn / 2 * 7) % services + 1;
        let [_, mut slice] = other(service);
        // Pick an endpoint in the client's zone. Others get no connections, so their changes are not published.
        let near = (0..ENDPOINTS).find(|e| ((service * ENDPOINTS + e) % NODES).is_multiple_of(9)).unwrap_or_default();
        slice["endpoints"][near as usize]["conditions"]["ready"] = json!(turn % 2 == 1);
        let began = Instant::now();
        api.apply(&[slice]);
        let mut others = String::new();
        loop {
            let line = timeout(BOUND, events.next_line()).await.with_context(|| {
                format!("turn {turn}: change of service {service} was not published; other events: {others}")
            })??;
            let event: Value = serde_json::from_str(&line.context("the agent closed the event stream")?)?;
            if event["kind"] == "published" {
                break;
            }
            writeln!(others, "{event}")?;
        }
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    ensure!(times.len() == changes as usize);
    Ok(times)
}
