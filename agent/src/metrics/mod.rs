//! `/metrics` in the OpenMetrics text format.
//!
//! Names follow Istio's standard metrics where one exists; all others start with `portolan_`.
//! Labels have low cardinality: no addresses.

pub mod collect;

use std::sync::atomic::AtomicU64;

use portolan_core::model::Severity;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, NoLabelSet, text::encode},
    metrics::{MetricType, counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use self::collect::{Destination, HealthCount, MetricsSnapshot, Total};
use crate::{opt_out, source::SourceReport};

/// Name and help of a metric, and the total that it shows.
type Metric = (&'static str, &'static str, fn(&Total) -> u64);
type Counters<L> = Family<L, Counter<u64, AtomicU64>>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DestinationLabels {
    destination_service_namespace: String,
    destination_service_name: String,
    destination_cluster: String,
    destination_region: String,
    destination_zone: String,
}

impl From<&Destination> for DestinationLabels {
    fn from(destination: &Destination) -> Self {
        Self {
            destination_service_namespace: destination.service.namespace.clone(),
            destination_service_name: destination.service.name.clone(),
            destination_cluster: destination.cluster.to_string(),
            destination_region: destination.locality.region.clone(),
            destination_zone: destination.locality.zone.clone(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ServiceLabels {
    namespace: String,
    service: String,
    port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MapLabels {
    map: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClosedLabels {
    reason: &'static str,
    protocol: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ProbeLabels {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabels {
    cluster: String,
    resource: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FindingLabels {
    severity: FindingSeverity,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
enum FindingSeverity {
    error,
    warning,
}

/// Renders all metrics in the OpenMetrics text format.
///
/// # Errors
/// Returns an error if a metric cannot be encoded, which is not expected to happen.
pub fn render(
    sample: &MetricsSnapshot,
    reading: &[SourceReport],
    outs: &opt_out::Report,
) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::default();
    connections(&mut registry, sample);
    services(&mut registry, sample);
    agent(&mut registry, sample);
    sources(&mut registry, reading);
    opt_outs(&mut registry, outs);
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

fn connections(registry: &mut Registry, sample: &MetricsSnapshot) {
    let metrics: [Metric; 5] = [
        ("istio_tcp_connections_opened", "Connections established", |total| total.opened),
        ("istio_tcp_connections_closed", "Connections closed after they were established", |total| total.closed),
        ("istio_tcp_connections_failed", "Connects that were refused, reset, or timed out", |total| total.failed),
        ("istio_tcp_sent_bytes", "Bytes sent on closed connections", |total| total.sent_bytes),
        ("istio_tcp_received_bytes", "Bytes received on closed connections", |total| total.received_bytes),
    ];
    for (name, help, value) in metrics {
        let family = Counters::<DestinationLabels>::default();
        for (destination, total) in &sample.totals {
            family.get_or_create(&destination.into()).inc_by(value(total));
        }
        registry.register(name, help, family);
    }
}

fn services(registry: &mut Registry, sample: &MetricsSnapshot) {
    let (picks, refused) = (Counters::<ServiceLabels>::default(), Counters::<ServiceLabels>::default());
    for ((service, port), (given, refusals)) in &sample.services {
        let labels = ServiceLabels { namespace: service.namespace.clone(), service: service.name.clone(), port: *port };
        picks.get_or_create(&labels).inc_by(*given);
        refused.get_or_create(&labels).inc_by(*refusals);
    }
    registry.register("portolan_picks", "Connections to the service that got an endpoint", picks);
    let overflow = Counters::<ServiceLabels>::default();
    for ((service, port), count) in &sample.overflow {
        let labels = ServiceLabels { namespace: service.namespace.clone(), service: service.name.clone(), port: *port };
        overflow.get_or_create(&labels).inc_by(*count);
    }
    let about = "Connections refused by maxConnections";
    registry.register("portolan_connection_limit_refusals", about, overflow.clone());
    registry.register("portolan_overflow", "Deprecated alias of portolan_connection_limit_refusals", overflow);
    registry.register("portolan_refused", "Connections refused: no eligible endpoint, or maxConnections", refused);
    let (ejections, overflows) = (Counters::<ServiceLabels>::default(), Counters::<ServiceLabels>::default());
    let unconfirmed = Counters::<ServiceLabels>::default();
    for ((service, port, kind), count) in &sample.health {
        let labels = ServiceLabels { namespace: service.namespace.clone(), service: service.name.clone(), port: *port };
        let family = match *kind {
            HealthCount::Ejected => &ejections,
            HealthCount::Limited => &overflows,
            HealthCount::Unconfirmed => &unconfirmed,
        };
        family.get_or_create(&labels).inc_by(*count);
    }
    registry.register("portolan_ejections", "Endpoints ejected by outlier detection", ejections);
    registry.register("portolan_ejection_overflows", "Ejections suppressed by maxEjectionPercent", overflows);
    let about = "Ejections not confirmed: failures seen from a single pod";
    registry.register("portolan_ejections_unconfirmed", about, unconfirmed);
}

fn agent(registry: &mut Registry, sample: &MetricsSnapshot) {
    let gauge = |value: i64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(value);
        gauge
    };
    registry.register("portolan_ejected_endpoints", "Endpoints currently ejected", gauge(sample.ejected as i64));
    let [targets, failing] = sample.probed.map(|count| gauge(count as i64));
    registry.register("portolan_probed_endpoints", "Endpoints with an active probe (portolan.io/probe)", targets);
    registry.register("portolan_failing_endpoints", "Endpoints that currently fail their active probe", failing);
    let probes = Counters::<ProbeLabels>::default();
    for (result, count) in ["success", "failing", "unknown"].into_iter().zip(sample.probes) {
        probes.get_or_create(&ProbeLabels { result }).inc_by(count);
    }
    // The name of `success` up to version 0.1, until the next release.
    probes.get_or_create(&ProbeLabels { result: "well" }).inc_by(sample.probes[0]);
    registry.register(
        "portolan_probes",
        "Active probes by result; unknown: the agent could not probe; well: deprecated, repeats success",
        probes,
    );
    registry.register("portolan_ready", "1 while the agent is ready, see /readyz", gauge(sample.ready.into()));
    registry.register(
        "portolan_publish_seconds",
        "Time from a change to the published table in the kernel",
        sample.publish_seconds.clone(),
    );
    registry.register(
        "portolan_ejection_seconds",
        "Time from the failure that triggers an ejection to the published table without the endpoint",
        sample.ejection_seconds.clone(),
    );
    let names = ["portolan_connect_seconds", "portolan_round_trip_seconds"];
    let about = [
        "Time from SYN to established, where outlier detection is on",
        "Smoothed round-trip time of connections at close, where outlier detection is on",
    ];
    for ((name, about), times) in names.into_iter().zip(about).zip(&sample.times) {
        registry.register_collector(Box::new(Times { name, about, times: times.clone() }));
    }
    let counters = [
        (
            "portolan_events_lost",
            "Connection outcomes dropped: ring buffer full, or pod over its event budget",
            sample.counters.events_lost,
        ),
        (
            "portolan_lookup_inconsistencies",
            "Connections refused because the maps were inconsistent",
            sample.counters.inconsistent,
        ),
        (
            "portolan_socket_state_alloc_failures",
            "Sockets that got an endpoint, but no per-socket state",
            sample.counters.no_memory,
        ),
        (
            "portolan_socket_storage_states",
            "Sockets whose state is in socket storage, because the connections map had no entry for it",
            sample.counters.fallback,
        ),
        (
            "portolan_connections_over_share",
            "Sockets whose state is in socket storage, because their pod had used up its share of the connections map",
            sample.connection_slots.2,
        ),
        ("portolan_inconsistent", "Deprecated alias of portolan_lookup_inconsistencies", sample.counters.inconsistent),
        ("portolan_no_memory", "Deprecated alias of portolan_socket_state_alloc_failures", sample.counters.no_memory),
    ];
    for (name, help, value) in counters {
        let counter = Counter::<u64, AtomicU64>::default();
        counter.inc_by(value);
        registry.register(name, help, counter);
    }
    let (used, capacity) = (Family::<MapLabels, Gauge>::default(), Family::<MapLabels, Gauge>::default());
    let connection_slots = ("connections", sample.connection_slots.0, sample.connection_slots.1);
    for (map, entries, size) in sample.occupancy.into_iter().chain([connection_slots]) {
        used.get_or_create(&MapLabels { map }).set(entries.into());
        capacity.get_or_create(&MapLabels { map }).set(size.into());
    }
    registry.register("portolan_map_entries", "Map entries in use", used);
    registry.register("portolan_map_capacity", "Map capacity in entries", capacity);
    let passes = Counter::<u64, AtomicU64>::default();
    passes.inc_by(sample.closing_passes);
    registry.register("portolan_closing_passes", "Sweeps of all network namespaces for stale connections", passes);
    let schema = gauge(portolan_common::SCHEMA_VERSION.into());
    registry.register("portolan_schema", "Schema version of the BPF maps", schema);
    let closed = Counters::<ClosedLabels>::default();
    for ((reason, protocol), count) in &sample.closed {
        let labels = ClosedLabels { reason: reason.as_str(), protocol: protocol.to_string() };
        closed.get_or_create(&labels).inc_by(*count);
    }
    registry.register("portolan_closed_connections", "Connections terminated by Portolan, by reason", closed);
    let findings = Family::<FindingLabels, Gauge>::default();
    for (severity, label) in [(Severity::Error, FindingSeverity::error), (Severity::Warning, FindingSeverity::warning)]
    {
        let count = sample.findings.iter().filter(|finding| finding.severity == severity).count();
        findings.get_or_create(&FindingLabels { severity: label }).set(count as i64);
    }
    registry.register("portolan_findings", "Current findings by severity, see `portolan get services`", findings);
}

fn sources(registry: &mut Registry, reading: &[SourceReport]) {
    let objects = Family::<SourceLabels, Gauge>::default();
    let failing = Family::<SourceLabels, Gauge>::default();
    let age = Family::<SourceLabels, Gauge<f64, AtomicU64>>::default();
    let lists = Counters::<SourceLabels>::default();
    for source in reading {
        let labels = SourceLabels { cluster: source.cluster.clone(), resource: source.resource.clone() };
        objects.get_or_create(&labels).set(source.objects as i64);
        failing.get_or_create(&labels).set(source.error.is_some().into());
        lists.get_or_create(&labels).inc_by(source.lists);
        if let Some(seconds) = source.lag_seconds {
            age.get_or_create(&labels).set(seconds);
        }
    }
    registry.register("portolan_source_objects", "Objects held in memory, see `portolan get sources`", objects);
    registry.register("portolan_source_failing", "1 while the source has an error", failing);
    registry.register("portolan_source_age_seconds", "Time since the last sign of life of the source", age);
    registry.register("portolan_source_lists", "Full lists of the source", lists);
}

fn opt_outs(registry: &mut Registry, outs: &opt_out::Report) {
    let pods = Gauge::<i64>::default();
    pods.set(outs.pods.iter().filter(|pod| !pod.cgroups.is_empty()).count() as i64);
    registry.register("portolan_opted_out_pods", "Pods excluded by label, see `portolan get opt-outs`", pods);
}

/// A histogram that the eBPF programs fill.
#[derive(Debug)]
struct Times {
    name: &'static str,
    about: &'static str,
    /// Number of times below each power of two, in microseconds. The last element is the sum of all times.
    times: Vec<u64>,
}

impl Collector for Times {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Some((sum, counts)) = self.times.split_last() else { return Ok(()) };
        let bounds = (0..).map(|power: i32| f64::from(power).exp2() / 1e6);
        let last = counts.len().saturating_sub(1);
        let buckets = bounds.zip(counts).enumerate();
        // The last bucket has no upper bound.
        let buckets: Vec<(f64, u64)> =
            buckets.map(|(i, (bound, count))| (if i == last { f64::MAX } else { bound }, *count)).collect();
        let total = counts.iter().sum();
        let mut encoder = encoder.encode_descriptor(self.name, self.about, None, MetricType::Histogram)?;
        encoder.encode_histogram::<NoLabelSet>(*sum as f64 / 1e6, total, &buckets, None)
    }
}
