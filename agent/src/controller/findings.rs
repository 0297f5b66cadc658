//! Findings that are new: they are logged, and recorded as Kubernetes Events.

use std::collections::BTreeSet;

use portolan_core::model::{Finding, Severity};
use tokio::sync::mpsc;

/// New findings that are logged one by one; of more, only the number is logged.
const MAX_LOGGED: usize = 50;

/// Knows which findings have been reported.
#[derive(Debug, Default)]
pub(super) struct FindingReporter {
    known: BTreeSet<Finding>,
    /// Records findings as Kubernetes Events.
    recorder: Option<mpsc::Sender<Finding>>,
}

impl FindingReporter {
    /// A reporter that also hands new findings to `recorder`.
    pub(super) fn new(recorder: Option<mpsc::Sender<Finding>>) -> Self {
        Self { known: BTreeSet::new(), recorder }
    }

    /// Replaces all findings, and returns the new ones.
    pub(super) fn replace(&mut self, findings: BTreeSet<Finding>) -> Vec<Finding> {
        let new = findings.difference(&self.known).cloned().collect();
        self.known = findings;
        new
    }

    /// Logs and records new findings.
    pub(super) fn report(&self, new: &[Finding]) {
        if let Some(recorder) = &self.recorder {
            // Best effort: a recorder that is busy loses Events, and not the log.
            new.iter().for_each(|finding| drop(recorder.try_send(finding.clone())));
        }
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
