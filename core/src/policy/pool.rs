//! Computes one pool: its endpoints, their levels, and the share of each endpoint group.

use std::{sync::Arc, time::Duration};

use super::{
    cluster_local::cluster_local,
    context::PolicyContext,
    endpoints::{self, Filter, Selected},
    levels::assign_levels,
    load_split::LoadSplit,
    locality::effective_setting,
    maglev, service_view,
    share::Group,
    types::{Endpoint, LocalityMode, LocalityShare, Pool, PoolKey, SettingSource},
};
use crate::model::{
    Algorithm, ClusterLocal, Code, Finding, LocalitySetting, OutlierDetection, Probe, Protocol, ServiceId,
    SuccessCriterion,
};

/// Returns whether this is the Service through which pods reach the API server.
fn is_api_server(service: &ServiceId) -> bool {
    !service.is_entry && service.name.namespace == "default" && service.name.name == "kubernetes"
}

/// Builds the pool, and the groups that share its connections.
pub(super) fn build(
    context: &PolicyContext<'_>,
    key: PoolKey,
    routed: bool,
    findings: &mut Vec<Finding>,
) -> (Pool, Vec<Group>) {
    let rule = context.rules.destination_rule(&key.service);
    let policy = rule.map(|rule| context.rules.traffic_policy(rule, &key)).unwrap_or_default();
    let view = service_view::find(context.snapshot, &context.client.cluster, &key.service);
    let traffic_distribution = view.as_ref().and_then(|view| view.traffic_distribution);
    let effective = effective_setting(policy.locality(), traffic_distribution, &context.rules.mesh.locality);
    // The locality of the API server's endpoints is unknown, so shares by region must not exclude them.
    let effective = effective.filter(|_| !is_api_server(&key.service));
    let host = context.rules.host_of(&key.service).unwrap_or_default();
    let (cluster_local, cluster_local_by) = cluster_local(&context.rules.mesh, &host);
    let threshold = policy.outlier.as_ref().map_or(0, |outlier| outlier.min_health_percent);
    // Panic mode keeps the API server's Service usable even if all of its endpoints are ejected.
    let threshold = if is_api_server(&key.service) { threshold.max(1) } else { threshold };
    let subset =
        rule.zip(key.subset.as_ref()).and_then(|(rule, name)| rule.subsets.iter().find(|subset| subset.name == *name));

    let filter = Filter {
        key: &key,
        labels: subset.map(|subset| &subset.labels),
        cluster_local,
        has_istio_rule: rule.is_some() || routed,
        ready_only: threshold > 0 && traffic_distribution.is_none(),
        ejects: policy.outlier.is_some(),
    };
    let Selected { mut candidates, leaving, left_out } = if let (Some(name), None) = (&key.subset, subset) {
        let message =
            format!("no DestinationRule defines subset {name:?} of {}; its connections are refused", key.service);
        findings.push(Finding::new(Code::UnknownSubset, key.service.object(), message));
        Default::default()
    } else {
        endpoints::select(context, &filter)
    };
    check_ejection_limit(&key, policy.outlier.as_ref(), candidates.len(), findings);

    let balancer = policy.balancer.unwrap_or_default();
    let warmup = balancer.warmup.as_ref();
    let (setting, source) = effective.unzip();
    // Ports of protocols other than TCP cannot be probed, so the probe must name its own port.
    let own = |probe: &Arc<Probe>| key.protocol == Protocol::Tcp || probe.port.is_some();
    let probe = rule.and_then(|rule| rule.probe.clone()).filter(own);
    // Failover requires a way to detect failed endpoints, passive or active.
    let health_checked = policy.outlier.is_some() || probe.is_some();
    let mode = mode(setting.as_ref(), source, health_checked, cluster_local);
    let load_split = LoadSplit { context, warmup, threshold, key: &key };
    let (priorities, weights, groups) = match (&setting, mode) {
        (Some(setting), LocalityMode::Distribute) if setting.distribute_with_failover => {
            load_split.distribute_with_failover(setting, &mut candidates)
        }
        _ => {
            let default = LocalitySetting::default();
            let setting = setting.as_ref().unwrap_or(&default);
            let traffic_distribution = source == Some(SettingSource::TrafficDistribution);
            let by_distance = traffic_distribution || (source.is_some() && health_checked);
            let weights = assign_levels(context.client, mode, setting, by_distance, cluster_local, &mut candidates);
            let explicit = !(setting.failover.is_empty() && setting.failover_priority.is_empty());
            let by_locality =
                mode == LocalityMode::Distribute || (mode == LocalityMode::Failover && explicit && health_checked);
            let (priorities, groups) = load_split.by_level(&candidates, &weights, by_locality);
            (priorities, weights, groups)
        }
    };
    if mode == LocalityMode::Distribute && cluster_local == ClusterLocal::Prefer {
        let message = format!(
            "port {}: the preference for the client's cluster has no effect, because distribute decides the shares",
            key.port
        );
        findings.push(Finding::new(Code::NotTogether, key.service.object(), message));
    }
    let localities = weights
        .into_iter()
        .map(|((priority, locality), weight)| LocalityShare { locality, priority, weight })
        .collect();
    let mut limits = policy.pool.unwrap_or_default();
    let ejects = policy.outlier.is_some();
    limits.connect_timeout =
        limits.connect_timeout.or(context.rules.mesh.connect_timeout).or(ejects.then_some(DEFAULT_CONNECT_TIMEOUT));
    let algorithm = algorithm(balancer.algorithm, &key, cluster_local, findings);
    let groups = if algorithm == Algorithm::ConsistentHash { maglev::quotas(groups) } else { groups };
    let http = view.as_ref().and_then(|view| view.port(&key)).is_some_and(|port| port.http1);
    let success_criterion =
        success_criterion(policy.outlier.as_ref(), http && !context.observed.not_http.contains(&key.both_families()));
    // Collects in place: this reuses the allocation of the candidates, which are larger.
    let mut endpoints: Vec<Endpoint> = candidates.into_iter().map(|candidate| candidate.endpoint).collect();
    endpoints.shrink_to_fit();
    let pool = Pool {
        mode,
        success_criterion,
        setting: source,
        distributes_with_failover: mode == LocalityMode::Distribute
            && setting.as_ref().is_some_and(|setting| setting.distribute_with_failover),
        cluster_local,
        cluster_local_by,
        rule: rule.cloned(),
        algorithm,
        outlier: policy.outlier,
        probe,
        close_idle_elsewhere: rule.and_then(|rule| rule.close_idle_elsewhere),
        warmup: balancer.warmup,
        limits,
        priorities,
        localities,
        endpoints,
        leaving,
        groups: groups.len(),
        excluded: left_out,
        key,
    };
    (pool, groups)
}

