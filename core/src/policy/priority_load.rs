//! Load of each priority level (Envoy priority load and panic threshold).

/// Envoy's overprovisioning factor in percent: at 140, up to 28 of 100 hosts may fail before traffic spills over.
pub const OVERPROVISIONING_FACTOR: u64 = 140;

/// Hosts of one priority level, as counts or as sums of weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Level {
    /// All hosts, including excluded ones.
    pub hosts: u64,
    /// Hosts that are eligible for connections.
    pub healthy: u64,
    /// Hosts that are eligible only if healthy ones cannot carry the load.
    pub degraded: u64,
    /// Hosts of unknown health, which are left out of the percentages.
    pub excluded: u64,
}

impl Level {
    /// Creates a level whose hosts are either healthy or unhealthy.
    pub fn new(hosts: u64, healthy: u64) -> Self {
        Self { hosts, healthy, ..Self::default() }
    }
}

/// Load of each priority level, in the order of the input.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loads {
    /// Percent of the connections for healthy hosts.
    pub load: Vec<u32>,
    /// Percent of the connections for degraded hosts.
    pub degraded: Vec<u32>,
    /// Whether the level is in panic mode: so few of its hosts are healthy that all of them are used.
    pub panic: Vec<bool>,
}

/// Computes the load of the priority levels, nearest first.
pub fn loads(levels: &[Level], threshold: u32, factor: u64) -> Loads {
    let counted = |level: &Level| level.hosts.saturating_sub(level.excluded);
    let health = |hosts: u64, level: &Level| (factor * hosts).checked_div(counted(level)).unwrap_or(0).min(100);
    let healthy: Vec<u64> = levels.iter().map(|level| health(level.healthy, level)).collect();
    let degraded: Vec<u64> = levels.iter().map(|level| health(level.degraded, level)).collect();
    let total = healthy.iter().chain(&degraded).sum::<u64>().min(100);
    // No level panics while all levels together can carry the full load.
    let panic: Vec<bool> = levels
        .iter()
        .map(|level| {
            let hosts = counted(level);
            let usable = level.healthy + level.degraded;
            let percent = if hosts == 0 { 0.0 } else { 100.0 * usable as f64 / hosts as f64 };
            total < 100 && percent < f64::from(threshold)
        })
        .collect();
    let none = vec![0; levels.len()];
    if !levels.is_empty() && panic.iter().all(|panic| *panic) {
        let hosts: u64 = levels.iter().map(|level| level.hosts).sum();
        let load = levels.iter().map(|level| 100 * level.hosts / hosts.max(1)).collect();
        let first = levels.iter().position(|level| level.hosts > 0);
        return Loads { load: with_remainder(load, first, 100), degraded: none, panic };
    }
    let mut left = 100;
    let mut take = |health: &[u64]| -> Vec<u64> {
        let take = |health: &u64| {
            let part = (health * 100).checked_div(total).unwrap_or(0).min(left);
            left -= part;
            part
        };
        health.iter().map(take).collect()
    };
    let (load, spilled) = (take(&healthy), take(&degraded));
    let to = |health: &[u64]| health.iter().position(|health| *health > 0);
    match (to(&healthy), to(&degraded)) {
        (None, Some(first)) => Loads { load: none, degraded: with_remainder(spilled, Some(first), 100), panic },
        (first, _) => {
            let whole = 100 - spilled.iter().sum::<u64>();
            // If no host is eligible, the load goes to the nearest level, which refuses it.
            let first = first.or(if levels.is_empty() { None } else { Some(0) });
            let degraded = spilled.into_iter().map(|load| load as u32).collect();
            Loads { load: with_remainder(load, first, whole), degraded, panic }
        }
    }
}

/// Adds the remainder of the integer division to one level.
fn with_remainder(mut load: Vec<u64>, to: Option<usize>, whole: u64) -> Vec<u32> {
    let given: u64 = load.iter().sum();
    if let Some(level) = to.and_then(|to| load.get_mut(to)) {
        *level += whole.saturating_sub(given);
    }
    load.into_iter().map(|load| load as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Envoy's arithmetic has one case in which losing a host raises the load of its level.
    /// If the loss puts all levels into panic mode, load follows the size of the levels.
    #[test]
    fn panic_can_raise_load_of_a_level_that_loses_a_host() {
        let of = |far: u64| loads(&[Level::new(2, 1), Level::new(1, far)], 60, OVERPROVISIONING_FACTOR).load;
        assert_eq!((of(1), of(0)), (vec![70, 30], vec![67, 33]));
    }

    proptest::proptest! {
        #[test]
        fn loads_sum_to_100(levels in proptest::collection::vec((0u64..200, 0u64..200), 1..6), threshold in 0u32..=100) {
            let levels: Vec<Level> = levels.iter().map(|&(hosts, healthy)| Level::new(hosts, healthy.min(hosts))).collect();
            let loads = loads(&levels, threshold, OVERPROVISIONING_FACTOR);
            if levels.iter().any(|level| level.hosts > 0) {
                proptest::prop_assert_eq!(loads.load.iter().sum::<u32>(), 100);
            }
        }
    }
}
