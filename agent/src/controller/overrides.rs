//! Overrides by an operator: `portolan eject`, `drain` and `restore`.

use portolan_core::{
    health::{OverrideCommand, Overrides},
    model::{Code, Finding, ObjectRef},
    policy::PolicyOutput,
    table::Layout,
};

use super::event_log::rfc3339;

/// Returns why a command would have no effect.
pub(super) fn validate(command: &OverrideCommand, layout: &Layout, output: &PolicyOutput) -> Option<String> {
    match command {
        OverrideCommand::Eject { endpoint, .. } => {
            let known = layout.backend_id(endpoint).is_some();
            (!known).then(|| format!("no service has an endpoint {endpoint}; portolan get endpoints lists them"))
        }
        OverrideCommand::Drain { service, region, .. } => {
            let of_service = output.assignments.iter().filter(|assignment| assignment.service.name == *service);
            let pools: Vec<_> = of_service.flat_map(|assignment| &assignment.routes).map(|route| &route.pool).collect();
            if pools.is_empty() {
                return Some(format!("clients of this node have no service {service}"));
            }
            let mut endpoints = pools.iter().flat_map(|pool| &pool.endpoints);
            let exists = endpoints.any(|endpoint| endpoint.locality.region == *region);
            (!exists).then(|| format!("{service} has no endpoint in region {region}"))
        }
        OverrideCommand::Restore { .. } | OverrideCommand::Undrain { .. } => None,
    }
}

/// Returns a finding for each override in effect: endpoints get no connections because of it.
pub(super) fn findings(overrides: &Overrides) -> impl Iterator<Item = Finding> {
    let because = |reason: &str| if reason.is_empty() { String::new() } else { format!(" ({reason})") };
    let ejected = overrides.ejected().map(move |(endpoint, terms)| {
        let until =
            terms.until.map_or_else(|| "until it is restored".to_owned(), |at| format!("until {}", rfc3339(at)));
        let message =
            format!("ejected by an operator {until}; to undo: portolan restore {endpoint}{}", because(&terms.reason));
        Finding::new(Code::Override, ObjectRef::global("Endpoint", endpoint), message)
    });
    let drained = overrides.drained().map(move |drain| {
        let (service, region, because) = (&drain.service, &drain.region, because(&drain.ordered.reason));
        let message = format!(
            "region {region} is drained by an operator and gets no new connections; to undo: portolan restore {service} --region {region}{because}"
        );
        Finding::new(Code::Override, ObjectRef::new("Service", service), message)
    });
    ejected.chain(drained)
}
