//! Turns the kernel's counters into metrics.
//!
//! The kernel counts by backend id, and ids are reused. Metrics need monotonic counters by destination.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use portolan_common::{BackendStats, FrontendStats};
use portolan_core::{
    model::{Finding, Locality, NamespacedName, ServiceId},
    policy::{Assignment, Endpoint, PoolKey},
    table::{BackendId, FrontendId, Layout, Op},
};
use portolan_datapath::{Closed, Counters};
use prometheus_client::metrics::histogram::Histogram;

use crate::kernel::Kernel;

/// Destination of connections. It has no address, to bound the cardinality of the metrics.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Destination {
    /// Namespace and name of the service.
    pub service: Arc<NamespacedName>,
    /// ID of the cluster that the endpoint is in.
    pub cluster: Arc<str>,
    /// Region, zone and subzone of the endpoint.
    pub locality: Arc<Locality>,
}

/// Connection outcomes of a destination, since the agent started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    /// Connections established.
    pub opened: u64,
    /// Established connections that were closed.
    pub closed: u64,
    /// Connects that failed.
    pub failed: u64,
    /// Bytes sent on closed connections.
    pub sent_bytes: u64,
    /// Bytes received on closed connections.
    pub received_bytes: u64,
}

/// The result of a threshold that an endpoint reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HealthCount {
    /// The endpoint was ejected.
    Ejected,
    /// `maxEjectionPercent` allowed no further ejection.
    Limited,
    /// A single pod saw the failures, and the agent could not confirm them.
    Unconfirmed,
}

/// Counts by service, port and kind: `ejected`, `overflow` (suppressed by the limit), or `unconfirmed`.
pub type HealthCounts = BTreeMap<(NamespacedName, u16, HealthCount), u64>;

/// Number of connections with an endpoint and number of refused connections, by service and port.
pub type ServiceTotals = BTreeMap<(NamespacedName, u16), (u64, u64)>;

