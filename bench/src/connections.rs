//! Connections through Portolan, beside those that go straight, by DNAT, and through a sidecar: each in turn, round after round.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
};

use anyhow::{Result, ensure};
use portolan_bench::task::Task;
use portolan_tests::{Namespace, unique};

use crate::{
    dnat,
    figures::{Arm, Round},
    progress,
    proxies::{self, ENVOY, HAPROXY, Proxy},
    served::{ALGORITHMS, ActiveEndpoints},
    world::{ENDPOINT_PORT, ENDPOINTS, Port, SERVICE, SERVICE_PORT, Worker, World, client, spent},
};

/// How long to measure.
#[derive(Clone, Debug)]
pub(crate) struct Effort {
    pub(crate) rounds: usize,
    /// Connects of an arm in a round.
    pub(crate) connects: usize,
    pub(crate) requests: usize,
    pub(crate) bulk: usize,
    /// Sizes of the tables.
    pub(crate) services: Vec<u32>,
}

/// Connects a second where they are begun at a rate.
pub(crate) const PACE: f64 = 5_000.0;

/// Where an arm's client dials.
enum Way {
    /// The ports of an address, by TCP and UDP.
    Address([u8; 4], [u16; 4]),
    /// A proxy's ports on loopback: it accepts everything, so only a request says anything, and it has no UDP.
    Proxy(u16, usize),
}

struct Running {
    arm: Arm,
    client: usize,
    way: Way,
}

/// What was left running, for what is measured after.
pub(crate) struct Measured {
    pub(crate) arms: Vec<Arm>,
    /// The nodes that Portolan serves, by services.
    pub(crate) served: Vec<(u32, ActiveEndpoints)>,
    /// What serves, as long as this lives.
    _world: (World, Worker),
}

/// Sets everything up, and measures.
pub(crate) fn run(effort: &Effort, envoy: Result<&Path, &str>) -> Result<Measured> {
    let world = World::new()?;
    let mut server = world.serve(&ENDPOINTS, None)?;
    let mut served = Vec::new();
    for services in &effort.services {
        progress(&format!("starting an agent with {services} services"));
        served.push((*services, ActiveEndpoints::start(&world, *services)?));
    }
    let (mut clients, mut running, mut missing) = (Vec::new(), Vec::new(), Vec::new());
    let own_ports = [SERVICE_PORT, SERVICE_PORT + 1, SERVICE_PORT + 2, 53];
    let straight = [ENDPOINT_PORT, ENDPOINT_PORT + 1, ENDPOINT_PORT + 2, ENDPOINT_PORT];
    let with = |last: u8| [SERVICE[0], SERVICE[1], SERVICE[2], last];

    // In the namespace of the first node, but not one of its pods.
    let first = &served[0].1.bed;
    clients.push(client(&first.namespace, None)?);
    let direct = Arm::new("direct", "the endpoint's address, no program on the way", None);
    running.push(Running { arm: direct, client: 0, way: Way::Address(ENDPOINTS[0], straight) });
    for (services, node) in &served {
        clients.push(client(&node.bed.namespace, Some(&node.bed.cgroup))?);
        let inside = clients.len() - 1;
        let about = "the endpoint's address, past Portolan's programs";
        let arm = Arm::new(format!("miss, {services}"), about, Some(*services));
        running.push(Running { arm, client: inside, way: Way::Address(ENDPOINTS[0], straight) });
        for (algorithm, last) in ALGORITHMS {
            if last != SERVICE[3] && *services != effort.services[0] {
                continue;
            }
            let (name, about) = match algorithm {
                "ROUND_ROBIN" => ("hit", "the Service address, rewritten"),
                "LEAST_REQUEST" => ("least request", "the same, of two the one with fewer connections"),
                _ => ("hash", "the same, by the client's hash"),
            };
            let arm = Arm::new(format!("{name}, {services}"), about, Some(*services));
            running.push(Running { arm, client: inside, way: Way::Address(with(last), own_ports) });
        }
    }
    let mut namespaces = Vec::new();
    type Rules = fn(&Namespace, u32) -> Result<()>;
    let kinds: [(&str, &str, Rules); 2] = [
        ("nftables", "DNAT as kube-proxy's nftables mode writes it", dnat::nftables),
        ("iptables", "DNAT as kube-proxy's iptables mode writes it", dnat::iptables),
    ];
    for (kind, about, rules) in kinds {
        for services in &effort.services {
            progress(&format!("writing the rules of {kind} for {services} services"));
            let mut arm = Arm::new(format!("{kind}, {services}"), about, Some(*services));
            let namespace = Namespace::new(unique("dnat"))?;
            world.connect(&namespace)?;
            if let Err(error) = rules(&namespace, *services) {
                arm.missing = Some(one_line(&error));
                missing.push(arm);
                continue;
            }
            clients.push(client(&namespace, None)?);
            running.push(Running { arm, client: clients.len() - 1, way: Way::Address(SERVICE, own_ports) });
            namespaces.push(namespace);
        }
    }
    let mut ipvs = Arm::new("IPVS", "as kube-proxy's IPVS mode has it", None);
    ipvs.missing = Some(no_ipvs().to_owned());
    missing.push(ipvs);
    let mut proxies: Vec<Proxy> = Vec::new();
    let sidecars: [(&str, &str, u16, Result<Proxy>); 2] = [
        ("HAProxy", "a sidecar, one thread", HAPROXY, proxies::haproxy(&first.namespace)),
        (
            "Envoy",
            "a sidecar, one worker",
            ENVOY,
            envoy
                .map_err(|why| anyhow::anyhow!("{why}"))
                .and_then(|program| proxies::envoy(&first.namespace, program, &ENDPOINTS)),
        ),
    ];
    for (name, about, port, started) in sidecars {
        let mut arm = Arm::new(name, about, None);
        match started {
            Ok(proxy) => {
                proxies.push(proxy);
                running.push(Running { arm, client: 0, way: Way::Proxy(port, proxies.len() - 1) });
            }
            Err(error) => {
                arm.missing = Some(one_line(&error));
                missing.push(arm);
            }
        }
    }

    // The first round warms up and does not count.
    for round in 0..=effort.rounds {
        progress(&format!("round {round} of {}", effort.rounds));
        for own in &mut running {
            let client = &mut clients[own.client];
            let figures = match &own.way {
                Way::Address(address, ports) => addressed(client, &mut server, *address, ports, effort)?,
                Way::Proxy(port, proxy) => proxied(client, &mut server, *port, &proxies[*proxy], effort)?,
            };
            if round > 0 {
                own.arm.rounds.push(figures);
            }
        }
    }
    let direct = running[0].arm.rounds.clone();
    let mut arms: Vec<Arm> = running.into_iter().map(|running| running.arm).collect();
    arms.iter_mut().for_each(|arm| arm.sum_up(&direct));
    arms.extend(missing);
    Ok(Measured { arms, served, _world: (world, server) })
}

