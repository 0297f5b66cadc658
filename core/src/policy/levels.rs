//! Assigns a priority level to each candidate, and computes the weight of each locality per level.

use std::sync::Arc;

use super::{
    context::{Candidate, Weights},
    locality::{densify, distribute_weights, levels},
    types::{Client, Endpoint, LocalityMode},
};
use crate::model::{ClusterLocal, Locality, LocalitySetting};

/// Assigns each endpoint its level and returns the weight of each locality.
pub(super) fn assign_levels(
    client: &Client,
    mode: LocalityMode,
    setting: &LocalitySetting,
    by_distance: bool,
    cluster_local: ClusterLocal,
    candidates: &mut Vec<Candidate<'_>>,
) -> Weights {
    if mode == LocalityMode::Failover {
        let mut levels = if by_distance { failover(client, setting, candidates) } else { vec![0; candidates.len()] };
        if cluster_local == ClusterLocal::Prefer {
            // Any endpoint in the client's cluster, however distant, comes before endpoints of other clusters.
            let outside = levels.iter().max().map_or(0, |level| level + 1);
            for (level, candidate) in levels.iter_mut().zip(&*candidates) {
                *level += if candidate.endpoint.cluster == client.cluster { 0 } else { outside };
            }
        }
        for (candidate, level) in candidates.iter_mut().zip(densify(levels)) {
            candidate.endpoint.priority = level;
        }
    }
    let mut weights = endpoint_weights(candidates);
    if mode == LocalityMode::Distribute {
        let own: Vec<(&Locality, u64)> = weights.iter().map(|((_, locality), weight)| (&**locality, *weight)).collect();
        if let Some(given) = distribute_weights(&client.locality, &own, &setting.distribute) {
            let keys: Vec<_> = weights.keys().cloned().collect();
            weights = keys.into_iter().zip(given).filter_map(|(key, weight)| Some((key, weight?))).collect();
            candidates.retain(|candidate| weights.contains_key(&(0, Arc::clone(&candidate.endpoint.locality))));
        }
    }
    weights
}

/// Returns the level of each endpoint under the failover setting, possibly with gaps.
pub(super) fn failover(client: &Client, setting: &LocalitySetting, candidates: &[Candidate<'_>]) -> Vec<u32> {
    let localities: Vec<&Locality> = candidates.iter().map(|candidate| &*candidate.endpoint.locality).collect();
    levels((&client.labels, &client.locality), setting, &localities, candidates)
}

/// Returns the weight of each locality: the sum of its endpoint weights.
pub(super) fn endpoint_weights(candidates: &[Candidate<'_>]) -> Weights {
    let mut weights = Weights::new();
    for Endpoint { priority, locality, weight, .. } in candidates.iter().map(|candidate| &candidate.endpoint) {
        *weights.entry((*priority, Arc::clone(locality))).or_default() += u64::from(*weight);
    }
    weights
}
