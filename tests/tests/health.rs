//! Endpoint health on a node: ejection by single pods, persistence across restarts, and operator overrides.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{
    io::Read as _,
    net::{SocketAddr, TcpListener},
    process::{Command, Output},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use portolan_tests::{
    Agent, Dialer, Directory, Namespace, Pod, ProcessContext, Server, TestBed, binary,
    dial::Task,
    objects::{destination_rule, node, plain, service, slice},
    unique, wait_until,
};
use rustix::process::Signal;
use serde_json::{Value, json};

const WEB: &str = "172.16.0.10:80";
const ECONNREFUSED: i32 = 111;
const BOUND: Duration = Duration::from_secs(30);

/// Writes a service `web` with one near and one far endpoint, both of which serve, and this `outlierDetection`.
/// Returns the server of the near endpoint as well.
fn near_and_far(bed: &TestBed, outlier: &Value, annotations: &Value) -> Result<(Directory, Server)> {
    let directory = Directory::new()?;
    for address in ["10.0.0.1/32", "10.1.0.1/32"] {
        bed.namespace.add_address(address)?;
    }
    bed.serve("10.1.0.1:9080", "far")?;
    let near = bed.serve_until("10.0.0.1:9080", "near")?;
    let mut rule = destination_rule("web", &json!({"trafficPolicy": {"outlierDetection": outlier}}));
    rule["metadata"]["annotations"] = annotations.clone();
    directory.write(
        "c1/all.yaml",
        &[
            node("near", "r1/z1"),
            node("far", "r2/z1"),
            plain(service("web", &["172.16.0.10"], 80)),
            plain(slice("web", 9080, &[("10.0.0.1", "near", ""), ("10.1.0.1", "far", "")])),
            rule,
        ],
    )?;
    Ok((directory, near))
}

fn eager() -> Value {
    json!({"consecutive5xxErrors": 2, "interval": "1s", "baseEjectionTime": "2m", "maxEjectionPercent": 100})
}

fn none() -> Value {
    json!({})
}

fn ejected(agent: &Agent) -> Result<Vec<String>> {
    let report = agent.get("ejections")?;
    let services = report["services"].as_array().cloned().unwrap_or_default();
    let endpoints = services.iter().flat_map(|service| service["endpoints"].as_array().cloned().unwrap_or_default());
    Ok(endpoints.map(|endpoint| endpoint["address"].as_str().unwrap_or_default().to_owned()).collect())
}

fn wait_ejected(agent: &Agent, expected: &[&str]) -> Result<()> {
    wait_until(&format!("{expected:?} to be ejected"), BOUND, || {
        let ejected = ejected(agent)?;
        ensure!(ejected == expected, "{ejected:?}");
        Ok(())
    })
}

/// Threat 1 of the threat model: a pod makes its own connections fail to have a healthy endpoint ejected for the whole
/// node.
#[test]
fn single_pod_cannot_eject_an_endpoint_for_others() -> Result<()> {
    let bed = TestBed::new()?;
    let (directory, _near) = near_and_far(&bed, &eager(), &none())?;
    let agent = bed.agent(&directory, "c1", "near")?;
    let (mut bad, mut good) = (Pod::new(&bed, 1)?, Pod::new(&bed, 2)?);
    assert_eq!(good.client.dial(WEB, 3)?.greetings(), ["near"; 3]);
    bad.rejects("10.0.0.1")?;
    assert_eq!(bad.client.dial(WEB, 9)?.errnos(), [ECONNREFUSED; 9]);
    // A finding names the pod.
    wait_until("the finding", BOUND, || {
        let found = agent.findings("PTL0100")?;
        ensure!(
            found.iter().any(|found| found.contains("10.0.0.1:9080") && found.contains("(dial) in cgroup")),
            "{found:?}"
        );
        Ok(())
    })?;
    assert_eq!(ejected(&agent)?, Vec::<String>::new());
    assert_eq!(good.client.dial(WEB, 10)?.greetings(), ["near"; 10], "the shares of other pods are unchanged");
    assert!(agent.http("/metrics")?.1.contains("portolan_ejections_unconfirmed_total{"));

    // Failures from a second pod confirm the ejection.
    good.rejects("10.0.0.1")?;
    assert_eq!(bad.client.dial(WEB, 1)?.errnos(), [ECONNREFUSED]);
    assert_eq!(good.client.dial(WEB, 1)?.errnos(), [ECONNREFUSED]);
    wait_ejected(&agent, &["10.0.0.1:9080"])?;
    Ok(())
}

