//! The findings of all parts. New ones are logged, and become actions that record them as Kubernetes Events.

use std::collections::BTreeSet;

use portolan_core::model::{Code, Finding, ObjectRef, Severity};

use super::{Controller, effect::Action, now::Now, overrides, publish::is_nearly_full};
use crate::kernel::Kernel;

/// New findings that are logged one by one; of more, only the number is logged.
const MAX_LOGGED: usize = 50;

/// Knows which findings have been reported.
#[derive(Debug, Default)]
pub(super) struct FindingReporter {
    known: BTreeSet<Finding>,
}

impl FindingReporter {
    /// Replaces all findings, and returns the new ones.
    pub(super) fn replace(&mut self, findings: BTreeSet<Finding>) -> Vec<Finding> {
        let new = findings.difference(&self.known).cloned().collect();
        self.known = findings;
        new
    }

    /// Logs new findings.
    pub(super) fn log(new: &[Finding]) {
        for finding in new.iter().take(MAX_LOGGED) {
            let Finding { code, object, field, message, position, .. } = finding;
            let at = position.as_ref().map(|position| format!(":{}:{}", position.line, position.column));
            let source = format!("{}{}", finding.source, at.unwrap_or_default());
            let source = Some(source).filter(|source| !source.is_empty());
            let field = if field.is_empty() { String::new() } else { format!(" {field}") };
            match finding.severity {
                Severity::Error => tracing::error!(source, "{code} {object}{field}: {message}"),
                Severity::Warning => tracing::warn!(source, "{code} {object}{field}: {message}"),
            }
        }
        if let Some(more) = new.len().checked_sub(MAX_LOGGED).filter(|more| *more > 0) {
            tracing::warn!("{more} more findings; run: portolan get services");
        }
    }
}

impl<K: Kernel> Controller<K> {
    /// Returns all findings but those of the compiler.
    pub(super) fn standing_findings(&self, now: Now) -> impl Iterator<Item = Finding> {
        self.store
            .findings()
            .into_iter()
            .chain(self.client_findings.iter().cloned())
            .chain(self.start_findings.iter().cloned())
            .chain(self.publisher.findings().cloned())
            .chain(self.http.findings(&self.health))
            .chain(self.probe_limit_finding())
            .chain(self.connections_finding())
            .chain(self.gate.findings(now).cloned())
            .chain(overrides::findings(self.health.overrides()))
    }

    /// Returns a finding if few slots for the state of connections are left.
    /// Its message has no count, so that it stays the same finding while connections come and go.
    pub(super) fn connections_finding(&self) -> Option<Finding> {
        let (used, size, _) = self.kernel.connection_slots();
        is_nearly_full(used, size).then(|| {
            let message = format!(
                "at least 90 % of the {size} slots are in use; further sockets keep their state in socket storage, and take longer to connect; restart the agent with a larger --max-connections"
            );
            Finding::new(Code::MapNearlyFull, ObjectRef::global("Map", "connections"), message)
        })
    }

    /// Returns a finding if rules ask for more active probes than the limit allows.
    fn probe_limit_finding(&self) -> Option<Finding> {
        let (targets, _, asked) = self.health.probes();
        let limit = self.settings.probes_per_second;
        (asked > f64::from(limit)).then(|| {
            let effect = if limit == 0 {
                "active probes are disabled".to_owned()
            } else {
                format!("the limit is {limit}, so that endpoints are probed less often than periodSeconds says")
            };
            let message = format!(
                "portolan.io/probe asks for {asked:.0} probes per second of {targets} endpoints; {effect} (--probes-per-second)"
            );
            Finding::new(Code::ProbesBounded, ObjectRef::global("Probes", ""), message)
        })
    }

    /// Logs and records new findings; those of objects only if something about them is new.
    pub(super) fn report_findings(&mut self, now: Now, of_objects: bool) {
        let mut new = self.compiler.fresh_findings();
        if of_objects {
            let standing: BTreeSet<Finding> = self.standing_findings(now).collect();
            new.extend(self.finding_reporter.replace(standing));
        }
        for finding in &mut new {
            self.store.add_source(&self.settings.cluster, finding);
        }
        FindingReporter::log(&new);
        self.actions.extend(new.into_iter().map(Action::RecordFinding));
    }
}
