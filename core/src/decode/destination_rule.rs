//! Decoder for DestinationRules. The types have the supported fields only; every other field becomes a finding.

use std::{collections::BTreeMap, time::Duration};

use serde::Deserialize;
use serde_json::Value;

use super::{
    annotations::{ALWAYS_EJECT_ONE, CLOSE_IDLE_ELSEWHERE, COUNT_EARLY_RESETS, DISTRIBUTE_WITH_FAILOVER},
    context::{Context, Invalid, invalid},
    locality_lb::{LocalitySpec, duration, locality_setting, maybe_duration, null_as_default},
};
use crate::model::{
    Algorithm, Code, ConnectionPool, DestinationRule, Keepalive, LoadBalancer, OutlierDetection, Subset, TrafficPolicy,
    Warmup,
};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DestinationRuleSpec {
    host: String,
    #[serde(default)]
    traffic_policy: Option<PolicySpec>,
    #[serde(default, deserialize_with = "null_as_default")]
    subsets: Vec<SubsetSpec>,
    #[serde(default)]
    workload_selector: Option<Value>,
    #[serde(default, deserialize_with = "null_as_default")]
    export_to: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SubsetSpec {
    name: String,
    #[serde(default, deserialize_with = "null_as_default")]
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
    #[serde(default, deserialize_with = "null_as_default")]
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
    consistent_hash: Option<HashSpec>,
    #[serde(default)]
    locality_lb_setting: Option<LocalitySpec>,
    #[serde(default)]
    warmup: Option<WarmupSpec>,
    #[serde(default)]
    warmup_duration_secs: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct HashSpec {
    #[serde(default)]
    use_source_ip: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WarmupSpec {
    duration: String,
    #[serde(default)]
    minimum_percent: Option<f64>,
    #[serde(default)]
    aggression: Option<f64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct OutlierSpec {
    // Wrapped integers may be null. The deprecated name applies if the current one is absent.
    #[serde(default, rename = "consecutive5xxErrors")]
    consecutive_5xx_errors: Option<u32>,
    #[serde(default)]
    consecutive_errors: Option<u32>,
    #[serde(default)]
    consecutive_gateway_errors: Option<u32>,
    #[serde(default)]
    split_external_local_origin_errors: bool,
    #[serde(default)]
    consecutive_local_origin_failures: Option<u32>,
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
    #[serde(default)]
    max_connections: Option<u32>,
    #[serde(default)]
    idle_timeout: Option<String>,
    #[serde(default)]
    max_connection_duration: Option<String>,
    #[serde(default)]
    tcp_keepalive: Option<KeepaliveSpec>,
}

#[derive(Deserialize)]
struct KeepaliveSpec {
    #[serde(default)]
    probes: Option<u32>,
    #[serde(default)]
    time: Option<String>,
    #[serde(default)]
    interval: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct HttpPoolSpec {
    #[serde(default)]
    max_requests_per_connection: Option<u32>,
}

/// Portolan extensions, from the annotations of the rule.
#[derive(Clone, Copy)]
struct Own {
    distribute_with_failover: bool,
    always_eject_one: bool,
    count_early_resets: bool,
}

pub(super) fn destination_rule(
    context: &mut Context<'_>,
    mut value: Value,
) -> Result<Option<DestinationRule>, Invalid> {
    let own = Own {
        distribute_with_failover: context.bool_annotation(&value, DISTRIBUTE_WITH_FAILOVER),
        always_eject_one: context.bool_annotation(&value, ALWAYS_EJECT_ONE),
        count_early_resets: context.bool_annotation(&value, COUNT_EARLY_RESETS),
    };
    let close_idle_elsewhere = close_idle_elsewhere(context, &value);
    let probe = super::probe::probe(context, &value);
    let spec: DestinationRuleSpec = context.deserialize_reporting_ignored("spec", value["spec"].take(), |_| false)?;
    if spec.workload_selector.is_some() {
        let message = "is not supported: the policy of a node cannot depend on the client, so the rule is ignored";
        context.finding(Code::ScopeNotEnforceable, "spec.workloadSelector", message);
        return Ok(None);
    }
    if !context.exported_to_all(&spec.export_to) {
        return Ok(None);
    }
    if spec.host.is_empty() || spec.host.trim_start_matches('*').contains('*') {
        return Err(invalid(
            "spec.host",
            format!("{:?} is not a valid host name; `*` is allowed only at the start", spec.host),
        ));
    }
    let mut subsets: Vec<Subset> = Vec::new();
    for (i, subset) in spec.subsets.into_iter().enumerate() {
        let at = format!("spec.subsets[{i}]");
        if subsets.iter().any(|other| other.name == subset.name) {
            return Err(invalid(format!("{at}.name"), format!("duplicate subset name {:?}", subset.name)));
        }
        let policy =
            subset.traffic_policy.map(|policy| traffic_policy(context, &format!("{at}.trafficPolicy"), policy, own));
        let policy = policy.transpose()?.unwrap_or_default();
        subsets.push(Subset { name: subset.name, labels: subset.labels, policy });
    }
    let policy = spec.traffic_policy.map(|policy| traffic_policy(context, "spec.trafficPolicy", policy, own));
    let policy = policy.transpose()?.unwrap_or_default();
    for (i, subset) in subsets.iter().enumerate() {
        for (port, own) in &subset.policy.ports {
            let at = format!("spec.subsets[{i}].trafficPolicy.portLevelSettings");
            report_dropped_blocks(context, &at, *port, &policy, own);
        }
    }
    Ok(Some(DestinationRule {
        name: context.name.clone(),
        host: spec.host,
        policy,
        subsets,
        probe,
        close_idle_elsewhere,
    }))
}

/// Parses `portolan.io/close-idle-elsewhere`. An invalid value is reported and ignored.
fn close_idle_elsewhere(context: &mut Context<'_>, value: &Value) -> Option<Duration> {
    let text = value.pointer("/metadata/annotations")?.get(CLOSE_IDLE_ELSEWHERE)?;
    let at = format!("metadata.annotations[\"{CLOSE_IDLE_ELSEWHERE}\"]");
    match text.as_str().map(|text| duration(at.clone(), text)) {
        Some(Ok(idle)) if idle >= Duration::from_secs(1) => Some(idle),
        _ => {
            let message = format!(
                "{text} is not valid; use a duration of at least 1s, in quotes (\"30s\"). The annotation is ignored"
            );
            context.finding(Code::UnknownAnnotation, at, message);
            None
        }
    }
}

fn traffic_policy(context: &mut Context<'_>, at: &str, spec: PolicySpec, own: Own) -> Result<TrafficPolicy, Invalid> {
    let mut policy = TrafficPolicy::default();
    if let Some(balancer) = spec.load_balancer {
        policy.balancer = Some(load_balancer(context, &format!("{at}.loadBalancer"), balancer, own)?);
    }
    if let Some(outlier) = spec.outlier_detection {
        policy.outlier = Some(outlier_detection(context, &format!("{at}.outlierDetection"), outlier, own)?);
    }
    if let Some(pool) = spec.connection_pool {
        policy.pool = Some(connection_pool(context, &format!("{at}.connectionPool"), pool)?);
    }
    for (i, port) in spec.port_level_settings.into_iter().enumerate() {
        let at = format!("{at}.portLevelSettings[{i}]");
        let number = port.port.number;
        let spec: PolicySpec = context.deserialize_reporting_ignored(&at, Value::Object(port.policy), |_| false)?;
        if !spec.port_level_settings.is_empty() {
            return Err(invalid(format!("{at}.portLevelSettings"), "is not allowed inside port-level settings"));
        }
        let settings = traffic_policy(context, &at, spec, own)?;
        report_dropped_blocks(context, &at, number, &policy, &settings);
        if policy.ports.insert(number, settings).is_some() {
            return Err(invalid(format!("{at}.port.number"), format!("duplicate settings for port {number}")));
        }
    }
    Ok(policy)
}

/// Reports blocks that port-level settings drop: they inherit nothing, which users do not expect.
fn report_dropped_blocks(context: &mut Context<'_>, at: &str, port: u16, above: &TrafficPolicy, own: &TrafficPolicy) {
    let dropped = [
        ("outlierDetection", above.outlier.is_some() && own.outlier.is_none()),
        ("loadBalancer", above.balancer.is_some() && own.balancer.is_none()),
        ("connectionPool", above.pool.is_some() && own.pool.is_none()),
    ];
    for (block, _) in dropped.iter().filter(|(_, dropped)| *dropped) {
        let message = format!("replaces all settings for port {port} and does not inherit {block}; repeat it here");
        context.finding(Code::PortPolicyDrops, at, message);
    }
}

fn load_balancer(
    context: &mut Context<'_>,
    at: &str,
    spec: LoadBalancerSpec,
    own: Own,
) -> Result<LoadBalancer, Invalid> {
    let algorithm = algorithm(context, at, spec.simple.as_deref(), spec.consistent_hash)?;
    let setting = spec.locality_lb_setting.map(|setting| {
        locality_setting(context, &format!("{at}.localityLbSetting"), setting, own.distribute_with_failover)
    });
    let locality = setting.transpose()?;
    let warmup = match (spec.warmup, spec.warmup_duration_secs) {
        (Some(warmup), _) => Some(self::warmup(&format!("{at}.warmup"), warmup)?),
        (None, Some(text)) => {
            let window = duration(format!("{at}.warmupDurationSecs"), &text)?;
            Some(Warmup { window, minimum_percent: 10.0, aggression: 1.0 })
        }
        (None, None) => None,
    };
    if warmup.is_some() && !matches!(algorithm, None | Some(Algorithm::RoundRobin | Algorithm::LeastRequest)) {
        context.finding(
            Code::NotTogether,
            format!("{at}.warmup"),
            "has an effect only with ROUND_ROBIN and LEAST_REQUEST",
        );
        return Ok(LoadBalancer { algorithm, locality, warmup: None });
    }
    Ok(LoadBalancer { algorithm, locality, warmup })
}

fn warmup(at: &str, spec: WarmupSpec) -> Result<Warmup, Invalid> {
    let minimum_percent = spec.minimum_percent.unwrap_or(10.0);
    if !(0.0..=100.0).contains(&minimum_percent) {
        return Err(invalid(format!("{at}.minimumPercent"), format!("{minimum_percent} is not between 0 and 100")));
    }
    let aggression = spec.aggression.unwrap_or(1.0);
    if !(1.0..=1000.0).contains(&aggression) {
        return Err(invalid(format!("{at}.aggression"), format!("{aggression} is not between 1 and 1000")));
    }
    Ok(Warmup { window: duration(format!("{at}.duration"), &spec.duration)?, minimum_percent, aggression })
}

fn algorithm(
    context: &mut Context<'_>,
    at: &str,
    simple: Option<&str>,
    hash: Option<HashSpec>,
) -> Result<Option<Algorithm>, Invalid> {
    Ok(match (hash, simple) {
        (Some(HashSpec { use_source_ip: true }), _) => Some(Algorithm::ConsistentHash),
        (Some(_), _) => {
            let message = "only useSourceIp is supported, because requests are not inspected; ROUND_ROBIN is used";
            context.finding(Code::FieldIgnored, format!("{at}.consistentHash"), message);
            None
        }
        (None, None | Some("UNSPECIFIED")) => None,
        (None, Some("ROUND_ROBIN")) => Some(Algorithm::RoundRobin),
        (None, Some("PASSTHROUGH")) => Some(Algorithm::Passthrough),
        (None, Some("LEAST_REQUEST" | "LEAST_CONN")) => Some(Algorithm::LeastRequest),
        (None, Some("RANDOM")) => Some(Algorithm::Random),
        (None, Some(other)) => {
            return Err(invalid(format!("{at}.simple"), format!("{other:?} is not a supported algorithm")));
        }
    })
}

fn outlier_detection(
    context: &mut Context<'_>,
    at: &str,
    spec: OutlierSpec,
    own: Own,
) -> Result<OutlierDetection, Invalid> {
    let split = spec.split_external_local_origin_errors;
    let unused = [
        ("consecutive5xxErrors", split && spec.consecutive_5xx_errors.or(spec.consecutive_errors).is_some()),
        ("consecutiveGatewayErrors", split && spec.consecutive_gateway_errors.is_some()),
        ("consecutiveLocalOriginFailures", !split && spec.consecutive_local_origin_failures.is_some()),
    ];
    for (field, _) in unused.iter().filter(|(_, set)| *set) {
        let message = if split {
            "has no effect on connections with splitExternalLocalOriginErrors; it counts only HTTP responses"
        } else {
            "has no effect without splitExternalLocalOriginErrors"
        };
        context.finding(Code::FieldIgnored, format!("{at}.{field}"), message);
    }
    let time = |field: &str, text: Option<String>, default: Duration| {
        Ok(maybe_duration(format!("{at}.{field}"), text)?.unwrap_or(default))
    };
    let percent = |field: &str, value: Option<u32>| match value {
        Some(value) if value > 100 => Err(invalid(format!("{at}.{field}"), format!("{value} is greater than 100"))),
        value => Ok(value.unwrap_or(0)),
    };
    let base_ejection_time = time("baseEjectionTime", spec.base_ejection_time, Duration::from_secs(30))?;
    let local_origin = spec.consecutive_local_origin_failures.unwrap_or(5);
    Ok(OutlierDetection {
        consecutive_errors: spec.consecutive_5xx_errors.or(spec.consecutive_errors).unwrap_or(5),
        gateway_errors: spec.consecutive_gateway_errors.unwrap_or(0),
        local_origin_errors: spec.split_external_local_origin_errors.then_some(local_origin),
        interval: time("interval", spec.interval, Duration::from_secs(10))?,
        base_ejection_time,
        max_ejection_time: base_ejection_time.max(Duration::from_secs(300)),
        // Istio treats 0 as "not set".
        max_ejection_percent: match percent("maxEjectionPercent", spec.max_ejection_percent)? {
            0 => 10,
            set => set,
        },
        always_eject_one: own.always_eject_one,
        count_early_resets: own.count_early_resets,
        min_health_percent: percent("minHealthPercent", spec.min_health_percent)?,
    })
}

/// Clamps the values to what socket options accept, and reports values that exceed it.
fn keepalive(context: &mut Context<'_>, at: &str, spec: KeepaliveSpec) -> Result<Keepalive, Invalid> {
    let max = Duration::from_secs(Keepalive::MOST_SECONDS.into());
    let mut time = |field: &str, value| -> Result<Option<Duration>, Invalid> {
        let requested = maybe_duration(format!("{at}.{field}"), value)?;
        if requested.is_some_and(|requested| requested > max) {
            let message = format!("exceeds the limit of the kernel; {} s is used instead", max.as_secs());
            context.finding(Code::FieldIgnored, format!("{at}.{field}"), message);
        }
        Ok(requested.map(|requested| requested.min(max)))
    };
    let (time, interval) = (time("time", spec.time)?, time("interval", spec.interval)?);
    if spec.probes.is_some_and(|probes| probes > Keepalive::MOST_PROBES) {
        let message = format!("exceeds the limit of the kernel; {} is used instead", Keepalive::MOST_PROBES);
        context.finding(Code::FieldIgnored, format!("{at}.probes"), message);
    }
    Ok(Keepalive { probes: spec.probes.map(|probes| probes.min(Keepalive::MOST_PROBES)), time, interval })
}

fn connection_pool(context: &mut Context<'_>, at: &str, spec: PoolSpec) -> Result<ConnectionPool, Invalid> {
    // A value of 1 gives each request its own connection, so Portolan balances every request. Nothing to report.
    if spec.http.and_then(|http| http.max_requests_per_connection).is_some_and(|max| max > 1) {
        let message = "is not supported: Portolan balances connections, not requests";
        context.finding(Code::FieldIgnored, format!("{at}.http.maxRequestsPerConnection"), message);
    }
    let Some(tcp) = spec.tcp else { return Ok(ConnectionPool::default()) };
    let at = format!("{at}.tcp");
    let keepalive = tcp.tcp_keepalive.map(|spec| keepalive(context, &format!("{at}.tcpKeepalive"), spec));
    Ok(ConnectionPool {
        connect_timeout: maybe_duration(format!("{at}.connectTimeout"), tcp.connect_timeout)?,
        max_connections: tcp.max_connections.filter(|max| *max > 0),
        idle_timeout: maybe_duration(format!("{at}.idleTimeout"), tcp.idle_timeout)?,
        max_duration: maybe_duration(format!("{at}.maxConnectionDuration"), tcp.max_connection_duration)?,
        keepalive: keepalive.transpose()?,
    })
}
