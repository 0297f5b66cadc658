//! Helpers that the tests of all lessons share.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};
use portolan_tests::{
    Agent, Dialer, Directory, ProcessContext, TestBed,
    dial::{Reply, Sender, Task},
    objects::{node, service, slice, udp_service, udp_slice},
    storm::Servers,
};
use serde_json::Value;

pub(crate) const ECONNREFUSED: i32 = 111;
pub(crate) const ECONNABORTED: i32 = 103;
pub(crate) const EHOSTUNREACH: i32 = 113;
pub(crate) const ENETUNREACH: i32 = 101;
pub(crate) const BOUND: Duration = Duration::from_secs(30);
pub(crate) const WEB: &str = "172.16.0.10:80";
pub(crate) const DNS: &str = "172.16.0.53:53";

/// Starts two pods that serve `web` over TCP and `dns` over UDP and greet with their names, and writes their objects.
pub(crate) fn two_pods(bed: &TestBed) -> Result<Directory> {
    for i in 1..=2 {
        bed.namespace.add_address(&format!("10.0.0.{i}/32"))?;
        bed.serve(&format!("10.0.0.{i}:9080"), &format!("pod{i}"))?;
        bed.serve_datagrams(&format!("10.0.0.{i}:5353"), &format!("pod{i}"))?;
    }
    let directory = Directory::new()?;
    write_pods(&directory, &[1, 2])?;
    Ok(directory)
}

pub(crate) fn write_pods(directory: &Directory, pods: &[u8]) -> Result<()> {
    let addresses: Vec<String> = pods.iter().map(|i| format!("10.0.0.{i}")).collect();
    let endpoints: Vec<(&str, &str, &str)> = addresses.iter().map(|address| (address.as_str(), "n1", "")).collect();
    directory.write(
        "c1/all.yaml",
        &[
            node("n1", "r1"),
            service("web", &["172.16.0.10"], 80),
            slice("web", 9080, &endpoints),
            udp_service("dns", &["172.16.0.53"], 53),
            udp_slice("dns", 5353, &endpoints),
        ],
    )
}

pub(crate) fn send(client: &mut Dialer, to: &str, times: u32, from: Sender) -> Result<Reply> {
    client.run(&Task::Datagrams { to: to.parse()?, times, from, mapped: false })
}

/// Returns the value of the metric line that starts with `line`: a metric name, with its labels if it has any.
pub(crate) fn metric(agent: &Agent, line: &str) -> Result<u64> {
    let text = agent.http("/metrics")?.1;
    let value = text.lines().find_map(|own| own.strip_prefix(line)).with_context(|| format!("no {line} in {text}"))?;
    Ok(value.trim().parse()?)
}

/// Number of services in a storm. Service `i` has the address `172.16.1.<i>` and the endpoints `10.<i>.0.<1..=4>`.
pub(crate) const SERVICES: u8 = 6;
pub(crate) const ENDPOINTS: u8 = 4;

pub(crate) fn storm_frontends() -> Vec<SocketAddr> {
    (0..SERVICES).map(|service| SocketAddr::from(([172, 16, 1, service], 80))).collect()
}

pub(crate) fn storm_endpoint(service: u8, endpoint: u8) -> SocketAddr {
    SocketAddr::from(([10, service, 0, endpoint + 1], 9080))
}

/// Starts a server for each endpoint of a storm. Its greeting identifies the endpoint.
pub(crate) fn storm_servers(bed: &TestBed) -> Result<Servers> {
    let mut addresses = Vec::new();
    for service in 0..SERVICES {
        for endpoint in 0..ENDPOINTS {
            let address = storm_endpoint(service, endpoint);
            bed.namespace.add_address(&format!("{}/32", address.ip()))?;
            addresses.push((address, service, endpoint));
        }
    }
    Servers::start(ProcessContext { namespace: Some(&bed.namespace), cgroup: None }, &addresses)
}

/// Returns the objects of a storm: a service has endpoint `e` if bit `e` of its mask is set. Masks repeat cyclically.
pub(crate) fn storm_objects(masks: &[u8]) -> Vec<Value> {
    let mut objects = vec![node("n1", "r1")];
    for (number, mask) in (0..SERVICES).zip(masks.iter().cycle()) {
        let name = format!("s{number}");
        let addresses: Vec<String> = (0..ENDPOINTS)
            .filter(|endpoint| mask & (1 << endpoint) != 0)
            .map(|endpoint| storm_endpoint(number, endpoint).ip().to_string())
            .collect();
        let endpoints: Vec<(&str, &str, &str)> = addresses.iter().map(|address| (address.as_str(), "n1", "")).collect();
        objects.push(service(&name, &[&format!("172.16.1.{number}")], 80));
        objects.push(slice(&name, 9080, &endpoints));
    }
    objects
}
