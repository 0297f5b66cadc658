//! Connection outcomes, from the kernel to the agent. Each test produces the outcome with real connections.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use portolan_tests::{
    Agent, Directory, TestBed,
    dial::Task,
    objects::{destination_rule, node, plain, service, slice},
    patience, wait_until,
};
use serde_json::{Value, json};

const ECONNREFUSED: i32 = 111;
const ETIMEDOUT: i32 = 110;
const BOUND: Duration = Duration::from_secs(20);

/// Writes a service with two endpoints in the near region and one in the far region, and these rules for it.
fn failover(bed: &TestBed, outlier: &Value, connect_timeout: Option<&str>) -> Result<Directory> {
    let directory = Directory::new()?;
    for address in ["10.0.0.1", "10.0.0.2", "10.1.0.1"] {
        bed.namespace.add_address(&format!("{address}/32"))?;
    }
    bed.serve("10.1.0.1:9080", "far")?;
    let mut policy = json!({"outlierDetection": outlier});
    if let Some(timeout) = connect_timeout {
        policy["connectionPool"] = json!({"tcp": {"connectTimeout": timeout}});
    }
    directory.write(
        "c1/all.yaml",
        &[
            node("near", "r1/z1"),
            node("far", "r2/z1"),
            plain(service("web", &["172.16.0.10"], 80)),
            plain(slice("web", 9080, &[("10.0.0.1", "near", ""), ("10.0.0.2", "near", ""), ("10.1.0.1", "far", "")])),
            destination_rule("web", &json!({"trafficPolicy": policy})),
        ],
    )?;
    Ok(directory)
}

fn eager() -> Value {
    // Under emulation, fifty connections take longer than two seconds.
    let time = format!("{}s", 2 * patience());
    json!({"consecutive5xxErrors": 1, "interval": "1s", "baseEjectionTime": time, "maxEjectionPercent": 100})
}

fn ejected(agent: &Agent) -> Result<Vec<String>> {
    let report = agent.get("ejections")?;
    let services = report["services"].as_array().cloned().unwrap_or_default();
    let endpoints = services.iter().flat_map(|service| service["endpoints"].as_array().cloned().unwrap_or_default());
    Ok(endpoints.map(|endpoint| endpoint["address"].as_str().unwrap_or_default().to_owned()).collect())
}

fn kinds(agent: &Agent) -> Result<Vec<String>> {
    Ok(agent.events()?.iter().map(|event| event["kind"].as_str().unwrap_or_default().to_owned()).collect())
}

#[test]
fn refused_connect_ejects_at_once_and_is_released_later() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = failover(&bed, &eager(), None)?;
    let agent = bed.agent(&directory, "c1", "near")?;
    let mut client = bed.dialer()?;
    // Each near endpoint fails one connection.
    // An ejection takes effect after the next turn of the event loop, so the client waits for it.
    for out in 1..=2 {
        assert_eq!(client.dial("172.16.0.10:80", 1)?.errnos(), [ECONNREFUSED]);
        wait_until("the ejection", BOUND, || {
            let ejected = ejected(&agent)?;
            ensure!(ejected.len() == out, "{ejected:?}");
            Ok(())
        })?;
    }
    let began = Instant::now();
    assert_eq!(client.dial("172.16.0.10:80", 50)?.greetings(), ["far"; 50]);
    let report = agent.get("endpoints")?;
    assert_eq!(report["services"][0]["priorities"][0]["load"], json!(0));
    let until = report["services"][0]["endpoints"][0]["ejectedUntil"].as_str().unwrap_or_default().to_owned();
    assert!(until.starts_with("20"), "{until}");

    // The endpoints are released automatically and get all connections again.
    bed.serve("10.0.0.1:9080", "near")?;
    bed.serve("10.0.0.2:9080", "near")?;
    wait_until("the release", BOUND, || {
        let ejected = ejected(&agent)?;
        ensure!(ejected.is_empty(), "{ejected:?}");
        Ok(())
    })?;
    assert!(began.elapsed() > Duration::from_millis(1500), "released after {:?}", began.elapsed());
    assert_eq!(client.dial("172.16.0.10:80", 50)?.greetings(), ["near"; 50]);
    let kinds = kinds(&agent)?;
    let count = |kind: &str| kinds.iter().filter(|seen| *seen == kind).count();
    assert_eq!((count("failed"), count("ejected"), count("released")), (2, 2, 2), "{kinds:?}");
    Ok(())
}

#[test]
fn unanswered_connect_times_out_and_counts() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = failover(&bed, &eager(), Some("300ms"))?;
    for address in ["10.0.0.1/32", "10.0.0.2/32"] {
        bed.namespace.swallow(address)?;
    }
    let agent = bed.agent(&directory, "c1", "near")?;
    let mut client = bed.dialer()?;
    let began = Instant::now();
    assert_eq!(
        client.dial("172.16.0.10:80", 1)?.errnos(),
        [ETIMEDOUT],
        "the application gets the error long before the default of two minutes"
    );
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    wait_until("the ejection", BOUND, || {
        ensure!(ejected(&agent)?.len() == 1);
        Ok(())
    })?;
    let events = agent.events()?;
    let failed = events.iter().find(|event| event["kind"] == "failed").unwrap();
    assert!(failed["message"].as_str().unwrap().contains("timed out"), "{failed}");
    Ok(())
}