/// The same with network namespaces that the pod makes: some use the endpoint's address, so that no other pod seems
/// to, and connects fail in others.
#[test]
fn network_namespaces_of_a_single_pod_cannot_eject_an_endpoint_for_others() -> Result<()> {
    let bed = TestBed::new()?;
    let (directory, _near) = near_and_far(&bed, &eager(), &none())?;
    let agent = bed.agent(&directory, "c1", "near")?;
    let (bad, mut good) = (Pod::new(&bed, 1)?, Pod::new(&bed, 2)?);
    assert_eq!(good.client.dial(WEB, 3)?.greetings(), ["near"; 3]);
    let own = (0..4).map(|_| Namespace::new(unique("own"))).collect::<Result<Vec<_>>>()?;
    for (i, namespace) in own.iter().enumerate() {
        namespace.add_address("10.0.0.1/32")?;
        if i < 2 {
            bed.serve_in(namespace, "10.0.0.1:9080", "own")?;
        }
        let mut client = Dialer::start(ProcessContext { namespace: Some(namespace), cgroup: Some(&bad.cgroup) })?;
        let expected = if i < 2 { 0 } else { ECONNREFUSED };
        assert_eq!(client.dial(WEB, 5)?.errnos(), [expected; 5]);
    }
    wait_until("the finding", BOUND, || {
        let found = agent.findings("PTL0100")?;
        ensure!(found.iter().any(|found| found.contains("10.0.0.1:9080")), "{found:?}");
        Ok(())
    })?;
    assert_eq!(ejected(&agent)?, Vec::<String>::new());
    assert_eq!(good.client.dial(WEB, 10)?.greetings(), ["near"; 10]);
    Ok(())
}

#[test]
fn agent_connection_confirms_failures_seen_by_a_single_pod() -> Result<()> {
    let bed = TestBed::new()?;
    let (directory, near) = near_and_far(&bed, &eager(), &none())?;
    let agent = bed.agent(&directory, "c1", "near")?;
    let (mut one, mut other) = (Pod::new(&bed, 1)?, Pod::new(&bed, 2)?);
    assert_eq!(other.client.dial(WEB, 3)?.greetings(), ["near"; 3]);
    near.stop()?;
    assert_eq!(one.client.dial(WEB, 2)?.errnos(), [ECONNREFUSED; 2]);
    wait_ejected(&agent, &["10.0.0.1:9080"])?;
    assert_eq!(other.client.dial(WEB, 5)?.greetings(), ["far"; 5]);
    let report = agent.get("ejections")?;
    let why = report["services"][0]["endpoints"][0]["ejectedBy"].as_str().unwrap_or_default().to_owned();
    assert_eq!(why, "consecutive5xxErrors (2 consecutive failures)");
    let events = agent.events()?;
    let event = events.iter().find(|event| event["kind"] == "ejected").unwrap();
    assert_eq!((&event["cause"]["failures"], &event["out"]), (&json!(2), &json!([1, 2])));
    Ok(())
}

