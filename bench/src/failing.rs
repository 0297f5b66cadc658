//! Endpoints that fail one after another, and then a twentieth of a mesh at once.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use portolan_tests::{
    Agent, Directory, ProcessContext, TestBed,
    objects::{destination_rule, node, plain, service, slice},
    storm::{Load, Servers},
    wait_until,
};
use serde::Serialize;
use serde_json::json;

use crate::{files::memory, progress, world::spent};

const ENDPOINTS: u32 = 10;
/// Port of healthy endpoints.
const GOOD: u16 = 9080;
/// Port of endpoints whose server stops during the measurement.
const BAD: u16 = 9081;
/// Port without a listener: connects are refused from the start.
const DEAD: u16 = 9082;
/// Time limit for each wait.
const LIMIT: Duration = Duration::from_secs(60);

/// Figures of both kinds of failure.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Failing {
    pub(crate) services: u32,
    pub(crate) endpoints: u32,
    /// Number of endpoints that fail at the same moment.
    pub(crate) failing: u32,
    /// Milliseconds from that moment until the last of them is ejected, under continuous load.
    pub(crate) until: f64,
    /// Connections made by the load generator in total.
    pub(crate) connections: u64,
    /// Connections of those that failed.
    pub(crate) failed: u64,
    /// Milliseconds from a failure in the kernel to a published table without the endpoint: p50, p99.
    /// These are bucket bounds of the agent's histogram, for the endpoints that fail at once.
    pub(crate) within: [f64; 2],
    /// Number of endpoints that fail one after another, on an otherwise idle machine.
    pub(crate) single: u32,
    /// The same as `within`, for these endpoints.
    pub(crate) single_within: [f64; 2],
    /// CPU time of the agent, in seconds.
    pub(crate) spent: f64,
    /// Anonymous memory of the agent in MiB, before and after.
    pub(crate) mib: [f64; 2],
}

/// Measures a mesh of `services` Services with ten endpoints each.
///
/// First, one endpoint in each of a fifth of the Services fails, one after another.
/// Then one endpoint in each of another half of the Services fails, all at once.
pub(crate) fn run(services: u32) -> Result<Failing> {
    let (failing, single) = (services / 2, services / 5);
    progress(&format!("{failing} of {} endpoints fail at once", services * ENDPOINTS));
    let bed = TestBed::named("failing")?;
    bed.namespace.ip(&["route", "add", "local", "10.0.0.0/8", "dev", "lo"])?;
    let place = || ProcessContext { namespace: Some(&bed.namespace), cgroup: None };
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
        let fails = usize::from(i < failing + single);
        let port = if i < failing { BAD } else { DEAD };
        let listed = |part: &[String], port: u16, more: &str| {
            let endpoints: Vec<(&str, &str, &str)> = part.iter().map(|address| (address.as_str(), "n1", "")).collect();
            let mut slice = plain(slice(&name, port, &endpoints));
            slice["metadata"]["name"] = json!(format!("{name}-{more}"));
            slice
        };
        objects.push(listed(&all[fails..], GOOD, "good"));
        if fails > 0 {
            objects.push(listed(&all[..fails], port, "bad"));
        }
    }
    directory.write("c1/all.yaml", &objects)?;
    let agent = bed.agent(&directory, "c1", "n1")?;
    let own = agent.process.id();
    let mib = || memory(own, "RssAnon:").context("the agent has exited");
    // One after another: dial every endpoint of each of these Services. One in ten refuses.
    let mut client = bed.dialer()?;
    for frontend in &frontends[failing as usize..(failing + single) as usize] {
        client.dial(&frontend.to_string(), ENDPOINTS)?;
    }
    wait_until("endpoints that fail one by one to be ejected", LIMIT, || {
        let ejected = metric(&agent, "portolan_ejected_endpoints")?;
        ensure!(ejected >= f64::from(single), "{ejected}");
        Ok(())
    })?;
    let one_by_one = agent.http("/metrics")?.1;
    let before = (mib()?, spent(own)?);
    // Load on all Services. The healthy endpoints of all of them are the same server.
    let load = Load::start_with(bed.place(), &frontends, u64::MAX, None, 2)?;
    wait_until("load on all services", LIMIT, || {
        let opened = metric(&agent, "istio_tcp_connections_opened_total")?;
        ensure!(opened > 2.0 * f64::from(services), "{opened}");
        Ok(())
    })?;
    let began = Instant::now();
    drop(bad);
    while metric(&agent, "portolan_ejected_endpoints")? < f64::from(failing + single) {
        ensure!(began.elapsed() < LIMIT, "not all failing endpoints are ejected after {LIMIT:?}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
    let until = began.elapsed().as_secs_f64() * 1e3;
    let summary = load.stop()?;
    let text = agent.http("/metrics")?.1;
    let within = |after: &str, before: &str| -> Result<[f64; 2]> {
        let of = |part| {
            quantile(after, before, "portolan_ejection_seconds", part)
                .context("/metrics has no samples of portolan_ejection_seconds")
        };
        Ok([of(0.5)? * 1e3, of(0.99)? * 1e3])
    };
    Ok(Failing {
        services,
        endpoints: services * ENDPOINTS,
        failing,
        until,
        connections: summary.good + summary.bad,
        failed: summary.bad,
        within: within(&text, &one_by_one)?,
        single,
        single_within: within(&one_by_one, "")?,
        spent: (spent(own)? - before.1) / 1e9,
        mib: [before.0, mib()?],
    })
}

/// Returns the sum of a metric over all label values.
fn metric(agent: &Agent, name: &str) -> Result<f64> {
    let text = agent.http("/metrics")?.1;
    let lines = text.lines().filter(|line| line.starts_with(name) && !line.starts_with('#'));
    Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
}

/// Returns the upper bound of the bucket with a quantile (`part`, 0 to 1) of the samples between two scrapes.
/// Returns `None` if there are no samples.
fn quantile(after: &str, before: &str, name: &str, part: f64) -> Option<f64> {
    let (after, before) = (buckets(after, name), buckets(before, name));
    let count = |i: usize| Some(after.get(i)?.1 - before.get(i).map_or(0.0, |(_, count)| *count));
    let total = count(after.len().checked_sub(1)?)?;
    let found = (0..after.len()).find(|i| count(*i).is_some_and(|count| total > 0.0 && count >= part * total))?;
    Some(after[found].0)
}

/// Parses the buckets of a histogram without labels: upper bounds and cumulative counts.
fn buckets(text: &str, name: &str) -> Vec<(f64, f64)> {
    let prefix = format!("{name}_bucket{{le=\"");
    let buckets = text.lines().filter_map(|line| {
        let (bound, count) = line.strip_prefix(&prefix)?.split_once("\"} ")?;
        let bound = if bound == "+Inf" { f64::INFINITY } else { bound.parse().ok()? };
        Some((bound, count.parse::<f64>().ok()?))
    });
    buckets.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantile_is_bucket_bound_of_samples_between_scrapes() {
        let text = "x_bucket{le=\"0.001\"} 5\nx_bucket{le=\"0.005\"} 10\nx_bucket{le=\"+Inf\"} 10\n";
        assert_eq!(quantile(text, "", "x", 0.5), Some(0.001));
        assert_eq!(quantile(text, "", "x", 0.99), Some(0.005));
        assert_eq!(quantile(text, "", "y", 0.5), None);
        assert_eq!(quantile(text, "x_bucket{le=\"0.001\"} 5\nx_bucket{le=\"0.005\"} 5\n", "x", 0.5), Some(0.005));
    }
}
