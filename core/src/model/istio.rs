//! Istio's rules, reduced to what affects a connection.

use std::{collections::BTreeMap, fmt, net::IpAddr, str::FromStr, sync::Arc, time::Duration};

use super::{
    endpoint::Labels, locality::LocalityPattern, name::NamespacedName, outlier_detection::OutlierDetection,
    probe::Probe,
};

/// How an endpoint is selected within a locality.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// The next endpoint in a weighted rotation.
    RoundRobin,
    /// The endpoint with fewer active connections of two random picks.
    LeastRequest,
    /// A random endpoint.
    Random,
    /// An endpoint selected by a hash of the client.
    ConsistentHash,
    /// The original destination address, unchanged.
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

/// An entry of `distribute`: the traffic split for clients in one locality.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Distribute {
    /// The localities of the clients that the entry applies to.
    pub from: LocalityPattern,
    /// Destination localities with percentages, which sum to 100, in the order of their names.
    pub to: Vec<(LocalityPattern, u32)>,
}

/// An entry of `failover`: the region that takes the traffic of a region that fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failover {
    /// The region that fails, which is the region of the client.
    pub from: String,
    /// The region that takes its traffic.
    pub to: String,
}

/// `localityLbSetting`, valid according to Istio's rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalitySetting {
    /// Whether load balancing considers locality at all; true by default.
    pub enabled: bool,
    /// The `distribute` entries; the first one whose `from` matches the client applies.
    pub distribute: Vec<Distribute>,
    /// The preferred failover regions.
    pub failover: Vec<Failover>,
    /// The labels that endpoints should share with the client, most important first (`failoverPriority`).
    pub failover_priority: Vec<LabelPreference>,
    /// Whether traffic that a locality of `distribute` cannot carry follows the failover rules (a Portolan extension).
    /// If false, a valid setting has either `distribute` or the failover fields, not both.
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

/// An entry of `failoverPriority`: `label` or `label=value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelPreference {
    /// The label key.
    pub key: String,
    /// The value that endpoints should have; `None` for the value that the client has.
    pub value: Option<String>,
}

/// `warmup`: a slow start that reduces the weight of new endpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct Warmup {
    /// The time after which an endpoint has its full weight.
    pub window: Duration,
    /// The lower bound of the weight during warmup, in percent of the full weight.
    pub minimum_percent: f64,
    /// The shape of the ramp: 1 is linear in the age of the endpoint; larger values rise faster at first.
    pub aggression: f64,
}

/// `connectionPool.tcp`: limits and timeouts for connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectionPool {
    /// How long a connect may take; `None` leaves the limit to the policy.
    pub connect_timeout: Option<Duration>,
    /// The maximum number of concurrent connections from this node to the destination.
    pub max_connections: Option<u32>,
    /// The time without traffic after which a connection is closed.
    pub idle_timeout: Option<Duration>,
    /// The age at which a connection is closed.
    pub max_duration: Option<Duration>,
    /// TCP keepalive; `None` keeps the settings of the application.
    pub keepalive: Option<Keepalive>,
}

/// `tcpKeepalive`: socket options for connections. `None` keeps the value of the socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keepalive {
    /// The number of unanswered probes before the connection is considered dead (`TCP_KEEPCNT`).
    pub probes: Option<u32>,
    /// The idle time before the first probe (`TCP_KEEPIDLE`).
    pub time: Option<Duration>,
    /// The time between probes (`TCP_KEEPINTVL`).
    pub interval: Option<Duration>,
}

impl Keepalive {
    /// The longest time that the kernel accepts, in seconds (`MAX_TCP_KEEPIDLE`, `MAX_TCP_KEEPINTVL`).
    pub const MOST_SECONDS: u32 = 32_767;
    /// The largest number of probes that the kernel accepts (`MAX_TCP_KEEPCNT`).
    pub const MOST_PROBES: u32 = 127;
}

/// `trafficPolicy`. A block that is `None` has its default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrafficPolicy {
    /// `loadBalancer`: endpoint selection, locality, and warmup.
    pub balancer: Option<LoadBalancer>,
    /// `outlierDetection`: when failing endpoints are ejected.
    pub outlier: Option<OutlierDetection>,
    /// `connectionPool.tcp`: limits and timeouts for connections.
    pub pool: Option<ConnectionPool>,
    /// `portLevelSettings` by port number.
    /// An entry replaces all blocks above for its port and inherits nothing.
    pub ports: BTreeMap<u16, TrafficPolicy>,
}

