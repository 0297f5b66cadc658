//! UDP: connected and unconnected sockets, IPv4, IPv6, and v4-mapped addresses.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use portolan_tests::{
    Dialer, Directory, TestBed,
    dial::{Reply, Sender, Task},
    objects::{mesh_config, node, udp_service, udp_slice},
    wait_until,
};
use serde_json::json;

const ECONNREFUSED: i32 = 111;
const ENETUNREACH: i32 = 101;
const EHOSTUNREACH: i32 = 113;
const BOUND: Duration = Duration::from_secs(20);
const DNS: &str = "172.16.0.53:53";

/// Starts a DNS service with `count` endpoints, 10.0.0.1 and up. Each responds with its name.
fn name_server(bed: &TestBed, count: usize) -> Result<Directory> {
    for i in 1..=count {
        bed.namespace.add_address(&format!("10.0.0.{i}/32"))?;
        bed.serve_datagrams(&format!("10.0.0.{i}:5353"), &format!("pod{i}"))?;
    }
    let directory = Directory::new()?;
    endpoints(&directory, &(1..=count).collect::<Vec<_>>())?;
    Ok(directory)
}

fn endpoints(directory: &Directory, pods: &[usize]) -> Result<()> {
    let addresses: Vec<String> = pods.iter().map(|i| format!("10.0.0.{i}")).collect();
    let endpoints: Vec<(&str, &str, &str)> = addresses.iter().map(|address| (address.as_str(), "n1", "")).collect();
    directory.write(
        "c1/all.yaml",
        &[node("n1", "r1"), udp_service("dns", &["172.16.0.53"], 53), udp_slice("dns", 5353, &endpoints)],
    )
}

fn send(client: &mut Dialer, to: &str, times: u32, from: Sender) -> Result<Reply> {
    client.run(&Task::Datagrams { to: to.parse()?, times, from, mapped: false })
}

const ALL: [Sender; 5] = [Sender::Connected, Sender::ConnectedTo, Sender::Fresh, Sender::Same, Sender::Batch];

#[test]
fn every_family_and_socket_type_gets_replies_from_the_service() -> Result<()> {
    let bed = TestBed::new()?;
    for (address, greeting) in [("10.0.0.1", "four"), ("fd00::1", "six")] {
        bed.namespace.add_address(&format!("{address}/{}", if greeting == "four" { 32 } else { 128 }))?;
        let ip: std::net::IpAddr = address.parse()?;
        bed.serve_datagrams(&SocketAddr::new(ip, 5353).to_string(), greeting)?;
    }
    let directory = Directory::new()?;
    directory.write(
        "c1/all.yaml",
        &[
            node("n1", "r1"),
            udp_service("dns", &["172.16.0.53", "fd16::53"], 53),
            udp_slice("dns", 5353, &[("10.0.0.1", "n1", "")]),
            udp_slice("dns", 5353, &[("fd00::1", "n1", "")]),
        ],
    )?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    for (to, mapped, greeting, peer) in [
        (DNS, false, "four", DNS),
        (DNS, true, "four", "[::ffff:172.16.0.53]:53"),
        ("[fd16::53]:53", false, "six", "[fd16::53]:53"),
    ] {
        for from in ALL {
            let reply = client.run(&Task::Datagrams { to: to.parse()?, times: 3, from, mapped })?;
            assert_eq!(reply.greetings(), [greeting; 3], "{to} mapped {mapped} {from:?}: {reply:?}");
            assert!(reply.seen.iter().all(|seen| seen.peer == Some(peer.parse().unwrap())), "{from:?}: {reply:?}");
        }
    }
    // Other destinations are not rewritten.
    for from in ALL {
        let direct = send(&mut client, "10.0.0.1:5353", 1, from)?;
        assert_eq!((direct.seen[0].peer, direct.greetings()), (Some("10.0.0.1:5353".parse()?), vec!["four"]));
    }
    assert_eq!(send(&mut client, "172.16.0.53:54", 1, Sender::Fresh)?.errnos(), [ENETUNREACH]);
    // Each socket counts as one connection: three if each datagram has a socket, one if a socket sends all three.
    let report = agent.get("endpoints")?;
    let of = |i: usize| report["services"][i]["endpoints"][0]["kernel"]["connections"].clone();
    assert_eq!((of(0), of(1)), (json!(22), json!(11)), "{report:#}");
    Ok(())
}

#[test]
fn sockets_are_balanced_and_a_flow_keeps_its_endpoint() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = name_server(&bed, 3)?;
    let _agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    for from in [Sender::Connected, Sender::Fresh] {
        let reply = send(&mut client, DNS, 30, from)?;
        assert_eq!([1, 2, 3].map(|i| reply.count(&format!("pod{i}"))), [10; 3], "{from:?}");
    }
    for from in [Sender::Same, Sender::Batch] {
        let reply = send(&mut client, DNS, 12, from)?;
        assert_eq!(reply.count(&reply.seen[0].greeting), 12, "{from:?} {reply:?}");
    }
    Ok(())
}

