//! The agent with Kubernetes API servers: watches, outages, invalid objects, opt-out, and remote clusters.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod following;
mod opt_out;
mod others;
mod trouble;

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use portolan_tests::{
    Agent, Api, TestBed,
    objects::{node, plain, service, slice},
    wait_until,
};
use serde_json::Value;

const WEB: &str = "172.16.0.10:80";
const ECONNREFUSED: i32 = 111;
const BOUND: Duration = Duration::from_secs(30);
/// Bound for recovery after a long outage: after half a minute of failures, retries are up to half a minute apart.
const AFTER_LONG: Duration = Duration::from_secs(90);
/// Flags that shorten intervals of minutes to seconds.
const SOON: [&str; 4] = ["--resync", "2s", "--watch-timeout", "1s"];

/// Sets up a node and its API server, and returns the kubeconfig of the agent. Each address serves its own name.
fn node_with(addresses: &[&str]) -> Result<(TestBed, Api, PathBuf)> {
    let bed = TestBed::new()?;
    for address in addresses {
        bed.namespace.add_address(&format!("{address}/32"))?;
        bed.serve(&format!("{address}:9080"), address)?;
    }
    let mut api = Api::new()?;
    let kubeconfig = api.reach(&bed.namespace)?;
    Ok((bed, api, kubeconfig))
}

/// Returns the node, the Service `web`, and a slice with these endpoints.
fn web(endpoints: &[&str]) -> Vec<Value> {
    let endpoints: Vec<_> = endpoints.iter().map(|address| (*address, "n1", "")).collect();
    vec![node("n1", "r1/z1"), plain(service("web", &["172.16.0.10"], 80)), plain(slice("web", 9080, &endpoints))]
}

/// Returns the EndpointSlice of `web`.
fn web_slice(endpoints: &[&str]) -> Value {
    web(endpoints).pop().unwrap_or_default()
}

fn wait_finding(agent: &Agent, code: &str, text: &str) -> Result<()> {
    wait_until(&format!("{code}: {text}"), BOUND, || {
        let found = agent.findings(code)?;
        ensure!(found.iter().any(|found| found.contains(text)), "{found:?}");
        Ok(())
    })
}

/// Waits for a finding to end. Resources recover one by one: the last one may have failed for a minute.
fn wait_no_finding(agent: &Agent, code: &str) -> Result<()> {
    wait_until(&format!("no {code}"), AFTER_LONG, || {
        let found = agent.findings(code)?;
        ensure!(found.is_empty(), "{found:?}");
        Ok(())
    })
}

/// Returns the entry of a resource in `get sources`; null if there is none.
fn source(agent: &Agent, cluster: &str, resource: &str) -> Result<Value> {
    let sources = agent.get("sources")?["sources"].as_array().cloned().unwrap_or_default();
    Ok(sources.into_iter().find(|it| it["cluster"] == cluster && it["resource"] == resource).unwrap_or_default())
}

/// Returns the endpoints of a service, as `address health`.
fn endpoints(agent: &Agent, name: &str) -> Result<Vec<String>> {
    let report = agent.get("endpoints")?;
    let services = report["services"].as_array().into_iter().flatten().filter(|service| service["name"] == name);
    let all = services.flat_map(|service| service["endpoints"].as_array().into_iter().flatten());
    Ok(all
        .map(|endpoint| format!("{} {}", endpoint["address"].as_str().unwrap(), endpoint["health"].as_str().unwrap()))
        .collect())
}

fn wait_endpoints(agent: &Agent, name: &str, expected: &[&str]) -> Result<()> {
    wait_until(&format!("{name} to have {expected:?}"), BOUND, || {
        let seen = endpoints(agent, name)?;
        ensure!(seen == expected, "{seen:?}");
        Ok(())
    })
}
