//! `connectionPool.tcp` limits, timeouts and keepalive, and connections that Portolan closes.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use portolan_tests::{
    Agent, ConnectionSlots, Dialer, Directory, Pod, TestBed,
    dial::{Task, Way},
    objects::{destination_rule, node, service, slice},
    wait_until,
};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};

const ECONNREFUSED: i32 = 111;
const ECONNABORTED: i32 = 103;
const ETIMEDOUT: i32 = 110;
const EPROTONOSUPPORT: i32 = 93;
const BOUND: Duration = Duration::from_secs(20);
const WEB: &str = "172.16.0.10:80";

/// Writes a service with two endpoints and these settings of `connectionPool.tcp`.
fn limited(bed: &TestBed, tcp: &Value) -> Result<Directory> {
    for i in 1..=2 {
        bed.namespace.add_address(&format!("10.0.0.{i}/32"))?;
        bed.serve(&format!("10.0.0.{i}:9080"), &format!("pod{i}"))?;
    }
    let directory = Directory::new()?;
    write(&directory, &[1, 2], tcp)?;
    Ok(directory)
}

fn write(directory: &Directory, pods: &[u8], tcp: &Value) -> Result<()> {
    let addresses: Vec<String> = pods.iter().map(|i| format!("10.0.0.{i}")).collect();
    let endpoints: Vec<(&str, &str, &str)> = addresses.iter().map(|address| (address.as_str(), "n1", "")).collect();
    directory.write(
        "c1/all.yaml",
        &[
            node("n1", "r1"),
            service("web", &["172.16.0.10", "172.16.0.11"], 80),
            slice("web", 9080, &endpoints),
            destination_rule("web", &json!({"trafficPolicy": {"connectionPool": {"tcp": tcp}}})),
        ],
    )
}

fn metric(agent: &Agent, line: &str) -> Result<u64> {
    let text = agent.http("/metrics")?.1;
    let value = text.lines().find_map(|own| own.strip_prefix(line)).unwrap_or("0");
    Ok(value.trim().parse()?)
}

#[test]
fn connections_over_the_limit_are_refused_and_counted() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = limited(&bed, &json!({"maxConnections": 5}))?;
    let mut agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    let hold = |to: &str, times| Task::Hold { to: to.parse().unwrap(), times };
    let reply = client.run(&hold(WEB, 8))?;
    assert_eq!(reply.errnos(), [0, 0, 0, 0, 0, ECONNREFUSED, ECONNREFUSED, ECONNREFUSED]);
    // The limit belongs to the destination. It applies to every address that leads there and to every client.
    let mut other = bed.dialer()?;
    assert_eq!(other.run(&hold("172.16.0.11:80", 1))?.errnos(), [ECONNREFUSED]);
    // It persists across a restart of the agent.
    agent.process.kill();
    let agent = bed.agent(&directory, "c1", "n1")?;
    assert_eq!(other.run(&hold(WEB, 1))?.errnos(), [ECONNREFUSED]);
    let labels = "portolan_overflow_total{namespace=\"default\",service=\"web\",port=\"80\"}";
    assert_eq!(metric(&agent, labels)?, 5);
    // A raised limit takes effect at once, and closed connections make room.
    write(&directory, &[1, 2], &json!({"maxConnections": 6}))?;
    wait_until("the limit to be raised", BOUND, || {
        ensure!(other.run(&hold(WEB, 1))?.errnos() == [0]);
        Ok(())
    })?;
    assert_eq!(other.run(&hold(WEB, 1))?.errnos(), [ECONNREFUSED]);
    client.run(&Task::Release)?;
    wait_until("there to be room", BOUND, || {
        ensure!(other.run(&hold(WEB, 5))?.errnos() == [0; 5]);
        Ok(())
    })
}

#[test]
fn keepalive_is_set_unless_the_application_sets_it() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = limited(&bed, &json!({"tcpKeepalive": {"time": "77s", "interval": "7s", "probes": 3}}))?;
    let _agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    let reply = client.run(&Task::Keepalive { to: WEB.parse()?, own: false })?;
    assert_eq!((reply.errnos(), reply.values), (vec![0], vec![1, 77, 7, 3]));
    let direct = client.run(&Task::Keepalive { to: "10.0.0.1:9080".parse()?, own: false })?;
    assert_eq!(direct.values[0], 0, "a direct connection is unchanged");
    let own = client.run(&Task::Keepalive { to: WEB.parse()?, own: true })?;
    assert_ne!(own.values[1], 77, "the settings of the application stay");
    Ok(())
}

