//! One pod tries to break the data path for all others. Each test is an attack that is within a pod's means.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{
    io::{ErrorKind, Read as _, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use portolan_tests::{
    ActiveCounts, Agent, ConnectionSlots, Directory, Foreign, ForeignProgram, Namespace, Pod, TestBed,
    dial::{Task, Way},
    objects::{destination_rule, node, plain, service, slice},
    unique, wait_until,
};
use serde_json::{Value, json};

const ECONNREFUSED: i32 = 111;
const EPERM: i32 = 1;
const BOUND: Duration = Duration::from_secs(20);
const WEB: &str = "172.16.0.10:80";
const FAILURE: &str = "HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n";

/// Returns the number of attempts of an attack, which `PORTOLAN_ATTACK_ATTEMPTS` overrides.
fn attempts(usual: u32) -> u32 {
    std::env::var("PORTOLAN_ATTACK_ATTEMPTS").ok().and_then(|count| count.parse().ok()).unwrap_or(usual)
}

/// Writes a service on an HTTP port with a near and a far endpoint, and these settings in its rule.
fn web(bed: &TestBed, policy: &Value) -> Result<Directory> {
    let directory = Directory::new()?;
    for address in ["10.0.0.1/32", "10.1.0.1/32"] {
        bed.namespace.add_address(address)?;
    }
    directory.write(
        "c1/all.yaml",
        &[
            node("near", "r1/z1"),
            node("far", "r2/z1"),
            service("web", &["172.16.0.10"], 80),
            slice("web", 9080, &[("10.0.0.1", "near", ""), ("10.1.0.1", "far", "")]),
            destination_rule("web", &json!({"trafficPolicy": policy})),
        ],
    )?;
    Ok(directory)
}

fn eager(consecutive: u32) -> Value {
    json!({"outlierDetection": {
        "consecutive5xxErrors": consecutive, "interval": "1s", "baseEjectionTime": "2m", "maxEjectionPercent": 100,
    }})
}

fn wait_ejected(agent: &Agent) -> Result<()> {
    wait_until("the ejection", BOUND, || {
        let ejections = agent.get("ejections")?.to_string();
        ensure!(ejections.contains("10.0.0.1:9080"), "{ejections}\n{}", agent.log());
        Ok(())
    })
}

/// Waits until no slot is in use. The self-probe has some for a moment.
fn wait_all_free(slots: &ConnectionSlots) -> Result<()> {
    wait_until("the slots to be freed", BOUND, || {
        ensure!(slots.taken() == 0, "{} are in use", slots.taken());
        Ok(())
    })
}

fn metric(agent: &Agent, name: &str) -> Result<u64> {
    let metrics = agent.http("/metrics")?.1;
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(line.with_context(|| format!("no metric {name}"))?.parse()?)
}

fn ejections_so_far(agent: &Agent) -> Result<u32> {
    let metrics = agent.http("/metrics")?.1;
    let lines = metrics.lines().filter(|line| line.starts_with("portolan_ejections_total{"));
    lines.map(|line| Ok(line.rsplit(' ').next().unwrap_or_default().parse::<u32>()?)).sum()
}

/// Threat 16: connects that fail between the hook and the SYN must not use up what observes other connections.
#[test]
fn connects_that_fail_before_their_syn_leave_others_observed() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = web(&bed, &eager(5))?;
    bed.serve("10.0.0.1:9080", FAILURE)?;
    bed.serve("10.1.0.1:9080", "HTTP/1.1 200 OK\r\n\r\n")?;
    let agent = bed.agent(&directory, "c1", "near")?;
    let slots = ConnectionSlots::open(bed.pins())?;
    let (mut attacker, mut other) = (Pod::new(&bed, 1)?, Pod::new(&bed, 2)?);
    let (mut left, to) = (attempts(140_000), WEB.parse()?);
    while left > 0 {
        let times = left.min(1_000_000);
        left -= times;
        let reply = attacker.client.run(&Task::BoundToLoopback { to, times, keep: false })?;
        assert_eq!((reply.good, reply.bad), (times.into(), 0));
    }
    wait_all_free(&slots)?;
    assert_eq!(other.client.dial(WEB, 5)?.count(FAILURE), 5);
    wait_ejected(&agent)?;
    wait_until("the metric to be zero", BOUND, || {
        let used = metric(&agent, "portolan_map_entries{map=\"connections\"}")?;
        ensure!(used == 0, "{used}");
        Ok(())
    })
}

