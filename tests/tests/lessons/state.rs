//! Lessons 13 to 20: state, restarts, endpoint selection.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use portolan_tests::{
    Agent, BlockedFile, ConnectionSlots, Directory, TestBed,
    dial::{Sender, Task},
    objects::{node, service, slice, udp_service, udp_slice},
    patience,
    steps::{Step, Steps},
    storm::Load,
    wait_until,
};
use serde_json::{Value, json};

use crate::world::{
    BOUND, DNS, EHOSTUNREACH, ENETUNREACH, WEB, metric, send, storm_frontends, storm_objects, storm_servers, two_pods,
    write_pods,
};

#[test]
fn lesson_13_nothing_is_removed_before_the_initial_sync() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = two_pods(&bed)?;
    let mut agent = bed.agent(&directory, "c1", "n1")?;
    agent.process.kill();
    // The agent starts, but blocks while it opens the only file.
    let all = directory.path().join("c1/all.yaml");
    let blocked = BlockedFile::open(&all)?;
    let mut agent = bed.start(&directory, "c1", "n1")?;
    blocked.wait(BOUND)?;
    let mut client = bed.dialer()?;
    assert_eq!(client.dial("172.16.0.10:80", 4)?.errnos(), [0; 4], "frontends of the previous agent stay in effect");
    drop(blocked);
    agent.wait_ready()?;
    assert_eq!(client.dial("172.16.0.10:80", 4)?.errnos(), [0; 4]);
    // A file that becomes unreadable causes a finding, and its last known objects stay in effect.
    wait_until("the agent to have read the directory", BOUND, || {
        ensure!(directory.plan("c1", "n1", &[])?.0["config"] == agent.get("services")?["config"]);
        Ok(())
    })?;
    let link = directory.path().join("c1/.link");
    std::os::unix::fs::symlink("/proc/self/mem", &link)?;
    fs::rename(&link, &all)?;
    wait_until("the finding", BOUND, || {
        let findings = agent.get("services")?["findings"].to_string();
        ensure!(findings.contains("c1/all.yaml") && findings.contains("cannot be read"), "{findings}");
        Ok(())
    })?;
    assert_eq!(client.dial("172.16.0.10:80", 4)?.errnos(), [0; 4]);
    // Once everything has been read, objects that are gone are removed.
    directory.remove("c1/all.yaml")?;
    directory.write("c1/all.yaml", &[node("n1", "r1")])?;
    wait_until("the service to be removed", BOUND, || {
        let errnos = client.dial("172.16.0.10:80", 1)?.errnos();
        ensure!(errnos == [ENETUNREACH], "{errnos:?}");
        Ok(())
    })
}

#[test]
fn lesson_14_rescan_finds_changes_that_the_watch_misses() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = two_pods(&bed)?;
    let _agent = bed.agent_with(&directory, "c1", "n1", &["--rescan", "300ms"])?;
    let mut client = bed.dialer()?;
    assert_eq!(client.dial(WEB, 2)?.errnos(), [0; 2]);
    // The watched directory is replaced by another one, whose contents cause no inotify events.
    let other = Directory::new()?;
    write_pods(&other, &[2])?;
    fs::rename(directory.path(), directory.scratch("away"))?;
    fs::rename(other.path(), directory.path())?;
    wait_until("the endpoint to be removed", BOUND, || {
        let reply = client.dial(WEB, 4)?;
        ensure!(reply.count("pod2") == 4, "{reply:?}");
        Ok(())
    })
}

/// Runs `change` under load and checks that no connection fails or is misrouted.
fn assert_no_failures_during(bed: &TestBed, what: &str, change: impl FnOnce() -> Result<()>) -> Result<()> {
    let load = Load::start(bed.place(), &storm_frontends(), u64::MAX, None)?;
    change()?;
    let summary = load.stop()?;
    ensure!(summary.bad == 0 && summary.misrouted == 0 && summary.good > 0, "{what}: {summary:?}");
    println!("{what}: {} connections, {:.0} per second", summary.good, summary.rate());
    Ok(())
}