#[test]
fn idle_and_expired_connections_are_closed() -> Result<()> {
    for (limit, reason) in [(json!({"idleTimeout": "1s"}), "idle"), (json!({"maxConnectionDuration": "1s"}), "age")] {
        let bed = TestBed::new()?;
        let directory = limited(&bed, &limit)?;
        let agent = bed.agent(&directory, "c1", "n1")?;
        let mut client = bed.dialer()?;
        client.run(&Task::Hold { to: WEB.parse()?, times: 4 })?;
        client.run(&Task::Hold { to: "10.0.0.1:9080".parse()?, times: 1 })?;
        wait_until("the connections to be closed", BOUND, || {
            let errnos = client.run(&Task::Held)?.errnos();
            // The unread greeting arrives before the reset.
            ensure!(errnos[..4] == [ECONNABORTED; 4], "{reason}: {errnos:?}\n{}", agent.log());
            Ok(())
        })?;
        assert_ne!(client.run(&Task::Held)?.errnos()[4], ECONNABORTED, "a direct connection stays open");
        let labels = format!("portolan_closed_connections_total{{reason=\"{reason}\",protocol=\"TCP\"}}");
        wait_until("the metric", BOUND, || {
            let count = metric(&agent, &labels)?;
            ensure!(count == 4, "{count}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn gone_connections_flag_decides_about_removed_endpoints() -> Result<()> {
    // Whether a slot or socket storage holds the state makes no difference.
    for (setting, use_slots) in [("keep", true), ("reset", true), ("reset", false), ("idle", true), ("idle", false)] {
        let bed = TestBed::new()?;
        let directory = limited(&bed, &json!({}))?;
        let agent = bed.agent_with(&directory, "c1", "n1", &["--gone-connections", setting])?;
        if !use_slots {
            ConnectionSlots::open(bed.pins())?.take_all();
        }
        let mut client = bed.dialer()?;
        // Two to each endpoint.
        client.run(&Task::Hold { to: WEB.parse()?, times: 4 })?;
        write(&directory, &[2], &json!({}))?;
        wait_until("the endpoint to be removed", BOUND, || {
            ensure!(client.dial(WEB, 2)?.greetings() == ["pod2"; 2]);
            Ok(())
        })?;
        let aborted = |errnos: &[i32]| errnos.iter().filter(|errno| **errno == ECONNABORTED).count();
        if setting == "keep" {
            assert_eq!(aborted(&client.run(&Task::Held)?.errnos()), 0);
            continue;
        }
        wait_until("the connections to be closed", BOUND, || {
            let errnos = client.run(&Task::Held)?.errnos();
            ensure!(aborted(&errnos) == 2, "{setting}: {errnos:?}\n{}", agent.log());
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn special_ways_to_connect_work() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = limited(&bed, &json!({}))?;
    let keep = json!({"serviceSettings": [{"settings": {"clusterLocal": true}, "hosts": ["strict.default.svc.cluster.local"]}]});
    directory.write("mesh.yaml", &[portolan_tests::objects::mesh_config(&keep)])?;
    directory.write(
        "c1/strict.yaml",
        &[service("strict", &["172.16.0.20"], 80), slice("strict", 9080, &[("10.0.0.1", "n1", "")])],
    )?;
    bed.namespace.run("sysctl", &["-qw", "net.ipv4.tcp_fastopen=3"])?;
    bed.namespace.add_address("10.0.9.9/32")?;
    let _agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    let from = "10.0.9.9:0".parse()?;
    for way in [Way::FastOpen, Way::FastOpenConnect, Way::Bound(from), Way::Multipath] {
        let reply = client.run(&Task::Dialed { to: WEB.parse()?, way })?;
        let seen = &reply.seen[0];
        assert!(seen.errno == 0 && seen.greeting.starts_with("pod"), "{way:?}: {seen:?}");
        // The hook of `getpeername()` sees the MPTCP socket, and that of `connect()` its first subflow.
        assert_eq!(seen.peer == Some(WEB.parse()?), way != Way::Multipath, "{way:?}: {seen:?}");
    }
    let strict = client.run(&Task::Dialed { to: "172.16.0.20:80".parse()?, way: Way::Multipath })?;
    assert_eq!(strict.greetings(), ["pod1"]);
    // SCTP is not rewritten. An SCTP listener on the Service address itself gets the connection.
    bed.namespace.add_address("172.16.0.11/32")?;
    let listener = bed
        .namespace
        .enter(|| Ok(Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::from(libc::IPPROTO_SCTP)))))?;
    let dial = |client: &mut Dialer| {
        client.run(&Task::Dialed { to: "172.16.0.11:80".parse().expect("an address"), way: Way::Sctp })
    };
    match listener {
        Ok(listener) => {
            listener.bind(&"172.16.0.11:80".parse::<SocketAddr>()?.into())?;
            listener.listen(1)?;
            let server = std::thread::spawn(move || listener.accept().and_then(|(socket, _)| socket.send(b"sctp")));
            assert_eq!(dial(&mut client)?.greetings(), ["sctp"]);
            server.join().unwrap()?;
        }
        // Kernels of Debian have SCTP (`cargo xtask vm`). Without it, the socket cannot be created.
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(EPROTONOSUPPORT));
            assert_eq!(dial(&mut client)?.errnos(), [EPROTONOSUPPORT]);
        }
    }
    Ok(())
}

/// The first subflow of an MPTCP connection is rewritten, and the others join it at the endpoint's own address.
#[test]
fn subflows_of_multipath_tcp_join_at_the_endpoint() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = limited(&bed, &json!({}))?;
    write(&directory, &[3], &json!({}))?;
    bed.namespace.add_address("10.0.0.3/32")?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let mut pod = Pod::new(&bed, 1)?;
    pod.namespace.add_address("192.168.1.5/32")?;
    bed.namespace.ip(&["route", "add", "192.168.1.5/32", "via", "192.168.1.1"])?;
    pod.namespace.ip(&["mptcp", "limits", "set", "subflow", "2"])?;
    bed.namespace.ip(&["mptcp", "limits", "set", "subflow", "2", "add_addr_accepted", "2"])?;
    pod.namespace.ip(&["mptcp", "endpoint", "add", "192.168.1.5", "subflow"])?;
    let joins = || -> Result<u64> {
        let text = bed.namespace.enter(|| Ok(std::fs::read_to_string("/proc/thread-self/net/netstat")?))?;
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split(' ').collect()).collect();
        let table = lines.chunks(2).find(|pair| pair[0][0] == "MPTcpExt:");
        let column =
            |pair: &[Vec<&str>]| pair[0].iter().position(|name| *name == "MPJoinAckRx").map(|i| pair[1][i].parse());
        Ok(table.and_then(column).transpose()?.unwrap_or_default())
    };
    let listener = bed.namespace.enter(|| {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP))?;
        listener.bind(&"10.0.0.3:9080".parse::<SocketAddr>()?.into())?;
        listener.listen(1)?;
        Ok(listener)
    })?;
    std::thread::scope(|scope| -> Result<()> {
        let server = scope.spawn(|| -> Result<()> {
            let (socket, _) = listener.accept()?;
            socket.send(b"first,")?;
            wait_until("the second subflow", BOUND, || {
                ensure!(joins()? == 1, "{} subflows joined", joins()?);
                Ok(())
            })?;
            socket.send(b"second")?;
            Ok(socket.shutdown(std::net::Shutdown::Both)?)
        });
        let reply = pod.client.run(&Task::Dialed { to: WEB.parse()?, way: Way::Multipath })?;
        server.join().expect("the server does not panic")?;
        assert_eq!(reply.greetings(), ["first,second"]);
        Ok(())
    })?;
    // It is one connection of the service.
    let endpoints = agent.get("endpoints")?;
    assert_eq!(endpoints["services"][0]["endpoints"][0]["kernel"]["connections"], json!(1), "{endpoints}");
    Ok(())
}