#[test]
fn ejection_needs_no_confirmation_if_only_one_pod_uses_the_endpoint() -> Result<()> {
    let bed = TestBed::new()?;
    let (directory, _near) = near_and_far(&bed, &eager(), &none())?;
    let agent = bed.agent(&directory, "c1", "near")?;
    let mut only = Pod::new(&bed, 1)?;
    only.rejects("10.0.0.1")?;
    assert_eq!(only.client.dial(WEB, 2)?.errnos(), [ECONNREFUSED; 2]);
    wait_ejected(&agent, &["10.0.0.1:9080"])?;
    assert_eq!(only.client.dial(WEB, 2)?.greetings(), ["far"; 2]);
    Ok(())
}

#[test]
fn ejections_survive_restart_and_upgrade() -> Result<()> {
    let bed = TestBed::new()?;
    let (directory, near) = near_and_far(&bed, &eager(), &none())?;
    let mut agent = bed.agent(&directory, "c1", "near")?;
    let mut client = bed.dialer()?;
    near.stop()?;
    assert_eq!(client.dial(WEB, 2)?.errnos(), [ECONNREFUSED; 2]);
    wait_ejected(&agent, &["10.0.0.1:9080"])?;
    let until = agent.get("ejections")?["services"][0]["endpoints"][0]["ejectedUntil"].clone();
    for program in ["portolan", "portolan-next"] {
        wait_until("the ejection to be persisted", BOUND, || {
            let state = std::fs::read_to_string(bed.state())?;
            ensure!(state.contains("10.0.0.1:9080"), "{state}");
            Ok(())
        })?;
        agent.process.kill();
        assert_eq!(client.dial(WEB, 4)?.greetings(), ["far"; 4], "while the agent is away");
        agent = bed.agent_of(program, &directory, "c1", "near", &[])?;
        assert_eq!(ejected(&agent)?, ["10.0.0.1:9080"]);
        assert_eq!(client.dial(WEB, 4)?.greetings(), ["far"; 4]);
    }
    let now = agent.get("ejections")?["services"][0]["endpoints"][0]["ejectedUntil"].clone();
    let at = |time: &Value| humantime::parse_rfc3339(time.as_str().unwrap_or_default());
    let (now, until) = (at(&now)?, at(&until)?);
    let apart = now.duration_since(until).or_else(|_| until.duration_since(now))?;
    assert!(apart < Duration::from_secs(2), "the end of the ejection moved by {apart:?}");
    // A damaged state file is a finding and has no other effect.
    agent.process.kill();
    std::fs::write(bed.state(), "{\"version\":")?;
    let agent = bed.agent(&directory, "c1", "near")?;
    assert_eq!(agent.findings("PTL0104")?.len(), 1);
    assert_eq!(ejected(&agent)?, Vec::<String>::new());
    Ok(())
}

/// Runs a CLI command against the admin socket.
fn run_command(bed: &TestBed, arguments: &[&str]) -> Result<Output> {
    Ok(Command::new(binary("portolan")?).args(arguments).arg("--admin").arg(bed.admin()).output()?)
}

