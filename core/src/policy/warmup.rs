//! Warmup of new endpoints (Envoy slow start).

use std::time::Duration;

use crate::model::Warmup;

/// Returns the fraction of its weight, at most 1.0, that an endpoint of this age gets (Envoy slow start).
pub fn warmup_factor(warmup: &Warmup, age: Duration) -> f64 {
    if age >= warmup.window {
        return 1.0;
    }
    let part = age.max(Duration::from_millis(1)).as_secs_f64() / warmup.window.as_secs_f64();
    part.powf(1.0 / warmup.aggression).max(warmup.minimum_percent / 100.0).min(1.0)
}