#[test]
fn pending_connect_is_neither_idle_nor_expired() -> Result<()> {
    let bed = TestBed::new()?;
    let limits = json!({"connectTimeout": "3s", "idleTimeout": "0.3s", "maxConnectionDuration": "0.3s"});
    let directory = limited(&bed, &limits)?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    // An established connection, so that sweeps run.
    client.run(&Task::Hold { to: WEB.parse()?, times: 1 })?;
    for i in 1..=2 {
        bed.namespace.swallow(&format!("10.0.0.{i}/32"))?;
    }
    let task = Task::Dial { to: WEB.parse()?, times: 1, mapped: false, nonblocking: true, send: 0 };
    assert_eq!(client.run(&task)?.errnos(), [ETIMEDOUT], "{}", agent.log());
    Ok(())
}

#[test]
fn connections_to_a_terminating_endpoint_stay_until_it_is_removed() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = limited(&bed, &json!({}))?;
    let agent = bed.agent_with(&directory, "c1", "n1", &["--gone-connections", "reset"])?;
    let mut client = bed.dialer()?;
    client.run(&Task::Hold { to: WEB.parse()?, times: 4 })?;
    // The pod is terminating: it gets no new connections and may finish those that it has.
    let mut draining = slice("web", 9080, &[("10.0.0.1", "n1", ""), ("10.0.0.2", "n1", "")]);
    draining["endpoints"][0]["conditions"] = json!({"ready": false, "serving": true, "terminating": true});
    let rule = destination_rule("web", &json!({"trafficPolicy": {"connectionPool": {"tcp": {}}}}));
    let objects = [node("n1", "r1"), service("web", &["172.16.0.10", "172.16.0.11"], 80), draining, rule];
    directory.write("c1/all.yaml", &objects)?;
    wait_until("no new connections to it", BOUND, || {
        ensure!(client.dial(WEB, 4)?.greetings() == ["pod2"; 4]);
        Ok(())
    })?;
    let aborted = |client: &mut portolan_tests::Dialer| -> Result<usize> {
        Ok(client.run(&Task::Held)?.errnos().iter().filter(|errno| **errno == ECONNABORTED).count())
    };
    assert_eq!(aborted(&mut client)?, 0);
    assert_eq!(metric(&agent, "portolan_closing_passes_total")?, 0, "no sweep has run");
    write(&directory, &[2], &json!({}))?;
    wait_until("connections to the removed endpoint to be closed", BOUND, || {
        let count = aborted(&mut client)?;
        ensure!(count == 2, "{count}");
        Ok(())
    })
}