/// The same with sockets that the pod keeps, before their SYN and after it.
#[test]
fn one_pod_cannot_take_all_slots() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = web(&bed, &eager(5))?;
    bed.serve("10.0.0.1:9080", FAILURE)?;
    bed.serve("10.1.0.1:9080", "far")?;
    let agent = bed.agent_with(&directory, "c1", "near", &["--max-connections", "1024"])?;
    let slots = ConnectionSlots::open(bed.pins())?;
    let (mut attacker, mut other) = (Pod::new(&bed, 1)?, Pod::new(&bed, 2)?);
    let attack = Task::BoundToLoopback { to: WEB.parse()?, times: 3_000, keep: true };
    assert_eq!(attacker.client.run(&attack)?.good, 3_000);
    // Connects that have sent their SYN take the slots of those that have not.
    assert_eq!(other.client.dial(WEB, 5)?.count(FAILURE), 5);
    wait_ejected(&agent)?;
    attacker.client.run(&Task::Release)?;
    wait_all_free(&slots)?;
    let held = attacker.client.run(&Task::Hold { to: WEB.parse()?, times: 600 })?;
    assert_eq!(held.errnos(), [0; 600]);
    // The self-probe has one for a moment.
    wait_until("one pod to have a quarter of the slots", BOUND, || {
        ensure!((slots.size(), slots.connected()) == (1_024, 256), "{} of {}", slots.connected(), slots.size());
        Ok(())
    })?;
    // Of the others, few found both of their slots taken before they came to their share.
    assert!(metric(&agent, "portolan_connections_over_share_total")? >= 200);
    assert!(metric(&agent, "portolan_socket_storage_states_total")? >= 344);
    // The others are counted as well.
    let endpoints = agent.get("endpoints")?["services"][0]["endpoints"].clone();
    let active = |endpoint: &Value| endpoint["kernel"]["active"].as_u64();
    assert_eq!(endpoints.as_array().into_iter().flatten().filter_map(active).sum::<u64>(), 600, "{endpoints}");
    // `doctor` names the pod, and the usage of the maps.
    let (pins, cgroup) = (bed.pins().display().to_string(), bed.cgroup.path().display().to_string());
    let doctor = bed.portolan(&["doctor", "-o", "json", "--bpffs", &pins, "--cgroup", &cgroup])?;
    let diagnosis: Value = serde_json::from_slice(&doctor.stdout)?;
    let checks: Vec<&Value> = diagnosis["checks"].as_array().into_iter().flatten().collect();
    let over: Vec<&str> = checks
        .iter()
        .filter(|check| check["check"] == "connections")
        .filter_map(|check| check["says"].as_str())
        .collect();
    assert!(over.len() == 1 && over[0].contains("pod1 found its share"), "{over:?}");
    let maps = diagnosis["maps"].as_array().cloned().unwrap_or_default();
    let frontends = maps.iter().find(|map| map["name"] == "frontends").context("no line for frontends")?;
    // The Service's, and four of the self-probe.
    assert_eq!((&frontends["used"], &frontends["size"]), (&json!(5), &json!(16_384)));
    attacker.client.run(&Task::Release)?;
    wait_all_free(&slots)
}

/// Many pods use up the slots: a finding says so, connections go on, and their responses are seen.
#[test]
fn full_slots_are_a_finding_and_change_nothing_else() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = web(&bed, &eager(5))?;
    directory.write(
        "c1/other.yaml",
        &[plain(service("other", &["172.16.0.20"], 80)), plain(slice("other", 9080, &[("10.1.0.1", "far", "")]))],
    )?;
    bed.serve("10.0.0.1:9080", FAILURE)?;
    bed.serve("10.1.0.1:9080", "far")?;
    let agent = bed.agent_with(&directory, "c1", "near", &["--max-connections", "1024"])?;
    let slots = ConnectionSlots::open(bed.pins())?;
    let mut pods = (1..=8).map(|number| Pod::new(&bed, number)).collect::<Result<Vec<_>>>()?;
    for pod in &mut pods[..7] {
        let held = pod.client.run(&Task::Hold { to: "172.16.0.20:80".parse()?, times: 256 })?;
        assert_eq!(held.errnos(), [0; 256]);
    }
    assert!(slots.taken() > 900, "{} slots are in use", slots.taken());
    wait_until("the finding", BOUND, || {
        let found = agent.findings("PTL0092")?;
        ensure!(found.iter().any(|found| found.contains("--max-connections")), "{found:?}");
        Ok(())
    })?;
    assert_eq!(pods[7].client.dial(WEB, 5)?.count(FAILURE), 5);
    wait_ejected(&agent)?;
    let doctor = bed.portolan(&["doctor", "-o", "json", "--bpffs", &bed.pins().display().to_string()])?;
    let diagnosis: Value = serde_json::from_slice(&doctor.stdout)?;
    let maps = diagnosis["maps"].as_array().cloned().unwrap_or_default();
    let connections = maps.iter().find(|map| map["name"] == "connections").context("no line for connections")?;
    assert!(connections["used"].as_u64() > Some(900), "{connections}");
    Ok(())
}

