//! Active health checks: endpoints that accept connections but never respond, or respond with errors.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use portolan_tests::{
    Agent, Dialer, Directory, Pod, TestBed,
    objects::{destination_rule, node, service, slice},
    report::{finding, service_named},
    wait_until,
};
use serde_json::{Value, json};
use tonic_health::{ServingStatus, server::HealthReporter};

const WEB: &str = "172.16.0.10:80";
const BOUND: Duration = Duration::from_secs(30);
/// Stands for a status: the server never responds.
const SILENT: u16 = 0;

/// A server that sends a greeting to clients that send nothing, and responds to a request with a configurable status.
struct Server {
    status: Arc<AtomicU16>,
    /// Number of requests received.
    asked: Arc<AtomicU32>,
    last: Arc<std::sync::Mutex<String>>,
}

impl Server {
    fn start(bed: &TestBed, address: &str, name: &'static str) -> Result<Self> {
        let address: SocketAddr = address.parse()?;
        let listener = bed.namespace.enter(|| TcpListener::bind(address).context("cannot listen"))?;
        let server = Self { status: Arc::new(AtomicU16::new(200)), asked: Arc::default(), last: Arc::default() };
        let (status, asked, last) = (Arc::clone(&server.status), Arc::clone(&server.asked), Arc::clone(&server.last));
        thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let (status, asked, last) = (Arc::clone(&status), Arc::clone(&asked), Arc::clone(&last));
                thread::spawn(move || serve(stream, name, &status, &asked, &last));
            }
        });
        Ok(server)
    }

    fn set(&self, status: u16) {
        self.status.store(status, Ordering::SeqCst);
    }
}

fn serve(mut stream: TcpStream, name: &str, status: &AtomicU16, asked: &AtomicU32, last: &std::sync::Mutex<String>) {
    let (mut request, mut buffer) = (Vec::new(), [0; 1024]);
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read(&mut buffer) {
            Ok(0) if request.is_empty() => {
                let _ = stream.write_all(name.as_bytes());
                return;
            }
            Ok(0) | Err(_) => return,
            Ok(read) => request.extend(&buffer[..read]),
        }
    }
    asked.fetch_add(1, Ordering::SeqCst);
    *last.lock().unwrap() = String::from_utf8_lossy(&request).into_owned();
    let status = if request.starts_with(b"GET /bad ") { 500 } else { status.load(Ordering::SeqCst) };
    match status {
        // Blocks until the client times out.
        SILENT => drop(stream.read(&mut buffer)),
        status => {
            let head = format!("HTTP/1.1 {status} status\r\nContent-Length: {}\r\n\r\n", name.len());
            let _ = stream.write_all(&[head.as_bytes(), name.as_bytes()].concat());
        }
    }
}

/// Returns a service with a near and a far endpoint, and a rule with this probe and policy.
fn objects(probe: &str, endpoints: &[(&str, &str, &str)], policy: &Value) -> Vec<Value> {
    let mut rule = destination_rule("web", &json!({"trafficPolicy": policy}));
    rule["metadata"]["annotations"] = json!({"portolan.io/probe": probe});
    vec![
        node("near", "r1/z1"),
        node("far", "r2/z1"),
        service("web", &["172.16.0.10"], 80),
        slice("web", 9080, endpoints),
        rule,
    ]
}

const BOTH: [(&str, &str, &str); 2] = [("10.0.0.1", "near", ""), ("10.1.0.1", "far", "")];

fn near_and_far(bed: &TestBed, probe: &str) -> Result<(Directory, Server, Server)> {
    for address in ["10.0.0.1/32", "10.1.0.1/32"] {
        bed.namespace.add_address(address)?;
    }
    let near = Server::start(bed, "10.0.0.1:9080", "near")?;
    let far = Server::start(bed, "10.1.0.1:9080", "far")?;
    let directory = Directory::new()?;
    directory.write("c1/all.yaml", &objects(probe, &BOTH, &json!({})))?;
    Ok((directory, near, far))
}

