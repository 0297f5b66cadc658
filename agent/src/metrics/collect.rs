//! Counting for the metrics: the kernel's counters belong to backend ids, which come and go; people want true counters that only go
//! up, by destination.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use portolan_common::{BackendStats, FrontendStats};
use portolan_core::{
    health::{DetectorEvent, DetectorEventKind},
    model::{Finding, Locality, NamespacedName, ServiceId},
    policy::{Assignment, Endpoint, PoolKey},
    table::{Layout, Op},
};
use portolan_datapath::{Counters, Maps};
use prometheus_client::metrics::histogram::Histogram;

use crate::controller::Closed;

/// Where connections went. Labels are few: no addresses.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Destination {
    /// The service.
    pub service: Arc<NamespacedName>,
    /// The cluster of the endpoint.
    pub cluster: Arc<str>,
    /// Its locality.
    pub locality: Arc<Locality>,
}

/// What became of the connections to a destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    /// Established.
    pub opened: u64,
    /// Closed again.
    pub closed: u64,
    /// Failed to connect.
    pub failed: u64,
    /// Bytes sent on those that were closed.
    pub sent_bytes: u64,
    /// Bytes received on those that were closed.
    pub received_bytes: u64,
}

/// Ejections and overflows by pool.
pub type HealthCounts = BTreeMap<(NamespacedName, u16, &'static str), u64>;

/// Connections that were given an endpoint, and refused ones, by service and port.
pub type ServiceTotals = BTreeMap<(NamespacedName, u16), (u64, u64)>;

/// All that `/metrics` shows, at one moment.
pub struct MetricsSnapshot {
    /// By service and port.
    pub services: ServiceTotals,
    /// By destination.
    pub totals: BTreeMap<Destination, Total>,
    /// Endpoints that are ejected now.
    pub ejected: usize,
    /// Endpoints that are probed, and those whose probes fail.
    pub probed: [usize; 2],
    /// Probes that passed, that failed, and that could not be made, so far.
    pub probes: [u64; 3],
    /// Ejections and overflows so far.
    pub health: HealthCounts,
    /// Seconds from a change to the table that the kernel has.
    pub publish_seconds: Histogram,
    /// Seconds from a failure to the table without the endpoint.
    pub ejection_seconds: Histogram,
    /// Counters of the programs.
    pub counters: Counters,
    /// How long connects and round trips took, as `Maps::times` has it.
    pub times: [Vec<u64>; 2],
    /// Connections that were refused because there were as many as there may be, by service and port.
    pub overflow: BTreeMap<(NamespacedName, u16), u64>,
    /// Looks at all sockets so far.
    pub closing_passes: u64,
    /// Connections that were ended.
    pub closed: Closed,
    /// Entries in use and entries that there are, by map.
    pub occupancy: [(&'static str, u32, u32); 6],
    /// Connections that have a place for what is remembered of them, and how many may.
    pub places: (u32, u32),
    /// Whether everything is in place.
    pub ready: bool,
    /// What people should know.
    pub findings: Vec<Finding>,
}

/// The counts so far.
#[derive(Debug)]
pub struct Collector {
    names: HashMap<SocketAddr, Vec<Name>>,
    /// Whose each backend id is.
    addresses: Vec<Option<SocketAddr>>,
    /// The counters of ids as they were last taken in, where they were not zero: most endpoints of a large mesh are never dialled.
    seen: HashMap<u32, BackendStats>,
    totals: BTreeMap<Destination, Total>,
    health: HealthCounts,
    seen_frontends: HashMap<u32, FrontendStats>,
    services: ServiceTotals,
    publish_seconds: Histogram,
    ejection_seconds: Histogram,
}

/// What an endpoint belongs to.
#[derive(Debug)]
struct Name {
    /// The service whose assignments name it.
    owner: Arc<ServiceId>,
    destination: Arc<Destination>,
    /// Whether they still do. What has gone keeps its name for its last connections, until somebody else has the address.
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
    /// Says what the endpoints of a service belong to. One that serves several services counts for the first by name.
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

    /// Before these writes are done: takes in the counters that they would reset. Whether connections of former owners of these counters stand: one that ends
    /// in the very moment may be taken off the new owner's.
    pub fn before(&mut self, ops: &[Op], maps: &Maps) -> bool {
        let mut stand = false;
        for op in ops {
            if let Op::ResetPool(id, _) = op {
                stand |= maps.pool_stats(*id).is_ok_and(|stats| stats.active != 0);
            }
            if let Op::ResetFrontend(id) = op {
                self.seen_frontends.remove(id);
            }
            if let Op::SetBackend(id, backend) = op {
                let place = *id as usize;
                if let Some(address) = self.addresses.get(place).copied().flatten() {
                    self.take(*id, address, maps);
                    stand |= maps.backend_stats(*id).is_ok_and(|stats| stats.active != 0);
                    // Its last connections are counted.
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
        stand
    }

    /// Takes in the counters of all backends in use.
    pub fn collect(&mut self, layout: &Layout, maps: &Maps) {
        for (address, id) in layout.backends() {
            self.take(id, address, maps);
        }
        let held: HashSet<SocketAddr> = self.addresses.iter().flatten().copied().collect();
        self.names.retain(|address, _| held.contains(address));
    }

    fn take(&mut self, id: u32, address: SocketAddr, maps: &Maps) {
        let Ok(now) = maps.backend_stats(id) else { return };
        let place = id as usize;
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

    /// Takes in the counters of a frontend.
    pub fn take_frontend(&mut self, id: u32, service: &NamespacedName, port: u16, now: FrontendStats) {
        let before = self.seen_frontends.insert(id, now).unwrap_or_default();
        // The id went to another frontend, whose counters began at zero.
        let before = if now.cursor < before.cursor { FrontendStats::default() } else { before };
        let (given, refused) = self.services.entry((service.clone(), port)).or_default();
        *given += now.given().saturating_sub(before.given());
        *refused += now.refused_in_all().saturating_sub(before.refused_in_all());
    }

    /// By service and port.
    pub fn services(&self) -> &ServiceTotals {
        &self.services
    }

    /// Counts a verdict of the outlier detection.
    pub fn count_health(&mut self, pool: &PoolKey, event: &DetectorEvent) {
        let kind = match event.kind {
            DetectorEventKind::Ejected { .. } => "ejected",
            DetectorEventKind::Overflow { .. } => "overflow",
            DetectorEventKind::Released => return,
        };
        *self.health.entry((pool.service.name.clone(), pool.port, kind)).or_default() += 1;
    }

    /// An ejection was not confirmed.
    pub fn count_unconfirmed(&mut self, pool: &PoolKey) {
        *self.health.entry((pool.service.name.clone(), pool.port, "unconfirmed")).or_default() += 1;
    }

    /// A table was published.
    pub fn published(&mut self, took: Duration) {
        self.publish_seconds.observe(took.as_secs_f64());
    }

    /// An endpoint was ejected: so long after its failure nobody is sent there any more.
    pub fn ejected(&mut self, took: Duration) {
        self.ejection_seconds.observe(took.as_secs_f64());
    }

    /// How long that took; shared, not copied.
    pub fn ejection_seconds(&self) -> Histogram {
        self.ejection_seconds.clone()
    }

    /// How long publishing took; shared, not copied.
    pub fn publish_seconds(&self) -> Histogram {
        self.publish_seconds.clone()
    }

    /// By destination.
    pub fn totals(&self) -> &BTreeMap<Destination, Total> {
        &self.totals
    }

    /// Ejections and overflows.
    pub fn health(&self) -> &HealthCounts {
        &self.health
    }
}

/// The destination of an endpoint: one value for all that are alike.
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

/// The endpoints of assignments, with their pools.
fn endpoints(assignments: &[Arc<Assignment>]) -> impl Iterator<Item = (&PoolKey, &Endpoint)> {
    let pools = assignments.iter().flat_map(|assignment| &assignment.routes).map(|route| &route.pool);
    pools.flat_map(|pool| pool.endpoints.iter().map(|endpoint| (&pool.key, endpoint)))
}
