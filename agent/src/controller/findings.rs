//! What is told of objects and maps that are not as they should be.

use std::collections::BTreeSet;

use portolan_core::{
    model::{Code, Finding, Severity},
    table::{Layout, Rejected},
};

use super::Reconciler;

/// Findings that are logged one by one when they appear together.
const LOGGED_AT_ONCE: usize = 50;
/// A map that is as full as this, in percent, is told.
const NEARLY_FULL: u64 = 90;

impl Reconciler {
    /// Logs the findings that were not there before. Those of objects are looked through only where there is anything new.
    pub(super) fn log_findings(&mut self, of_objects: bool) {
        let mut fresh = self.compiler.fresh_findings();
        if of_objects {
            let now: BTreeSet<Finding> = self
                .store
                .findings()
                .into_iter()
                .chain(self.client_findings.clone())
                .chain(self.start_findings.clone())
                .chain(self.findings_of_health())
                .chain(self.trouble.clone())
                .chain(self.crowded.clone())
                .collect();
            fresh.extend(now.difference(&self.logged).cloned());
            self.logged = now;
        }
        for finding in &mut fresh {
            self.store.add_source(&self.cluster, finding);
        }
        if let Some(teller) = &self.teller {
            // Where it has enough to do, the log must do.
            fresh.iter().for_each(|finding| drop(teller.try_send(finding.clone())));
        }
        for finding in fresh.iter().take(LOGGED_AT_ONCE) {
            let Finding { code, object, field, message, position, .. } = finding;
            let at = position.as_ref().map(|position| format!(":{}:{}", position.line, position.column));
            let source =
                Some(format!("{}{}", finding.source, at.unwrap_or_default())).filter(|source| !source.is_empty());
            let field = if field.is_empty() { String::new() } else { format!(" {field}") };
            match finding.severity {
                Severity::Error => tracing::error!(source, "{code} {object}{field}: {message}"),
                Severity::Warning => tracing::warn!(source, "{code} {object}{field}: {message}"),
            }
        }
        if let Some(more) = fresh.len().checked_sub(LOGGED_AT_ONCE).filter(|more| *more > 0) {
            tracing::warn!("{more} more findings: portolan get services");
        }
    }
}

/// Maps that should be larger.
pub(super) fn crowded(layout: &Layout) -> Vec<Finding> {
    let full = layout
        .occupancy()
        .into_iter()
        .filter(|(_, used, size)| u64::from(*used) * 100 >= u64::from(*size) * NEARLY_FULL);
    full.map(|(map, used, size)| {
        let message = format!("{used} of {size} entries are in use; start the agent with a larger size");
        Finding::new(Code::MapNearlyFull, format!("Map {map}"), message)
    })
    .collect()
}

/// A frontend that does not fit.
pub(super) fn no_room(refused: &Rejected) -> Finding {
    let (address, full) = (refused.key.endpoint().socket_addr(), refused.full);
    let what =
        if refused.held { "it stays as it was, or refuses if it is new" } else { "its connections go past Portolan" };
    let message = format!("{} ({} entries) has no room for {} more: {what}", refused.map, full.size, full.wanted);
    Finding::new(Code::MapFull, format!("Frontend {address}"), message)
}
