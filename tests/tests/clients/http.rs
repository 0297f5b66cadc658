//! HTTP status counts of the kernel, compared with the log of the server. The clients keep connections open.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, ensure};
use portolan_tests::{Process, objects::destination_rule, wait_until};
use serde_json::{Value, json};

use super::{BOUND, World, nginx_with};

/// Starts a server that answers every third request with 500, behind an HTTP port, with a rule that counts errors but
/// never ejects.
fn third() -> Result<World> {
    World::new(80, 8080, |directory| {
        let rule = json!({"trafficPolicy": {"outlierDetection": {"consecutive5xxErrors": 1_000_000}}});
        directory.write("c1/rule.yaml", &[destination_rule("server", &rule)])?;
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/third.py");
        let mut command = Command::new("python3");
        command.args([script, "10.0.0.1", "8080"]).arg(directory.scratch("log"));
        Ok(command)
    })
}

/// The number of responses, and how many of them were errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counts {
    responses: u64,
    errors: u64,
}

impl World {
    fn logged(&self) -> Result<Counts> {
        let log = fs::read_to_string(self.directory.scratch("log"))?;
        let errors = log.lines().filter(|line| *line == "500").count() as u64;
        Ok(Counts { responses: log.lines().count() as u64, errors })
    }

    fn counted(&self) -> Result<Counts> {
        let endpoints = self.agent.get("endpoints")?;
        let services = endpoints["services"].as_array().context("no services")?;
        let server = services.iter().find(|service| service["name"] == "server").context("no such service")?;
        let kernel = &server["endpoints"][0]["kernel"];
        let number = |field: &str| kernel[field].as_u64().unwrap_or(0);
        Ok(Counts { responses: number("responses"), errors: number("serverErrors") })
    }

    /// Waits until the server is up, and checks its first responses.
    fn warm(&self) -> Result<()> {
        let url = "http://172.16.0.10/";
        wait_until("the server", BOUND, || self.run("curl", &["-s", "-m", "5", url]).map(drop))?;
        self.assert_counts_match("the first responses")
    }

    fn assert_counts_match(&self, what: &str) -> Result<()> {
        let (logged, counted) = (self.logged()?, self.counted()?);
        ensure!(logged == counted, "{what}: the server logged {logged:?}, the kernel counted {counted:?}");
        Ok(())
    }
}

