//! Priority load, locality shares, and warmup.

use std::time::Duration;

use portolan_core::{
    model::Warmup,
    policy::{Level, OVERPROVISIONING_FACTOR, Schedule, Share, WeightedGroup, effective_weights, loads, warmup_factor},
};
use serde_json::{Value, json};

use crate::values::{host, list, number};

pub fn priority_load(input: &Value, expect: &Value) {
    let weighted = input["weighted_priority_health"] == json!(true);
    let levels: Vec<Level> = list(&input["priorities"])
        .iter()
        .map(|level| {
            let count = |field: &str| number(&level[field]) as usize;
            let (healthy, degraded, excluded) = (count("healthy"), count("degraded"), count("excluded"));
            if !weighted || !level["weights"].is_array() {
                let [healthy, degraded, excluded] = [healthy, degraded, excluded].map(|hosts| hosts as u64);
                return Level { hosts: number(&level["hosts"]), healthy, degraded, excluded };
            }
            // Hosts are in the order healthy, degraded, excluded. Each counts with its weight.
            let weights: Vec<u64> = list(&level["weights"]).iter().map(number).collect();
            let sum = |from: usize, hosts: usize| weights[from..from + hosts].iter().sum();
            Level {
                hosts: weights.iter().sum(),
                healthy: sum(0, healthy),
                degraded: sum(healthy, degraded),
                excluded: sum(healthy + degraded, excluded),
            }
        })
        .collect();
    let threshold = number(&input["panic_threshold_percent"]) as u32;
    let loads = loads(&levels, threshold, number(&input["overprovisioning_factor_percent"]));
    assert_eq!(json!(loads.load), expect["healthy_load"]);
    if expect["degraded_load"].is_array() {
        assert_eq!(json!(loads.degraded), expect["degraded_load"]);
    }
    if expect["panic"].is_array() {
        assert_eq!(json!(loads.panic), expect["panic"]);
    }
}

/// Returns the schedule of localities, by effective weight.
pub fn locality_schedule(input: &Value) -> Schedule {
    let factor = input["overprovisioning_factor_percent"].as_u64().unwrap_or(OVERPROVISIONING_FACTOR);
    let localities: Vec<_> = list(&input["localities"])
        .iter()
        .map(|locality| (number(&locality["weight"]), number(&locality["hosts"]), number(&locality["healthy"])))
        .collect();
    let groups = effective_weights(&localities, factor).into_iter().zip(0..);
    Schedule::new(groups.map(|(weight, i)| WeightedGroup::in_turn(Share::from(weight), vec![(host(i), 1)])).collect())
}

pub fn picks(schedule: &Schedule, count: usize) -> Vec<u32> {
    schedule.turns.iter().cycle().take(if schedule.turns.is_empty() { 0 } else { count }).map(|turn| turn.run).collect()
}

pub fn wrr_counts(input: &Value, expect: &Value) {
    let picks = picks(&locality_schedule(input), number(&input["picks"]) as usize);
    let counts: Vec<usize> = (0..list(&input["localities"]).len() as u32)
        .map(|run| picks.iter().filter(|pick| **pick == run).count())
        .collect();
    assert_eq!(json!(counts), expect["counts"]);
}

pub fn wrr_sequence(input: &Value, expect: &Value) {
    let picks = picks(&locality_schedule(input), list(&expect["sequence"]).len());
    assert_eq!(json!(picks), expect["sequence"]);
}

pub fn wrr_windows(input: &Value, expect: &Value) {
    let size = number(&input["window_size"]) as usize;
    let picks = picks(&locality_schedule(input), size * number(&input["windows"]) as usize);
    let remote: Vec<usize> = picks.chunks(size).map(|window| window.iter().filter(|run| **run == 1).count()).collect();
    assert_eq!(json!(remote), expect["remote_picks_per_window"]);
}

pub fn weight_share(input: &Value, expect: &Value) {
    let localities: Vec<_> = list(&input["localities"])
        .iter()
        .map(|locality| (number(&locality["weight"]), number(&locality["hosts"]), number(&locality["healthy"])))
        .collect();
    let weights = effective_weights(&localities, number(&input["overprovisioning_factor_percent"]));
    let total: u128 = weights.iter().sum();
    for (weight, exact) in weights.iter().zip(list(&expect["share_exact"])) {
        let share = 100.0 * *weight as f64 / total as f64;
        assert!((share - exact.as_f64().unwrap()).abs() < 0.001, "{weights:?}");
    }
}

pub fn slow_start(input: &Value, expect: &Value) {
    let warmup = Warmup {
        window: Duration::from_secs(number(&input["window_s"])),
        minimum_percent: 100.0 * input["min_weight_fraction"].as_f64().unwrap(),
        aggression: input["aggression"].as_f64().unwrap(),
    };
    let factor = warmup_factor(&warmup, Duration::from_secs(number(&input["age_s"])));
    let (expected, tolerance) = (expect["factor"].as_f64().unwrap(), expect["tolerance"].as_f64().unwrap());
    assert!((factor - expected).abs() <= tolerance, "{factor}");
}
