//! Many endpoints fail at once: a twentieth of a mesh.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use portolan_tests::{
    Agent, Bed, Directory, Place,
    objects::{destination_rule, node, plain, service, slice},
    storm::{Load, Servers},
    wait_until,
};
use serde::Serialize;
use serde_json::json;

use crate::{files::memory, progress, world::spent};

const ENDPOINTS: u32 = 10;
const GOOD: u16 = 9080;
const BAD: u16 = 9081;
/// No agent takes longer.
const LIMIT: Duration = Duration::from_secs(60);

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Failing {
    pub(crate) services: u32,
    pub(crate) endpoints: u32,
    /// Endpoints that fail at the same moment.
    pub(crate) failing: u32,
    /// Milliseconds from that moment until the last of them is ejected, as long as connections come.
    pub(crate) until: f64,
    /// Connections that were made meanwhile and a little after, and those of them that failed.
    pub(crate) connections: u64,
    pub(crate) failed: u64,
    /// Milliseconds from a failure in the kernel to the table without the endpoint: half of them were at most so long, and 99 of 100, by the
    /// bounds of the agent's histogram.
    pub(crate) half: f64,
    pub(crate) nearly_all: f64,
    /// Seconds of processor time of the agent, and its memory before and after, MiB.
    pub(crate) spent: f64,
    pub(crate) mib: [f64; 2],
}

/// So many services with ten endpoints each; of half of them one fails.
pub(crate) fn run(services: u32) -> Result<Failing> {
    let failing = services / 2;
    progress(&format!("{failing} of {} endpoints fail at once", services * ENDPOINTS));
    let bed = Bed::named("failing")?;
    bed.namespace.ip(&["route", "add", "local", "10.0.0.0/8", "dev", "lo"])?;
    let place = || Place { namespace: Some(&bed.namespace), cgroup: None };
    let everywhere = |port: u16| SocketAddr::from(([0, 0, 0, 0], port));
    let _good = Servers::start(place(), &[(everywhere(GOOD), 0, 0)])?;
    let bad = Servers::start(place(), &[(everywhere(BAD), 0, 1)])?;
    let directory = Directory::new()?;
    let mut frontends = Vec::new();
    let rule = json!({"trafficPolicy": {"outlierDetection":
        {"consecutive5xxErrors": 1, "interval": "10s", "baseEjectionTime": "5m", "maxEjectionPercent": 100}}});
    let mut objects = vec![node("n1", "r1"), destination_rule("*.default.svc.cluster.local", &rule)];
    for i in 0..services {
        let name = format!("s{i}");
        let frontend = [172, 16 + (i >> 16) as u8, (i >> 8) as u8, i as u8];
        frontends.push(SocketAddr::from((frontend, 80)));
        objects.push(plain(service(&name, &[&std::net::Ipv4Addr::from(frontend).to_string()], 80)));
        let address = |e: u32| std::net::Ipv4Addr::from(0x0a00_0000 + i * 16 + e).to_string();
        let all: Vec<String> = (0..ENDPOINTS).map(address).collect();
        let fails = usize::from(i < failing);
        let listed = |part: &[String], port: u16, more: &str| {
            let endpoints: Vec<(&str, &str, &str)> = part.iter().map(|address| (address.as_str(), "n1", "")).collect();
            let mut slice = plain(slice(&name, port, &endpoints));
            slice["metadata"]["name"] = json!(format!("{name}-{more}"));
            slice
        };
        objects.push(listed(&all[fails..], GOOD, "good"));
        if fails > 0 {
            objects.push(listed(&all[..fails], BAD, "bad"));
        }
    }
    directory.write("c1/all.yaml", &objects)?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let own = agent.process.id();
    let mib = || memory(own, "RssAnon:").context("the agent has ended");
    let before = (mib()?, spent(own)?);
    // Every service leads to the same server, whatever its number.
    let load = Load::start_with(bed.place(), &frontends, u64::MAX, None, 2)?;
    wait_until("connections to come", LIMIT, || {
        let opened = metric(&agent, "istio_tcp_connections_opened_total")?;
        ensure!(opened > f64::from(services), "{opened}");
        Ok(())
    })?;
    let began = Instant::now();
    drop(bad);
    while metric(&agent, "portolan_ejected_endpoints")? < f64::from(failing) {
        ensure!(began.elapsed() < LIMIT, "not all are ejected after {LIMIT:?}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
    let until = began.elapsed().as_secs_f64() * 1e3;
    let summary = load.stop()?;
    let text = agent.http("/metrics")?.1;
    let within = |part: f64| quantile(&text, "portolan_ejection_seconds", part).map(|seconds| seconds * 1e3);
    Ok(Failing {
        services,
        endpoints: services * ENDPOINTS,
        failing,
        until,
        connections: summary.good + summary.bad,
        failed: summary.bad,
        half: within(0.5).context("no histogram")?,
        nearly_all: within(0.99).context("no histogram")?,
        spent: (spent(own)? - before.1) / 1e9,
        mib: [before.0, mib()?],
    })
}

/// The sum of a metric over its labels.
fn metric(agent: &Agent, name: &str) -> Result<f64> {
    let text = agent.http("/metrics")?.1;
    let lines = text.lines().filter(|line| line.starts_with(name) && !line.starts_with('#'));
    Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
}

/// The bound of the histogram's bucket within which this part of all lies.
fn quantile(text: &str, name: &str, part: f64) -> Option<f64> {
    let prefix = format!("{name}_bucket{{le=\"");
    let buckets = text.lines().filter_map(|line| {
        let (bound, count) = line.strip_prefix(&prefix)?.split_once("\"} ")?;
        let bound = if bound == "+Inf" { f64::INFINITY } else { bound.parse().ok()? };
        Some((bound, count.parse::<f64>().ok()?))
    });
    let buckets: Vec<(f64, f64)> = buckets.collect();
    let total = buckets.last()?.1;
    buckets.into_iter().find(|(_, count)| *count >= part * total).map(|(bound, _)| bound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_a_histogram() {
        let text = "x_bucket{le=\"0.001\"} 5\nx_bucket{le=\"0.005\"} 10\nx_bucket{le=\"+Inf\"} 10\n";
        assert_eq!(
            (quantile(text, "x", 0.5), quantile(text, "x", 0.99), quantile(text, "y", 0.5)),
            (Some(0.001), Some(0.005), None)
        );
    }
}