#[test]
fn aborted_connect_is_not_a_failure() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = failover(&bed, &eager(), None)?;
    for address in ["10.0.0.1/32", "10.0.0.2/32"] {
        bed.namespace.swallow(address)?;
    }
    let agent = bed.agent(&directory, "c1", "near")?;
    let mut client = bed.dialer()?;
    for _ in 0..6 {
        client.run(&Task::GiveUp { to: "172.16.0.10:80".parse()? })?;
    }
    // A connection that counts follows them through the same ring buffer.
    bed.namespace.restore("10.0.0.1/32")?;
    bed.namespace.restore("10.0.0.2/32")?;
    assert_eq!(client.dial("172.16.0.10:80", 1)?.errnos(), [ECONNREFUSED]);
    wait_until("the one failure", BOUND, || {
        ensure!(kinds(&agent)?.iter().any(|kind| kind == "failed"));
        Ok(())
    })?;
    let kinds = kinds(&agent)?;
    assert_eq!(kinds.iter().filter(|kind| *kind == "failed").count(), 1, "{kinds:?}");
    let endpoints = agent.get("endpoints")?["services"][0]["endpoints"].clone();
    let failures: u64 =
        endpoints.as_array().unwrap().iter().map(|endpoint| endpoint["kernel"]["failures"].as_u64().unwrap()).sum();
    assert_eq!(failures, 1);
    Ok(())
}

#[test]
fn success_between_failures_resets_the_count() -> Result<()> {
    let bed = TestBed::new()?;
    let outlier =
        json!({"consecutive5xxErrors": 2, "interval": "1s", "baseEjectionTime": "1m", "maxEjectionPercent": 100});
    let directory = failover(&bed, &outlier, None)?;
    directory.write(
        "c1/more.yaml",
        &[
            plain(service("one", &["172.16.0.20"], 80)),
            plain(slice("one", 9080, &[("10.0.0.1", "near", "")])),
            destination_rule("one", &json!({"trafficPolicy": {"outlierDetection": outlier}})),
        ],
    )?;
    let agent = bed.agent(&directory, "c1", "near")?;
    let mut client = bed.dialer()?;
    let fail = |client: &mut portolan_tests::Dialer| -> Result<()> {
        assert_eq!(client.dial("172.16.0.20:80", 1)?.errnos(), [ECONNREFUSED]);
        Ok(())
    };
    fail(&mut client)?;
    let served = bed.serve_once("10.0.0.1:9080", || client.dial("172.16.0.20:80", 1))?;
    assert_eq!(served.errnos(), [0]);
    fail(&mut client)?;
    assert_eq!(ejected(&agent)?, Vec::<String>::new());
    fail(&mut client)?;
    wait_until("the ejection", BOUND, || {
        let ejected = ejected(&agent)?;
        ensure!(ejected == ["10.0.0.1:9080"], "{ejected:?}");
        Ok(())
    })?;
    // The only endpoint of the pool is ejected, so the service refuses.
    assert_eq!(client.dial("172.16.0.20:80", 1)?.errnos(), [ECONNREFUSED]);
    Ok(())
}

/// Two services on the same endpoint: outcomes in one pool do not affect the other.
#[test]
fn pools_that_share_an_endpoint_count_independently() -> Result<()> {
    let bed = TestBed::new()?;
    bed.namespace.add_address("10.0.0.1/32")?;
    let directory = Directory::new()?;
    let outlier =
        json!({"consecutive5xxErrors": 2, "interval": "1s", "baseEjectionTime": "1m", "maxEjectionPercent": 100});
    let mut objects = vec![node("near", "r1/z1")];
    for (name, address) in [("one", "172.16.0.20"), ("two", "172.16.0.30")] {
        objects.push(plain(service(name, &[address], 80)));
        objects.push(plain(slice(name, 9080, &[("10.0.0.1", "near", "")])));
        objects.push(destination_rule(name, &json!({"trafficPolicy": {"outlierDetection": outlier}})));
    }
    directory.write("c1/all.yaml", &objects)?;
    let agent = bed.agent(&directory, "c1", "near")?;
    let mut client = bed.dialer()?;
    let failures = |agent: &Agent, count: usize| {
        wait_until("the failures to be reported", BOUND, || {
            ensure!(kinds(agent)?.iter().filter(|kind| *kind == "failed").count() == count);
            Ok(())
        })
    };
    let serve_once = |client: &mut portolan_tests::Dialer, to: &str| -> Result<()> {
        assert_eq!(bed.serve_once("10.0.0.1:9080", || client.dial(to, 1))?.errnos(), [0]);
        Ok(())
    };
    assert_eq!(client.dial("172.16.0.20:80", 1)?.errnos(), [ECONNREFUSED]);
    failures(&agent, 1)?;
    // A success of the other pool, then one of this pool, which resets its count.
    serve_once(&mut client, "172.16.0.30:80")?;
    serve_once(&mut client, "172.16.0.20:80")?;
    assert_eq!(client.dial("172.16.0.20:80", 1)?.errnos(), [ECONNREFUSED]);
    failures(&agent, 2)?;
    assert_eq!(ejected(&agent)?, Vec::<String>::new());
    // A success of the other pool alone does not reset it.
    serve_once(&mut client, "172.16.0.30:80")?;
    assert_eq!(client.dial("172.16.0.20:80", 1)?.errnos(), [ECONNREFUSED]);
    failures(&agent, 3)?;
    let report = agent.get("ejections")?;
    assert_eq!(report["services"][0]["name"], json!("one"));
    assert_eq!(report["services"].as_array().map(Vec::len), Some(1), "the other pool is not ejected: {report}");
    Ok(())
}

