//! Lessons 1 to 6: sockets.

use std::time::Duration;

use anyhow::{Result, ensure};
use portolan_tests::{
    Dialer, Directory, Namespace, ProcessContext, TestBed,
    dial::{Sender, Task},
    objects::{node, service, slice, udp_service, udp_slice},
    unique, wait_until,
};
use serde_json::json;

use crate::world::{BOUND, DNS, ECONNABORTED, ECONNREFUSED, WEB, metric, send, two_pods, write_pods};

#[test]
fn lesson_01_connected_udp_sockets_to_a_removed_endpoint_are_closed() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = Directory::new()?;
    for i in 1..=2 {
        bed.namespace.add_address(&format!("10.0.0.{i}/32"))?;
        bed.serve_datagrams(&format!("10.0.0.{i}:5353"), &format!("pod{i}"))?;
    }
    let write = |endpoints: &[(&str, &str, &str)]| {
        directory.write(
            "c1/all.yaml",
            &[node("n1", "r1"), udp_service("dns", &["172.16.0.53"], 53), udp_slice("dns", 5353, endpoints)],
        )
    };
    write(&[("10.0.0.1", "n1", ""), ("10.0.0.2", "n1", "")])?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    let dns = "172.16.0.53:53".parse()?;
    // Four sockets through the Service, two to each endpoint. Three that dialed the endpoint itself, two of them after
    // the Service.
    for mapped in [false, true, false, true] {
        client.run(&Task::HoldDatagram { to: dns, mapped, then: None })?;
    }
    let direct = "10.0.0.1:5353".parse()?;
    client.run(&Task::HoldDatagram { to: direct, mapped: false, then: None })?;
    client.run(&Task::HoldDatagram { to: dns, mapped: false, then: Some(direct) })?;
    client.run(&Task::HoldDatagram { to: dns, mapped: false, then: Some(direct) })?;
    write(&[("10.0.0.2", "n1", "")])?;
    wait_until("the sockets to be closed", BOUND, || {
        let errnos = client.run(&Task::Held)?.errnos();
        let mut own = errnos[..4].to_vec();
        own.sort_unstable();
        ensure!(own == [0, 0, ECONNABORTED, ECONNABORTED], "{errnos:?}\n{}", agent.log());
        ensure!(errnos[4..] == [0; 3], "{errnos:?}");
        Ok(())
    })?;
    // The helper reports after it has closed them.
    wait_until("the report", BOUND, || {
        let closed = agent.events()?.into_iter().filter(|event| event["kind"] == "closed").collect::<Vec<_>>();
        let message = closed.first().and_then(|event| event["message"].as_str()).unwrap_or_default();
        ensure!(closed.len() == 1 && message.starts_with("2 UDP connections to 10.0.0.1:5353"), "{closed:?}");
        Ok(())
    })
}

