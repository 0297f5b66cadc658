//! The vectors in `data/vectors.json`: the behavior of Istio, Envoy and Kubernetes, as figures with their sources.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
#![allow(clippy::disallowed_methods, reason = "a test gets its times and files from somewhere")]
#![allow(unreachable_pub, reason = "an integration test is a separate crate")]

mod clusters;
#[path = "../common/mod.rs"]
mod common;
mod kubernetes;
mod load;
mod locality;
mod outlier;
mod values;

use libtest_mimic::{Arguments, Trial};
use serde_json::Value;
use values::text;

/// Checks one vector, given its input and expected output. Panics on a mismatch.
type Check = fn(&Value, &Value);

/// Every kind of vector, and its check.
const KINDS: [(&str, Check); 32] = [
    ("acceptance", clusters::acceptance),
    ("cluster_local", clusters::cluster_local_setting),
    ("cluster_local_endpoints", clusters::cluster_local_endpoints),
    ("ejection_growth", outlier::ejection_growth),
    ("ejection_limit", outlier::ejection_limit),
    ("ejection_timeline", outlier::ejection_timeline),
    ("istio_distribute", locality::distribute),
    ("istio_effective_setting", locality::effective),
    ("istio_endpoint_health", kubernetes::endpoint_health),
    ("istio_failover_mixed", locality::failover_mixed),
    ("istio_failover_priority_labels", locality::failover_labels),
    ("istio_lb_validation", locality::validation),
    ("istio_locality_failover", locality::failover),
    ("istio_locality_match", locality::locality_match),
    ("istio_od_mapping", outlier::outlier_mapping),
    ("istio_panic_mapping", outlier::outlier_mapping),
    ("istio_zone_aware", locality::zone_aware),
    ("k8s_conditions", kubernetes::kubernetes_conditions),
    ("k8s_endpoints", kubernetes::kubernetes_endpoints),
    ("locality_weight_share", load::weight_share),
    ("locality_wrr_counts", load::wrr_counts),
    ("locality_wrr_sequence", load::wrr_sequence),
    ("locality_wrr_windows", load::wrr_windows),
    ("od_config", outlier::outlier_config),
    ("od_consecutive", outlier::consecutive),
    ("od_failure_percentage", outlier::failure_percentage),
    ("od_jitter", outlier::jitter),
    ("od_success_rate", outlier::success_rate),
    ("od_tcp_mapping", outlier::tcp_mapping),
    ("priority_load", load::priority_load),
    ("slow_start_factor", load::slow_start),
    ("ztunnel_candidates", locality::ztunnel),
];

/// Runs each vector as a test named `kind/id`.
fn main() {
    let arguments = Arguments::from_args();
    let file: Value = serde_json::from_str(include_str!("../data/vectors.json")).unwrap();
    let trials = file["vectors"].as_array().unwrap().iter().map(|vector| {
        let (id, kind) = (text(&vector["id"]), text(&vector["kind"]));
        let check =
            KINDS.iter().find(|(known, _)| *known == kind).unwrap_or_else(|| panic!("{id}: unknown kind {kind}")).1;
        let vector = vector.clone();
        Trial::test(format!("{kind}/{id}"), move || {
            check(&vector["input"], &vector["expect"]);
            Ok(())
        })
    });
    let trials: Vec<Trial> = trials.collect();
    assert_eq!(trials.len(), 204, "number of vectors");
    libtest_mimic::run(&arguments, trials).exit();
}
