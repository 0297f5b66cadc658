//! Istio's `outlierDetection`.

use std::time::Duration;

/// `outlierDetection`, with Envoy's defaults where Istio sets none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutlierDetection {
    /// Failures in a row that eject; 0 turns it off. Not asked for a connection where `local_origin_errors` is set.
    pub consecutive_errors: u32,
    /// The same events, another threshold; 0: not set.
    pub gateway_errors: u32,
    /// With `splitExternalLocalOriginErrors`: the only threshold for connections; 0 turns it off.
    pub local_origin_errors: Option<u32>,
    /// The sweep that releases.
    pub interval: Duration,
    /// Time of the first ejection; the n-th lasts n times as long.
    pub base_ejection_time: Duration,
    /// No ejection lasts longer.
    pub max_ejection_time: Duration,
    /// Percentage of the pool that may be ejected at once.
    pub max_ejection_percent: u32,
    /// Whether one endpoint may be ejected where the percentage allows none (Portolan's own).
    pub always_eject_one: bool,
    /// Panic threshold in percent; 0: no panic.
    pub min_health_percent: u32,
    /// Whether a connection that breaks before a byte came back counts as a failure (Portolan's own).
    pub count_early_resets: bool,
}

/// What proves that an endpoint is well, and ends a row of failures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SuccessCriterion {
    /// A connection that is established.
    #[default]
    Connected,
    /// A byte that comes back (`portolan.io/count-early-resets`).
    FirstByte,
    /// An HTTP response with a status below 500.
    HttpStatus,
}

impl OutlierDetection {
    /// Failures of connections in a row that eject. A threshold of 0 is none.
    pub fn thresholds(&self) -> [u32; 2] {
        match self.local_origin_errors {
            Some(errors) => [errors, 0],
            None => [self.gateway_errors, self.consecutive_errors],
        }
    }

    /// The thresholds by what they count: gateway errors, errors, failures of local origin. 0 is none.
    pub fn counters(&self) -> [u32; 3] {
        [self.gateway_errors, self.consecutive_errors, self.local_origin_errors.unwrap_or(0)]
    }

    /// Endpoints out of `hosts` that may be ejected at once.
    pub fn most_ejected(&self, hosts: usize) -> usize {
        let by_percent = hosts * self.max_ejection_percent as usize / 100;
        by_percent.max(usize::from(self.always_eject_one && hosts > 0))
    }
}
