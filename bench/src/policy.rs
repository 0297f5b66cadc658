//! What the policy costs, and what the verbs that show it cost on a large directory.

use std::{
    fmt::Write as _,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Result, ensure};
use portolan_tests::{
    Directory, binary,
    objects::{destination_rule, node, service, slice},
};
use serde_json::{Value, json};

const ENDPOINTS: usize = 10;
const NODES: usize = 100;
/// Services in one file.
const IN_FILE: usize = 100;

pub(super) fn run(services: usize) -> Result<()> {
    let directory = directory(services)?;
    println!("\non {services} services with {ENDPOINTS} endpoints each, in {} files:", services.div_ceil(IN_FILE) + 2);
    for (verb, seconds, mib) in on_files(&directory)? {
        println!("  {verb:<40} {seconds:>6.2} s  {mib:>5.0} MiB at most");
    }
    Ok(())
}

pub(super) fn smoke() -> Result<()> {
    let figures = on_files(&directory(200)?)?;
    ensure!(figures.iter().all(|(_, seconds, mib)| *seconds > 0.0 && *mib > 1.0), "{figures:?}");
    Ok(())
}

/// Verb, seconds, and memory in MiB.
fn on_files(directory: &Directory) -> Result<Vec<(String, f64, f64)>> {
    let config = directory.path().display().to_string();
    let place = ["--config", &config, "--cluster", "c1", "--node", "node-0"];
    let verbs = [vec!["plan", "-o", "json"], vec!["plan", "--service", "default/s-7"], vec!["explain", "default/s-7"]];
    let mut figures = Vec::new();
    for verb in verbs {
        let mut command = Command::new(binary("portolan")?);
        command.args(&verb).args(place).stdout(Stdio::null());
        let began = Instant::now();
        let mut child = command.spawn()?;
        let status = wait_with_usage(&mut child)?;
        ensure!(status.0, "{verb:?} failed");
        figures.push((verb.join(" "), began.elapsed().as_secs_f64(), status.1));
    }
    Ok(figures)
}

/// Whether it went well, and its memory at most, in MiB.
fn wait_with_usage(child: &mut std::process::Child) -> Result<(bool, f64)> {
    // Its own peak is in /proc until it is waited for; what is read last is the nearest to it.
    let mut peak = 0.0_f64;
    let path = format!("/proc/{}/status", child.id());
    loop {
        if let Ok(status) = std::fs::read_to_string(&path) {
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
            peak = peak.max(kib.unwrap_or_default() / 1024.0);
        }
        if let Some(status) = child.try_wait()? {
            return Ok((status.success(), peak));
        }
        std::thread::park_timeout(std::time::Duration::from_millis(2));
    }
}

fn directory(services: usize) -> Result<Directory> {
    let directory = Directory::new()?;
    let rule = json!({"trafficPolicy": {
        "outlierDetection": {"consecutive5xxErrors": 3, "maxEjectionPercent": 50},
        "loadBalancer": {"localityLbSetting": {"failover": [{"from": "r0", "to": "r1"}]}}}});
    directory.write("rules.yaml", &[destination_rule("*.default.svc.cluster.local", &rule)])?;
    let nodes: Vec<Value> = (0..NODES).map(|i| node(&format!("node-{i}"), &format!("r{}/z{}", i % 3, i % 9))).collect();
    directory.write("c1/nodes.yaml", &nodes)?;
    for first in (0..services).step_by(IN_FILE) {
        let mut text = String::new();
        for i in first..services.min(first + IN_FILE) {
            for object in of_service(i) {
                writeln!(text, "---\n{object}")?;
            }
        }
        directory.write_text(&format!("c1/services-{first}.yaml"), &text)?;
    }
    Ok(directory)
}

fn of_service(i: usize) -> [Value; 2] {
    let name = format!("s-{i}");
    let mut slice = slice(&name, 8080, &[]);
    let endpoint = |e: usize| {
        let at = i * ENDPOINTS + e;
        json!({"addresses": [format!("10.{}.{}.{}", at >> 16, (at >> 8) & 255, at & 255)], "nodeName": format!("node-{}", at % NODES),
            "conditions": {"ready": true, "serving": true, "terminating": false}})
    };
    slice["endpoints"] = (0..ENDPOINTS).map(endpoint).collect();
    [service(&name, &[&format!("172.16.{}.{}", i >> 8, i & 255)], 80), slice]
}