#[test]
fn lesson_15_upgrade_and_downgrade_lose_no_connections() -> Result<()> {
    let bed = TestBed::new()?;
    let _servers = storm_servers(&bed)?;
    let directory = Directory::new()?;
    directory.write("c1/all.yaml", &storm_objects(&[0b1111]))?;
    let schema = |agent: &portolan_tests::Agent| -> Result<u64> { metric(agent, "portolan_schema") };
    let mut agent = bed.agent(&directory, "c1", "n1")?;
    let own = schema(&agent)?;
    let mut client = bed.dialer()?;
    let frontend = storm_frontends()[0];
    client.run(&Task::Hold { to: frontend, times: 1 })?;
    for (program, expected) in [("portolan-next", own + 1), ("portolan", own), ("portolan-next", own + 1)] {
        assert_no_failures_during(&bed, program, || {
            agent.process.kill();
            agent = bed.agent_of(program, &directory, "c1", "n1", &[])?;
            ensure!(schema(&agent)? == expected);
            Ok(())
        })?;
        // Socket state survives, whatever the version.
        assert_eq!(client.run(&Task::Held)?.seen[0].peer, Some(frontend), "{program}");
    }
    agent.process.kill();
    agent = bed.agent(&directory, "c1", "n1")?;
    // Only one map set remains.
    let sets = fs::read_dir(bed.pins())?.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with('v'));
    assert_eq!(sets.count(), 1);
    drop(agent);
    Ok(())
}

/// Resumes an agent until its `number`-th step of this kind, and kills it just before that step.
/// Returns `false` if it becomes ready earlier.
fn kill_before(kind: Step, number: u32, agent: &mut Agent, steps: &Steps) -> Result<bool> {
    let (mut taken, end) = (0, Instant::now() + BOUND * patience());
    while Instant::now() < end {
        let Some((step, id)) = steps.next(Duration::from_millis(100))? else {
            // The agent may reach its next step now: it then waits for this test and does not respond.
            let answer = agent.http_within("/readyz", Duration::from_millis(200) * patience());
            if answer.is_ok_and(|(status, _)| status == 200) {
                return Ok(false);
            }
            ensure!(agent.process.child().try_wait()?.is_none(), "the agent exited: {}", agent.log());
            continue;
        };
        taken += u32::from(step == kind);
        if taken == number {
            agent.process.kill();
            return Ok(true);
        }
        steps.go_on(id)?;
    }
    bail!("neither ready nor at {kind:?} number {number}: {}", agent.log())
}

#[test]
fn lesson_15_kill_before_any_upgrade_step_loses_no_connections() -> Result<()> {
    let bed = TestBed::new()?;
    let _servers = storm_servers(&bed)?;
    let directory = Directory::new()?;
    directory.write("c1/all.yaml", &storm_objects(&[0b1111]))?;
    let current = || -> Result<String> { Ok(fs::read_link(bed.pins().join("current"))?.display().to_string()) };
    let sets = || -> Result<usize> {
        let names = fs::read_dir(bed.pins())?.flatten().map(|entry| entry.file_name());
        Ok(names.filter(|name| name.to_string_lossy().starts_with('v')).count())
    };
    let doctor = || -> Result<Value> {
        let (pins, cgroup) = (bed.pins().display().to_string(), bed.cgroup.path().display().to_string());
        let output = bed.portolan(&["doctor", "-o", "json", "--bpffs", &pins, "--cgroup", &cgroup])?;
        let checks: Value = serde_json::from_slice(&output.stdout)?;
        Ok(checks["checks"].as_array().into_iter().flatten().find(|it| it["check"] == "programs").cloned().into())
    };
    bed.agent(&directory, "c1", "n1")?.process.kill();
    assert_eq!(doctor()?["state"], "ok");
    let mut before = current()?;
    // Under emulation, a start takes most of a minute beside a load.
    // There, three kills during the exchange of programs suffice, each followed by connections.
    let emulated = patience() > 1;
    let kinds = [Step::UpdateLink, Step::MakeMap, Step::LoadProgram, Step::Pin, Step::Files];
    let kinds = if emulated { &kinds[..1] } else { &kinds[..] };
    let mut client = bed.dialer()?;
    let to = storm_frontends()[0].to_string();
    let mut kill_all = || {
        for &kind in kinds {
            // Under emulation, a sample of the many similar steps suffices.
            let stride = if patience() > 1 { 4 } else { 1 };
            let mut kills = 0;
            for number in (1..).step_by(stride) {
                let (mut agent, steps) = bed.start_watched("portolan-next", &directory, "c1", "n1")?;
                let killed = kill_before(kind, number, &mut agent, &steps)?;
                agent.process.kill();
                kills += u32::from(killed);
                let complete = current()? != before && sets()? == 1;
                if kind == Step::UpdateLink && killed {
                    // Before the first of these steps all programs use one map set; before each of the others, they use
                    // two.
                    let state = doctor()?["state"].clone();
                    assert_eq!(state, if number == 1 { "ok" } else { "warning" }, "{:#}", doctor()?);
                }
                assert_eq!(client.dial(&to, 4)?.errnos(), [0; 4]);
                if kind == Step::UpdateLink || current()? != before {
                    // Roll back, whatever state the killed agent left.
                    bed.agent(&directory, "c1", "n1")?.process.kill();
                    assert_eq!((doctor()?["state"].as_str(), sets()?), (Some("ok"), 1), "{:#}", doctor()?);
                    before = current()?;
                }
                if !killed || complete {
                    break;
                }
            }
            println!("killed before {kind:?}: {kills} times");
            assert!(kills > 0, "never killed before {kind:?}");
            assert!(kind != Step::UpdateLink || kills == 10u32.div_ceil(stride as u32), "{kills} link updates");
        }
        Ok(())
    };
    if emulated { kill_all() } else { assert_no_failures_during(&bed, "killed before each step", kill_all) }
}