#[test]
fn lesson_01_udp_sockets_are_closed_in_every_network_namespace() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = two_pods(&bed)?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    // Two pods, each with its own network namespace, in which the endpoints are.
    let pods = [Namespace::new(unique("pod"))?, Namespace::new(unique("pod"))?];
    let mut clients = Vec::new();
    for pod in &pods {
        for i in 1..=2 {
            pod.add_address(&format!("10.0.0.{i}/32"))?;
        }
        let mut client = Dialer::start(ProcessContext { namespace: Some(pod), cgroup: Some(&bed.cgroup) })?;
        for _ in 0..2 {
            client.run(&Task::HoldDatagram { to: DNS.parse()?, mapped: false, then: None })?;
        }
        clients.push(client);
    }
    write_pods(&directory, &[2])?;
    for client in &mut clients {
        wait_until("one socket of two to be closed", BOUND, || {
            let mut errnos = client.run(&Task::Held)?.errnos();
            errnos.sort_unstable();
            ensure!(errnos == [0, ECONNABORTED], "{errnos:?}\n{}", agent.log());
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn lesson_02_other_traffic_does_not_evict_udp_affinity() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = two_pods(&bed)?;
    let _agent = bed.agent_with(&directory, "c1", "n1", &["--max-affinities", "16"])?;
    let mut client = bed.dialer()?;
    let first = send(&mut client, DNS, 1, Sender::Kept)?;
    let mut others = bed.dialer()?;
    let count = 4_000;
    assert_eq!(send(&mut others, DNS, count, Sender::Fresh)?.errnos(), vec![0; count as usize]);
    let again = send(&mut client, DNS, 2, Sender::Kept)?;
    assert_eq!((again.greetings(), again.value), (vec![first.seen[0].greeting.as_str(); 2], first.value));
    assert!(again.seen.iter().all(|seen| seen.peer == Some(DNS.parse().unwrap())), "{again:?}");
    Ok(())
}

#[test]
fn lesson_03_reconnected_tcp_socket_has_no_stale_state() -> Result<()> {
    let bed = TestBed::new()?;
    for (address, greeting) in [("10.0.0.1", "web"), ("10.0.0.2", "other")] {
        bed.namespace.add_address(&format!("{address}/32"))?;
        bed.serve(&format!("{address}:9080"), greeting)?;
    }
    let directory = Directory::new()?;
    directory.write(
        "c1/all.yaml",
        &[
            node("n1", "r1"),
            service("web", &["172.16.0.10"], 80),
            service("other", &["172.16.0.20"], 80),
            slice("web", 9080, &[("10.0.0.1", "n1", "")]),
            slice("other", 9080, &[("10.0.0.2", "n1", "")]),
        ],
    )?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    for (then, peer) in [
        // Directly to the endpoint that the Service selected: getpeername() returns the address that was dialed.
        ("10.0.0.1:9080", "10.0.0.1:9080"),
        ("10.0.0.2:9080", "10.0.0.2:9080"),
        ("172.16.0.20:80", "172.16.0.20:80"),
    ] {
        let reply = client.run(&Task::Redial { to: "172.16.0.10:80".parse()?, then: then.parse()? })?;
        assert_eq!(reply.errnos(), [0, 0], "{then}");
        assert_eq!(reply.seen[0].peer, Some("172.16.0.10:80".parse()?));
        assert_eq!(reply.seen[1].peer, Some(peer.parse()?), "{then}");
    }
    // A failure of the second connection is not attributed to the first one.
    let reply = client.run(&Task::Redial { to: "172.16.0.10:80".parse()?, then: "10.0.0.2:1".parse()? })?;
    assert_eq!(reply.errnos(), [0, ECONNREFUSED]);
    wait_until("the sockets to be closed", Duration::from_secs(10), || {
        let endpoints = agent.get("endpoints")?;
        let kernel: Vec<_> = [0, 1].map(|i| endpoints["services"][i]["endpoints"][0]["kernel"].clone()).to_vec();
        ensure!(
            kernel
                == [
                    json!({"connections": 1, "active": 0, "failures": 0}),
                    json!({"connections": 4, "active": 0, "failures": 0})
                ],
            "{kernel:?}"
        );
        Ok(())
    })
}

#[test]
fn lesson_03_disconnected_udp_socket_has_no_stale_state() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = two_pods(&bed)?;
    let _agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    for then in ["10.0.0.1:5353", "10.0.0.2:5353", DNS] {
        // Twice, so that the Service selects each endpoint once.
        for _ in 0..2 {
            let reply = client.run(&Task::Reuse { to: DNS.parse()?, then: then.parse()? })?;
            assert_eq!(reply.seen[0].peer, Some(DNS.parse()?));
            assert_eq!((reply.seen[1].errno, reply.seen[1].peer), (0, Some(then.parse()?)), "{reply:?}");
        }
    }
    // The same from an unconnected socket: first to the Service, then to the endpoints themselves.
    let around = vec![DNS.parse()?, "10.0.0.1:5353".parse()?, "10.0.0.2:5353".parse()?];
    let reply = client.run(&Task::DatagramsAround { to: around.clone(), times: 3 })?;
    for (seen, to) in reply.seen.iter().zip(around.iter().cycle()) {
        assert_eq!(seen.peer, Some(*to), "{reply:?}");
    }
    Ok(())
}

#[test]
fn lesson_04_unconnected_udp_socket_keeps_its_source_port() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = two_pods(&bed)?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    let first = send(&mut client, DNS, 1, Sender::Kept)?;
    // A connected socket to the same endpoint shows when sockets have been closed.
    for _ in 0..2 {
        client.run(&Task::HoldDatagram { to: DNS.parse()?, mapped: false, then: None })?;
    }
    let remaining = if first.seen[0].greeting == "pod1" { 2 } else { 1 };
    write_pods(&directory, &[remaining])?;
    wait_until("the connected socket to be closed", BOUND, || {
        let errnos = client.run(&Task::Held)?.errnos();
        ensure!(errnos.contains(&ECONNABORTED), "{errnos:?}\n{}", agent.log());
        Ok(())
    })?;
    let again = send(&mut client, DNS, 1, Sender::Kept)?;
    assert_eq!((again.value, again.greetings()), (first.value, vec![format!("pod{remaining}").as_str()]));
    Ok(())
}