/// Starts a node whose Service accepts this many connections at a time.
fn limited(most: u32) -> Result<(TestBed, Directory, Agent)> {
    serving(&json!({"connectionPool": {"tcp": {"maxConnections": most}}}), &[])
}

/// Starts a node with two endpoints that greet with their region, and this traffic policy.
fn serving(policy: &Value, arguments: &[&str]) -> Result<(TestBed, Directory, Agent)> {
    let bed = TestBed::new()?;
    let directory = web(&bed, policy)?;
    bed.serve("10.0.0.1:9080", "near")?;
    bed.serve("10.1.0.1:9080", "far")?;
    let agent = bed.agent_with(&directory, "c1", "near", arguments)?;
    Ok((bed, directory, agent))
}

/// Threat 18: another program on a pod's own cgroup hides the ends of connections.
#[test]
fn hidden_ends_of_connections_do_not_exhaust_a_limit() -> Result<()> {
    let (bed, _directory, agent) = limited(3)?;
    let (mut attacker, mut other) = (Pod::new(&bed, 1)?, Pod::new(&bed, 2)?);
    let hiding = ForeignProgram::attach(&attacker.cgroup, Foreign::HideEnds)?;
    for _ in 0..4 {
        attacker.client.run(&Task::Hold { to: WEB.parse()?, times: 3 })?;
        assert_eq!(other.client.dial(WEB, 1)?.errnos(), [ECONNREFUSED], "the limit is reached");
        attacker.client.run(&Task::Release)?;
        // The application's own close is seen.
        wait_until("the counts to come down", BOUND, || {
            let errnos = other.client.dial(WEB, 1)?.errnos();
            ensure!(errnos == [0], "{errnos:?}\n{}", agent.log());
            Ok(())
        })?;
    }
    // `doctor` tells of the program.
    let (pins, cgroup) = (bed.pins().display().to_string(), bed.cgroup.path().display().to_string());
    let doctor = bed.portolan(&["doctor", "-o", "json", "--bpffs", &pins, "--cgroup", &cgroup])?;
    let found = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(found.contains("sock_ops") && found.contains("pod1"), "{found}");
    drop(hiding);
    Ok(())
}

/// The same for the connections that a pod has beyond its share of the slots, whose state is in socket storage.
#[test]
fn hidden_ends_of_connections_beyond_the_share_are_seen_at_once() -> Result<()> {
    let limit = json!({"connectionPool": {"tcp": {"maxConnections": 400}}});
    let (bed, _directory, agent) = serving(&limit, &["--max-connections", "1024"])?;
    let mut attacker = Pod::new(&bed, 1)?;
    let _hiding = ForeignProgram::attach(&attacker.cgroup, Foreign::HideEnds)?;
    attacker.client.run(&Task::Hold { to: WEB.parse()?, times: 400 })?;
    assert!(metric(&agent, "portolan_connections_over_share_total")? > 100);
    attacker.client.run(&Task::Release)?;
    // A recount would correct the counts as well, and tell of it.
    wait_until("the counts to come down", BOUND, || {
        let endpoints = agent.get("endpoints")?["services"][0]["endpoints"].clone();
        let active = endpoints.as_array().into_iter().flatten().filter_map(|it| it["kernel"]["active"].as_u64());
        ensure!(active.sum::<u64>() == 0, "{endpoints}");
        Ok(())
    })?;
    let repairs: Vec<Value> = agent.events()?.into_iter().filter(|event| event["kind"] == "repaired").collect();
    assert!(repairs.is_empty(), "{repairs:?}");
    Ok(())
}