#[test]
fn every_response_is_counted_with_its_status() -> Result<()> {
    let world = third()?;
    world.warm()?;
    // Thirty requests on one connection, with bodies that look like responses.
    let many = |path: &str| -> Vec<String> { (0..30).map(|i| format!("http://172.16.0.10{path}?{i}")).collect() };
    for (what, first, path) in [
        ("curl", vec![], "/"),
        ("curl over IPv6 sockets", vec!["-g"], "/"),
        ("with Expect: 100-continue", vec!["-H", "Expect: 100-continue", "-d", "hello"], "/"),
    ] {
        let urls = many(path);
        let urls: Vec<String> = if first == ["-g"] {
            urls.iter().map(|url| url.replace("172.16.0.10", "[::ffff:172.16.0.10]")).collect()
        } else {
            urls
        };
        let arguments: Vec<&str> =
            ["-s", "-m", "20"].into_iter().chain(first).chain(urls.iter().map(String::as_str)).collect();
        let before = world.logged()?;
        world.run("curl", &arguments)?;
        ensure!(world.logged()?.responses == before.responses + 30, "{what}: not every request was answered");
        world.assert_counts_match(what)?;
    }
    let urls: Vec<&str> = vec!["http://172.16.0.10/split"; 30];
    world.run("curl", &[&["-s", "-m", "20"], urls.as_slice()].concat())?;
    world.assert_counts_match("in pieces")?;

    let script = world.directory.scratch("stop.lua");
    let lua = "local n = 0\nfunction response()\n  n = n + 1\n  if n == 500 then wrk.thread:stop() end\nend\n";
    fs::write(&script, lua)?;
    let script = script.display().to_string();
    world.run("wrk", &["-t2", "-c2", "-d20s", "-s", &script, "http://172.16.0.10/"])?;
    ensure!(world.logged()?.responses >= 1_000, "wrk did not make its requests");
    world.assert_counts_match("wrk")?;

    let upstream = "upstream u { server 172.16.0.10:80; keepalive 4; }";
    let location = "proxy_pass http://u; proxy_http_version 1.1; proxy_set_header Connection \"\";";
    let proxy = nginx_with(&world.directory, "10.0.0.9:8000", upstream, location)?;
    let _proxy = Process::spawn(proxy, world.bed.place())?;
    wait_until("nginx", BOUND, || world.run("curl", &["-s", "-m", "5", "http://10.0.0.9:8000/"]).map(drop))?;
    let urls: Vec<&str> = vec!["http://10.0.0.9:8000/"; 60];
    world.run("curl", &[&["-s", "-m", "20"], urls.as_slice()].concat())?;
    world.assert_counts_match("nginx")?;

    // Of pipelined requests, at least the first response is counted, and nothing else is taken for a response.
    let before = world.logged()?;
    let request = r#"
import socket, sys
s = socket.create_connection(("172.16.0.10", 80)); s.settimeout(10)
s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 6)
seen = b""
while seen.count(b" is it\r\n") < 6 or not seen.endswith(b"no\r\n" ): seen += s.recv(65536)
"#;
    world.run("python3", &["-c", request])?;
    let (logged, counted) = (world.logged()?, world.counted()?);
    ensure!(logged.responses == before.responses + 6, "{before:?}, then {logged:?}");
    ensure!(counted.responses > before.responses && counted.responses <= logged.responses, "{counted:?}, {logged:?}");
    ensure!(counted.errors >= before.errors && counted.errors <= logged.errors, "{counted:?}, {logged:?}");
    Ok(())
}

#[test]
fn non_http_traffic_is_detected_and_counted_by_connections() -> Result<()> {
    for (what, expected) in [("tls", "TLS"), ("http2", "HTTP/2")] {
        let world = World::new(80, 8080, |directory| {
            let outlier = json!({"consecutive5xxErrors": 1, "maxEjectionPercent": 100});
            let rule = json!({"trafficPolicy": {"outlierDetection": outlier}});
            directory.write("c1/rule.yaml", &[destination_rule("server", &rule)])?;
            // The first bytes of a server of each kind.
            let says =
                if what == "tls" { "b'\\x16\\x03\\x03\\x00\\x7a\\x02'" } else { "b'\\0\\0\\0\\x04\\0\\0\\0\\0\\0'" };
            let script = format!(
                "import socket\ns=socket.create_server(('10.0.0.1',8080))\nwhile True:\n  c,_=s.accept()\n  c.recv(9)\n  c.sendall({says})\n  c.close()"
            );
            let mut command = Command::new("python3");
            command.args(["-c", &script]);
            Ok(command)
        })?;
        let ask = "import socket\ns=socket.create_connection(('172.16.0.10',80))\ns.sendall(b'hello')\nprint(len(s.recv(99)))";
        wait_until("the server", BOUND, || world.run("python3", &["-c", ask]).map(drop))?;
        wait_until("the finding", BOUND, || {
            let findings: Value = world.agent.get("services")?["findings"].clone();
            let found = findings.as_array().context("no findings")?.iter().any(|finding| {
                finding["code"] == "PTL0102"
                    && finding["message"].as_str().is_some_and(|message| message.contains(expected))
            });
            ensure!(found, "{what}: {findings}");
            Ok(())
        })?;
        let explained = world.agent.explain("default/server")?.to_string();
        ensure!(!explained.contains("status 500"), "{explained}");
    }
    Ok(())
}
