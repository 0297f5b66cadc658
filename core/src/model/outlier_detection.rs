//! Istio's `outlierDetection`, applied to connections and HTTP/1 responses.

use std::time::Duration;

/// `outlierDetection`, with Envoy's defaults for the fields that Istio does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutlierDetection {
    /// The number of consecutive errors that ejects an endpoint; 0 disables the check.
    /// Connect failures do not count if `local_origin_errors` is set.
    pub consecutive_errors: u32,
    /// The number of consecutive gateway errors that ejects an endpoint; 0 disables the check.
    /// Status 502 to 504 and connect failures count; the latter do not if `local_origin_errors` is set.
    pub gateway_errors: u32,
    /// The number of consecutive connect failures that ejects; 0 disables the check.
    /// `None` unless `splitExternalLocalOriginErrors` is set.
    pub local_origin_errors: Option<u32>,
    /// The interval of the sweep that ends expired ejections.
    pub interval: Duration,
    /// The duration of the first ejection; the n-th ejection lasts n times as long.
    pub base_ejection_time: Duration,
    /// The upper bound for the duration of an ejection.
    pub max_ejection_time: Duration,
    /// The maximum share of the pool that may be ejected at the same time, in percent.
    pub max_ejection_percent: u32,
    /// Whether one endpoint may be ejected even if the percentage allows none
    /// (`portolan.io/always-eject-one`; Envoy's `always_eject_one_host`).
    pub always_eject_one: bool,
    /// The panic threshold in percent; 0 disables panic mode.
    pub min_health_percent: u32,
    /// Whether a connection that breaks before the first response byte counts as a failure
    /// (`portolan.io/count-early-resets`).
    pub count_early_resets: bool,
}

/// The event that counts as a success and resets the failure counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SuccessCriterion {
    /// An established connection.
    #[default]
    Connected,
    /// The first response byte (`portolan.io/count-early-resets`).
    FirstByte,
    /// An HTTP response with a status below 500.
    HttpStatus,
}

impl OutlierDetection {
    /// Returns the thresholds that apply to connect failures. 0 means no threshold.
    pub fn thresholds(&self) -> [u32; 2] {
        match self.local_origin_errors {
            Some(errors) => [errors, 0],
            None => [self.gateway_errors, self.consecutive_errors],
        }
    }

    /// Returns the thresholds in the order gateway errors, all errors, local-origin failures. 0 means no threshold.
    pub fn counters(&self) -> [u32; 3] {
        [self.gateway_errors, self.consecutive_errors, self.local_origin_errors.unwrap_or(0)]
    }

    /// Returns how many of `hosts` endpoints may be ejected at the same time. The percentage rounds down.
    pub fn most_ejected(&self, hosts: usize) -> usize {
        let by_percent = hosts * self.max_ejection_percent as usize / 100;
        by_percent.max(usize::from(self.always_eject_one && hosts > 0))
    }
}
