//! Connections through Portolan, compared with direct ones, DNAT and sidecars.
//! All of them take turns in every round.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
};

use anyhow::{Result, ensure};
use portolan_bench::task::{Measurement, Task};
use portolan_tests::{Namespace, unique};

use crate::{
    dnat,
    figures::{Arm, Round},
    progress,
    proxies::{self, ENVOY, HAPROXY, Proxy},
    served::{self, ALGORITHMS, ActiveEndpoints, OTHER_PORT},
    world::{ENDPOINT_PORT, ENDPOINTS, Port, SERVICE, SERVICE_PORT, Worker, World, client, spent},
};

/// The amount of work per round, and the table sizes.
#[derive(Clone, Debug)]
pub(crate) struct Effort {
    pub(crate) rounds: usize,
    /// Connects per arm and round.
    pub(crate) connects: usize,
    /// Requests, round trips and datagrams per arm and round.
    pub(crate) requests: usize,
    /// Bytes of bulk data per arm and round.
    pub(crate) bulk: usize,
    /// Table sizes, as numbers of Services.
    pub(crate) services: Vec<u32>,
}

/// Connects per second in the paced (open-loop) measurement.
pub(crate) const PACE: f64 = 5_000.0;

/// What an arm's client dials.
enum Way {
    /// An address, with its echo, sink and quiet TCP ports and its UDP port.
    Address([u8; 4], [u16; 4]),
    /// A proxy on loopback: its first port, and its index.
    /// It accepts every connect, so only requests are meaningful, and it has no UDP.
    Proxy(u16, usize),
    /// Each of these addresses in turn: only connects are measured.
    InTurn(Vec<SocketAddr>),
}

/// The arm that all other ones are compared with.
pub(crate) const DIRECT: &str = "direct";
/// The arm that connects in turn are compared with.
pub(crate) const DIRECT_IN_TURN: &str = "direct, in turn";
/// The first port of the server for connects in turn; its queue is at the port that endpoints of these Services have.
const IN_TURN_PORT: u16 = OTHER_PORT - Port::Quiet as u16;

struct Running {
    arm: Arm,
    client: usize,
    way: Way,
}

/// The figures, and the nodes that keep running for later parts.
pub(crate) struct Measured {
    pub(crate) arms: Vec<Arm>,
    /// The nodes with an agent, by number of Services.
    pub(crate) served: Vec<(u32, ActiveEndpoints)>,
    /// Keeps the server and its namespace alive.
    _world: (World, Worker),
}