#[test]
fn lesson_15_udp_flows_continue_after_an_upgrade() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = two_pods(&bed)?;
    bed.namespace.add_address("10.0.0.3/32")?;
    bed.serve_datagrams("10.0.0.3:5353", "names")?;
    let names = "172.16.0.54:53";
    directory.write(
        "c1/names.yaml",
        &[udp_service("names", &["172.16.0.54"], 53), udp_slice("names", 5353, &[("10.0.0.3", "n1", "")])],
    )?;
    let mut agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    for program in ["portolan-next", "portolan"] {
        for round in 0..3 {
            for (to, greeting) in [(DNS, "pod"), (names, "names")] {
                let reply = send(&mut client, to, 1, Sender::Kept)?;
                let seen = &reply.seen[0];
                assert!(seen.greeting.starts_with(greeting), "{program} {round}: {seen:?}");
                assert_eq!(seen.peer, Some(to.parse()?), "{program} {round}");
            }
        }
        agent.process.kill();
        agent = bed.agent_of(program, &directory, "c1", "n1", &[])?;
    }
    Ok(())
}

#[test]
fn lesson_15_new_version_waits_for_a_complete_table() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = two_pods(&bed)?;
    bed.agent(&directory, "c1", "n1")?.process.kill();
    let good = fs::read_to_string(directory.path().join("c1/all.yaml"))?;
    directory.write_text("c1/all.yaml", "kind: [")?;
    let mut agent = bed.start_of("portolan-next", &directory, "c1", "n1", &[])?;
    wait_until("the agent to report what it waits for", BOUND, || {
        let (status, why) = agent.http("/readyz")?;
        ensure!(status == 503 && why.contains("previous version"), "{status} {why}");
        Ok(())
    })?;
    let mut client = bed.dialer()?;
    assert_eq!(client.dial(WEB, 4)?.count("pod1"), 2, "the previous version's tables stay in effect");
    directory.write_text("c1/all.yaml", &good)?;
    agent.wait_ready()?;
    assert_eq!(client.dial(WEB, 4)?.count("pod1"), 2);
    Ok(())
}

/// Returns the number of connections in a storm, which `PORTOLAN_STORM_CONNECTIONS` overrides.
fn connections() -> u64 {
    std::env::var("PORTOLAN_STORM_CONNECTIONS").ok().and_then(|count| count.parse().ok()).unwrap_or(100_000)
}

