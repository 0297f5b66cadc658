//! Readers of Istio's kinds. The types hold what is honoured; every other field becomes a finding.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::read::Context;
use crate::model::{
    Algorithm, DestinationRule, Distribute, Failover, LocalitySetting, OutlierDetection, Subset, TcpRoute,
    TrafficPolicy, VirtualService, WeightedDestination,
};

/// A list or map that may be written as `null`, which means that it is empty.
pub(super) fn nullable<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: Default + Deserialize<'de>,
    D: Deserializer<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DestinationRuleSpec {
    host: String,
    #[serde(default)]
    traffic_policy: Option<PolicySpec>,
    #[serde(default, deserialize_with = "nullable")]
    subsets: Vec<SubsetSpec>,
    #[serde(default)]
    workload_selector: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SubsetSpec {
    name: String,
    #[serde(default, deserialize_with = "nullable")]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    traffic_policy: Option<PolicySpec>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PolicySpec {
    #[serde(default)]
    load_balancer: Option<LoadBalancerSpec>,
    #[serde(default)]
    outlier_detection: Option<OutlierSpec>,
    #[serde(default)]
    connection_pool: Option<PoolSpec>,
    #[serde(default, deserialize_with = "nullable")]
    port_level_settings: Vec<PortSpec>,
}

#[derive(Deserialize)]
struct PortSpec {
    port: PortSelector,
    #[serde(flatten)]
    policy: serde_json::Map<String, Value>,
}

#[derive(Deserialize)]
struct PortSelector {
    number: u16,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LoadBalancerSpec {
    #[serde(default)]
    simple: Option<String>,
    #[serde(default)]
    consistent_hash: Option<Value>,
    #[serde(default)]
    locality_lb_setting: Option<LocalitySpec>,
}

/// `localityLbSetting`, in a DestinationRule and in the MeshConfig.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct LocalitySpec {
    #[serde(default)]
    enabled: Option<bool>,
    #[serde(default, deserialize_with = "nullable")]
    distribute: Vec<DistributeSpec>,
    #[serde(default, deserialize_with = "nullable")]
    failover: Vec<FailoverSpec>,
}

#[derive(Deserialize)]
struct DistributeSpec {
    #[serde(default)]
    from: String,
    #[serde(default, deserialize_with = "nullable")]
    to: BTreeMap<String, u32>,
}

#[derive(Deserialize)]
struct FailoverSpec {
    #[serde(default)]
    from: String,
    #[serde(default)]
    to: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct OutlierSpec {
    // Wrapped integers may be null; the deprecated name counts where the current one is absent.
    #[serde(default, rename = "consecutive5xxErrors")]
    consecutive_5xx_errors: Option<u32>,
    #[serde(default)]
    consecutive_errors: Option<u32>,
    #[serde(default)]
    consecutive_gateway_errors: Option<u32>,
    #[serde(default)]
    interval: Option<String>,
    #[serde(default)]
    base_ejection_time: Option<String>,
    #[serde(default)]
    max_ejection_percent: Option<u32>,
    #[serde(default)]
    min_health_percent: Option<u32>,
}

#[derive(Deserialize)]
struct PoolSpec {
    #[serde(default)]
    tcp: Option<TcpPoolSpec>,
    #[serde(default)]
    http: Option<HttpPoolSpec>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TcpPoolSpec {
    #[serde(default)]
    connect_timeout: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct HttpPoolSpec {
    #[serde(default)]
    max_requests_per_connection: Option<u32>,
}

pub(super) fn destination_rule(context: &mut Context<'_>, mut value: Value) -> Result<Option<DestinationRule>, String> {
    let spec: DestinationRuleSpec = context.honoured("spec", value["spec"].take(), |_| false)?;
    if spec.workload_selector.is_some() {
        context.error("spec.workloadSelector is not honoured: the rule is for some clients only, so it is left out");
        return Ok(None);
    }
    let mut subsets = Vec::new();
    for (i, subset) in spec.subsets.into_iter().enumerate() {
        let at = format!("spec.subsets[{i}].trafficPolicy");
        let policy = subset.traffic_policy.map(|policy| traffic_policy(context, &at, policy)).transpose()?;
        subsets.push(Subset { name: subset.name, labels: subset.labels, policy: policy.unwrap_or_default() });
    }
    let policy = spec.traffic_policy.map(|policy| traffic_policy(context, "spec.trafficPolicy", policy)).transpose()?;
    let policy = policy.unwrap_or_default();
    Ok(Some(DestinationRule { name: context.name.clone(), host: spec.host, policy, subsets }))
}

fn traffic_policy(context: &mut Context<'_>, at: &str, spec: PolicySpec) -> Result<TrafficPolicy, String> {
    let mut policy = TrafficPolicy::default();
    if let Some(balancer) = spec.load_balancer {
        let at = format!("{at}.loadBalancer");
        policy.algorithm = algorithm(context, &at, balancer.simple.as_deref(), balancer.consistent_hash.is_some())?;
        policy.locality = balancer
            .locality_lb_setting
            .map(|setting| locality_setting(&format!("{at}.localityLbSetting"), setting))
            .transpose()?;
    }
    policy.outlier = spec
        .outlier_detection
        .map(|outlier| outlier_detection(context, &format!("{at}.outlierDetection"), outlier))
        .transpose()?;
    if let Some(pool) = spec.connection_pool {
        let at = format!("{at}.connectionPool");
        if let Some(text) = pool.tcp.and_then(|tcp| tcp.connect_timeout) {
            policy.connect_timeout = Some(duration(&format!("{at}.tcp.connectTimeout"), &text)?);
        }
        // With 1 each request has a connection of its own, which is what Portolan chooses for anyway.
        if pool.http.and_then(|http| http.max_requests_per_connection).is_some_and(|max| max > 1) {
            context.warning(format!(
                "{at}.http.maxRequestsPerConnection is not honoured: connections are not looked into"
            ));
        }
    }
    for (i, port) in spec.port_level_settings.into_iter().enumerate() {
        let at = format!("{at}.portLevelSettings[{i}]");
        let spec: PolicySpec = context.honoured(&at, Value::Object(port.policy), |_| false)?;
        let own = traffic_policy(context, &at, spec)?;
        policy.ports.insert(port.port.number, own);
    }
    Ok(policy)
}

fn algorithm(
    context: &mut Context<'_>,
    at: &str,
    simple: Option<&str>,
    hash: bool,
) -> Result<Option<Algorithm>, String> {
    let asked = match simple {
        _ if hash => Algorithm::ConsistentHash,
        None | Some("UNSPECIFIED") => return Ok(None),
        Some("ROUND_ROBIN") => return Ok(Some(Algorithm::RoundRobin)),
        Some("LEAST_REQUEST" | "LEAST_CONN") => Algorithm::LeastRequest,
        Some("RANDOM") => Algorithm::Random,
        Some("PASSTHROUGH") => Algorithm::Passthrough,
        Some(other) => return Err(format!("{at}.simple: {other:?} is no algorithm")),
    };
    context.warning(format!(
        "{at}: {asked} is not honoured yet; ROUND_ROBIN is used, with the same shares for each locality"
    ));
    Ok(Some(Algorithm::RoundRobin))
}

/// Istio's `ValidateLocalityLbSetting`.
pub(super) fn locality_setting(at: &str, spec: LocalitySpec) -> Result<LocalitySetting, String> {
    if !spec.distribute.is_empty() && !spec.failover.is_empty() {
        return Err(format!("{at}: distribute and failover exclude each other; keep one of them"));
    }
    let mut distribute: Vec<Distribute> = Vec::new();
    for (i, rule) in spec.distribute.into_iter().enumerate() {
        let at = format!("{at}.distribute[{i}]");
        let from = rule.from.parse().map_err(|message| format!("{at}.from: {message}"))?;
        let mut to: Vec<(crate::model::LocalityPattern, u32)> = Vec::new();
        for (place, percent) in rule.to {
            let pattern = place.parse().map_err(|message| format!("{at}.to: {message}"))?;
            if !(1..=100).contains(&percent) {
                return Err(format!("{at}.to[{place:?}]: {percent} is not within 1 and 100"));
            }
            if let Some((other, _)) = to.iter().find(|(other, _)| other.overlaps(&pattern)) {
                return Err(format!("{at}.to: {place:?} and \"{other}\" overlap"));
            }
            to.push((pattern, percent));
        }
        let sum: u32 = to.iter().map(|(_, percent)| percent).sum();
        if sum != 100 {
            return Err(format!("{at}.to: the percentages sum to {sum}, not to 100"));
        }
        if let Some(other) = distribute.iter().find(|other| other.from.overlaps(&from)) {
            return Err(format!("{at}.from: \"{from}\" and \"{}\" overlap", other.from));
        }
        distribute.push(Distribute { from, to });
    }
    let mut failover = Vec::new();
    for (i, rule) in spec.failover.into_iter().enumerate() {
        let at = format!("{at}.failover[{i}]");
        for (field, region) in [("from", &rule.from), ("to", &rule.to)] {
            if region.is_empty() || region.contains(['/', '*']) {
                return Err(format!("{at}.{field}: {region:?} is no region"));
            }
        }
        if rule.from == rule.to {
            return Err(format!("{at}: from and to are the same region, {:?}", rule.from));
        }
        failover.push(Failover { from: rule.from, to: rule.to });
    }
    Ok(LocalitySetting { enabled: spec.enabled.unwrap_or(true), distribute, failover })
}

fn outlier_detection(context: &mut Context<'_>, at: &str, spec: OutlierSpec) -> Result<OutlierDetection, String> {
    let time = |field: &str, text: Option<String>, default: Duration| {
        text.map_or(Ok(default), |text| duration(&format!("{at}.{field}"), &text))
    };
    let percent = |field: &str, value: Option<u32>| match value {
        Some(value) if value > 100 => Err(format!("{at}.{field}: {value} is more than 100 percent")),
        value => Ok(value.unwrap_or(0)),
    };
    if spec.consecutive_gateway_errors.is_some_and(|errors| errors > 0) {
        context.warning(format!("{at}.consecutiveGatewayErrors is not honoured yet"));
    }
    let base_ejection_time = time("baseEjectionTime", spec.base_ejection_time, Duration::from_secs(30))?;
    Ok(OutlierDetection {
        consecutive_errors: spec.consecutive_5xx_errors.or(spec.consecutive_errors).unwrap_or(5),
        interval: time("interval", spec.interval, Duration::from_secs(10))?,
        base_ejection_time,
        max_ejection_time: base_ejection_time.max(Duration::from_secs(300)),
        // Istio takes 0 for "not set".
        max_ejection_percent: match percent("maxEjectionPercent", spec.max_ejection_percent)? {
            0 => 10,
            set => set,
        },
        min_health_percent: percent("minHealthPercent", spec.min_health_percent)?,
    })
}

/// A duration as Go and Istio write it (`1h30m`, `1.5s`), of at least 1 ms.
pub(super) fn duration(at: &str, text: &str) -> Result<Duration, String> {
    match go_duration(text) {
        None => Err(format!("{at}: {text:?} is no duration")),
        Some(duration) if duration < Duration::from_millis(1) => Err(format!("{at}: {text:?} is less than 1 ms")),
        Some(duration) if duration > LONGEST => Err(format!("{at}: {text:?} is more than ten years")),
        Some(duration) => Ok(duration),
    }
}

/// No setting means more than this, and sums of it stay far from any limit.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Go's `time.ParseDuration`, without a sign. (The crate of that purpose panics on some texts, and hangs on others.)
fn go_duration(text: &str) -> Option<Duration> {
    let is_number = |c: char| c.is_ascii_digit() || c == '.';
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let (number, tail) = rest.split_at(rest.find(|c| !is_number(c))?);
        let (unit, tail) = tail.split_at(tail.find(is_number).unwrap_or(tail.len()));
        let unit = match unit {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        seconds += number.parse::<f64>().ok()? * unit;
        rest = tail;
    }
    if text.is_empty() { None } else { Duration::try_from_secs_f64(seconds).ok() }
}

#[derive(Deserialize)]
struct VirtualServiceSpec {
    #[serde(default, deserialize_with = "nullable")]
    hosts: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    gateways: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    tcp: Vec<TcpRouteSpec>,
}

#[derive(Deserialize)]
struct TcpRouteSpec {
    #[serde(default, rename = "match", deserialize_with = "nullable")]
    matches: Vec<MatchSpec>,
    #[serde(default, deserialize_with = "nullable")]
    route: Vec<RouteSpec>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct MatchSpec {
    #[serde(default)]
    port: Option<u16>,
    #[serde(default, deserialize_with = "nullable")]
    destination_subnets: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    source_labels: BTreeMap<String, String>,
    #[serde(default)]
    source_namespace: Option<String>,
}

#[derive(Deserialize)]
struct RouteSpec {
    destination: DestinationSpec,
    #[serde(default)]
    weight: u32,
}

#[derive(Deserialize)]
struct DestinationSpec {
    host: String,
    #[serde(default)]
    subset: Option<String>,
    #[serde(default)]
    port: Option<PortSelector>,
}

pub(super) fn virtual_service(context: &mut Context<'_>, mut value: Value) -> Result<Option<VirtualService>, String> {
    let spec: VirtualServiceSpec = context.honoured("spec", value["spec"].take(), |path| path == "exportTo")?;
    if !spec.gateways.is_empty() && !spec.gateways.iter().any(|gateway| gateway == "mesh") {
        context.warning(
            "spec.gateways does not name \"mesh\": its routes are for gateways, not for connections on a node",
        );
        return Ok(None);
    }
    if spec.hosts.is_empty() {
        return Err("spec.hosts is empty".to_owned());
    }
    let mut tcp = Vec::new();
    for (i, route) in spec.tcp.into_iter().enumerate() {
        tcp.push(tcp_route(&format!("spec.tcp[{i}]"), route)?);
    }
    Ok(Some(VirtualService { name: context.name.clone(), hosts: spec.hosts, tcp }))
}

fn tcp_route(at: &str, spec: TcpRouteSpec) -> Result<TcpRoute, String> {
    let mut ports = Vec::new();
    let every_port = spec.matches.iter().any(|block| block.port.is_none());
    for (i, block) in spec.matches.into_iter().enumerate() {
        if !block.destination_subnets.is_empty() || !block.source_labels.is_empty() || block.source_namespace.is_some()
        {
            return Err(format!("{at}.match[{i}]: only `port` is honoured yet, so the routes are left out"));
        }
        ports.extend(block.port.filter(|_| !every_port));
    }
    let single = spec.route.len() == 1;
    let sum: u64 = spec.route.iter().map(|route| u64::from(route.weight)).sum();
    if sum == 0 && !single {
        return Err(format!("{at}.route: the weights of the {} destinations sum to 0", spec.route.len()));
    }
    let destinations = spec.route.into_iter().map(|route| WeightedDestination {
        host: route.destination.host,
        subset: route.destination.subset,
        port: route.destination.port.map(|port| port.number),
        weight: if single { 1 } else { route.weight },
    });
    Ok(TcpRoute { ports, destinations: destinations.collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_as_go_writes_them() {
        for (text, milliseconds) in [
            ("1s", 1_000),
            ("1.5s", 1_500),
            ("1m", 60_000),
            ("1h30m", 5_400_000),
            ("10ms", 10),
            ("2000µs", 2),
            (".5s", 500),
        ] {
            assert_eq!(duration("at", text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        let nines = format!("0.{}s", "9".repeat(60));
        assert_eq!(duration("at", &nines).map(|time| time.as_secs_f64().round()), Ok(1.0));
        for text in ["", "s", "5", "5с", "10s…", "1µs", "-5s", "1d", "1..2s", "soon", "999999999h", "1s 2s"] {
            assert!(duration("at", text).is_err(), "{text}");
        }
    }
}