/// Waits until all connections go to the endpoint with this greeting.
fn wait_all(agent: &Agent, client: &mut Dialer, expected: &str) -> Result<()> {
    wait_until(&format!("all connections to go {expected}"), BOUND, || {
        let greetings = client.dial(WEB, 4)?.greetings().join(" ");
        ensure!(greetings == [expected; 4].join(" "), "{greetings}\n{}", agent.log());
        Ok(())
    })
}

fn messages(agent: &Agent, kind: &str) -> Result<Vec<String>> {
    let events = agent.events()?.into_iter().filter(|event| event["kind"] == kind);
    Ok(events.map(|event| event["message"].as_str().unwrap_or_default().to_owned()).collect())
}

#[test]
fn failing_endpoint_is_removed_and_restored() -> Result<()> {
    let bed = TestBed::new()?;
    let probe = "{httpGet: {path: /healthz, httpHeaders: [{name: Host, value: web.example}]}, periodSeconds: 1, failureThreshold: 2, successThreshold: 2}";
    let (directory, near, _far) = near_and_far(&bed, probe)?;
    let agent = bed.agent(&directory, "c1", "near")?;
    let mut client = bed.dialer()?;
    // A probe enables failover, even without outlierDetection.
    wait_all(&agent, &mut client, "near")?;
    for (status, why) in [(SILENT, "no answer within 1s"), (500, "status 500"), (404, "status 404")] {
        near.set(status);
        wait_all(&agent, &mut client, "far")?;
        let events = messages(&agent, "unhealthy")?;
        let last = events.last().context("no event")?;
        let expected = format!("10.0.0.1:9080: httpGet /healthz has 2 consecutive failures, the last one: {why}");
        assert_eq!(*last, expected);
        let report = agent.get("services")?;
        let endpoint = &service_named(&report, "web")?["endpoints"][0];
        assert_eq!((&endpoint["health"], &endpoint["share"]), (&json!("unhealthy"), &json!(0.0)), "{endpoint}");
        let explained = agent.explain("default/web")?.to_string();
        assert!(
            explained.contains("failing active probes (portolan.io/probe)") && explained.contains("1 of 2 failing now"),
            "{explained}"
        );
        near.set(302);
        wait_all(&agent, &mut client, "near")?;
    }
    assert_eq!(messages(&agent, "healthy")?.len(), 3);
    let request = near.last.lock().unwrap().to_lowercase();
    assert!(
        request.starts_with("get /healthz http/1.1\r\n") && request.contains("\r\nhost: web.example\r\n"),
        "{request}"
    );
    assert!(request.contains("\r\nuser-agent: portolan-probe/"), "{request}");
    let metrics = agent.http("/metrics")?.1;
    assert!(
        metrics.contains("\nportolan_probed_endpoints 2\n")
            && metrics.contains("portolan_probes_total{result=\"failing\"}")
    );

    // Without the annotation, nothing is probed, and no endpoint is unhealthy.
    near.set(500);
    wait_all(&agent, &mut client, "far")?;
    let mut without = objects("", &BOTH, &json!({"outlierDetection": {}}));
    without[4]["metadata"]["annotations"] = json!({});
    directory.write("c1/all.yaml", &without)?;
    wait_all(&agent, &mut client, "near")?;
    wait_until("probing to stop", BOUND, || {
        ensure!(agent.http("/metrics")?.1.contains("\nportolan_probed_endpoints 0\n"));
        Ok(())
    })
}