#[test]
fn lesson_16_update_storm_misroutes_no_connections() -> Result<()> {
    let bed = TestBed::new()?;
    let _servers = storm_servers(&bed)?;
    let directory = Directory::new()?;
    directory.write("c1/all.yaml", &storm_objects(&[0b1111]))?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let descriptors = || -> Result<usize> { Ok(fs::read_dir(format!("/proc/{}/fd", agent.process.id()))?.count()) };
    let entries = || -> Result<Vec<u64>> {
        ["frontends", "versions", "backends", "slots", "runs"]
            .map(|map| metric(&agent, &format!("portolan_map_entries{{map=\"{map}\"}}")))
            .into_iter()
            .collect()
    };
    let places = ConnectionSlots::open(bed.pins())?;
    let before = (entries()?, descriptors()?, 0);
    let count = connections();
    let mut load = Load::start(bed.place(), &storm_frontends(), count, None)?;
    let (mut changes, began) = (0u64, Instant::now());
    // Each service always has an endpoint, and IDs move between the endpoints of different services.
    let masks = [0b0011, 0b1100, 0b0101, 0b1010, 0b0001, 0b1000, 0b1111, 0b0110];
    while !load.has_ended()? {
        changes += 1;
        let turned: Vec<u8> = (0..masks.len()).map(|i| masks[(i + changes as usize) % masks.len()]).collect();
        directory.write("c1/all.yaml", &storm_objects(&turned))?;
        let next = began + Duration::from_millis(10) * u32::try_from(changes)?;
        while Instant::now() < next {
            std::thread::park_timeout(next.saturating_duration_since(Instant::now()));
        }
    }
    let summary = load.stop()?;
    println!("{changes} changes, {} connections, {:.0} per second", summary.good, summary.rate());
    assert_eq!((summary.good, summary.bad, summary.misrouted), (count, 0, 0), "{summary:?}");
    let metrics = agent.http("/metrics")?.1;
    assert!(metrics.contains("\nportolan_lookup_inconsistencies_total 0\n"), "{metrics}");
    let published = agent.events()?.into_iter().filter(|event| event["kind"] == "published").count();
    // The number of publications depends on the machine. Several must happen while connections run.
    assert!(published >= 3, "{published} publications");
    // Restore the initial state.
    directory.write("c1/all.yaml", &storm_objects(&[0b1111]))?;
    wait_until("the maps to return to their initial contents", BOUND, || {
        let after = (entries()?, descriptors()?, places.taken());
        // During a sweep over sockets, the agent holds their network namespaces open, as it does at startup.
        let no_more = after.1 <= before.1;
        ensure!((&after.0, after.2) == (&before.0, before.2) && no_more, "{after:?}, before {before:?}");
        Ok(())
    })
}

#[test]
fn lesson_17_last_known_state_survives_loss_of_the_source() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = two_pods(&bed)?;
    let agent = bed.agent_with(&directory, "c1", "n1", &["--rescan", "200ms"])?;
    let mut client = bed.dialer()?;
    fs::rename(directory.path(), directory.scratch("away"))?;
    wait_until("the finding", BOUND, || {
        let findings = agent.get("services")?["findings"].to_string();
        ensure!(findings.contains("PTL0001"), "{findings}");
        Ok(())
    })?;
    assert_eq!(client.dial(WEB, 4)?.count("pod1"), 2);
    fs::rename(directory.scratch("away"), directory.path())?;
    write_pods(&directory, &[2])?;
    wait_until("new changes to take effect", BOUND, || {
        ensure!(client.dial(WEB, 2)?.count("pod2") == 2);
        Ok(())
    })
}

#[test]
fn lesson_18_invalid_objects_are_reported_and_the_rest_works() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = two_pods(&bed)?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    let odd: [(&str, &str, Value); 5] = [
        ("a-number", "Service default/a-number", json!({"kind": "Service", "spec": 7})),
        (
            "ports",
            "Service default/ports",
            json!({"kind": "Service", "spec": {"clusterIP": "172.16.0.90", "ports": [{"port": 70_000}]}}),
        ),
        (
            "address",
            "Service default/address",
            json!({"kind": "Service", "spec": {"clusterIP": "not an address", "ports": [{"port": 80}]}}),
        ),
        (
            "deep",
            "DestinationRule default/deep",
            json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "spec": {"host": "web", "trafficPolicy": {"outlierDetection": {"interval": "-5s"}}}}),
        ),
        (
            "nothing",
            "ServiceEntry default/nothing",
            json!({"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "spec": {"hosts": []}}),
        ),
    ];
    for (name, _, object) in &odd {
        let mut object = object.clone();
        object["metadata"] = json!({"name": name, "namespace": "default"});
        if object["apiVersion"].is_null() {
            object["apiVersion"] = json!("v1");
        }
        directory.write(&format!("c1/{name}.yaml"), &[object])?;
    }
    for (name, object, _) in &odd {
        wait_until(&format!("a finding about {name}"), BOUND, || {
            let report = agent.get("services")?;
            let named = report["findings"].as_array().into_iter().flatten().any(|finding| finding["object"] == *object);
            ensure!(named, "{:#}", report["findings"]);
            Ok(())
        })?;
    }
    assert_eq!(client.dial(WEB, 4)?.count("pod1"), 2);
    write_pods(&directory, &[1])?;
    wait_until("changes to take effect", BOUND, || {
        ensure!(client.dial(WEB, 2)?.count("pod1") == 2);
        Ok(())
    })
}