/// The kernel closes the subflows of MPTCP itself, so that only a recount finds the hidden end of one.
#[test]
fn hidden_ends_of_subflows_are_found_by_a_recount() -> Result<()> {
    let (bed, _directory, agent) = limited(3)?;
    let (mut attacker, mut other) = (Pod::new(&bed, 1)?, Pod::new(&bed, 2)?);
    let _hiding = ForeignProgram::attach(&attacker.cgroup, Foreign::HideEnds)?;
    for _ in 0..3 {
        let reply = attacker.client.run(&Task::Dialed { to: WEB.parse()?, way: Way::Multipath })?;
        assert_eq!(reply.errnos(), [0]);
    }
    wait_until("the counts to come down", BOUND, || {
        let errnos = other.client.dial(WEB, 3)?.errnos();
        ensure!(errnos == [0; 3], "{errnos:?}\n{}", agent.log());
        Ok(())
    })
}

/// Ends that no program saw, in a pool where connections begin and end all the time: its count is never at rest.
#[test]
fn lost_ends_are_found_in_a_busy_pool() -> Result<()> {
    const LOST: (u32, u32) = (10, 6);
    let (bed, _directory, agent) = limited(LOST.0 + LOST.1 + 5)?;
    let mut holder = Pod::new(&bed, 1)?;
    holder.client.run(&Task::Hold { to: WEB.parse()?, times: 1 })?;
    let counts = ActiveCounts::open(bed.pins())?;
    wait_until("one connection to be counted", BOUND, || {
        ensure!(counts.read() == [[1], [1]], "{:?}", counts.read());
        Ok(())
    })?;
    counts.lose_ends(LOST);
    // Four places are left for six pods, each of which is served often and refused often.
    let mut busy = (2..8).map(|host| Pod::new(&bed, host)).collect::<Result<Vec<_>>>()?;
    for pod in &mut busy {
        pod.client.begin(&Task::Load { to: WEB.parse()? })?;
    }
    // At no time is a count lower than the connection that is held.
    let least = || counts.read().map(|counts| counts.into_iter().min().unwrap_or(0));
    let mut lowest = i64::MAX;
    wait_until("the counts to come down", BOUND, || {
        let [of_backend, of_pool] = least();
        lowest = lowest.min(of_backend).min(of_pool);
        ensure!(of_backend.max(of_pool) <= 1 + 6, "{of_backend}, {of_pool} active\n{}", agent.log());
        Ok(())
    })?;
    for pod in &mut busy {
        let load = pod.client.run(&Task::Stop)?;
        println!("{} connections, {} refused", load.good, load.bad);
        assert!(load.good > 0);
    }
    wait_until("the counts to be right", BOUND, || {
        let counts = counts.read();
        lowest = counts.iter().flatten().copied().chain([lowest]).min().unwrap_or(0);
        ensure!(counts == [[1], [1]], "{counts:?}\n{}", agent.log());
        Ok(())
    })?;
    assert!(lowest >= 1, "a count was {lowest}");
    Ok(())
}

/// No other socket takes a slot that is being filled in.
#[test]
fn busy_slots_are_not_stolen() -> Result<()> {
    let (bed, _directory, _agent) = serving(&json!({}), &["--max-connections", "1024"])?;
    let slots = ConnectionSlots::open(bed.pins())?;
    let mut pod = Pod::new(&bed, 1)?;
    slots.mark_all_busy();
    let busy = slots.busy();
    let dialed = WEB.parse()?;
    let reply = pod.client.dial(WEB, 20)?;
    assert!(reply.seen.iter().all(|seen| seen.errno == 0 && seen.peer == Some(dialed)), "{reply:?}");
    assert_eq!(slots.busy(), busy);
    Ok(())
}

