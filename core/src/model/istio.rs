//! Istio's rules, as far as they mean something for a connection.

use std::{collections::BTreeMap, fmt, net::IpAddr, str::FromStr, sync::Arc, time::Duration};

use super::{
    endpoint::Labels, locality::LocalityPattern, name::NamespacedName, outlier_detection::OutlierDetection,
    probe::Probe,
};

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

/// `localityLbSetting`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalitySetting {
    /// Whether locality counts at all.
    pub enabled: bool,
    /// Shares by region; the first whose `from` matches counts.
    pub distribute: Vec<Distribute>,
    /// Preferred regions for failover.
    pub failover: Vec<Failover>,
    /// Labels that an endpoint should share with the client, the most important first.
    pub failover_priority: Vec<LabelPreference>,
    /// Whether the share of a locality in `distribute` that cannot carry it goes where failover leads (Portolan's own). Without it,
    /// a valid setting has `distribute` or the others, not both.
    pub distribute_with_failover: bool,
}

impl Default for LocalitySetting {
    fn default() -> Self {
        Self {
            enabled: true,
            distribute: Vec::new(),
            failover: Vec::new(),
            failover_priority: Vec::new(),
            distribute_with_failover: false,
        }
    }
}

/// An entry of `failoverPriority`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelPreference {
    /// The label.
    pub key: String,
    /// The value that endpoints should have; the client's own where absent.
    pub value: Option<String>,
}

/// `warmup`: new endpoints get less at first.
#[derive(Clone, Debug, PartialEq)]
pub struct Warmup {
    /// How long.
    pub window: Duration,
    /// What they get at least, in percent.
    pub minimum_percent: f64,
    /// 1: in proportion to their age; more: faster at first.
    pub aggression: f64,
}

/// `connectionPool.tcp`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectionPool {
    /// Limit for the connect.
    pub connect_timeout: Option<Duration>,
    /// Connections to the destination at once, from this node.
    pub max_connections: Option<u32>,
    /// Connections without traffic are closed after this time.
    pub idle_timeout: Option<Duration>,
    /// Connections are closed after this time.
    pub max_duration: Option<Duration>,
    /// Whether and how the kernel looks after silent connections.
    pub keepalive: Option<Keepalive>,
}

/// `tcpKeepalive`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keepalive {
    /// Probes without an answer.
    pub probes: Option<u32>,
    /// Silence before the first.
    pub time: Option<Duration>,
    /// Time between them.
    pub interval: Option<Duration>,
}

impl Keepalive {
    /// Longer times no socket takes.
    pub const MOST_SECONDS: u32 = 32_767;
    /// Nor more probes.
    pub const MOST_PROBES: u32 = 127;
}

/// `trafficPolicy`. Absent blocks are the defaults.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrafficPolicy {
    /// How endpoints are chosen.
    pub balancer: Option<LoadBalancer>,
    /// Outlier detection.
    pub outlier: Option<OutlierDetection>,
    /// Limits on connections.
    pub pool: Option<ConnectionPool>,
    /// `portLevelSettings`: each replaces everything above for its port.
    pub ports: BTreeMap<u16, TrafficPolicy>,
}

/// `loadBalancer`
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoadBalancer {
    /// Host choice.
    pub algorithm: Option<Algorithm>,
    /// Locality setting; it replaces all others.
    pub locality: Option<LocalitySetting>,
    /// Warmup of new endpoints.
    pub warmup: Option<Warmup>,
}

impl TrafficPolicy {
    /// The locality setting.
    pub fn locality(&self) -> Option<&LocalitySetting> {
        self.balancer.as_ref()?.locality.as_ref()
    }
}

/// A named part of a destination's endpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct Subset {
    /// The name that routes use.
    pub name: String,
    /// Labels that an endpoint must have.
    pub labels: Labels,
    /// Overrides, block by block.
    pub policy: TrafficPolicy,
}

/// A DestinationRule.
#[derive(Clone, Debug, PartialEq)]
pub struct DestinationRule {
    /// Its name.
    pub name: NamespacedName,
    /// The host it is for, as written: short, full, or with a leading `*`.
    pub host: String,
    /// Its policy.
    pub policy: TrafficPolicy,
    /// Its subsets.
    pub subsets: Vec<Subset>,
    /// The probe of its endpoints.
    pub probe: Option<Arc<Probe>>,
    /// After which time without traffic connections to endpoints that get no new ones are closed (`portolan.io/close-idle-elsewhere`).
    pub close_idle_elsewhere: Option<Duration>,
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

/// When a route counts: all of it must hold. A part that is left out always does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// The port that was dialled.
    pub port: Option<u16>,
    /// Ranges, one of which the address that was dialled is in.
    pub subnets: Vec<Subnet>,
}

impl Match {
    /// Whether a connection to this address is meant.
    pub fn holds(&self, address: IpAddr, port: u16) -> bool {
        self.port.is_none_or(|own| own == port)
            && (self.subnets.is_empty() || self.subnets.iter().any(|subnet| subnet.contains(address)))
    }
}

/// A range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    address: IpAddr,
    prefix: u32,
}

impl Subnet {
    /// Whether the address is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                let differing = u32::from(own) ^ u32::from(other);
                differing.checked_shr(32 - self.prefix).unwrap_or(0) == 0
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                let differing = u128::from(own) ^ u128::from(other);
                differing.checked_shr(128 - self.prefix).unwrap_or(0) == 0
            }
            _ => false,
        }
    }

    /// The only address in it, if there is but one.
    pub fn single(&self) -> Option<IpAddr> {
        (self.prefix == if self.address.is_ipv4() { 32 } else { 128 }).then_some(self.address)
    }
}

impl FromStr for Subnet {
    type Err = String;

    /// `ADDRESS[/PREFIX]`
    fn from_str(text: &str) -> Result<Self, String> {
        let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
        let wrong = || format!("{text:?} is neither an address nor a range");
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.map_or(Ok(longest), str::parse).map_err(|_| wrong())?;
        if prefix > longest { Err(wrong()) } else { Ok(Self { address, prefix }) }
    }
}

/// One route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// One of them must hold; empty: always.
    pub matches: Vec<Match>,
    /// Where to.
    pub destinations: Vec<WeightedDestination>,
}

impl Route {
    /// Whether a connection to this address is meant.
    pub fn holds(&self, address: IpAddr, port: u16) -> bool {
        self.matches.is_empty() || self.matches.iter().any(|own| own.holds(address, port))
    }
}

/// A VirtualService, as far as a node can honour it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtualService {
    /// Its name.
    pub name: NamespacedName,
    /// The hosts it is for, as written.
    pub hosts: Vec<String>,
    /// In order; the first that matches counts.
    pub tcp: Vec<Route>,
    /// Those that do not look into requests; likewise.
    pub http: Vec<Route>,
}