#[test]
fn lesson_19_thousands_of_services_and_hundreds_of_entries_work() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = two_pods(&bed)?;
    let (services, entries) = (2_000u32, 300u32);
    let mut objects = Vec::new();
    for i in 0..services {
        let (name, address) = (format!("s{i}"), format!("172.20.{}.{}", i / 250, i % 250));
        objects.push(service(&name, &[&address], 80));
        objects.push(slice(&name, 9080, &[("10.0.0.1", "n1", "")]));
    }
    for i in 0..entries {
        objects.push(json!({
            "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
            "metadata": {"name": format!("e{i}"), "namespace": "default"},
            "spec": {
                "hosts": [format!("e{i}.example")], "addresses": [format!("172.21.{}.{}", i / 250, i % 250)],
                "resolution": "STATIC", "location": "MESH_INTERNAL", "ports": [{"number": 80, "name": "http", "protocol": "TCP", "targetPort": 9080}],
                "endpoints": [{"address": "10.0.0.2"}],
            },
        }));
    }
    directory.write("c1/many.yaml", &objects)?;
    // Map sizes are configurable: at first, not all frontends fit.
    let mut agent = bed.start_with(&directory, "c1", "n1", &["--max-frontends", "2000"])?;
    wait_until("the finding", BOUND * 2, || {
        let findings = agent.get("services")?["findings"].to_string();
        ensure!(findings.contains("FRONTENDS (2000 entries) has no room"), "{}", findings.len());
        Ok(())
    })?;
    agent.process.kill();
    let agent = bed.agent_with(&directory, "c1", "n1", &["--max-frontends", "3000"])?;
    assert!(metric(&agent, "portolan_map_entries{map=\"frontends\"}")? >= u64::from(services + entries));
    let mut client = bed.dialer()?;
    for i in (0..services).step_by(397) {
        assert_eq!(client.dial(&format!("172.20.{}.{}:80", i / 250, i % 250), 1)?.greetings(), ["pod1"]);
    }
    for i in (0..entries).step_by(97) {
        assert_eq!(client.dial(&format!("172.21.{}.{}:80", i / 250, i % 250), 1)?.greetings(), ["pod2"]);
    }
    Ok(())
}

#[test]
fn lesson_20_strict_cluster_local_service_refuses_without_fallback() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = Directory::new()?;
    // The only endpoint is in another cluster, and the service is made strictly cluster-local.
    bed.namespace.add_address("10.1.0.1/32")?;
    bed.serve("10.1.0.1:9080", "elsewhere")?;
    directory.write("c1/all.yaml", &[node("n1", "r1"), service("web", &["172.16.0.10"], 80)])?;
    directory.write(
        "c2/all.yaml",
        &[node("n2", "r1"), service("web", &["172.17.0.10"], 80), slice("web", 9080, &[("10.1.0.1", "n2", "")])],
    )?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    assert_eq!(client.dial("172.16.0.10:80", 2)?.greetings(), ["elsewhere"; 2], "services merge across clusters");

    let keep =
        json!({"serviceSettings": [{"settings": {"clusterLocal": true}, "hosts": ["web.default.svc.cluster.local"]}]});
    directory.write("mesh.yaml", &[portolan_tests::objects::mesh_config(&keep)])?;
    wait_until("the service to be cluster-local", Duration::from_secs(10), || {
        let local = agent.get("services")?["services"][0]["clusterLocal"] == json!(true);
        ensure!(local, "not yet");
        Ok(())
    })?;
    for nonblocking in [false, true] {
        let task = Task::Dial { to: "172.16.0.10:80".parse()?, times: 3, mapped: false, nonblocking, send: 0 };
        assert_eq!(client.run(&task)?.errnos(), [EHOSTUNREACH; 3], "nonblocking {nonblocking}");
        let task = Task::Dial { to: "172.16.0.10:80".parse()?, times: 1, mapped: true, nonblocking, send: 0 };
        assert_eq!(client.run(&task)?.errnos(), [EHOSTUNREACH]);
    }
    let services = agent.get("services")?;
    assert_eq!(services["services"][0]["kernel"]["refused"], json!(8));
    Ok(())
}