fn run_successfully(bed: &TestBed, arguments: &[&str]) -> Result<String> {
    let output = run_command(bed, arguments)?;
    ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn operator_override_stays_in_effect_and_visible_until_restored() -> Result<()> {
    let bed = TestBed::new()?;
    let (directory, _near) = near_and_far(&bed, &eager(), &none())?;
    let mut agent = bed.agent(&directory, "c1", "near")?;
    let mut client = bed.dialer()?;
    let goes_to = |client: &mut Dialer, expected: &str| {
        wait_until(&format!("connections to go {expected}"), BOUND, || {
            let seen = client.dial(WEB, 4)?;
            ensure!(seen.greetings() == [expected; 4], "{:?}", seen.greetings());
            Ok(())
        })
    };
    goes_to(&mut client, "near")?;
    let said = run_successfully(&bed, &["eject", "10.0.0.1:9080", "--for", "10m", "--reason", "disk is full"])?;
    assert_eq!(said.trim(), "10.0.0.1:9080 ejected by operator for 10m: disk is full");
    goes_to(&mut client, "far")?;
    // A restart does not change that.
    agent.process.kill();
    agent = bed.agent(&directory, "c1", "near")?;
    goes_to(&mut client, "far")?;
    let report = agent.get("ejections")?;
    let endpoint = &report["services"][0]["endpoints"][0];
    assert_eq!((&endpoint["health"], &endpoint["ejectedBy"]), (&json!("ejected"), &json!("operator: disk is full")));
    assert!(endpoint["ejectedUntil"].is_string());
    assert_eq!(agent.findings("PTL0103")?.len(), 1);
    assert!(agent.explain("default/web")?.to_string().contains("operator: disk is full"));
    assert!(agent.events()?.iter().all(|event| event["kind"] != "ejected"), "the event belongs to the previous agent");
    run_successfully(&bed, &["restore", "10.0.0.1:9080"])?;
    goes_to(&mut client, "near")?;
    assert!(agent.events()?.iter().any(|event| event["kind"] == "override"));

    run_successfully(&bed, &["drain", "default/web", "--region", "r1"])?;
    goes_to(&mut client, "far")?;
    assert!(agent.findings("PTL0103")?[0].contains("portolan restore default/web --region r1"));
    run_successfully(&bed, &["restore", "default/web", "--region", "r1"])?;
    goes_to(&mut client, "near")?;
    assert_eq!(agent.findings("PTL0103")?, Vec::<String>::new());
    // An override that expires.
    run_successfully(&bed, &["eject", "10.0.0.1:9080", "--for", "2s"])?;
    assert_eq!(client.dial(WEB, 4)?.greetings(), ["far"; 4], "an override is in effect when the command returns");
    goes_to(&mut client, "near")?;

    for (wrong, complaint) in [
        (&["eject", "10.9.9.9:1"][..], "no service has an endpoint 10.9.9.9:1"),
        (&["restore", "10.0.0.1:9080"], "is not ejected by an operator"),
        (&["drain", "default/other", "--region", "r1"], "have no service default/other"),
        (&["drain", "default/web", "--region", "r7"], "default/web has no endpoint in region r7"),
        (&["restore", "default/web"], "name its --region"),
        (&["eject", "10.0.0.1:9080", "--for", "9999y"], "longer than"),
    ] {
        let output = run_command(&bed, wrong)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && said.contains(complaint), "{wrong:?}: {said}");
    }
    Ok(())
}

/// Accepts connections at an address, reads a byte, and resets them.
fn reset_all(bed: &TestBed, address: SocketAddr) -> Result<()> {
    let listener = bed.namespace.enter(|| Ok(TcpListener::bind(address)?))?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 1]);
            // Makes the close send a reset.
            let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
        }
    });
    Ok(())
}

#[test]
fn early_resets_count_only_with_the_annotation() -> Result<()> {
    for enabled in [true, false] {
        let bed = TestBed::new()?;
        let (directory, near) =
            near_and_far(&bed, &eager(), &json!({"portolan.io/count-early-resets": enabled.to_string()}))?;
        near.stop()?;
        reset_all(&bed, "10.0.0.1:9080".parse()?)?;
        let agent = bed.agent(&directory, "c1", "near")?;
        let mut client = bed.dialer()?;
        for _ in 0..2 {
            client.run(&Task::Dial { to: WEB.parse()?, times: 1, mapped: false, nonblocking: false, send: 1 })?;
        }
        if enabled {
            wait_ejected(&agent, &["10.0.0.1:9080"])?;
            assert_eq!(client.dial(WEB, 2)?.greetings(), ["far"; 2]);
        } else {
            wait_until("both closes to be counted", BOUND, || {
                let metrics = agent.http("/metrics")?.1;
                let closed = metrics.lines().filter(|line| line.starts_with("istio_tcp_connections_closed_total{"));
                let closed: u64 = closed.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum();
                ensure!(closed >= 2, "{closed}");
                Ok(())
            })?;
            assert_eq!(ejected(&agent)?, Vec::<String>::new());
            let failed = agent.events()?.iter().filter(|event| event["kind"] == "failed").count();
            assert_eq!(failed, 0);
        }
    }
    Ok(())
}