/// `loadBalancer`. A field that is `None` has its default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoadBalancer {
    /// `simple` or `consistentHash`; `None` for the default.
    pub algorithm: Option<Algorithm>,
    /// `localityLbSetting`, which replaces the setting of the mesh.
    pub locality: Option<LocalitySetting>,
    /// `warmup`, or the deprecated `warmupDurationSecs`.
    pub warmup: Option<Warmup>,
}

impl TrafficPolicy {
    /// Returns the `localityLbSetting` of this policy; `None` if it does not set one.
    pub fn locality(&self) -> Option<&LocalitySetting> {
        self.balancer.as_ref()?.locality.as_ref()
    }
}

/// A named subset of the endpoints of a destination.
#[derive(Clone, Debug, PartialEq)]
pub struct Subset {
    /// The name that routes refer to.
    pub name: String,
    /// The labels that an endpoint must have.
    pub labels: Labels,
    /// The policy of the subset; each block that it sets overrides the block of the host.
    pub policy: TrafficPolicy,
}

/// A DestinationRule: the policy and subsets of a host.
#[derive(Clone, Debug, PartialEq)]
pub struct DestinationRule {
    /// The namespace and name of the rule.
    pub name: NamespacedName,
    /// The host as written: a short name, a full name, or a pattern with a leading `*`.
    pub host: String,
    /// The policy of the host; `TrafficPolicy::default()` if the rule sets none.
    pub policy: TrafficPolicy,
    /// The subsets in the order of the rule; their names are unique.
    pub subsets: Vec<Subset>,
    /// The active health check of the endpoints (`portolan.io/probe`).
    pub probe: Option<Arc<Probe>>,
    /// The idle time after which connections to endpoints that receive no new connections are closed
    /// (`portolan.io/close-idle-elsewhere`); `None` disables it.
    pub close_idle_elsewhere: Option<Duration>,
}

/// A destination of a route, with its weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightedDestination {
    /// The host, as written.
    pub host: String,
    /// The subset of the host; `None` for all its endpoints.
    pub subset: Option<String>,
    /// The port of the destination; `None` for the original destination port.
    pub port: Option<u16>,
    /// The share of the traffic, relative to the sum of the weights of the route.
    pub weight: u32,
}

/// The conditions of a route, all of which must hold. An absent condition always holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// The original destination port.
    pub port: Option<u16>,
    /// CIDR ranges; the original destination address must be in one of them. Empty: any address.
    pub subnets: Vec<Subnet>,
}

impl Match {
    /// Returns whether a connection to this original destination matches.
    pub fn holds(&self, address: IpAddr, port: u16) -> bool {
        self.port.is_none_or(|own| own == port)
            && (self.subnets.is_empty() || self.subnets.iter().any(|subnet| subnet.contains(address)))
    }
}

/// A CIDR range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    address: IpAddr,
    prefix: u32,
}

impl Subnet {
    /// Returns whether the range contains the address. An IPv4-mapped IPv6 address counts as IPv4.
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

    /// Returns the address if the range contains exactly one (`/32` or `/128`).
    pub fn single(&self) -> Option<IpAddr> {
        (self.prefix == if self.address.is_ipv4() { 32 } else { 128 }).then_some(self.address)
    }
}

impl FromStr for Subnet {
    type Err = String;

    /// Parses `ADDRESS[/PREFIX]`; without a prefix length, the range is the single address.
    fn from_str(text: &str) -> Result<Self, String> {
        let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
        let invalid = || format!("{text:?} is neither an IP address nor a CIDR range");
        let address: IpAddr = address.parse().map_err(|_| invalid())?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.map_or(Ok(longest), str::parse).map_err(|_| invalid())?;
        if prefix > longest { Err(invalid()) } else { Ok(Self { address, prefix }) }
    }
}

/// A route: conditions and weighted destinations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The alternative conditions, one of which must hold. Empty: the route always matches.
    pub matches: Vec<Match>,
    /// The destinations; at least one.
    pub destinations: Vec<WeightedDestination>,
}

impl Route {
    /// Returns whether a connection to this original destination takes the route.
    pub fn holds(&self, address: IpAddr, port: u16) -> bool {
        self.matches.is_empty() || self.matches.iter().any(|own| own.holds(address, port))
    }
}

/// A VirtualService, reduced to what a node can apply to whole connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtualService {
    /// The namespace and name of the VirtualService.
    pub name: NamespacedName,
    /// The hosts, as written.
    pub hosts: Vec<String>,
    /// The TCP routes, in order; the first one that matches applies.
    pub tcp: Vec<Route>,
    /// The HTTP routes that do not require request inspection, in order; the first one that matches applies.
    pub http: Vec<Route>,
}
