//! TCP connections through the real BPF programs.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Result, ensure};
use portolan::kernel::facts;
use portolan_common::Frontend;
use portolan_core::{
    model::Protocol,
    table::{Sizes, key},
};
use portolan_tests::{
    Agent, ConnectionSlots, Directory, TestBed,
    dial::Task,
    direct::{Direct, table},
    objects::{destination_rule, node, service, slice},
    wait_until,
};
use serde_json::json;

const ENETUNREACH: i32 = 101;
const BOUND: Duration = Duration::from_secs(20);

/// The unit tests of the controller use a fake kernel. What it models holds in this one.
#[test]
fn kernel_confirms_what_the_fake_models() -> Result<()> {
    let bed = TestBed::new()?;
    let mut direct = Direct::new(&bed, facts::SIZES)?;
    facts::check(direct.kernel()).map_err(anyhow::Error::msg)
}

/// Serves two regions on one node, `near` at 10.0.0.x and `far` at 10.1.0.x, with a split of 90% and 10%.
fn ninety_ten(bed: &TestBed, near: usize, far: usize) -> Result<Directory> {
    let directory = Directory::new()?;
    let mut addresses = Vec::new();
    for (region, count) in [(0, near), (1, far)] {
        for i in 1..=count {
            let address = format!("10.{region}.0.{i}");
            bed.namespace.add_address(&format!("{address}/32"))?;
            bed.serve(&format!("{address}:9080"), if region == 0 { "near" } else { "far" })?;
            addresses.push((address, ["near", "far"][region]));
        }
    }
    let endpoints: Vec<(&str, &str, &str)> =
        addresses.iter().map(|(address, node)| (address.as_str(), *node, "")).collect();
    let rule = json!({"trafficPolicy": {"loadBalancer": {"simple": "ROUND_ROBIN", "localityLbSetting": {
        "distribute": [{"from": "r1/*", "to": {"r1/*": 90, "r2/*": 10}}]}}}});
    directory.write(
        "c1/all.yaml",
        &[
            node("near", "r1/z1"),
            node("far", "r2/z1"),
            service("web", &["172.16.0.10"], 80),
            slice("web", 9080, &endpoints),
            destination_rule("web", &rule),
        ],
    )?;
    Ok(directory)
}

#[test]
fn split_is_exact_in_every_ten_connections() -> Result<()> {
    for (near, far) in [(1, 1), (3, 2)] {
        let bed = TestBed::new()?;
        let directory = ninety_ten(&bed, near, far)?;
        let agent = bed.agent(&directory, "c1", "near")?;
        let mut client = bed.dialer()?;
        let reply = client.dial("172.16.0.10:80", 1000)?;
        for ten in reply.seen.chunks(10) {
            let to_far = ten.iter().filter(|seen| seen.greeting == "far").count();
            assert_eq!((ten.len(), to_far), (10, 1), "{near} near, {far} far: {ten:?}");
        }
        assert!(
            reply.seen.iter().all(|seen| seen.peer == Some("172.16.0.10:80".parse().unwrap())),
            "getpeername() returns the dialed address"
        );
        // `plan` shows the measured shares.
        let plan = bed.portolan(&[
            "plan",
            "--config",
            &directory.path().display().to_string(),
            "--cluster",
            "c1",
            "--node",
            "near",
            "-o",
            "json",
        ])?;
        let plan: serde_json::Value = serde_json::from_slice(&plan.stdout)?;
        let shares: Vec<f64> = plan["services"][0]["localities"]
            .as_array()
            .unwrap()
            .iter()
            .map(|l| l["share"].as_f64().unwrap())
            .collect();
        assert_eq!(shares, [reply.count("near") as f64 / 1000.0, reply.count("far") as f64 / 1000.0]);
        drop(agent);
    }
    Ok(())
}

