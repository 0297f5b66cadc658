//! Istio's rules, as far as they mean something for a connection.

use std::{collections::BTreeMap, fmt, time::Duration};

use super::{LocalityPattern, NamespacedName};

/// How a host is chosen inside a locality.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// The next one, by weight.
    RoundRobin,
    /// Of two drawn, the one with fewer active connections.
    LeastRequest,
    /// A random one.
    Random,
    /// By a hash of the client.
    ConsistentHash,
    /// The address that was dialled, unchanged.
    Passthrough,
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RoundRobin => "ROUND_ROBIN",
            Self::LeastRequest => "LEAST_REQUEST",
            Self::Random => "RANDOM",
            Self::ConsistentHash => "CONSISTENT_HASH",
            Self::Passthrough => "PASSTHROUGH",
        })
    }
}

/// `distribute`: shares for clients of one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Distribute {
    /// Clients that it is for.
    pub from: LocalityPattern,
    /// Destinations and percentages, which sum to 100, in the order of their names.
    pub to: Vec<(LocalityPattern, u32)>,
}

/// `failover`: where a region's traffic goes when that region fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failover {
    /// Region of the client.
    pub from: String,
    /// Region that it turns to.
    pub to: String,
}

/// `localityLbSetting`. A valid one has `distribute` or `failover`, not both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalitySetting {
    /// Whether locality counts at all.
    pub enabled: bool,
    /// Shares by region; the first whose `from` matches counts.
    pub distribute: Vec<Distribute>,
    /// Preferred regions for failover.
    pub failover: Vec<Failover>,
}

impl Default for LocalitySetting {
    fn default() -> Self {
        Self { enabled: true, distribute: Vec::new(), failover: Vec::new() }
    }
}

/// `outlierDetection`, with Envoy's defaults where Istio sets none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutlierDetection {
    /// Failures in a row that eject; 0 turns it off.
    pub consecutive_errors: u32,
    /// The sweep that releases.
    pub interval: Duration,
    /// Time of the first ejection; the n-th lasts n times as long.
    pub base_ejection_time: Duration,
    /// No ejection lasts longer.
    pub max_ejection_time: Duration,
    /// Percentage of the pool that may be ejected at once.
    pub max_ejection_percent: u32,
    /// Panic threshold in percent; 0: no panic.
    pub min_health_percent: u32,
}

/// `trafficPolicy`. Absent blocks are the defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrafficPolicy {
    /// Host choice.
    pub algorithm: Option<Algorithm>,
    /// Locality setting; it replaces the mesh's.
    pub locality: Option<LocalitySetting>,
    /// Outlier detection.
    pub outlier: Option<OutlierDetection>,
    /// `connectionPool.tcp.connectTimeout`.
    pub connect_timeout: Option<Duration>,
    /// `portLevelSettings`: each replaces everything above for its port.
    pub ports: BTreeMap<u16, TrafficPolicy>,
}

/// A named part of a destination's endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subset {
    /// The name that routes use.
    pub name: String,
    /// Labels that an endpoint must have.
    pub labels: BTreeMap<String, String>,
    /// Overrides, block by block.
    pub policy: TrafficPolicy,
}

/// A DestinationRule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DestinationRule {
    /// Its name.
    pub name: NamespacedName,
    /// The host it is for, as written: short, full, or with a leading `*`.
    pub host: String,
    /// Its policy.
    pub policy: TrafficPolicy,
    /// Its subsets.
    pub subsets: Vec<Subset>,
}

/// One destination of a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightedDestination {
    /// Host, as written.
    pub host: String,
    /// Subset of it.
    pub subset: Option<String>,
    /// Port of it; the dialled one where absent.
    pub port: Option<u16>,
    /// Relative to the sum of the route.
    pub weight: u32,
}

/// One `tcp` route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpRoute {
    /// Ports that it is for; empty: all.
    pub ports: Vec<u16>,
    /// Where to.
    pub destinations: Vec<WeightedDestination>,
}

/// A VirtualService that a node can honour: its `tcp` routes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtualService {
    /// Its name.
    pub name: NamespacedName,
    /// The hosts it is for, as written.
    pub hosts: Vec<String>,
    /// In order; the first that matches counts.
    pub tcp: Vec<TcpRoute>,
}

impl TrafficPolicy {
    /// Whether the `loadBalancer` block is there.
    pub fn has_load_balancer(&self) -> bool {
        self.algorithm.is_some() || self.locality.is_some()
    }
}