/// Snapshot of everything that `/metrics` shows.
#[derive(Debug)]
pub struct MetricsSnapshot {
    /// Picks and refusals by service and port.
    pub services: ServiceTotals,
    /// Connection outcomes by destination.
    pub totals: BTreeMap<Destination, Total>,
    /// Number of endpoints that are currently ejected.
    pub ejected: usize,
    /// Number of endpoints with an active probe, and of those whose probes fail.
    pub probed: [usize; 2],
    /// Number of probes that succeeded, that failed, and that could not be made.
    pub probes: [u64; 3],
    /// Ejections, suppressed ejections and unconfirmed ejections.
    pub health: HealthCounts,
    /// Seconds from a change to the published table in the kernel.
    pub publish_seconds: Histogram,
    /// Seconds from a failure to the published table without the endpoint.
    pub ejection_seconds: Histogram,
    /// Error counters of the eBPF programs.
    pub counters: Counters,
    /// Histograms of connect and round-trip times, in the format of `Maps::times`.
    pub times: [Vec<u64>; 2],
    /// Connections refused by `maxConnections`, by service and port.
    pub overflow: BTreeMap<(NamespacedName, u16), u64>,
    /// Number of sweeps over all sockets.
    pub closing_passes: u64,
    /// Number of terminated connections, by reason and protocol.
    pub closed: Closed,
    /// Map name, entries in use, and capacity of each map.
    pub occupancy: [(&'static str, u32, u32); 7],
    /// Number of connections with a state entry, and the capacity for such entries.
    pub connection_slots: (u32, u32, u64),
    /// Whether the agent is ready.
    pub ready: bool,
    /// All current findings.
    pub findings: Vec<Finding>,
}

/// Accumulates the counters of the kernel and of the agent.
#[derive(Debug)]
pub struct Collector {
    names: HashMap<SocketAddr, Vec<Name>>,
    /// Endpoint of each backend id.
    addresses: Vec<Option<SocketAddr>>,
    /// Last collected counters of each backend id.
    /// An id is absent while its counters are zero: most endpoints of a large mesh get no connections.
    seen: HashMap<BackendId, BackendStats>,
    totals: BTreeMap<Destination, Total>,
    health: HealthCounts,
    seen_frontends: HashMap<FrontendId, FrontendStats>,
    services: ServiceTotals,
    publish_seconds: Histogram,
    ejection_seconds: Histogram,
}

/// A service that an endpoint belongs to.
#[derive(Debug)]
struct Name {
    /// Service whose assignments contain the endpoint.
    owner: Arc<ServiceId>,
    destination: Arc<Destination>,
    /// Whether they still do.
    /// A removed endpoint keeps its name for its remaining connections, until another service gets the address.
    live: bool,
}

impl Default for Collector {
    fn default() -> Self {
        Self {
            names: HashMap::new(),
            addresses: Vec::new(),
            seen: HashMap::new(),
            totals: BTreeMap::new(),
            health: BTreeMap::new(),
            seen_frontends: HashMap::new(),
            services: BTreeMap::new(),
            publish_seconds: Histogram::new([0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]),
            ejection_seconds: Histogram::new([0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0]),
        }
    }
}

impl Collector {
    /// Records the destinations of a service's endpoints. An endpoint of several services counts for the first by name.
    pub fn name(&mut self, service: &ServiceId, before: &[Arc<Assignment>], after: &[Arc<Assignment>]) {
        for (_, endpoint) in endpoints(before) {
            for name in self.names.get_mut(&endpoint.address).into_iter().flatten() {
                name.live &= *name.owner != *service;
            }
        }
        let owner = Arc::new(service.clone());
        let mut made: Vec<Arc<Destination>> = Vec::new();
        for (pool, endpoint) in endpoints(after) {
            let destination = shared(&mut made, &pool.service.name, endpoint);
            let names = self.names.entry(endpoint.address).or_default();
            names.retain(|name| name.live && *name.owner != *service);
            names.reserve_exact(1);
            names.push(Name { owner: Arc::clone(&owner), destination, live: true });
            names.sort_by(|a, b| a.owner.cmp(&b.owner));
        }
    }

    /// Collects the counters that these writes reset; must run before the writes.
    ///
    /// Returns whether previous owners of these counters still have connections.
    /// If such a connection closes at the same time, it may be subtracted from the counters of the new owner.
    pub fn before(&mut self, ops: &[Op], kernel: &impl Kernel) -> bool {
        let mut active = false;
        for op in ops {
            if let Op::ResetPool(id, _) = op {
                active |= kernel.pool_stats(*id).is_ok_and(|stats| !stats.active.is_zero());
            }
            if let Op::ResetFrontend(id, _) = op {
                self.seen_frontends.remove(id);
            }
            if let Op::SetBackend(id, backend) = op {
                let place = id.get() as usize;
                if let Some(address) = self.addresses.get(place).copied().flatten() {
                    self.take(*id, address, kernel);
                    active |= kernel.backend_stats(*id).is_ok_and(|stats| !stats.active.is_zero());
                    // The counters of its last connections are collected.
                    if self.names.get(&address).is_some_and(|names| names.iter().all(|name| !name.live)) {
                        self.names.remove(&address);
                    }
                }
                if self.addresses.len() <= place {
                    self.addresses.resize(place + 1, None);
                }
                self.addresses[place] = Some(backend.endpoint.socket_addr());
                self.seen.remove(id);
            }
        }
        active
    }

    /// Collects the counters of all backends in use.
    pub fn collect(&mut self, layout: &Layout, kernel: &impl Kernel) {
        for (address, id) in layout.backends() {
            self.take(id, address, kernel);
        }
        let in_use: HashSet<SocketAddr> = self.addresses.iter().flatten().copied().collect();
        self.names.retain(|address, _| in_use.contains(address));
    }

    fn take(&mut self, id: BackendId, address: SocketAddr, kernel: &impl Kernel) {
        let Ok(now) = kernel.backend_stats(id) else { return };
        let place = id.get() as usize;
        if self.addresses.len() <= place {
            self.addresses.resize(place + 1, None);
        }
        self.addresses[place] = Some(address);
        let zero = BackendStats { epoch: now.epoch, ..BackendStats::default() };
        let before = self.seen.get(&id).copied().unwrap_or_default();
        if now == zero && before == BackendStats::default() {
            return;
        }
        self.seen.insert(id, now);
        let names = self.names.get(&address).map(Vec::as_slice).unwrap_or_default();
        let Some(name) = names.iter().find(|name| name.live).or(names.first()) else { return };
        let total = self.totals.entry((*name.destination).clone()).or_default();
        total.opened += now.opened.saturating_sub(before.opened);
        total.closed += now.closed.saturating_sub(before.closed);
        total.failed += now.failed.saturating_sub(before.failed);
        total.sent_bytes += now.sent_bytes.saturating_sub(before.sent_bytes);
        total.received_bytes += now.received_bytes.saturating_sub(before.received_bytes);
    }

    /// Collects the counters of a frontend.
    pub fn take_frontend(&mut self, id: FrontendId, service: &NamespacedName, port: u16, now: FrontendStats) {
        let before = self.seen_frontends.insert(id, now).unwrap_or_default();
        // The id was reused by another frontend, whose counters started at zero.
        let before = if now.cursor < before.cursor { FrontendStats::default() } else { before };
        let (given, refused) = self.services.entry((service.clone(), port)).or_default();
        *given += now.given().saturating_sub(before.given());
        *refused += now.refused_in_all().saturating_sub(before.refused_in_all());
    }

    /// Returns picks and refusals by service and port.
    pub fn services(&self) -> &ServiceTotals {
        &self.services
    }

    /// Counts the result of a threshold that an endpoint reached.
    pub fn count_health(&mut self, pool: &PoolKey, count: HealthCount) {
        *self.health.entry((pool.service.name.clone(), pool.port, count)).or_default() += 1;
    }

    /// Records the time from a change to its published table.
    pub fn published(&mut self, took: Duration) {
        self.publish_seconds.observe(took.as_secs_f64());
    }

    /// Records the time from a failure to the published table without the endpoint.
    pub fn ejected(&mut self, took: Duration) {
        self.ejection_seconds.observe(took.as_secs_f64());
    }

    /// Returns the histogram of ejection times. The clone shares its data with this collector.
    pub fn ejection_seconds(&self) -> Histogram {
        self.ejection_seconds.clone()
    }

    /// Returns the histogram of publish times. The clone shares its data with this collector.
    pub fn publish_seconds(&self) -> Histogram {
        self.publish_seconds.clone()
    }

    /// Returns the connection outcomes by destination.
    pub fn totals(&self) -> &BTreeMap<Destination, Total> {
        &self.totals
    }

    /// Returns the counts of ejections, suppressed ejections and unconfirmed ejections.
    pub fn health(&self) -> &HealthCounts {
        &self.health
    }
}

/// Returns the destination of an endpoint. Equal destinations share one allocation.
fn shared(made: &mut Vec<Arc<Destination>>, service: &NamespacedName, endpoint: &Endpoint) -> Arc<Destination> {
    let place = (&endpoint.cluster, &endpoint.locality);
    let is_same = |own: &&Arc<Destination>| *own.service == *service && (&own.cluster, &own.locality) == place;
    if let Some(known) = made.iter().find(is_same) {
        return Arc::clone(known);
    }
    let of_service = made.iter().find(|own| *own.service == *service);
    let service = of_service.map_or_else(|| Arc::new(service.clone()), |own| Arc::clone(&own.service));
    let new = Arc::new(Destination {
        service,
        cluster: Arc::clone(&endpoint.cluster),
        locality: Arc::clone(&endpoint.locality),
    });
    made.push(Arc::clone(&new));
    new
}

/// Iterates over the endpoints of assignments, each with the key of its pool.
fn endpoints(assignments: &[Arc<Assignment>]) -> impl Iterator<Item = (&PoolKey, &Endpoint)> {
    let pools = assignments.iter().flat_map(|assignment| &assignment.routes).map(|route| &route.pool);
    pools.flat_map(|pool| pool.endpoints.iter().map(|endpoint| (&pool.key, endpoint)))
}
