//! The agent on API servers: what they say, how they go away and come back, and all that is wrong with what they say.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod following;
mod opt_out;
mod others;
mod trouble;

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use portolan_tests::{
    Agent, Api, Bed,
    objects::{node, plain, service, slice},
    wait_until,
};
use serde_json::Value;

const WEB: &str = "172.16.0.10:80";
const ECONNREFUSED: i32 = 111;
const BOUND: Duration = Duration::from_secs(30);
/// An agent that has tried in vain for half a minute tries again within half a minute.
const AFTER_LONG: Duration = Duration::from_secs(90);
/// So that a test need not wait for what else comes after minutes.
const SOON: [&str; 4] = ["--resync", "2s", "--watch-timeout", "1s"];

/// A node, its API server, and how the agent reaches it; each of these addresses serves its name.
fn node_with(addresses: &[&str]) -> Result<(Bed, Api, PathBuf)> {
    let bed = Bed::new()?;
    for address in addresses {
        bed.namespace.add_address(&format!("{address}/32"))?;
        bed.serve(&format!("{address}:9080"), address)?;
    }
    let mut api = Api::new()?;
    let kubeconfig = api.reach(&bed.namespace)?;
    Ok((bed, api, kubeconfig))
}

/// The node, a Service and its endpoints.
fn web(endpoints: &[&str]) -> Vec<Value> {
    let endpoints: Vec<_> = endpoints.iter().map(|address| (*address, "n1", "")).collect();
    vec![node("n1", "r1/z1"), plain(service("web", &["172.16.0.10"], 80)), plain(slice("web", 9080, &endpoints))]
}

/// The object by which the API names the slice of `web`.
fn web_slice(endpoints: &[&str]) -> Value {
    web(endpoints).pop().unwrap_or_default()
}

fn wait_finding(agent: &Agent, code: &str, says: &str) -> Result<()> {
    wait_until(&format!("{code}: {says}"), BOUND, || {
        let found = agent.findings(code)?;
        ensure!(found.iter().any(|found| found.contains(says)), "{found:?}");
        Ok(())
    })
}

fn wait_no_finding(agent: &Agent, code: &str) -> Result<()> {
    wait_until(&format!("no {code}"), BOUND, || {
        let found = agent.findings(code)?;
        ensure!(found.is_empty(), "{found:?}");
        Ok(())
    })
}

/// What `get sources` says of a resource.
fn source(agent: &Agent, cluster: &str, resource: &str) -> Result<Value> {
    let sources = agent.get("sources")?["sources"].as_array().cloned().unwrap_or_default();
    Ok(sources.into_iter().find(|it| it["cluster"] == cluster && it["resource"] == resource).unwrap_or_default())
}

/// Addresses of the endpoints of a service.
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