/// Pods take over slots that connects which never began hold, while further such connects fill them again.
#[test]
fn counts_are_right_after_slots_were_stolen() -> Result<()> {
    let limit = json!({"connectionPool": {"tcp": {"maxConnections": 1_000}}});
    let (bed, _directory, agent) = serving(&limit, &["--max-connections", "1024"])?;
    let (counts, slots) = (ActiveCounts::open(bed.pins())?, ConnectionSlots::open(bed.pins())?);
    let mut busy = (1..4).map(|host| Pod::new(&bed, host)).collect::<Result<Vec<_>>>()?;
    for pod in &mut busy {
        pod.client.begin(&Task::Load { to: WEB.parse()? })?;
    }
    let mut attackers = (4..8).map(|host| Pod::new(&bed, host)).collect::<Result<Vec<_>>>()?;
    for attacker in &mut attackers {
        let task = Task::BoundToLoopback { to: WEB.parse()?, times: 800, keep: true };
        assert_eq!(attacker.client.run(&task)?.good, 800);
    }
    for pod in &mut busy {
        let load = pod.client.run(&Task::Stop)?;
        assert!(load.good > 0 && load.bad == 0, "{} connections, {} failed", load.good, load.bad);
    }
    wait_until("the load to end", BOUND, || {
        ensure!(slots.connected() == 0, "{} are connected", slots.connected());
        Ok(())
    })?;
    let before = slots.taken();
    busy[0].client.run(&Task::Hold { to: WEB.parse()?, times: 100 })?;
    let (connected, were_free) = (slots.connected(), slots.taken() - before);
    assert!(connected > were_free, "{connected} connections have slots, of which {were_free} were free");
    busy[0].client.run(&Task::Release)?;
    drop(attackers);
    wait_until("the counts to be right", BOUND, || {
        let counts = counts.read();
        ensure!(counts.iter().all(Vec::is_empty), "{counts:?}\n{}", agent.log());
        Ok(())
    })?;
    let repairs: Vec<Value> = agent.events()?.into_iter().filter(|event| event["kind"] == "repaired").collect();
    assert!(repairs.is_empty(), "{repairs:?}");
    Ok(())
}

/// Threat 17: a pod gives its own interface the address of a dead endpoint, and connects there.
#[test]
fn impersonated_endpoint_is_ejected_nevertheless() -> Result<()> {
    let bed = TestBed::new()?;
    let mut rule = eager(5);
    rule["outlierDetection"]["baseEjectionTime"] = json!("1ms");
    let directory = web(&bed, &rule)?;
    let objects = [plain(service("web", &["172.16.0.10"], 80)), plain(slice("web", 9080, &[("10.0.0.1", "near", "")]))];
    directory.write(
        "c1/all.yaml",
        &objects.into_iter().chain([destination_rule("web", &json!({"trafficPolicy": rule}))]).collect::<Vec<_>>(),
    )?;
    let agent = bed.agent(&directory, "c1", "near")?;
    let (mut attacker, mut victim) = (Pod::new(&bed, 1)?, Pod::new(&bed, 2)?);
    attacker.namespace.add_address("10.0.0.1/32")?;
    bed.serve_in(&attacker.namespace, "10.0.0.1:9080", "impersonated")?;
    assert_eq!(attacker.client.dial(WEB, 3)?.greetings(), ["impersonated"; 3]);
    let (all, to) = (attempts(20_000), WEB.parse()?);
    // A client's failures are forgotten after half a minute, so there are several rounds.
    let times = (all / 100).max(10_000);
    for round in 0..all.div_ceil(times) {
        // One failure less than the threshold, then all the successes, then the last failure.
        assert_eq!(victim.client.dial(WEB, 4)?.errnos(), [ECONNREFUSED; 4]);
        let reply = attacker.client.run(&Task::Repeat { to, times })?;
        assert_eq!(reply.good, u64::from(times), "{} failed, the last with errno {}", reply.bad, reply.value);
        assert_eq!(ejections_so_far(&agent)?, round, "ejected after four failures");
        assert_eq!(victim.client.dial(WEB, 1)?.errnos(), [ECONNREFUSED]);
        // The ejection itself may be over before it can be asked for.
        wait_until("one more ejection, and its end", BOUND, || {
            let ejections = ejections_so_far(&agent)?;
            ensure!(ejections == round + 1, "{ejections} ejections in round {round}\n{}", agent.log());
            let now = agent.get("ejections")?;
            ensure!(now["services"].as_array().is_none_or(Vec::is_empty), "{now}");
            Ok(())
        })?;
    }
    println!("{all} successes of the attacker between four failures and the fifth");
    Ok(())
}

/// A connect that another program denies takes no turn and no slot.
#[test]
fn denied_connects_take_no_turn() -> Result<()> {
    let bed = TestBed::new()?;
    let directory =
        web(&bed, &json!({"loadBalancer": {"simple": "ROUND_ROBIN", "localityLbSetting": {"enabled": false}}}))?;
    bed.serve("10.0.0.1:9080", "one")?;
    bed.serve("10.1.0.1:9080", "other")?;
    let _agent = bed.agent(&directory, "c1", "near")?;
    let slots = ConnectionSlots::open(bed.pins())?;
    let (mut denied, mut served) = (Pod::new(&bed, 1)?, Pod::new(&bed, 2)?);
    let _denying = ForeignProgram::attach(&denied.cgroup, Foreign::Deny)?;
    let mut seen = Vec::new();
    for _ in 0..6 {
        assert_eq!(denied.client.dial(WEB, 1)?.errnos(), [EPERM]);
        seen.push(served.client.dial(WEB, 1)?.greetings()[0].to_owned());
    }
    assert!(seen.windows(2).all(|pair| pair[0] != pair[1]), "{seen:?}");
    wait_all_free(&slots)
}