#[test]
fn new_endpoints_are_probed_soon_and_unhealthy_ones_stay_out() -> Result<()> {
    let bed = TestBed::new()?;
    // Probes are ten seconds apart, but a new endpoint is probed more often until its state is known.
    let (directory, near, far) = near_and_far(&bed, "{httpGet: {}, periodSeconds: 10, failureThreshold: 2}")?;
    near.set(503);
    let mut first = bed.agent(&directory, "c1", "near")?;
    let mut client = bed.dialer()?;
    wait_all(&first, &mut client, "far")?;
    // Both endpoints are unhealthy: connections are refused.
    far.set(503);
    first.process.kill();
    let _agent = bed.agent(&directory, "c1", "near")?;
    wait_until("no endpoint to be left", BOUND, || {
        let errnos = client.dial(WEB, 2)?.errnos();
        ensure!(errnos == [111; 2], "{errnos:?}");
        Ok(())
    })?;
    // If panic mode is allowed, all endpoints are used.
    let panic = json!({"outlierDetection": {"minHealthPercent": 50}});
    directory.write("c1/all.yaml", &objects("{httpGet: {}, periodSeconds: 10, failureThreshold: 2}", &BOTH, &panic))?;
    wait_until("all endpoints to be used", BOUND, || {
        let reply = client.dial(WEB, 4)?;
        ensure!((reply.count("near"), reply.count("far")) == (2, 2), "{reply:?}");
        Ok(())
    })
}

#[test]
fn tcp_probe_on_its_own_port_needs_no_request() -> Result<()> {
    let bed = TestBed::new()?;
    let (directory, near, far) =
        near_and_far(&bed, "{tcpSocket: {port: 9999}, periodSeconds: 1, failureThreshold: 1}")?;
    let health = bed.serve_until("10.1.0.1:9999", "health")?;
    let agent = bed.agent(&directory, "c1", "near")?;
    let mut client = bed.dialer()?;
    wait_all(&agent, &mut client, "far")?;
    assert_eq!((near.asked.load(Ordering::SeqCst), far.asked.load(Ordering::SeqCst)), (0, 0));
    drop(health);
    bed.serve("10.0.0.1:9999", "health")?;
    wait_all(&agent, &mut client, "near")
}

#[test]
fn grpc_health_status_decides() -> Result<()> {
    let bed = TestBed::new()?;
    let (directory, ..) =
        near_and_far(&bed, "{grpc: {port: 9443, service: shop.Cart}, periodSeconds: 1, failureThreshold: 2}")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut reporters: Vec<HealthReporter> = Vec::new();
    for address in ["10.0.0.1:9443", "10.1.0.1:9443"] {
        let address: SocketAddr = address.parse()?;
        let listener = bed.namespace.enter(|| TcpListener::bind(address).context("cannot listen"))?;
        listener.set_nonblocking(true)?;
        let (reporter, service) = tonic_health::server::health_reporter();
        let inside = runtime.enter();
        let incoming = tonic::transport::server::TcpIncoming::from(tokio::net::TcpListener::from_std(listener)?);
        drop(inside);
        runtime.spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        reporters.push(reporter);
    }
    let set = |i: usize, status| runtime.block_on(reporters[i].set_service_status("shop.Cart", status));
    set(0, ServingStatus::Serving);
    set(1, ServingStatus::Serving);
    let agent = bed.agent(&directory, "c1", "near")?;
    let mut client = bed.dialer()?;
    wait_all(&agent, &mut client, "near")?;
    set(0, ServingStatus::NotServing);
    wait_all(&agent, &mut client, "far")?;
    let events = messages(&agent, "unhealthy")?;
    assert!(
        events.last().is_some_and(|event| event
            .ends_with("grpc shop.Cart on port 9443 has 2 consecutive failures, the last one: NOT_SERVING")),
        "{events:?}"
    );
    set(0, ServingStatus::Serving);
    wait_all(&agent, &mut client, "near")
}