#[test]
fn connect_timeout_applies_to_both_socket_modes() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = limited(&bed, &json!({"connectTimeout": "0.3s"}))?;
    let _agent = bed.agent(&directory, "c1", "n1")?;
    for i in 1..=2 {
        bed.namespace.swallow(&format!("10.0.0.{i}/32"))?;
    }
    let mut client = bed.dialer()?;
    for nonblocking in [false, true] {
        let task = Task::Dial { to: WEB.parse()?, times: 1, mapped: false, nonblocking, send: 0 };
        assert_eq!(client.run(&task)?.errnos(), [ETIMEDOUT]);
    }
    Ok(())
}

#[test]
fn connect_timeout_below_one_second_does_not_wait_for_the_second_syn() -> Result<()> {
    let bed = TestBed::new()?;
    for i in 1..=2 {
        bed.namespace.swallow(&format!("10.0.0.{i}/32"))?;
    }
    let directory = Directory::new()?;
    let mut objects = vec![node("n1", "r1")];
    for (name, address, endpoint, timeout) in
        [("slow", "172.16.0.30", "10.0.0.1", "0.9s"), ("fast", "172.16.0.31", "10.0.0.2", "0.1s")]
    {
        objects.push(service(name, &[address], 80));
        objects.push(slice(name, 9080, &[(endpoint, "n1", "")]));
        let limit = json!({"trafficPolicy": {"connectionPool": {"tcp": {"connectTimeout": timeout}}}});
        objects.push(destination_rule(name, &limit));
    }
    directory.write("c1/all.yaml", &objects)?;
    let _agent = bed.agent(&directory, "c1", "n1")?;
    let give_up = |client: &mut Dialer, address: &str, times: u32| -> Result<Instant> {
        assert_eq!(client.dial(address, times)?.errnos(), vec![ETIMEDOUT; times as usize], "{address}");
        Ok(Instant::now())
    };
    // Five fast timeouts take less time than a slow one.
    // If each of them waited for its second SYN, the slow one would finish long before.
    let (mut one, mut other) = (bed.dialer()?, bed.dialer()?);
    let (slow, fast) = std::thread::scope(|scope| {
        let slow = scope.spawn(|| give_up(&mut one, "172.16.0.30:80", 1));
        let fast = scope.spawn(|| give_up(&mut other, "172.16.0.31:80", 5));
        (slow.join(), fast.join())
    });
    let (slow, fast) = (slow.unwrap()?, fast.unwrap()?);
    assert!(fast < slow, "fast finished {:?} after slow", fast - slow);
    Ok(())
}