#[test]
fn every_family_and_socket_type_connects() -> Result<()> {
    let bed = TestBed::new()?;
    for address in ["10.0.0.1/32", "fd00::1/128"] {
        bed.namespace.add_address(address)?;
    }
    bed.serve("10.0.0.1:9080", "four")?;
    bed.serve("[fd00::1]:9080", "six")?;
    let directory = Directory::new()?;
    directory.write(
        "c1/all.yaml",
        &[
            node("n1", "r1"),
            service("web", &["172.16.0.10", "fd16::10"], 80),
            slice("web", 9080, &[("10.0.0.1", "n1", "")]),
            slice("web", 9080, &[("fd00::1", "n1", "")]),
        ],
    )?;
    let _agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    for (to, mapped, greeting, peer) in [
        ("172.16.0.10:80", false, "four", "172.16.0.10:80"),
        // The default of Java: IPv6 sockets with v4-mapped addresses.
        ("172.16.0.10:80", true, "four", "[::ffff:172.16.0.10]:80"),
        ("[fd16::10]:80", false, "six", "[fd16::10]:80"),
    ] {
        for nonblocking in [false, true] {
            let reply = client.run(&Task::Dial { to: to.parse()?, times: 2, mapped, nonblocking, send: 0 })?;
            assert_eq!(reply.greetings(), [greeting; 2], "{to} mapped {mapped} nonblocking {nonblocking}");
            assert_eq!(reply.seen[0].peer, Some(peer.parse()?), "{to} mapped {mapped}");
        }
    }
    // Other destinations are not rewritten: an endpoint itself, and addresses without a Service.
    let direct = client.dial("10.0.0.1:9080", 1)?;
    assert_eq!((direct.seen[0].peer, direct.greetings()), (Some("10.0.0.1:9080".parse()?), vec!["four"]));
    assert_eq!(client.dial("172.16.0.99:80", 1)?.errnos(), [ENETUNREACH]);
    assert_eq!(client.dial("172.16.0.10:81", 1)?.errnos(), [ENETUNREACH]);
    Ok(())
}

#[test]
fn metrics_match_the_connections_made() -> Result<()> {
    let bed = TestBed::new()?;
    bed.namespace.add_address("10.0.0.1/32")?;
    bed.serve("10.0.0.1:9080", "hello")?;
    let directory = Directory::new()?;
    directory.write(
        "c1/all.yaml",
        &[node("n1", "r1/z1"), service("web", &["172.16.0.10"], 80), slice("web", 9080, &[("10.0.0.1", "n1", "")])],
    )?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    let task = Task::Dial { to: "172.16.0.10:80".parse()?, times: 7, mapped: false, nonblocking: false, send: 100 };
    assert_eq!(client.run(&task)?.greetings(), ["hello"; 7]);
    let expected = [
        ("istio_tcp_connections_opened_total", 7),
        ("istio_tcp_connections_closed_total", 7),
        ("istio_tcp_connections_failed_total", 0),
        ("istio_tcp_sent_bytes_total", 700),
        ("istio_tcp_received_bytes_total", 35),
        ("portolan_picks_total", 7),
        ("portolan_refused_total", 0),
        ("portolan_ready", 1),
    ];
    wait_until("the sockets to be closed", Duration::from_secs(10), || {
        let (status, text) = agent.http("/metrics")?;
        ensure!(status == 200, "{status}");
        for (name, value) in expected {
            let line = text.lines().find(|line| line.starts_with(name) && line.len() > name.len()).unwrap_or_default();
            ensure!(line.ends_with(&format!(" {value}")), "{line:?} is not {value}");
        }
        // No addresses in labels.
        ensure!(!text.contains("10.0.0.1"), "{text}");
        Ok(())
    })
}

#[test]
fn connection_without_a_free_slot_uses_socket_storage() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = ninety_ten(&bed, 1, 1)?;
    let agent = bed.agent(&directory, "c1", "near")?;
    let places = ConnectionSlots::open(bed.pins())?;
    let mut client = bed.dialer()?;
    let frontend = Some("172.16.0.10:80".parse()?);
    let count = |agent: &Agent, field: &str| -> Result<u64> {
        let report = agent.get("endpoints")?;
        let endpoints = report["services"][0]["endpoints"].as_array().into_iter().flatten();
        Ok(endpoints.filter_map(|endpoint| endpoint["kernel"][field].as_u64()).sum())
    };
    assert!(client.dial("172.16.0.10:80", 20)?.seen.iter().all(|seen| seen.peer == frontend));
    wait_until("the slots to be freed", BOUND, || {
        ensure!(places.taken() == 0, "{} are in use", places.taken());
        Ok(())
    })?;
    client.run(&Task::Hold { to: "172.16.0.10:80".parse()?, times: 7 })?;
    // The self-probe also uses a slot while it runs.
    wait_until("seven slots to be in use", BOUND, || {
        ensure!(places.taken() == 7, "{} are in use", places.taken());
        Ok(())
    })?;
    places.take_all();
    let reply = client.dial("172.16.0.10:80", 20)?;
    assert!(reply.seen.iter().all(|seen| seen.errno == 0 && seen.peer == frontend), "{reply:?}");
    assert_eq!(reply.count("far"), 2);
    // These connections are counted like all others.
    wait_until("the counters", BOUND, || {
        let seen = (count(&agent, "connections")?, count(&agent, "active")?);
        ensure!(seen == (47, 7), "{seen:?}");
        Ok(())
    })
}

