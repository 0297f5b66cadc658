//! Near and far: failover levels, and shares by locality.

use crate::model::{Distribute, Failover, Locality};

/// The priority of each endpoint for a client, by locality (Istio `applyLocalityFailover`): the same subzone, the same
/// zone, the same region, and then the other regions, of which a failover rule prefers one. Levels that nobody is on
/// vanish.
pub fn failover_levels(client: &Locality, endpoints: &[&Locality], rules: &[Failover]) -> Vec<u32> {
    // Only the first rule for the client's region counts.
    let rule = rules.iter().find(|rule| rule.from == client.region);
    let raw: Vec<u32> = endpoints
        .iter()
        .map(|endpoint| {
            if endpoint.region != client.region {
                if rule.is_some_and(|rule| rule.to != endpoint.region) { 4 } else { 3 }
            } else if endpoint.zone != client.zone {
                2
            } else if endpoint.subzone != client.subzone {
                1
            } else {
                0
            }
        })
        .collect();
    compact(&raw)
}

/// Renumbers levels so that none is empty: 0..n in the same order.
fn compact(raw: &[u32]) -> Vec<u32> {
    let mut levels = raw.to_vec();
    levels.sort_unstable();
    levels.dedup();
    raw.iter().map(|level| levels.partition_point(|other| other < level) as u32).collect()
}

/// The weight of each locality (in the order given, with its own weight: the sum of its endpoints') under the first
/// rule for the client's place (Istio `applyLocalityWeight`). `None` for a locality: no destination of the rule matches it, so it
/// gets nothing. `None` for all: no rule is for this client.
pub fn distribute_weights(
    client: &Locality,
    localities: &[(&Locality, u64)],
    rules: &[Distribute],
) -> Option<Vec<Option<u64>>> {
    let rule = rules.iter().find(|rule| rule.from.matches(client))?;
    let mut weights = vec![None; localities.len()];
    for (pattern, percent) in &rule.to {
        let matched: Vec<usize> =
            (0..localities.len()).filter(|&i| weights[i].is_none() && pattern.matches(localities[i].0)).collect();
        let total: u64 = matched.iter().map(|&i| localities[i].1).sum();
        for i in matched {
            // A destination's percentage is divided by the localities' own weights, rounded up.
            weights[i] = Some((localities[i].1 * u64::from(*percent)).div_ceil(total.max(1)));
        }
    }
    Some(weights)
}
