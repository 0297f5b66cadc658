//! A node with an agent, run as a user would run it, and the objects that the agent reads.

use std::{ffi::OsStr, fmt::Write as _, net::SocketAddr, time::Instant};

use anyhow::{Context as _, Result};
use portolan_tests::{
    Agent, Directory, TestBed,
    objects::{destination_rule, node},
};
use serde_json::{Value, json};

use crate::world::{self, ENDPOINT_PORT, SERVICE, SERVICE_PORT, World};

/// Number of endpoints of each Service that clients dial only in turn.
pub(crate) const ENDPOINTS: u32 = 10;
pub(crate) const NODES: u32 = 100;
/// Number of Services per file.
const IN_FILE: u32 = 100;

/// A node whose agent is running.
pub(crate) struct ActiveEndpoints {
    pub(crate) agent: Agent,
    _directory: Directory,
    pub(crate) bed: TestBed,
    /// Seconds from the agent's start until it was ready.
    pub(crate) ready: f64,
}

/// The Services that clients dial: the load-balancing algorithm, and the last byte of the cluster IP.
pub(crate) const ALGORITHMS: [(&str, u8); 3] = [("ROUND_ROBIN", 10), ("LEAST_REQUEST", 11), ("hash", 12)];

impl ActiveEndpoints {
    /// Starts an agent on a new node, in a mesh with `services` Services.
    pub(crate) fn start(world: &World, services: u32) -> Result<Self> {
        let bed = TestBed::named(&format!("node{services}"))?;
        world.connect(&bed.namespace)?;
        let directory = Directory::new()?;
        write_mesh(&directory, services)?;
        for (algorithm, last) in ALGORITHMS {
            let balancer = match algorithm {
                "hash" => json!({"consistentHash": {"useSourceIp": true}}),
                simple => json!({"simple": simple}),
            };
            let name = name(last);
            let rule = destination_rule(&name, &json!({"trafficPolicy": {"loadBalancer": balancer}}));
            let [service, slice] = dialed(last, &world::ENDPOINTS);
            directory.write(&format!("c1/{name}.yaml"), &[service, slice, rule])?;
        }
        let began = Instant::now();
        let agent = bed.agent_with(&directory, "c1", "node-0", &as_words(&sizes(services)))?;
        let ready = began.elapsed().as_secs_f64();
        Ok(Self { agent, _directory: directory, bed, ready })
    }

    /// Returns the kernel memory of the agent's pinned maps, in bytes.
    pub(crate) fn map_bytes(&self) -> Result<f64> {
        let mut all = 0.0;
        for folder in std::fs::read_dir(self.bed.pins())?.flatten().map(|entry| entry.path()) {
            let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name == "links" || folder.is_symlink() || !folder.is_dir() {
                continue;
            }
            for pin in std::fs::read_dir(folder)?.flatten() {
                all += bpftool(&["map", "show", "pinned"], pin.path().as_os_str())?["bytes_memlock"]
                    .as_f64()
                    .unwrap_or_default();
            }
        }
        Ok(all)
    }
}

/// Returns the agent's flags for the map sizes, or none if the defaults suffice.
fn sizes(services: u32) -> Vec<String> {
    if services <= 10_000 {
        return Vec::new();
    }
    let of = |flag: &str, size: u32| [format!("--max-{flag}"), size.to_string()];
    [of("frontends", services * 2), of("backends", services * (ENDPOINTS + 2)), of("slots", services * 64)].concat()
}

