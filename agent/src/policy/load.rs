//! How much each priority carries (Envoy's priority load and panic threshold).

/// Hosts beyond this percentage of a level's health are spare: at 140, up to 28 of 100 may fail before traffic spills.
pub const OVERPROVISIONING_FACTOR: u64 = 140;

/// The hosts of one priority.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Level {
    /// All of them.
    pub hosts: u64,
    /// Those that may be chosen.
    pub healthy: u64,
}

/// What each priority gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loads {
    /// Percent of the connections; sums to 100 where there is any host.
    pub load: Vec<u32>,
    /// Whether so few hosts of the level are healthy that all of them are used.
    pub panic: Vec<bool>,
}

/// Loads of the priorities, nearest first. `threshold` is the panic threshold in percent; 0 turns panic off. `factor` is in percent.
pub fn loads(levels: &[Level], threshold: u32, factor: u64) -> Loads {
    let health: Vec<u64> =
        levels.iter().map(|level| (factor * level.healthy).checked_div(level.hosts).unwrap_or(0).min(100)).collect();
    let total = health.iter().sum::<u64>().min(100);
    // While the levels together can carry everything, none panics.
    let panic: Vec<bool> = levels
        .iter()
        .map(|level| {
            let percent = if level.hosts == 0 { 0.0 } else { 100.0 * level.healthy as f64 / level.hosts as f64 };
            total < 100 && percent < f64::from(threshold)
        })
        .collect();
    if !levels.is_empty() && panic.iter().all(|panic| *panic) {
        let hosts: u64 = levels.iter().map(|level| level.hosts).sum();
        let load = levels.iter().map(|level| 100 * level.hosts / hosts.max(1)).collect();
        let first = levels.iter().position(|level| level.hosts > 0);
        return Loads { load: with_remainder(load, first), panic };
    }
    let mut left = 100;
    let mut load = Vec::with_capacity(levels.len());
    for health in &health {
        let part = (health * 100).checked_div(total).unwrap_or(0).min(left);
        left -= part;
        load.push(part);
    }
    let first = health.iter().position(|health| *health > 0).or(if levels.is_empty() { None } else { Some(0) });
    Loads { load: with_remainder(load, first), panic }
}

/// What integer division left over goes to one level.
fn with_remainder(mut load: Vec<u64>, to: Option<usize>) -> Vec<u32> {
    let given: u64 = load.iter().sum();
    if let Some(level) = to.and_then(|to| load.get_mut(to)) {
        *level += 100 - given;
    }
    load.into_iter().map(|load| load as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn loads_sum_to_a_hundred(levels in proptest::collection::vec((0u64..200, 0u64..200), 1..6), threshold in 0u32..=100) {
            let levels: Vec<Level> = levels.iter().map(|&(hosts, healthy)| Level { hosts, healthy: healthy.min(hosts) }).collect();
            let loads = loads(&levels, threshold, OVERPROVISIONING_FACTOR);
            if levels.iter().any(|level| level.hosts > 0) {
                proptest::prop_assert_eq!(loads.load.iter().sum::<u32>(), 100);
            }
        }
    }
}