/// Failures of a service that no rule evaluates cost the agent nothing.
#[test]
fn failures_without_a_rule_are_counted_and_not_reported() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = web(&bed, &json!({}))?;
    let agent = bed.agent(&directory, "c1", "near")?;
    let mut client = bed.dialer()?;
    assert_eq!(client.dial(WEB, 500)?.errnos(), [ECONNREFUSED; 500]);
    let endpoints = agent.get("endpoints")?;
    let failed = |endpoint: &Value| endpoint["kernel"]["failures"].as_u64();
    let endpoints = endpoints["services"][0]["endpoints"].as_array().cloned().unwrap_or_default();
    assert_eq!(endpoints.iter().filter_map(failed).sum::<u64>(), 500, "{endpoints:?}");
    let failed = agent.events()?.iter().filter(|event| event["kind"] == "failed").count();
    assert_eq!(failed, 0);
    Ok(())
}

/// A pod that makes network namespaces has no more of the ring buffer than one that does not.
#[test]
fn namespaces_of_a_pod_share_its_budget_of_events() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = web(&bed, &eager(1_000_000))?;
    let agent = bed.agent(&directory, "c1", "near")?;
    let attacker = Pod::new(&bed, 1)?;
    let namespaces = (0..20).map(|_| Namespace::new(unique("own"))).collect::<Result<Vec<_>>>()?;
    agent.process.signal(rustix::process::Signal::STOP)?;
    let began = Instant::now();
    // Nothing listens in these namespaces, and the endpoint's address is their own.
    for namespace in &namespaces {
        namespace.add_address("10.0.0.1/32")?;
        namespace.add_address("10.1.0.1/32")?;
        let place = portolan_tests::ProcessContext { namespace: Some(namespace), cgroup: Some(&attacker.cgroup) };
        portolan_tests::Dialer::start(place)?.dial(WEB, 1_000)?;
    }
    agent.process.signal(rustix::process::Signal::CONT)?;
    // A quarter of the buffer is for all pods. Above that, the pod has 256 each second, in all its namespaces together.
    let most = 15_000 / 4 + 256 * (began.elapsed().as_secs() + 3);
    wait_until("the lost events", BOUND, || {
        let lost = metric(&agent, "portolan_events_lost_total")?;
        ensure!(lost >= 20_000 - most, "{lost} of 20,000, at most {most} were due");
        Ok(())
    })
}

/// Threat 11: the admin socket answers no other user, even if its mode has been changed.
#[test]
fn admin_socket_answers_no_other_user() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = web(&bed, &json!({}))?;
    let _agent = bed.agent(&directory, "c1", "near")?;
    let socket = bed.admin();
    let open = |path: &std::path::Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode));
    open(&socket, 0o666)?;
    socket.ancestors().skip(1).take_while(|folder| folder.starts_with(std::env::temp_dir())).try_for_each(
        |folder| {
            let mode = std::fs::metadata(folder)?.permissions().mode();
            open(folder, mode | 0o555)
        },
    )?;
    // The kernel keeps the user of each thread, which the library's functions hide.
    let ask = |uid: libc::uid_t| -> Result<String> {
        let socket = socket.clone();
        let asked = std::thread::spawn(move || -> Result<String> {
            // SAFETY: the system call takes no pointers.
            ensure!(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) } == 0, "cannot become user {uid}");
            let mut stream = UnixStream::connect(&socket)?;
            stream.set_read_timeout(Some(BOUND))?;
            // The agent may close the connection before it has read the request.
            let request = b"GET /v1/report HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
            let sent = stream.write_all(request);
            let mut answer = Vec::new();
            let read = stream.read_to_end(&mut answer);
            for error in [sent.err(), read.err()].into_iter().flatten() {
                ensure!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{error}");
            }
            Ok(String::from_utf8_lossy(&answer).into_owned())
        });
        asked.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?
    };
    let answer = ask(0)?;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(ask(65_534)?, "", "the connection is closed without an answer");
    Ok(())
}