#[test]
fn flow_moves_when_its_endpoint_is_removed() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = name_server(&bed, 3)?;
    let _agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    let first = send(&mut client, DNS, 3, Sender::Kept)?;
    let own: usize = first.seen[0].greeting.trim_start_matches("pod").parse()?;
    // The other endpoints change repeatedly, and the flow keeps its endpoint.
    let other = own % 3 + 1;
    for pods in [vec![own, other], vec![1, 2, 3], vec![own]] {
        endpoints(&directory, &pods)?;
        wait_until("the change", BOUND, || {
            let seen: std::collections::BTreeSet<String> =
                send(&mut client, DNS, 6, Sender::Fresh)?.seen.into_iter().map(|seen| seen.greeting).collect();
            ensure!(seen == pods.iter().map(|pod| format!("pod{pod}")).collect(), "{seen:?}");
            Ok(())
        })?;
        let reply = send(&mut client, DNS, 3, Sender::Kept)?;
        assert_eq!((reply.count(&format!("pod{own}")), reply.value), (3, first.value), "{reply:?}");
    }
    endpoints(&directory, &[other])?;
    wait_until("the flow to move", BOUND, || {
        let reply = send(&mut client, DNS, 1, Sender::Kept)?;
        ensure!(reply.greetings() == [format!("pod{other}")], "{reply:?}");
        // The socket is the same: unconnected sockets are not closed.
        ensure!(reply.value == first.value && reply.seen[0].peer == Some(DNS.parse()?), "{reply:?}");
        Ok(())
    })
}

#[test]
fn one_socket_can_use_many_services() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = Directory::new()?;
    let mut objects = vec![node("n1", "r1")];
    let mut to = Vec::new();
    for i in 1..=12 {
        let (address, service) = (format!("10.0.0.{i}"), format!("172.16.0.{i}"));
        bed.namespace.add_address(&format!("{address}/32"))?;
        bed.serve_datagrams(&format!("{address}:5353"), &format!("service{i}"))?;
        objects.push(udp_service(&format!("s{i}"), &[&service], 53));
        objects.push(udp_slice(&format!("s{i}"), 5353, &[(&address, "n1", "")]));
        to.push(format!("{service}:53").parse::<SocketAddr>()?);
    }
    directory.write("c1/all.yaml", &objects)?;
    let _agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    let reply = client.run(&Task::DatagramsAround { to: to.clone(), times: 5 })?;
    for (seen, (i, to)) in reply.seen.iter().zip((1..).zip(&to).take(12).cycle()) {
        assert_eq!((seen.greeting.as_str(), seen.peer), (format!("service{i}").as_str(), Some(*to)));
    }
    assert_eq!(reply.seen.len(), 60);
    Ok(())
}

#[test]
fn active_flow_is_not_evicted_by_many_others() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = name_server(&bed, 3)?;
    let mut others = Vec::new();
    let mut around = Vec::new();
    for i in 1..=12 {
        let (name, address) = (format!("s{i}"), format!("172.16.1.{i}"));
        others.push(udp_service(&name, &[&address], 53));
        others.push(udp_slice(&name, 5353, &[("10.0.0.1", "n1", "")]));
        around.extend([DNS.parse()?, format!("{address}:53").parse::<SocketAddr>()?]);
    }
    directory.write("c1/others.yaml", &others)?;
    let _agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    let reply = client.run(&Task::DatagramsAround { to: around, times: 3 })?;
    let own: Vec<&str> = reply.seen.iter().step_by(2).map(|seen| seen.greeting.as_str()).collect();
    assert_eq!(own, vec![own[0]; 36], "the active flow keeps its endpoint");
    assert!(reply.seen.iter().step_by(2).all(|seen| seen.peer == Some(DNS.parse().unwrap())), "{reply:?}");
    Ok(())
}

#[test]
fn service_without_endpoints_fails_connect_and_sendto() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = name_server(&bed, 1)?;
    endpoints(&directory, &[])?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    for from in [Sender::Connected, Sender::Fresh] {
        assert_eq!(send(&mut client, DNS, 2, from)?.errnos(), [ECONNREFUSED; 2], "{from:?}");
    }
    let keep = json!({"serviceSettings": [{"settings": {"clusterLocal": true}, "hosts": ["*"]}]});
    directory.write("mesh.yaml", &[mesh_config(&keep)])?;
    wait_until("the service to be cluster-local", BOUND, || {
        ensure!(agent.get("services")?["services"][0]["clusterLocal"] == json!(true));
        Ok(())
    })?;
    for from in [Sender::Connected, Sender::Fresh] {
        assert_eq!(send(&mut client, DNS, 2, from)?.errnos(), [EHOSTUNREACH; 2], "{from:?}");
    }
    Ok(())
}
