//! From changes of the input to writes: compiles, plans, writes, and tells the parts what changed.

use std::collections::{BTreeMap, btree_map::Entry};

use portolan_core::{
    model::Finding,
    policy::ServiceChange,
    store::Changes,
    table::{Completeness, Op, Table},
};

use super::{Controller, Publication, effect::Action, now::Now, publish::Desired};
use crate::kernel::Kernel;

impl<K: Kernel> Controller<K> {
    /// Computes what changed, and leads the kernel to it.
    pub(super) fn publish(&mut self, now: Now) -> portolan_datapath::Result<()> {
        let first = !self.attached;
        let mut changes = std::mem::take(&mut self.changes);
        let mut findings = Vec::new();
        let client = self.settings.location.client(&self.settings.cluster, &self.store, &mut findings);
        changes.everything |= client != self.client;
        changes.findings |= findings != self.client_findings;
        (self.client, self.client_findings) = (client, findings);
        let changed = self.compile(now, &changes);
        let probes = self.health.probes_wanted();
        self.actions.extend(probes.into_iter().map(|(target, number)| Action::Probe { target, number }));

        let completeness = self.update_completeness();
        let desired = self.desired(&changed, completeness);
        let known: Vec<Finding> = self.publisher.findings().cloned().collect();
        let ops = self.publisher.plan(self.self_probe.table(), &desired);
        self.before_writes(now, &ops);
        self.publisher.commit(now, &ops, &mut self.kernel)?;

        changes.findings |= desired.full || !self.publisher.findings().eq(&known);
        self.report_findings(now, changes.findings);
        self.index(now, &changed, desired.full);
        if !self.attached && self.can_attach() {
            self.attach(now, &desired.table)?;
        }
        if self.attached {
            self.http.apply(&mut self.kernel);
        }
        let layout = self.publisher.layout();
        let effects = self.http.load(&changed, &mut self.health, layout, &self.kernel);
        self.route(now, effects);
        let removed = self.publisher.layout_mut().drain_removed();
        if self.attached {
            let (planner, view) = self.termination();
            if let Some(request) = planner.on_removed(removed, &view) {
                self.kernel.sweep(request);
            }
        }
        let frontends = ops.iter().filter(|op| matches!(op, Op::Publish(..) | Op::RemoveFrontend(..))).count();
        let first_failure = self.gate.take_first_failure();
        self.publications.push(Publication { frontends, writes: ops.len(), first_failure, first });
        Ok(())
    }

    /// Recomputes what changed, and tells the detectors and the metrics.
    fn compile(&mut self, now: Now, changes: &Changes) -> Vec<ServiceChange> {
        let mut changed: BTreeMap<_, ServiceChange> = BTreeMap::new();
        let mut changes =
            Changes { services: changes.services.clone(), everything: changes.everything, ..Changes::default() };
        // Again for endpoints that begin to warm up, or that a previous agent had ejected: the detectors find them.
        while changes.everything || !changes.services.is_empty() {
            let observed = self.health.observed();
            for change in self.compiler.compile(self.store.snapshot(), &self.client, observed, &changes) {
                self.health.configure(now.instant, &change.service, &change.after);
                self.collector.name(&change.service, &change.before, &change.after);
                match changed.entry(change.service.clone()) {
                    Entry::Occupied(mut known) => known.get_mut().after = change.after,
                    Entry::Vacant(vacant) => drop(vacant.insert(change)),
                }
            }
            changes = Changes { services: self.health.services_to_recompute(), ..Changes::default() };
        }
        changed.into_values().collect()
    }

    /// Finds out how much of the input was read, and why no more.
    fn update_completeness(&mut self) -> Completeness {
        let cluster = &self.settings.cluster;
        let (completeness, unread) = match self.store.first_unread(cluster) {
            Some((unread, true)) => (Completeness::WithoutSettings, Some(unread.what.clone())),
            // Readiness does not wait for what another cluster has to add.
            Some((unread, false)) => (Completeness::Partial, unread.concerns(cluster).then(|| unread.what.clone())),
            None if !self.store.snapshot().clusters.contains_key(cluster.as_str()) => {
                (Completeness::Partial, Some(format!("the configuration has no objects of cluster {cluster}")))
            }
            None => (Completeness::Complete, None),
        };
        self.unread = unread;
        completeness
    }

    /// Returns what the kernel is to hold: everything, or what changed.
    fn desired(&self, changed: &[ServiceChange], completeness: Completeness) -> Desired {
        if self.publisher.needs_full_table(completeness) {
            let mut table = Table::new(&self.compiler.output().assignments);
            table.frontends.extend(self.self_probe.table().frontends.clone());
            return Desired { table, removed: Vec::new(), full: true, completeness };
        }
        let table = Table::new(changed.iter().flat_map(|change| &change.after));
        let before = Table::new(changed.iter().flat_map(|change| &change.before));
        let removed = before.frontends.into_keys().filter(|key| !table.frontends.contains_key(key)).collect();
        Desired { table, removed, full: false, completeness }
    }

    /// Saves what the writes will reset.
    fn before_writes(&mut self, now: Now, ops: &[Op]) {
        if ops.iter().any(|op| matches!(op, Op::RemoveFrontend(..) | Op::ResetFrontend(..))) {
            self.count_frontends();
        }
        if self.collector.before(ops, &self.kernel) {
            self.termination.recount_later(now);
        }
        for op in ops {
            if let Op::SetBackend(id, _) = op {
                self.gate.reset_backend(*id);
            }
        }
    }

    /// Indexes all services, or those that changed.
    fn index(&mut self, now: Now, changed: &[ServiceChange], full: bool) {
        self.termination.untrack(changed.iter().flat_map(|change| &change.before));
        let all = if full { self.compiler.output().assignments } else { Vec::new() };
        if full {
            self.frontends.clear();
            self.http.reset(&all);
        }
        self.http.update(changed);
        for assignment in all.iter().chain(changed.iter().flat_map(|change| &change.after)) {
            self.termination.track(now, assignment);
            self.frontends.insert(assignment, self.publisher.layout());
        }
    }

    /// Reports whether this agent's programs may serve. They replace those of another version only with a complete table.
    fn can_attach(&self) -> bool {
        let complete = self.unread.is_none() && self.publisher.write_errors().is_empty();
        !self.kernel.replaces_another() || complete
    }

    fn attach(&mut self, now: Now, table: &Table) -> portolan_datapath::Result<()> {
        let replaces = self.kernel.replaces_another();
        self.kernel.attach()?;
        self.attached = true;
        let (planner, view) = self.termination();
        if replaces && let Some(request) = planner.on_replaced(&view) {
            self.kernel.sweep(request);
        }
        // The programs of a previous agent may have been detached for a while.
        self.termination.recount_now(now);
        self.actions.push(Action::SelfProbe);
        let (cgroup, frontends) = (self.kernel.location(), table.frontends.len());
        tracing::info!(cgroup, frontends, "attached: connections are served");
        Ok(())
    }

    /// Adds the counters of all frontends to the metrics.
    pub(super) fn count_frontends(&mut self) {
        for (id, service, port) in self.frontends.services() {
            if let Ok(stats) = self.kernel.frontend_stats(id) {
                self.collector.take_frontend(id, service, port, stats);
            }
        }
    }
}