#[test]
fn default_percentage_ejects_none_of_three_and_is_a_finding() -> Result<()> {
    let bed = TestBed::new()?;
    let outlier = json!({"consecutive5xxErrors": 1, "interval": "1s", "baseEjectionTime": "1m"});
    let directory = failover(&bed, &outlier, None)?;
    let agent = bed.agent(&directory, "c1", "near")?;
    let mut client = bed.dialer()?;
    assert_eq!(client.dial("172.16.0.10:80", 4)?.errnos(), [ECONNREFUSED; 4]);
    wait_until("the ejection limit to be reached", BOUND, || {
        ensure!(kinds(&agent)?.iter().filter(|kind| *kind == "ejection-limited").count() == 4);
        Ok(())
    })?;
    assert_eq!(ejected(&agent)?, Vec::<String>::new());
    let findings = agent.get("services")?["findings"].to_string();
    assert!(findings.contains("maxEjectionPercent") && findings.contains("34"), "{findings}");
    Ok(())
}

#[test]
fn connect_timeout_preserves_tcp_user_timeout() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = failover(&bed, &eager(), Some("5s"))?;
    bed.serve("10.0.0.1:9080", "near")?;
    bed.serve("10.0.0.2:9080", "near")?;
    let _agent = bed.agent(&directory, "c1", "near")?;
    let mut client = bed.dialer()?;
    for own in [0, 2_000, 60_000] {
        let reply = client.run(&Task::UserTimeout { to: "172.16.0.10:80".parse()?, own })?;
        assert_eq!((reply.errnos(), reply.value), (vec![0], own));
    }
    // A failed connect restores the option as well, because the socket may be connected again.
    let refused = "172.16.0.20:80";
    directory.write(
        "c1/refused.yaml",
        &[
            service("refused", &["172.16.0.20"], 80),
            slice("refused", 9099, &[("10.0.0.1", "near", "")]),
            destination_rule(
                "refused",
                &json!({"trafficPolicy": {"connectionPool": {"tcp": {"connectTimeout": "7s"}}}}),
            ),
        ],
    )?;
    wait_until("the service", BOUND, || {
        ensure!(client.dial(refused, 1)?.errnos() == [ECONNREFUSED]);
        Ok(())
    })?;
    for own in [0, 3_000, 60_000] {
        let reply = client.run(&Task::UserTimeout { to: refused.parse()?, own })?;
        assert_eq!((reply.errnos(), reply.value), (vec![ECONNREFUSED], own));
    }
    Ok(())
}

#[test]
fn new_endpoint_warms_up() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = Directory::new()?;
    let policy = json!({"loadBalancer": {"simple": "ROUND_ROBIN", "warmup": {"duration": "4s"}}});
    let write = |endpoints: &[(&str, &str, &str)]| {
        directory.write(
            "c1/all.yaml",
            &[
                node("near", "r1/z1"),
                service("web", &["172.16.0.10"], 80),
                slice("web", 9080, endpoints),
                destination_rule("web", &json!({"trafficPolicy": policy})),
            ],
        )
    };
    write(&[("10.0.0.1", "near", "")])?;
    let agent = bed.agent(&directory, "c1", "near")?;
    write(&[("10.0.0.1", "near", ""), ("10.0.0.2", "near", "")])?;
    let share =
        || -> Result<Option<f64>> { Ok(agent.get("endpoints")?["services"][0]["endpoints"][1]["share"].as_f64()) };
    // Its share is small from the start and grows over time.
    let mut seen = Vec::new();
    wait_until("the new endpoint to be warm", BOUND, || {
        seen.extend(share()?);
        seen.dedup();
        ensure!(seen.last() == Some(&0.5), "{seen:?}");
        Ok(())
    })?;
    assert!(seen[0] < 0.3 && seen.len() > 2 && seen.is_sorted(), "{seen:?}");
    Ok(())
}