#[test]
fn lesson_05_tcp_is_closed_only_if_configured_and_in_one_pass_per_batch() -> Result<()> {
    for (setting, closed) in [("keep", 0), ("reset", 20)] {
        let bed = TestBed::new()?;
        let directory = Directory::new()?;
        let mut objects = vec![node("n1", "r1")];
        let mut fewer = objects.clone();
        bed.namespace.add_address("10.0.0.1/32")?;
        bed.namespace.add_address("10.0.0.2/32")?;
        for endpoint in ["10.0.0.1:9080", "10.0.0.2:9080"] {
            bed.serve(endpoint, "pod")?;
        }
        for i in 1..=20 {
            let name = format!("s{i}");
            let both = [("10.0.0.1", "n1", ""), ("10.0.0.2", "n1", "")];
            for (objects, endpoints) in [(&mut objects, &both[..]), (&mut fewer, &both[1..])] {
                objects.push(service(&name, &[&format!("172.16.0.{i}")], 80));
                objects.push(slice(&name, 9080, endpoints));
            }
        }
        directory.write("c1/all.yaml", &objects)?;
        let agent = bed.agent_with(&directory, "c1", "n1", &["--gone-connections", setting])?;
        let mut client = bed.dialer()?;
        for i in 1..=20 {
            client.run(&Task::Hold { to: format!("172.16.0.{i}:80").parse()?, times: 2 })?;
        }
        let passes = || metric(&agent, "portolan_closing_passes_total");
        let before = passes()?;
        directory.write("c1/all.yaml", &fewer)?;
        wait_until("the change and its effects", BOUND, || {
            let aborted = client.run(&Task::Held)?.errnos().iter().filter(|errno| **errno == ECONNABORTED).count();
            let endpoints = agent.get("services")?["services"][19]["endpoints"].as_array().map(Vec::len);
            ensure!(endpoints == Some(1) && aborted == closed, "{endpoints:?} {aborted}");
            Ok(())
        })?;
        // The last socket is closed before the pass ends and is counted.
        let expected = u64::from(setting != "keep");
        wait_until("the pass to end", BOUND, || {
            ensure!(passes()? - before >= expected);
            Ok(())
        })?;
        assert_eq!(passes()? - before, expected, "{setting}: twenty services, one change");
    }
    Ok(())
}

#[test]
fn lesson_06_v4_mapped_addresses_are_handled_as_ipv4() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = two_pods(&bed)?;
    let agent = bed.agent_with(&directory, "c1", "n1", &["--gone-connections", "reset"])?;
    let mut client = bed.dialer()?;
    // The connect, getpeername, sendmsg, and recvmsg hooks.
    let task = Task::Dial { to: WEB.parse()?, times: 2, mapped: true, nonblocking: false, send: 0 };
    let reply = client.run(&task)?;
    assert_eq!((reply.count("pod1"), reply.count("pod2")), (1, 1));
    assert_eq!(reply.seen[0].peer, Some("[::ffff:172.16.0.10]:80".parse()?));
    for from in [Sender::Connected, Sender::Fresh, Sender::Batch] {
        let reply = client.run(&Task::Datagrams { to: DNS.parse()?, times: 2, from, mapped: true })?;
        assert_eq!(
            (reply.errnos(), reply.seen[0].peer),
            (vec![0; 2], Some("[::ffff:172.16.0.53]:53".parse()?)),
            "{from:?}"
        );
    }
    // The socket iterator.
    for _ in 0..2 {
        client.run(&Task::HoldDatagram { to: DNS.parse()?, mapped: true, then: None })?;
    }
    write_pods(&directory, &[])?;
    wait_until("both to be closed", BOUND, || {
        let errnos = client.run(&Task::Held)?.errnos();
        ensure!(errnos == [ECONNABORTED; 2], "{errnos:?}\n{}", agent.log());
        Ok(())
    })?;
    assert_eq!(client.run(&task)?.errnos(), [ECONNREFUSED; 2]);
    Ok(())
}