/// Starts an agent with `web` and a service `noise`, to which all connects fail.
fn with_noise(bed: &TestBed) -> Result<(Directory, Server, Agent)> {
    let (directory, near) = near_and_far(bed, &eager(), &none())?;
    bed.namespace.add_address("10.2.0.1/32")?;
    // Outcomes are reported only where a rule evaluates them; this one never ejects.
    let rule = json!({"trafficPolicy": {"outlierDetection": {"consecutive5xxErrors": 1_000_000}}});
    directory.write(
        "c1/noise.yaml",
        &[
            plain(service("noise", &["172.16.0.20"], 80)),
            plain(slice("noise", 9080, &[("10.2.0.1", "near", "")])),
            destination_rule("noise", &rule),
        ],
    )?;
    let agent = bed.agent(&directory, "c1", "near")?;
    Ok((directory, near, agent))
}

/// Returns the number of outcomes that found no room in the ring buffer.
fn lost(agent: &Agent) -> Result<u64> {
    let metrics = agent.http("/metrics")?.1;
    let lost = metrics.lines().find_map(|line| line.strip_prefix("portolan_events_lost_total "));
    Ok(lost.context("no metric")?.parse()?)
}

/// The ring buffer is full of other failures, but the counters in the maps still show the outcome.
#[test]
fn outcome_dropped_by_a_full_ring_buffer_is_recovered() -> Result<()> {
    let bed = TestBed::new()?;
    let (_directory, near, agent) = with_noise(&bed)?;
    let mut client = bed.dialer()?;
    assert_eq!(client.dial(WEB, 1)?.greetings(), ["near"]);
    agent.process.signal(Signal::STOP)?;
    // The ring buffer holds 14,500.
    for _ in 0..8 {
        client.dial("172.16.0.20:80", 2_000)?;
    }
    near.stop()?;
    assert_eq!(client.dial(WEB, 3)?.errnos(), [ECONNREFUSED; 3]);
    agent.process.signal(Signal::CONT)?;
    wait_ejected(&agent, &["10.0.0.1:9080"])?;
    let lost = lost(&agent)?;
    assert!(lost >= 3, "{lost}");
    Ok(())
}

/// Threat 13 of the threat model: a pod floods the ring buffer while the agent is busy. Outcomes of other pods are
/// still delivered.
#[test]
fn flooding_pod_leaves_ring_buffer_space_for_other_pods() -> Result<()> {
    let bed = TestBed::new()?;
    let (_directory, near, agent) = with_noise(&bed)?;
    let (mut flooding, mut other) = (Pod::new(&bed, 1)?, Pod::new(&bed, 2)?);
    assert_eq!(other.client.dial(WEB, 1)?.greetings(), ["near"]);
    agent.process.signal(Signal::STOP)?;
    // More than the ring buffer holds.
    for _ in 0..8 {
        flooding.client.dial("172.16.0.20:80", 2_000)?;
    }
    near.stop()?;
    assert_eq!(other.client.dial(WEB, 2)?.errnos(), [ECONNREFUSED; 2]);
    agent.process.signal(Signal::CONT)?;
    wait_ejected(&agent, &["10.0.0.1:9080"])?;
    // Both outcomes were delivered, not recovered from the counters.
    let events = agent.events()?;
    let seen = events.iter().filter(|event| event["kind"] == "failed" && event["endpoint"] == "10.0.0.1:9080").count();
    assert_eq!(seen, 2, "{:?}", events.last());
    let lost = lost(&agent)?;
    assert!(lost > 5_000, "{lost}");
    Ok(())
}
