//! Portolan's annotations, and the kinds on which each has an effect.

use serde_json::Value;

use super::context::Context;
use crate::model::{Code, Kind};

pub(super) const DISTRIBUTE_WITH_FAILOVER: &str = "portolan.io/distribute-with-failover";

pub(super) const ALWAYS_EJECT_ONE: &str = "portolan.io/always-eject-one";
pub(super) const COUNT_EARLY_RESETS: &str = "portolan.io/count-early-resets";
pub(super) const PREFER_CLUSTER_LOCAL: &str = "portolan.io/prefer-cluster-local";
pub(super) const PROBE: &str = "portolan.io/probe";
pub(super) const CLOSE_IDLE_ELSEWHERE: &str = "portolan.io/close-idle-elsewhere";

const ANNOTATIONS: [(&str, &[Kind]); 6] = [
    (DISTRIBUTE_WITH_FAILOVER, &[Kind::DestinationRule, Kind::MeshConfig]),
    (ALWAYS_EJECT_ONE, &[Kind::DestinationRule]),
    (COUNT_EARLY_RESETS, &[Kind::DestinationRule]),
    (PREFER_CLUSTER_LOCAL, &[Kind::MeshConfig]),
    (PROBE, &[Kind::DestinationRule]),
    (CLOSE_IDLE_ELSEWHERE, &[Kind::DestinationRule]),
];

/// Reports annotations with the prefix `portolan.io/` that are unknown or have no effect on this kind.
pub(super) fn check(context: &mut Context<'_>, kind: Kind, value: &Value) {
    let annotations = value.pointer("/metadata/annotations").and_then(Value::as_object);
    for key in annotations.into_iter().flat_map(|map| map.keys()).filter(|key| key.starts_with("portolan.io/")) {
        let known = ANNOTATIONS.iter().find(|(name, _)| name == key);
        if known.is_none_or(|(_, kinds)| !kinds.contains(&kind)) {
            let here: Vec<_> =
                ANNOTATIONS.iter().filter(|(_, kinds)| kinds.contains(&kind)).map(|(name, _)| *name).collect();
            let here = if here.is_empty() { "none".to_owned() } else { here.join(", ") };
            let message = format!("unknown annotation on a {kind}; supported: {here}");
            context.finding(Code::UnknownAnnotation, format!("metadata.annotations[\"{key}\"]"), message);
        }
    }
}