/// Sets up all arms, and measures them.
///
/// `envoy` is the path to Envoy, or the reason why there is none.
pub(crate) fn run(effort: &Effort, envoy: Result<&Path, &str>) -> Result<Measured> {
    let world = World::new()?;
    let mut server = world.serve(&ENDPOINTS, None)?;
    let mut served = Vec::new();
    for services in &effort.services {
        progress(&format!("starting an agent with {services} services"));
        served.push((*services, ActiveEndpoints::start(&world, *services)?));
    }
    let (mut clients, mut running, mut missing) = (Vec::new(), Vec::new(), Vec::new());
    let service_ports = [SERVICE_PORT, SERVICE_PORT + 1, SERVICE_PORT + 2, 53];
    let endpoint_ports = [ENDPOINT_PORT, ENDPOINT_PORT + 1, ENDPOINT_PORT + 2, ENDPOINT_PORT];
    let with = |last: u8| [SERVICE[0], SERVICE[1], SERVICE[2], last];

    // In the namespace of the first node, but outside of its pods' cgroup.
    let first = &served[0].1.bed;
    clients.push(client(&first.namespace, None)?);
    let direct = Arm::new(DIRECT, "endpoint address, no eBPF programs", None);
    running.push(Running { arm: direct, client: 0, way: Way::Address(ENDPOINTS[0], endpoint_ports) });
    let most = effort.services.iter().copied().max().unwrap_or(1);
    let mut in_turn_server = world.serve_in_turn(IN_TURN_PORT)?;
    let in_turn = |of: &dyn Fn(u32) -> SocketAddr| Way::InTurn((1..most).map(of).collect());
    if most > 1 {
        let arm = Arm::new(DIRECT_IN_TURN, "an endpoint of each Service in turn, no eBPF programs", None);
        running.push(Running { arm, client: 0, way: in_turn(&served::endpoint_of_other) });
    }
    for (services, node) in &served {
        clients.push(client(&node.bed.namespace, Some(&node.bed.cgroup))?);
        let inside = clients.len() - 1;
        let about = "endpoint address, through Portolan's programs";
        let arm = Arm::new(format!("miss, {services}"), about, Some(*services));
        running.push(Running { arm, client: inside, way: Way::Address(ENDPOINTS[0], endpoint_ports) });
        for (algorithm, last) in ALGORITHMS {
            if last != SERVICE[3] && *services != effort.services[0] {
                continue;
            }
            let (name, about) = match algorithm {
                "ROUND_ROBIN" => ("hit", "Service address, round robin"),
                "LEAST_REQUEST" => ("least request", "Service address, least request"),
                _ => ("hash", "Service address, consistent hash"),
            };
            let arm = Arm::new(format!("{name}, {services}"), about, Some(*services));
            running.push(Running { arm, client: inside, way: Way::Address(with(last), service_ports) });
        }
        if *services == most && most > 1 {
            let arm = Arm::new(format!("hit in turn, {most}"), "each Service in turn", Some(most));
            running.push(Running { arm, client: inside, way: in_turn(&served::address_of_other) });
        }
    }
    let mut namespaces = Vec::new();
    type Rules = fn(&Namespace, u32) -> Result<()>;
    let kinds: [(&str, &str, Rules); 2] = [
        ("nftables", "DNAT with the rules of kube-proxy's nftables mode", dnat::nftables),
        ("iptables", "DNAT with the rules of kube-proxy's iptables mode", dnat::iptables),
    ];
    for (kind, about, rules) in kinds {
        for services in &effort.services {
            progress(&format!("writing {kind} rules for {services} services"));
            let mut arm = Arm::new(format!("{kind}, {services}"), about, Some(*services));
            let namespace = Namespace::new(unique("dnat"))?;
            world.connect(&namespace)?;
            if let Err(error) = rules(&namespace, *services) {
                arm.missing = Some(one_line(&error));
                missing.push(arm);
                continue;
            }
            clients.push(client(&namespace, None)?);
            running.push(Running { arm, client: clients.len() - 1, way: Way::Address(SERVICE, service_ports) });
            if *services == most && most > 1 {
                let arm = Arm::new(format!("{kind} in turn, {most}"), "each Service in turn", Some(most));
                let way = in_turn(&served::address_of_other);
                running.push(Running { arm, client: clients.len() - 1, way });
            }
            namespaces.push(namespace);
        }
    }
    let mut ipvs = Arm::new("IPVS", "kube-proxy's IPVS mode", None);
    ipvs.missing = Some(no_ipvs().to_owned());
    missing.push(ipvs);
    let mut proxies: Vec<Proxy> = Vec::new();
    let sidecars: [(&str, &str, u16, Result<Proxy>); 2] = [
        ("HAProxy", "sidecar, one thread", HAPROXY, proxies::haproxy(&first.namespace)),
        (
            "Envoy",
            "sidecar, one worker",
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

    // Round 0 is a warm-up, and is not recorded.
    for round in 0..=effort.rounds {
        progress(&format!("round {round} of {}", effort.rounds));
        for own in &mut running {
            let client = &mut clients[own.client];
            let figures = match &own.way {
                Way::Address(address, ports) => addressed(client, &mut server, *address, ports, effort)?,
                Way::Proxy(port, proxy) => proxied(client, &mut server, *port, &proxies[*proxy], effort)?,
                Way::InTurn(all) => {
                    // No address again before all others, for the length of the run.
                    let first = round * effort.connects % all.len();
                    let each = Task::ConnectEach { to: all.clone(), first, count: effort.connects };
                    let connects = client.ask(&each)?;
                    in_turn_server.ask(&Task::Empty)?;
                    of_connects(&connects)
                }
            };
            if round > 0 {
                own.arm.rounds.push(figures);
            }
        }
    }
    let mut arms: Vec<Arm> = running.into_iter().map(|running| running.arm).collect();
    let rounds_of = |name| arms.iter().find(|arm| arm.name == name).map(|arm| arm.rounds.clone()).unwrap_or_default();
    let (direct, direct_in_turn) = (rounds_of(DIRECT), rounds_of(DIRECT_IN_TURN));
    for arm in &mut arms {
        let baseline = if arm.is_in_turn() { &direct_in_turn } else { &direct };
        arm.sum_up(baseline);
    }
    arms.extend(missing);
    Ok(Measured { arms, served, _world: (world, server) })
}

/// Returns why there is no IPVS arm.
fn no_ipvs() -> &'static str {
    let loads =
        || std::process::Command::new("modprobe").arg("ip_vs").output().is_ok_and(|output| output.status.success());
    if Path::new("/proc/net/ip_vs").exists() || loads() {
        "this kernel has IPVS, but the benchmark does not support it yet"
    } else {
        "this kernel has no IPVS (CONFIG_IP_VS)"
    }
}

fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}").split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Measures one round of an arm that dials an address.
fn addressed(
    client: &mut Worker,
    server: &mut Worker,
    address: [u8; 4],
    ports: &[u16; 4],
    effort: &Effort,
) -> Result<Round> {
    let at = |port: Port| SocketAddr::from((Ipv4Addr::from(address), ports[port as usize]));
    let quiet = at(Port::Quiet);
    let connects = client.ask(&Task::Connect { to: quiet, count: effort.connects, rate: None })?;
    server.ask(&Task::Empty)?;
    let mut round = of_connects(&connects);
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

/// Returns the figures of connects that followed each other.
fn of_connects(connects: &Measurement) -> Round {
    let [p50, p90, p99, p999] = connects.percentiles;
    let rate = connects.count as f64 / connects.seconds;
    Round::from([
        ("connect p50", p50),
        ("connect p90", p90),
        ("connect p99", p99),
        ("connect p99.9", p999),
        ("connects per second", rate),
    ])
}

/// Measures one round of an arm that dials a proxy.
fn proxied(client: &mut Worker, server: &mut Worker, port: u16, proxy: &Proxy, effort: &Effort) -> Result<Round> {
    let at = |more: u16| SocketAddr::from(([127, 0, 0, 1], port + more));
    let mut round = Round::new();
    streams(client, server, at(0), at(1), Some(proxy), effort, &mut round)?;
    Ok(round)
}

/// Measures requests, round trips and bulk transfer.
fn streams(
    client: &mut Worker,
    server: &mut Worker,
    echo: SocketAddr,
    sink: SocketAddr,
    proxy: Option<&Proxy>,
    effort: &Effort,
    round: &mut Round,
) -> Result<()> {
    let proxy_time = || proxy.map_or(Ok(0.0), |proxy| spent(proxy.process.id()));
    let before = server.ask(&Task::Spent)?.spent + proxy_time()?;
    let requests = client.ask(&Task::Request { to: echo, count: effort.requests })?;
    let others = server.ask(&Task::Spent)?.spent + proxy_time()? - before;
    let count = requests.count as f64;
    ensure!(count > 0.0, "the client made no requests");
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
