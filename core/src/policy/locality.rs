//! Locality: failover levels, and shares per locality.

use super::types::SettingSource;
use crate::model::{Distribute, Failover, LabelPreference, Labels, Locality, LocalitySetting, TrafficDistribution};

/// Returns the locality setting that applies to a service, and its source (Istio `GetLocalityLbSetting`).
pub fn effective_setting(
    rule: Option<&LocalitySetting>,
    distribution: Option<TrafficDistribution>,
    mesh: &LocalitySetting,
) -> Option<(LocalitySetting, SettingSource)> {
    let (setting, source) = match (rule, distribution) {
        (Some(rule), _) => (rule.clone(), SettingSource::DestinationRule),
        (None, Some(distribution)) => (preferring(distribution), SettingSource::TrafficDistribution),
        (None, None) => (mesh.clone(), SettingSource::Mesh),
    };
    setting.enabled.then_some((setting, source))
}

const NETWORK: &str = "topology.istio.io/network";
const REGION: &str = "topology.kubernetes.io/region";
const ZONE: &str = "topology.kubernetes.io/zone";
const SUBZONE: &str = "topology.istio.io/subzone";
const HOSTNAME: &str = "kubernetes.io/hostname";

/// Translates `trafficDistribution` into labels that an endpoint should share with the client, as Istio does.
fn preferring(distribution: TrafficDistribution) -> LocalitySetting {
    let keys: &[&str] = match distribution {
        TrafficDistribution::PreferSameZone => &[NETWORK, REGION, ZONE],
        TrafficDistribution::PreferSameNode => &[NETWORK, REGION, ZONE, SUBZONE, HOSTNAME],
    };
    let preference = |key: &&str| LabelPreference { key: (*key).to_owned(), value: None };
    LocalitySetting { failover_priority: keys.iter().map(preference).collect(), ..LocalitySetting::default() }
}

/// Returns the priority of each endpoint by locality (Istio `applyLocalityFailover`).
pub fn failover_levels(client: &Locality, endpoints: &[&Locality], rules: &[Failover]) -> Vec<u32> {
    densify(distances(client, endpoints, rules))
}

/// Works like [`failover_levels`], but keeps empty levels.
fn distances(client: &Locality, endpoints: &[&Locality], rules: &[Failover]) -> Vec<u32> {
    let preferred = rules.iter().find(|rule| rule.from == client.region).map(|rule| &rule.to);
    let level = |endpoint: &&Locality| {
        if endpoint.region != client.region {
            if preferred.is_some_and(|to| *to != endpoint.region) { 4 } else { 3 }
        } else if endpoint.zone != client.zone {
            2
        } else {
            u32::from(endpoint.subzone != client.subzone)
        }
    };
    endpoints.iter().map(level).collect()
}

/// Access to labels by key.
pub trait Labelled {
    /// Returns the value of a label, or an empty string if it is absent.
    fn label(&self, key: &str) -> &str;
}

impl Labelled for Labels {
    fn label(&self, key: &str) -> &str {
        self.get(key).map(String::as_str).unwrap_or_default()
    }
}

/// Returns the priority of each endpoint by shared labels (Istio `applyFailoverPriorities`).
pub fn label_levels(client: &Labels, endpoints: &[impl Labelled], keys: &[LabelPreference]) -> Vec<u32> {
    if client.is_empty() {
        return vec![0; endpoints.len()];
    }
    let count = keys.len() as u32;
    let expected: Vec<(&str, &str)> = keys
        .iter()
        .map(|preference| {
            (preference.key.as_str(), preference.value.as_deref().unwrap_or(client.label(&preference.key)))
        })
        .collect();
    let level = |endpoint: &dyn Labelled| {
        let mut level = 0;
        for ((key, value), index) in expected.iter().zip(0..) {
            if endpoint.label(key) != *value {
                level += count - index;
                // A different network counts as far, but the remaining labels still order the endpoints in it.
                if index > 0 || *key != NETWORK {
                    break;
                }
            }
        }
        level
    };
    endpoints.iter().map(|endpoint| level(endpoint)).collect()
}

/// Returns the level of each endpoint under a setting: by labels, by locality, or by both.
pub fn levels(
    client: (&Labels, &Locality),
    setting: &LocalitySetting,
    localities: &[&Locality],
    labels: &[impl Labelled],
) -> Vec<u32> {
    let keys = &setting.failover_priority;
    if keys.is_empty() {
        return failover_levels(client.1, localities, &setting.failover);
    }
    let by_label = label_levels(client.0, labels, keys);
    if setting.failover.is_empty() {
        return densify(by_label);
    }
    let by_place = distances(client.1, localities, &setting.failover);
    densify(densify(by_label).iter().zip(by_place).map(|(label, distance)| 5 * label + distance).collect())
}

/// Renumbers levels without gaps, in the same order.
pub(super) fn densify(levels: Vec<u32>) -> Vec<u32> {
    let mut used = levels.clone();
    used.sort_unstable();
    used.dedup();
    levels.iter().map(|level| used.partition_point(|other| other < level) as u32).collect()
}

/// Returns the weight of each locality under `distribute` (Istio `applyLocalityWeights`).
pub fn distribute_weights(
    client: &Locality,
    groups: &[(&Locality, u64)],
    rules: &[Distribute],
) -> Option<Vec<Option<u64>>> {
    let rule = rules.iter().find(|rule| rule.from.matches(client))?;
    let mut weights = vec![None; groups.len()];
    for (to, percent) in &rule.to {
        let matched: Vec<usize> =
            (0..groups.len()).filter(|&i| weights[i].is_none() && to.matches(groups[i].0)).collect();
        let total: u64 = matched.iter().map(|&i| groups[i].1).sum();
        for i in matched {
            weights[i] = Some((groups[i].1 * u64::from(*percent)).div_ceil(total.max(1)));
        }
    }
    Some(weights)
}
