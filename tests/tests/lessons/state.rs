//! Lessons 13 to 20: state, restarts, choice.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use portolan_tests::{
    Agent, Bed, Directory, Held, Places,
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
fn lesson_13_nothing_is_taken_away_before_everything_has_been_read() -> Result<()> {
    let bed = Bed::new()?;
    let directory = two_pods(&bed)?;
    let mut agent = bed.agent(&directory, "c1", "n1")?;
    agent.process.kill();
    // The directory is one file away from being read: the agent starts, and does not get past opening it.
    let all = directory.path().join("c1/all.yaml");
    let held = Held::open(&all)?;
    let mut agent = bed.start(&directory, "c1", "n1")?;
    held.wait(BOUND)?;
    let mut client = bed.dialler()?;
    assert_eq!(client.dial("172.16.0.10:80", 4)?.errnos(), [0; 4], "what a former agent published stands");
    drop(held);
    agent.wait_ready()?;
    assert_eq!(client.dial("172.16.0.10:80", 4)?.errnos(), [0; 4]);
    // A file that cannot be read any more is a finding, and keeps what it held.
    wait_until("the agent to have read what is there", BOUND, || {
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
    // Once everything is known, what is gone is taken away.
    directory.remove("c1/all.yaml")?;
    directory.write("c1/all.yaml", &[node("n1", "r1")])?;
    wait_until("the service to go", BOUND, || {
        let errnos = client.dial("172.16.0.10:80", 1)?.errnos();
        ensure!(errnos == [ENETUNREACH], "{errnos:?}");
        Ok(())
    })
}

#[test]
fn lesson_14_what_the_watch_misses_is_found_by_looking_again() -> Result<()> {
    let bed = Bed::new()?;
    let directory = two_pods(&bed)?;
    let _agent = bed.agent_with(&directory, "c1", "n1", &["--rescan", "300ms"])?;
    let mut client = bed.dialler()?;
    assert_eq!(client.dial(WEB, 2)?.errnos(), [0; 2]);
    // The folder that is watched goes, and another one stands in its place: no event tells of what is in it.
    let other = Directory::new()?;
    write_pods(&other, &[2])?;
    fs::rename(directory.path(), directory.scratch("away"))?;
    fs::rename(other.path(), directory.path())?;
    wait_until("the endpoint to be gone", BOUND, || {
        let reply = client.dial(WEB, 4)?;
        ensure!(reply.count("pod2") == 4, "{reply:?}");
        Ok(())
    })
}

/// A load over a change, without a failed connection.
fn without_a_failure(bed: &Bed, what: &str, change: impl FnOnce() -> Result<()>) -> Result<()> {
    let load = Load::start(bed.place(), &storm_frontends(), u64::MAX, None)?;
    change()?;
    let summary = load.stop()?;
    ensure!(summary.bad == 0 && summary.misrouted == 0 && summary.good > 0, "{what}: {summary:?}");
    println!("{what}: {} connections, {:.0} per second", summary.good, summary.rate());
    Ok(())
}

#[test]
fn lesson_15_an_upgrade_and_a_downgrade_lose_nothing() -> Result<()> {
    let bed = Bed::new()?;
    let _servers = storm_servers(&bed)?;
    let directory = Directory::new()?;
    directory.write("c1/all.yaml", &storm_objects(&[0b1111]))?;
    let schema = |agent: &portolan_tests::Agent| -> Result<u64> { metric(agent, "portolan_schema") };
    let mut agent = bed.agent(&directory, "c1", "n1")?;
    let own = schema(&agent)?;
    let mut client = bed.dialler()?;
    let dialled = storm_frontends()[0];
    client.run(&Task::Hold { to: dialled, times: 1 })?;
    for (program, expected) in [("portolan-next", own + 1), ("portolan", own), ("portolan-next", own + 1)] {
        without_a_failure(&bed, program, || {
            agent.process.kill();
            agent = bed.agent_of(program, &directory, "c1", "n1", &[])?;
            ensure!(schema(&agent)? == expected);
            Ok(())
        })?;
        // What sockets remember belongs to them, whatever the version.
        assert_eq!(client.run(&Task::Held)?.seen[0].peer, Some(dialled), "{program}");
    }
    agent.process.kill();
    agent = bed.agent(&directory, "c1", "n1")?;
    // Of all that there was, one set of maps is left.
    let sets = fs::read_dir(bed.pins())?.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with('v'));
    assert_eq!(sets.count(), 1);
    drop(agent);
    Ok(())
}

/// Lets an agent go on until its step of that kind and number, and kills it just before. `false` where it has become ready before.
fn killed_before(kind: Step, number: u32, agent: &mut Agent, steps: &Steps) -> Result<bool> {
    let (mut taken, end) = (0, Instant::now() + BOUND * patience());
    while Instant::now() < end {
        let Some((step, id)) = steps.next(Duration::from_millis(100))? else {
            // It may come to its next step now, and then it waits for this test, and answers nobody.
            let answer = agent.http_within("/readyz", Duration::from_millis(200) * patience());
            if answer.is_ok_and(|(status, _)| status == 200) {
                return Ok(false);
            }
            ensure!(agent.process.child().try_wait()?.is_none(), "the agent has ended: {}", agent.log());
            continue;
        };
        taken += u32::from(step == kind);
        if taken == number {
            agent.process.kill();
            return Ok(true);
        }
        steps.go_on(id)?;
    }
    bail!("neither ready nor at its {number}. {kind:?}: {}", agent.log())
}

#[test]
fn lesson_15_killed_before_any_step_of_an_upgrade_nothing_is_lost() -> Result<()> {
    let bed = Bed::new()?;
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
    // Where every instruction is emulated, a start takes most of a minute beside a load: there, three kills in the midst of the exchange have to do,
    // with connections after each.
    let emulated = patience() > 1;
    let kinds = [Step::UpdateLink, Step::MakeMap, Step::LoadProgram, Step::Pin, Step::Files];
    let kinds = if emulated { &kinds[..1] } else { &kinds[..] };
    let mut client = bed.dialler()?;
    let to = storm_frontends()[0].to_string();
    let mut kill_all = || {
        for &kind in kinds {
            // Where every instruction is emulated, of the many steps that are alike some must do.
            let stride = if patience() > 1 { 4 } else { 1 };
            let mut kills = 0;
            for number in (1..).step_by(stride) {
                let (mut agent, steps) = bed.start_watched("portolan-next", &directory, "c1", "n1")?;
                let killed = killed_before(kind, number, &mut agent, &steps)?;
                agent.process.kill();
                kills += u32::from(killed);
                let whole = current()? != before && sets()? == 1;
                if kind == Step::UpdateLink && killed {
                    // All programs are of one set before the first of these steps, and of two before each of the others.
                    let state = doctor()?["state"].clone();
                    assert_eq!(state, if number == 1 { "ok" } else { "warning" }, "{:#}", doctor()?);
                }
                assert_eq!(client.dial(&to, 4)?.errnos(), [0; 4]);
                if kind == Step::UpdateLink || current()? != before {
                    // Back to where it was, whatever the other left.
                    bed.agent(&directory, "c1", "n1")?.process.kill();
                    assert_eq!((doctor()?["state"].as_str(), sets()?), (Some("ok"), 1), "{:#}", doctor()?);
                    before = current()?;
                }
                if !killed || whole {
                    break;
                }
            }
            println!("killed before {kind:?}: {kills} times");
            assert!(kills > 0, "never killed before {kind:?}");
            assert!(kind != Step::UpdateLink || kills == 9u32.div_ceil(stride as u32), "{kills} updates of links");
        }
        Ok(())
    };
    if emulated { kill_all() } else { without_a_failure(&bed, "killed before each step", kill_all) }
}

#[test]
fn lesson_15_conversations_find_their_way_after_an_upgrade() -> Result<()> {
    let bed = Bed::new()?;
    let directory = two_pods(&bed)?;
    bed.namespace.add_address("10.0.0.3/32")?;
    bed.serve_datagrams("10.0.0.3:5353", "names")?;
    let names = "172.16.0.54:53";
    directory.write(
        "c1/names.yaml",
        &[udp_service("names", &["172.16.0.54"], 53), udp_slice("names", 5353, &[("10.0.0.3", "n1", "")])],
    )?;
    let mut agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialler()?;
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
fn lesson_15_another_version_waits_until_it_knows_everything() -> Result<()> {
    let bed = Bed::new()?;
    let directory = two_pods(&bed)?;
    bed.agent(&directory, "c1", "n1")?.process.kill();
    let good = fs::read_to_string(directory.path().join("c1/all.yaml"))?;
    directory.write_text("c1/all.yaml", "kind: [")?;
    let mut agent = bed.start_of("portolan-next", &directory, "c1", "n1", &[])?;
    wait_until("the agent to say what it waits for", BOUND, || {
        let (status, why) = agent.http("/readyz")?;
        ensure!(status == 503 && why.contains("former version"), "{status} {why}");
        Ok(())
    })?;
    let mut client = bed.dialler()?;
    assert_eq!(client.dial(WEB, 4)?.count("pod1"), 2, "the former version's tables are in force");
    directory.write_text("c1/all.yaml", &good)?;
    agent.wait_ready()?;
    assert_eq!(client.dial(WEB, 4)?.count("pod1"), 2);
    Ok(())
}

/// Connections of a storm; as many as `PORTOLAN_STORM_CONNECTIONS` says.
fn connections() -> u64 {
    std::env::var("PORTOLAN_STORM_CONNECTIONS").ok().and_then(|count| count.parse().ok()).unwrap_or(100_000)
}

#[test]
fn lesson_16_in_a_storm_of_changes_nobody_is_misled() -> Result<()> {
    let bed = Bed::new()?;
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
    let places = Places::open(bed.pins())?;
    let before = (entries()?, descriptors()?, 0);
    let count = connections();
    let mut load = Load::start(bed.place(), &storm_frontends(), count, None)?;
    let (mut changes, began) = (0u64, Instant::now());
    // Each service always has somebody, and ids go from one service's endpoints to another's.
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
    assert!(metrics.contains("\nportolan_inconsistent_total 0\n"), "{metrics}");
    let published = agent.events()?.into_iter().filter(|event| event["kind"] == "published").count();
    // How many there are is up to the machine; that there are some while connections run is what counts.
    assert!(published >= 3, "{published} publications");
    // As it was at the start.
    directory.write("c1/all.yaml", &storm_objects(&[0b1111]))?;
    wait_until("the maps to hold what they held", BOUND, || {
        let after = (entries()?, descriptors()?, places.taken());
        // While an agent looks at sockets it holds their namespaces, as it does when it begins.
        let no_more = after.1 <= before.1;
        ensure!((&after.0, after.2) == (&before.0, before.2) && no_more, "{after:?}, before {before:?}");
        Ok(())
    })
}

#[test]
fn lesson_17_what_was_known_stays_when_the_source_is_lost() -> Result<()> {
    let bed = Bed::new()?;
    let directory = two_pods(&bed)?;
    let agent = bed.agent_with(&directory, "c1", "n1", &["--rescan", "200ms"])?;
    let mut client = bed.dialler()?;
    fs::rename(directory.path(), directory.scratch("away"))?;
    wait_until("the finding", BOUND, || {
        let findings = agent.get("services")?["findings"].to_string();
        ensure!(findings.contains("PTL0001"), "{findings}");
        Ok(())
    })?;
    assert_eq!(client.dial(WEB, 4)?.count("pod1"), 2);
    fs::rename(directory.scratch("away"), directory.path())?;
    write_pods(&directory, &[2])?;
    wait_until("it to go on", BOUND, || {
        ensure!(client.dial(WEB, 2)?.count("pod2") == 2);
        Ok(())
    })
}

#[test]
fn lesson_18_odd_objects_are_named_and_the_rest_goes_on() -> Result<()> {
    let bed = Bed::new()?;
    let directory = two_pods(&bed)?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialler()?;
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
    wait_until("changes to be followed", BOUND, || {
        ensure!(client.dial(WEB, 2)?.count("pod1") == 2);
        Ok(())
    })
}

#[test]
fn lesson_19_hundreds_of_entries_and_thousands_of_services_are_no_matter() -> Result<()> {
    let bed = Bed::new()?;
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
    // The sizes are settings: there is no room for all of them at first.
    let mut agent = bed.start_with(&directory, "c1", "n1", &["--max-frontends", "2000"])?;
    wait_until("the finding", BOUND * 2, || {
        let findings = agent.get("services")?["findings"].to_string();
        ensure!(findings.contains("FRONTENDS (2000 entries) has no room"), "{}", findings.len());
        Ok(())
    })?;
    agent.process.kill();
    let agent = bed.agent_with(&directory, "c1", "n1", &["--max-frontends", "3000"])?;
    assert!(metric(&agent, "portolan_map_entries{map=\"frontends\"}")? >= u64::from(services + entries));
    let mut client = bed.dialler()?;
    for i in (0..services).step_by(397) {
        assert_eq!(client.dial(&format!("172.20.{}.{}:80", i / 250, i % 250), 1)?.greetings(), ["pod1"]);
    }
    for i in (0..entries).step_by(97) {
        assert_eq!(client.dial(&format!("172.21.{}.{}:80", i / 250, i % 250), 1)?.greetings(), ["pod2"]);
    }
    Ok(())
}

#[test]
fn lesson_20_what_is_strict_refuses_and_falls_through_to_nobody() -> Result<()> {
    let bed = Bed::new()?;
    let directory = Directory::new()?;
    // An endpoint in another cluster, and the service kept in its own: strict.
    bed.namespace.add_address("10.1.0.1/32")?;
    bed.serve("10.1.0.1:9080", "elsewhere")?;
    directory.write("c1/all.yaml", &[node("n1", "r1"), service("web", &["172.16.0.10"], 80)])?;
    directory.write(
        "c2/all.yaml",
        &[node("n2", "r1"), service("web", &["172.17.0.10"], 80), slice("web", 9080, &[("10.1.0.1", "n2", "")])],
    )?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialler()?;
    assert_eq!(client.dial("172.16.0.10:80", 2)?.greetings(), ["elsewhere"; 2], "services merge across clusters");

    let keep =
        json!({"serviceSettings": [{"settings": {"clusterLocal": true}, "hosts": ["web.default.svc.cluster.local"]}]});
    directory.write("mesh.yaml", &[portolan_tests::objects::mesh_config(&keep)])?;
    wait_until("the service to be kept", Duration::from_secs(10), || {
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