/// Why there is no arm with IPVS.
fn no_ipvs() -> &'static str {
    let loads =
        || std::process::Command::new("modprobe").arg("ip_vs").output().is_ok_and(|output| output.status.success());
    if Path::new("/proc/net/ip_vs").exists() || loads() {
        "this kernel has IPVS, but this benchmark does not know how to set it up yet"
    } else {
        "this kernel has no IPVS (CONFIG_IP_VS)"
    }
}

fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}").split_whitespace().collect::<Vec<_>>().join(" ")
}

fn addressed(
    client: &mut Worker,
    server: &mut Worker,
    address: [u8; 4],
    ports: &[u16; 4],
    effort: &Effort,
) -> Result<Round> {
    let at = |port: Port| SocketAddr::from((Ipv4Addr::from(address), ports[port as usize]));
    let mut round = Round::new();
    let quiet = at(Port::Quiet);
    let connects = client.ask(&Task::Connect { to: quiet, count: effort.connects, rate: None })?;
    server.ask(&Task::Empty)?;
    let [p50, p90, p99, p999] = connects.percentiles;
    round.extend([("connect p50", p50), ("connect p90", p90), ("connect p99", p99), ("connect p99.9", p999)]);
    round.insert("connects per second", connects.count as f64 / connects.seconds);
    let paced = client.ask(&Task::Connect { to: quiet, count: effort.connects, rate: Some(PACE) })?;
    server.ask(&Task::Empty)?;
    let [p50, _, p99, p999] = paced.percentiles;
    round.extend([("paced connect p50", p50), ("paced connect p99", p99), ("paced connect p99.9", p999)]);
    streams(client, server, at(Port::Echo), at(Port::Sink), None, effort, &mut round)?;
    let to = SocketAddr::from((Ipv4Addr::from(address), ports[3]));
    let one = client.ask(&Task::Datagrams { to, count: effort.requests, connected: false })?;
    round.insert("datagrams per second", one.count as f64 / one.seconds);
    round.insert("datagram p50", one.percentiles[0]);
    let each = client.ask(&Task::Datagrams { to, count: effort.requests, connected: true })?;
    round.insert("connected datagram p50", each.percentiles[0]);
    Ok(round)
}

fn proxied(client: &mut Worker, server: &mut Worker, port: u16, proxy: &Proxy, effort: &Effort) -> Result<Round> {
    let at = |more: u16| SocketAddr::from(([127, 0, 0, 1], port + more));
    let mut round = Round::new();
    streams(client, server, at(0), at(1), Some(proxy), effort, &mut round)?;
    Ok(round)
}

/// Requests, round trips and bulk.
fn streams(
    client: &mut Worker,
    server: &mut Worker,
    echo: SocketAddr,
    sink: SocketAddr,
    proxy: Option<&Proxy>,
    effort: &Effort,
    round: &mut Round,
) -> Result<()> {
    let proxys = || proxy.map_or(Ok(0.0), |proxy| spent(proxy.process.id()));
    let before = server.ask(&Task::Spent)?.spent + proxys()?;
    let requests = client.ask(&Task::Request { to: echo, count: effort.requests })?;
    let others = server.ask(&Task::Spent)?.spent + proxys()? - before;
    let count = requests.count as f64;
    ensure!(count > 0.0, "no request was made");
    let [p50, _, p99, _] = requests.percentiles;
    round.extend([("request p50", p50), ("request p99", p99)]);
    round.insert("requests per second", count / requests.seconds);
    round.insert("processor time per request", (requests.spent + others) / count);
    let trips = client.ask(&Task::RoundTrips { to: echo, count: effort.requests })?;
    round.insert("round trip p50", trips.percentiles[0]);
    let bulk = client.ask(&Task::Bulk { to: sink, bytes: effort.bulk })?;
    round.insert("MiB per second", (effort.bulk >> 20) as f64 / bulk.seconds);
    Ok(())
}