fn as_words(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

/// Runs bpftool on a pin or an ID, and returns its JSON output.
pub(crate) fn bpftool(what: &[&str], pin: &OsStr) -> Result<Value> {
    // Debian installs bpftool in /usr/sbin, which may be missing from PATH.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let shown = std::process::Command::new("bpftool").env("PATH", path).arg("-j").args(what).arg(pin).output()?;
    anyhow::ensure!(shown.status.success(), "bpftool failed: {}", String::from_utf8_lossy(&shown.stderr));
    serde_json::from_slice(&shown.stdout).context("bpftool printed invalid JSON")
}

fn name(last: u8) -> String {
    format!("web-{last}")
}

/// Returns a Service with all ports of the server, and its EndpointSlice with these endpoints.
/// `last` is the last byte of the cluster IP.
pub(crate) fn dialed(last: u8, endpoints: &[[u8; 4]]) -> [Value; 2] {
    let name = name(last);
    let address = std::net::Ipv4Addr::from([SERVICE[0], SERVICE[1], SERVICE[2], last]).to_string();
    let ports = ["echo", "sink", "quiet"];
    let mut own: Vec<Value> =
        (0..).zip(ports).map(|(i, port)| json!({"name": port, "port": SERVICE_PORT + i})).collect();
    own.push(json!({"name": "datagrams", "port": 53, "protocol": "UDP"}));
    let mut slice_ports: Vec<Value> =
        (0..).zip(ports).map(|(i, port)| json!({"name": port, "port": ENDPOINT_PORT + i, "protocol": "TCP"})).collect();
    slice_ports.push(json!({"name": "datagrams", "port": ENDPOINT_PORT, "protocol": "UDP"}));
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": address, "clusterIPs": [address], "ports": own},
    });
    let endpoint = |address: &[u8; 4]| json!({"addresses": [std::net::Ipv4Addr::from(*address).to_string()], "nodeName": "node-0", "conditions": {"ready": true}});
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": format!("{name}-1"), "namespace": "default", "labels": {"kubernetes.io/service-name": name}},
        "ports": slice_ports, "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
    });
    [service, slice]
}

/// Writes the rest of the mesh.
///
/// These are nodes in three regions, one DestinationRule for all Services, and Services that clients dial only in turn.
pub(crate) fn write_mesh(directory: &Directory, services: u32) -> Result<()> {
    let rule = json!({"trafficPolicy": {
        "outlierDetection": {"consecutive5xxErrors": 3, "maxEjectionPercent": 50},
        "loadBalancer": {"localityLbSetting": {"failover": [{"from": "r0", "to": "r1"}]}}}});
    directory.write("rules.yaml", &[destination_rule("*.default.svc.cluster.local", &rule)])?;
    let nodes: Vec<Value> = (0..NODES).map(|i| node(&format!("node-{i}"), &format!("r{}/z{}", i % 3, i % 9))).collect();
    directory.write("c1/nodes.yaml", &nodes)?;
    for first in (1..services).step_by(IN_FILE as usize) {
        let mut text = String::new();
        for i in first..services.min(first + IN_FILE) {
            for object in other(i) {
                writeln!(text, "---\n{object}")?;
            }
        }
        directory.write_text(&format!("c1/services-{first}.yaml"), &text)?;
    }
    Ok(())
}

/// The port of the endpoints of the other Services.
pub(crate) const OTHER_PORT: u16 = 8080;

/// Returns the address and port of Service number `i` of the others.
pub(crate) fn address_of_other(i: u32) -> SocketAddr {
    SocketAddr::from(((0xac11_0000 + i).to_be_bytes(), 80))
}

/// Returns the first endpoint of Service number `i` of the others.
pub(crate) fn endpoint_of_other(i: u32) -> SocketAddr {
    SocketAddr::from(((0x0a10_0000 + i * ENDPOINTS).to_be_bytes(), OTHER_PORT))
}

/// Returns Service number `i` of those that clients dial only in turn, and its EndpointSlice.
pub(crate) fn other(i: u32) -> [Value; 2] {
    let dotted = |address: u32| std::net::Ipv4Addr::from(address).to_string();
    let name = format!("s-{i}");
    let mut slice = portolan_tests::objects::slice(&name, OTHER_PORT, &[]);
    let endpoint = |e: u32| {
        let at = i * ENDPOINTS + e;
        json!({"addresses": [dotted(0x0a10_0000 + at)], "nodeName": format!("node-{}", at % NODES),
            "conditions": {"ready": true, "serving": true, "terminating": false}})
    };
    slice["endpoints"] = (0..ENDPOINTS).map(endpoint).collect();
    [portolan_tests::objects::service(&name, &[&address_of_other(i).ip().to_string()], 80), slice]
}