/// Frontends whose buckets are full are found by another map, and no search ends before it has looked there.
#[test]
fn frontends_behind_full_buckets_are_found() -> Result<()> {
    const SIZES: Sizes = Sizes { frontends: 64, backends: 64, slots: 64, affinities: 8, connections: 1 << 14 };
    let bed = TestBed::new()?;
    for address in ["10.0.0.1/32", "10.0.0.2/32", "fd00::1/128", "fd00::2/128"] {
        bed.namespace.add_address(address)?;
    }
    for (address, name) in [("10.0.0.1", "one"), ("10.0.0.2", "two"), ("[fd00::1]", "one"), ("[fd00::2]", "two")] {
        bed.serve(&format!("{address}:9080"), name)?;
    }
    let mut direct = Direct::new(&bed, SIZES)?;
    let hash = direct.kernel().maps.read_back(SIZES)?.hash;
    let buckets = |address: &SocketAddr| {
        let mixed = Frontend::hash(key(*address, Protocol::Tcp).fingerprint(&hash.multipliers), hash.seed);
        let shift = SIZES.frontend_shift();
        let mut buckets = [Frontend::first_bucket(mixed, shift), Frontend::second_bucket(mixed, shift)];
        buckets.sort_unstable();
        buckets
    };
    let mut client = bed.dialer()?;
    let v4 = |i: u32| IpAddr::from(Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(172, 16, 0, 0)) + i));
    let v6 = |i: u32| IpAddr::from(Ipv6Addr::from_bits((0xfd16 << 112) + u128::from(i)));
    for (service, endpoints) in [
        (&v4 as &dyn Fn(u32) -> IpAddr, ["10.0.0.1:9080", "10.0.0.2:9080"]),
        (&v6, ["[fd00::1]:9080", "[fd00::2]:9080"]),
    ] {
        // All in the same two buckets, which have room for four.
        let addresses: Vec<SocketAddr> = (1..1 << 18).map(|i| SocketAddr::new(service(i), 80)).collect();
        let same: Vec<SocketAddr> =
            addresses.iter().filter(|address| buckets(address) == buckets(&addresses[0])).take(20).copied().collect();
        assert_eq!(same.len(), 20);
        let of = |i: usize| -> Result<Vec<SocketAddr>> { Ok(vec![endpoints[i % 2].parse()?]) };
        let all =
            same.iter().enumerate().take(12).map(|(i, address)| Ok((*address, of(i)?))).collect::<Result<Vec<_>>>()?;
        direct.publish(&table(all.clone()))?;
        for (i, (address, _)) in all.iter().enumerate() {
            assert_eq!(client.dial(&address.to_string(), 2)?.greetings(), [["one", "two"][i % 2]; 2], "{address}");
        }
        for address in &same[12..] {
            assert_eq!(client.dial(&address.to_string(), 1)?.errnos(), [ENETUNREACH], "{address}");
        }
        // Frontends of all buckets and from behind them leave, and others come.
        let left: Vec<_> =
            all.iter().enumerate().filter(|(i, _)| i % 3 != 0).map(|(_, frontend)| frontend.clone()).collect();
        direct.publish(&table(left.clone()))?;
        for (i, (address, _)) in all.iter().enumerate() {
            let expected = if i % 3 == 0 { ENETUNREACH } else { 0 };
            assert_eq!(client.dial(&address.to_string(), 1)?.errnos(), [expected], "{address}");
        }
        direct.reclaim()?;
        let added =
            same[12..16].iter().enumerate().map(|(i, address)| Ok((*address, of(i)?))).collect::<Result<Vec<_>>>()?;
        direct.publish(&table([left, added].concat()))?;
        for (i, address) in same[12..16].iter().enumerate() {
            assert_eq!(client.dial(&address.to_string(), 2)?.greetings(), [["one", "two"][i % 2]; 2], "{address}");
        }
    }
    assert_eq!(direct.inconsistent()?, 0);
    Ok(())
}

/// Kernels with isolated CPUs, and machines with one CPU, need this in place of `membarrier`. That it waits is what Linux
/// guarantees; that the kernel accepts it from the agent is tested here.
#[test]
fn kernel_offers_the_barrier_of_inner_maps() -> Result<()> {
    let maps = portolan_datapath::MapBarrier::new()?;
    let began = std::time::Instant::now();
    for _ in 0..20 {
        maps.wait()?;
    }
    // A mere update takes a microsecond.
    println!("a grace period by replacing an inner map: {:?}", began.elapsed() / 20);
    Ok(())
}