/// Istio's default connect timeout, which decides when a connect counts as failed.
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Returns the signal that counts as a success.
fn success_criterion(outlier: Option<&OutlierDetection>, http: bool) -> SuccessCriterion {
    match outlier {
        Some(outlier) if http && (outlier.consecutive_errors > 0 || outlier.gateway_errors > 0) => {
            SuccessCriterion::HttpStatus
        }
        Some(outlier) if outlier.count_early_resets => SuccessCriterion::FirstByte,
        _ => SuccessCriterion::Connected,
    }
}

/// Returns the algorithm to use; reports a requested one that cannot be honored.
fn algorithm(
    requested: Option<Algorithm>,
    key: &PoolKey,
    cluster_local: ClusterLocal,
    findings: &mut Vec<Finding>,
) -> Algorithm {
    // Istio defaults to LEAST_REQUEST. Portolan defaults to round robin, so LEAST_REQUEST must be set explicitly.
    let requested = requested.unwrap_or(Algorithm::RoundRobin);
    if requested == Algorithm::LeastRequest && key.protocol == Protocol::Udp {
        let message = "LEAST_REQUEST counts connections, which UDP does not have; RANDOM is used";
        findings.push(Finding::new(Code::NotTogether, key.service.object(), message));
        return Algorithm::Random;
    }
    if requested != Algorithm::Passthrough {
        return requested;
    }
    if cluster_local == ClusterLocal::Strict {
        let message =
            "PASSTHROUGH would let connections leave their cluster, which clusterLocal forbids; ROUND_ROBIN is used";
        findings.push(Finding::new(Code::NotTogether, key.service.object(), message));
        return Algorithm::RoundRobin;
    }
    Algorithm::Passthrough
}

/// Returns the locality mode.
fn mode(
    setting: Option<&LocalitySetting>,
    source: Option<SettingSource>,
    ejects: bool,
    cluster_local: ClusterLocal,
) -> LocalityMode {
    match setting {
        Some(setting) if !setting.distribute.is_empty() => LocalityMode::Distribute,
        Some(_) if ejects || source == Some(SettingSource::TrafficDistribution) => LocalityMode::Failover,
        _ if cluster_local == ClusterLocal::Prefer => LocalityMode::Failover,
        _ => LocalityMode::None,
    }
}

/// Reports an ejection limit that rounds down to no endpoint at all.
fn check_ejection_limit(key: &PoolKey, outlier: Option<&OutlierDetection>, hosts: usize, findings: &mut Vec<Finding>) {
    let Some(outlier) = outlier else { return };
    if hosts > 0 && outlier.thresholds() != [0, 0] && outlier.most_ejected(hosts) == 0 {
        let message = format!(
            "{} % of {hosts} endpoints of port {} rounds down to zero, so no endpoint is ever ejected; raise it to {} \
             or more, or set the annotation portolan.io/always-eject-one: \"true\" on the DestinationRule",
            outlier.max_ejection_percent,
            key.port,
            100usize.div_ceil(hosts)
        );
        let finding = Finding::new(Code::EjectionLimitZero, key.service.object(), message);
        findings.push(finding.at("outlierDetection.maxEjectionPercent"));
    }
}