#[test]
fn excess_and_invalid_probes_are_findings() -> Result<()> {
    let bed = TestBed::new()?;
    let (directory, near, _far) = near_and_far(&bed, "{httpGet: {}, periodSeconds: 1, failureThreshold: 1}")?;
    let agent = bed.agent_with(&directory, "c1", "near", &["--probes-per-second", "1"])?;
    let mut client = bed.dialer()?;
    wait_until("the finding", BOUND, || {
        let report = agent.get("services")?;
        let found = finding(&report, "Probes", "asks for 2 probes per second of 2 endpoints; the limit is 1")?;
        ensure!(found["code"] == "PTL0105", "{found}");
        Ok(())
    })?;
    near.set(500);
    wait_all(&agent, &mut client, "far")?;
    for (probe, field, message) in [
        ("{httpGet: {scheme: HTTPS}}", ".httpGet.scheme", "only HTTP is supported"),
        ("{exec: {command: [ls]}}", ".exec", "cannot run commands in a container"),
        ("{tcpSocket: {port: http}}", ".tcpSocket.port", "use the port number"),
        ("{httpGet: {path: healthz}}", ".httpGet.path", "is not a valid path"),
        ("{httpGet: {}, periodSeconds: 0}", ".periodSeconds", "0 is less than 1"),
        ("{httpGet: {port: 70000}}", ".httpGet.port", "70000 is not a valid port"),
        ("{httpGet: {}, tcpSocket: {port: 1}}", "", "must have exactly one of"),
        ("{}", "", "must have exactly one of"),
        ("{httpGet: ", "", "is not valid YAML"),
        ("{httpGet: {}, perioSeconds: 3}", ".perioSeconds", "is not supported"),
    ] {
        let directory = Directory::new()?;
        directory.write("c1/all.yaml", &objects(probe, &BOTH, &json!({})))?;
        let report = directory.plan("c1", "near", &[])?.0;
        let found = finding(&report, "DestinationRule default/web", message).with_context(|| probe.to_owned())?;
        let at = format!("metadata.annotations[\"portolan.io/probe\"]{field}");
        assert_eq!(found["field"], json!(at), "{probe}: {found}");
    }
    Ok(())
}

/// One pod sees errors of an endpoint that others use as well: a probe by the agent decides.
#[test]
fn probe_confirms_failures_seen_by_a_single_pod() -> Result<()> {
    let bed = TestBed::new()?;
    // A threshold that scheduled probes never reach.
    let (directory, near, _far) = near_and_far(&bed, "{}")?;
    let outlier = json!({"outlierDetection": {
        "consecutive5xxErrors": 2, "maxEjectionPercent": 100, "interval": "1s", "baseEjectionTime": "5m"}});
    directory.write("c1/all.yaml", &objects("{httpGet: {path: /healthz}, failureThreshold: 1000}", &BOTH, &outlier))?;
    let agent = bed.agent(&directory, "c1", "near")?;
    let (bad, good) = (Pod::new(&bed, 1)?, Pod::new(&bed, 2)?);
    let ask = |pod: &Pod, path: &str| -> Result<String> {
        let url = format!("http://172.16.0.10{path}");
        let mut curl = pod.start("curl", &["-s", "-w", " %{http_code}", &url])?;
        let mut answer = String::new();
        curl.child().stdout.take().context("no output")?.read_to_string(&mut answer)?;
        Ok(answer)
    };
    assert_eq!(ask(&good, "/")?, "near 200");
    // The pod requests a path that fails. Other pods and the agent get good responses.
    for _ in 0..3 {
        assert_eq!(ask(&bad, "/bad")?, "near 500");
    }
    wait_until("the finding", BOUND, || {
        let report = agent.get("services")?;
        let found = finding(&report, "Service default/web", "the agent's own connection to it succeeded")?;
        ensure!(found["code"] == "PTL0100", "{found}");
        Ok(())
    })?;
    assert_eq!(messages(&agent, "ejected")?.len(), 0);
    assert_eq!(ask(&good, "/")?, "near 200");
    // The endpoint really fails: the agent sees what the pod sees.
    near.set(500);
    wait_until("the ejection", BOUND, || {
        // Each request adds a failure, until the endpoint is ejected.
        let status = ask(&bad, "/")?;
        ensure!(messages(&agent, "ejected")?.len() == 1, "{status}: {}", agent.log());
        Ok(())
    })?;
    assert_eq!(ask(&good, "/")?, "far 200");
    Ok(())
}