/// After a failover, clients keep connections to the far endpoint.
/// Once the near endpoint is back, idle connections are closed, a few at a time.
#[test]
fn idle_connections_are_closed_after_failback() -> Result<()> {
    let bed = TestBed::new()?;
    for (address, name) in [("10.0.0.1", "near"), ("10.1.0.1", "far")] {
        bed.namespace.add_address(&format!("{address}/32"))?;
        bed.serve(&format!("{address}:9080"), name)?;
    }
    let directory = Directory::new()?;
    let objects = |ready: bool, closes_idle: bool| {
        let mut endpoints = slice("web", 9080, &[("10.0.0.1", "near", ""), ("10.1.0.1", "far", "")]);
        endpoints["endpoints"][0]["conditions"]["ready"] = json!(ready);
        let mut rule = destination_rule("web", &json!({"trafficPolicy": {"outlierDetection": {}}}));
        if closes_idle {
            rule["metadata"]["annotations"] = json!({"portolan.io/close-idle-elsewhere": "3s"});
        }
        [node("near", "r1/z1"), node("far", "r2/z1"), service("web", &["172.16.0.10"], 80), endpoints, rule]
    };
    directory.write("c1/all.yaml", &objects(false, false))?;
    let agent = bed.agent(&directory, "c1", "near")?;
    let mut client = bed.dialer()?;
    let to = WEB.parse()?;
    let open = |client: &mut Dialer| -> Result<usize> {
        Ok(client.run(&Task::Held)?.errnos().iter().filter(|errno| **errno != ECONNABORTED).count())
    };
    client.run(&Task::Hold { to, times: 30 })?;
    // Without the annotation, connections stay.
    directory.write("c1/all.yaml", &objects(true, false))?;
    wait_until("new connections to go near", BOUND, || {
        ensure!(client.dial(WEB, 3)?.greetings() == ["near"; 3]);
        Ok(())
    })?;
    assert_eq!(metric(&agent, "portolan_closing_passes_total")?, 0);
    directory.write("c1/all.yaml", &objects(true, true))?;
    wait_until("the idle connections to be closed", BOUND, || {
        let left = open(&mut client)?;
        ensure!(left == 0, "{left}\n{}", agent.log());
        Ok(())
    })?;
    // At most twenty per second.
    let events = agent.events()?;
    let messages =
        events.iter().filter(|event| event["kind"] == "closed").filter_map(|event| event["message"].as_str());
    let counts: Vec<u64> = messages.filter_map(|message| message.split(' ').next()?.parse().ok()).collect();
    assert!(counts.len() > 1 && counts.iter().all(|count| *count <= 20), "{counts:?}");
    let moved = metric(&agent, "portolan_closed_connections_total{reason=\"elsewhere\",protocol=\"TCP\"}")?;
    assert!(moved >= 30, "{moved}");
    assert_eq!(client.dial(WEB, 3)?.greetings(), ["near"; 3]);
    // Connections to endpoints that also get new connections stay, however idle they are.
    client.run(&Task::Release)?;
    client.run(&Task::Hold { to, times: 2 })?;
    let passes = metric(&agent, "portolan_closing_passes_total")?;
    let mut changed = objects(true, true);
    changed[2] = service("web", &["172.16.0.10", "172.16.0.11"], 80);
    directory.write("c1/all.yaml", &changed)?;
    wait_until("another sweep", BOUND, || {
        ensure!(metric(&agent, "portolan_closing_passes_total")? > passes);
        Ok(())
    })?;
    assert_eq!(open(&mut client)?, 2);
    Ok(())
}
