//! The controller: inputs come in, writes to the kernel and requests for I/O go out.
//!
//! Sans-I/O: [`Controller::handle`] takes an input and the time, writes to a [`Kernel`], and collects the I/O that it wants as
//! [`Action`]s. [`run`] is the loop around it, which waits, does the I/O and feeds the results back.
//!
//! | part | owns |
//! |---|---|
//! | `publish` | the layout of the maps, what does not fit, write errors, retries |
//! | `ejection` | who saw an endpoint fail, and what awaits confirmation |
//! | `http_detection` | which HTTP ports are observed, and what they really carry |
//! | `termination` | which connections to terminate, and when to look |
//! | `persistence` | what is to be saved, and who waits for it |
//! | `self_probe` | the last result of the agent's own connection |
//! | `findings` | which findings have been reported |
//!
//! `reconcile` leads from a change of the input to the writes, with the help of these parts.
//!
//! A part never changes another part: it works on itself and on what its caller lends it (the kernel, the health of
//! endpoints), and returns `Effect`s, which the controller routes.

mod effect;
mod ejection;
pub mod event_log;
mod findings;
mod frontend_index;
mod http_detection;
mod now;
mod overrides;
mod persistence;
mod publish;
mod reconcile;
mod requests;
mod run;
mod self_probe;
pub mod state_file;
mod termination;

#[cfg(test)]
mod tests;

use portolan_core::model::ObjectRef;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use portolan_common::OutcomeKind;
use portolan_core::{
    health::{Health, OverrideCommand},
    model::{Code, Finding},
    policy::{Client, Compiler, client::ClientLocation},
    store::{Changes, Store, Update},
    table::{GraceEpoch, PinnedState, Sizes, Table},
};
use portolan_datapath::{Outcome, RemovedEndpointTcp, SweepReport};

use self::{
    effect::{Effect, Unconfirmed},
    ejection::EjectionGate,
    event_log::{Event, EventKind, EventLog},
    findings::FindingReporter,
    frontend_index::FrontendIndex,
    http_detection::HttpDetection,
    persistence::Persistence,
    publish::Publisher,
    self_probe::SelfProbeMonitor,
    state_file::PersistedState,
    termination::TerminationPlanner,
};
use crate::{
    kernel::Kernel,
    metrics::collect::Collector,
    probe::{Counts, ProbeReport, confirm::Confirmation, self_probe::Seen},
};

pub use self::{
    effect::Action,
    now::Now,
    requests::Request,
    run::{Io, run},
};

/// Outcomes that are handled at once, before a new table is published.
pub(crate) const MAX_OUTCOMES: usize = 256;

/// Settings of a controller, which stay the same while it runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Id of the cluster that the node is in.
    pub cluster: String,
    /// Where the clients of the node are.
    pub location: ClientLocation,
    /// Sizes of the maps.
    pub sizes: Sizes,
    /// What happens to TCP connections whose endpoint is removed.
    pub removed_endpoint_tcp: RemovedEndpointTcp,
    /// The limit on active probes, per second; 0 disables them.
    pub probes_per_second: u32,
}

/// What the controller reacts to.
#[derive(Debug)]
pub enum Input {
    /// Sources report changes.
    Updates(Vec<Update>),
    /// The programs report outcomes of connections, at most as many at once as the loop asks for.
    Outcomes {
        /// In the order in which they happened.
        outcomes: Vec<Outcome>,
        /// Whether there were no more.
        drained: bool,
    },
    /// The agent's own connection to an endpoint succeeded or failed.
    Confirmation(Confirmation),
    /// An active probe changed its mind about an endpoint.
    ProbeReport(ProbeReport),
    /// The name of a network namespace was looked up.
    NamespaceName(Unconfirmed, Option<String>),
    /// The self-probe ran.
    SelfProbe(Seen),
    /// No program runs any more that ran when this epoch ended.
    GraceElapsed(GraceEpoch),
    /// The helper looked through all sockets.
    Sweep(SweepReport),
    /// The state file was written, or could not be.
    Saved(u64, Result<(), String>),
    /// A client of the admin socket asks something.
    Request(Request),
    /// [`Controller::poll_timeout`] has come.
    Timeout,
}

/// A publication that changed something, for the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Publication {
    /// Frontends that were published or removed.
    pub frontends: usize,
    /// Writes to the maps.
    pub writes: usize,
    /// When the first failure happened that led to an ejection in it (`CLOCK_MONOTONIC`).
    pub first_failure: Option<Duration>,
    /// Whether it was the first one of this agent.
    pub first: bool,
}

/// The state of the agent.
pub struct Controller<K> {
    settings: Settings,
    kernel: K,
    // Input, and what the policy makes of it.
    store: Store,
    client: Client,
    client_findings: Vec<Finding>,
    /// Whether few slots for the state of connections were left at the last self-probe.
    connections_nearly_full: bool,
    start_findings: Vec<Finding>,
    compiler: Compiler,
    health: Health,
    /// What changed since the last publication.
    changes: Changes,
    /// Why the input is incomplete.
    unread: Option<String>,
    // Parts.
    publisher: Publisher,
    frontends: FrontendIndex,
    attached: bool,
    gate: EjectionGate,
    http: HttpDetection,
    termination: TerminationPlanner,
    persistence: Persistence,
    self_probe: SelfProbeMonitor,
    finding_reporter: FindingReporter,
    events: EventLog,
    collector: Collector,
    probe_counts: Arc<Counts>,
    // Output.
    actions: Vec<Action>,
    publications: Vec<Publication>,
}

/// What a controller starts from.
pub struct Start {
    /// What a previous agent left in the maps.
    pub pinned: PinnedState,
    /// What it left in the state file, or why that cannot be read.
    pub persisted: Result<Option<PersistedState>, String>,
    /// The frontends of the self-probe, and the endpoint that they lead to.
    pub self_probe: (Table, std::net::SocketAddr),
    /// Counts of active probes, for the metrics.
    pub probe_counts: Arc<Counts>,
}

impl<K: Kernel> Controller<K> {
    /// A controller over a kernel whose maps hold what a previous agent left.
    pub fn new(now: Now, settings: Settings, kernel: K, start: Start) -> Self {
        let Start { pinned, persisted, self_probe, probe_counts } = start;
        let adopted = pinned.frontends.len();
        if adopted > 0 {
            let backends = pinned.backends.len();
            tracing::info!(frontends = adopted, backends, "adopted pinned maps from previous agent");
        }
        let mut controller = Self {
            kernel,
            store: Store::default(),
            client: Client::default(),
            client_findings: Vec::new(),
            connections_nearly_full: false,
            start_findings: Vec::new(),
            compiler: Compiler::default(),
            health: Health::default(),
            changes: Changes::everything(),
            unread: None,
            publisher: Publisher::new(settings.sizes, pinned),
            frontends: FrontendIndex::default(),
            attached: false,
            gate: EjectionGate::new(now),
            http: HttpDetection::default(),
            termination: TerminationPlanner::new(settings.removed_endpoint_tcp),
            persistence: Persistence::default(),
            self_probe: SelfProbeMonitor::new(self_probe.0, self_probe.1),
            finding_reporter: FindingReporter::default(),
            events: EventLog::default(),
            collector: Collector::default(),
            probe_counts,
            actions: Vec::new(),
            publications: Vec::new(),
            settings,
        };
        match persisted {
            Ok(Some(state)) => {
                let away = state.age(now.wall);
                controller.health.restore(now.instant, away, state.pools(), state.overrides);
            }
            Ok(None) => {}
            Err(error) => {
                let message = format!("{error}; ejections start over, and overrides have to be repeated");
                controller.start_findings.push(Finding::new(
                    Code::PersistedStateUnreadable,
                    ObjectRef::global("State", ""),
                    message,
                ));
            }
        }
        controller.gate.ignore_earlier_failures(controller.publisher.layout(), &controller.kernel);
        controller
    }

    /// Returns when [`Input::Timeout`] is to be handled, if nothing comes before.
    pub fn poll_timeout(&self, now: Now) -> Option<Instant> {
        let timeouts = [
            self.health.poll_timeout(now.instant, now.wall),
            self.publisher.poll_timeout(),
            self.termination.poll_timeout(),
            self.persistence.poll_timeout(),
            self.gate.poll_timeout(now),
        ];
        timeouts.into_iter().flatten().min()
    }

    /// Handles an input: publishes what changes with it, and collects the I/O that follows from it.
    ///
    /// # Errors
    /// Returns an error if the programs cannot be attached, or if what the kernel holds cannot be found out. Then this agent
    /// cannot go on; the next one adopts what is pinned.
    pub fn handle(&mut self, now: Now, input: Input) -> portolan_datapath::Result<()> {
        self.on_input(now, input);
        self.publisher.move_lists(now, &mut self.kernel)?;
        // Publishing may find out something that changes the policy once more.
        while self.store.synced() && !self.changes.is_empty() {
            self.publish(now)?;
        }
        self.persist_if_due(now);
        Ok(())
    }

    /// Takes the I/O that is to be done.
    pub fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// Takes the publications since the last call, for [`Self::record_publication`].
    pub fn take_publications(&mut self) -> Vec<Publication> {
        std::mem::take(&mut self.publications)
    }

    /// Records how long a publication took, from the input to the kernel.
    pub fn record_publication(&mut self, now: Now, publication: Publication, took: Duration) {
        let Publication { frontends, writes, first_failure, .. } = publication;
        self.collector.published(took);
        if let Some(failure) = first_failure {
            self.collector.ejected(now.monotonic.saturating_sub(failure));
        }
        if frontends > 0 {
            let message = format!("{frontends} frontends changed, {writes} writes, {took:.1?}");
            self.events.add(now.wall, Event::new(EventKind::Published, message));
        }
    }

    /// Returns what the controller writes to.
    pub fn kernel(&self) -> &K {
        &self.kernel
    }

    /// Returns the kernel, for its asynchronous signals.
    pub fn kernel_mut(&mut self) -> &mut K {
        &mut self.kernel
    }

    fn on_input(&mut self, now: Now, input: Input) {
        match input {
            Input::Updates(updates) => {
                for update in updates {
                    self.store.apply(update, &mut self.changes);
                }
            }
            Input::Outcomes { outcomes, drained } => self.on_outcomes(now, outcomes, drained),
            Input::Confirmation(confirmation) => {
                let (gate, mut view) = self.gate(now);
                let effects = gate.on_confirmation(&mut view, confirmation);
                self.route(now, effects);
            }
            Input::ProbeReport(report) => self.on_probe_report(now, report),
            Input::NamespaceName(unconfirmed, name) => self.gate.on_namespace_name(now, unconfirmed, name),
            Input::SelfProbe(seen) => {
                let layout = self.publisher.layout();
                let (effects, repaired) = self.self_probe.on_result(seen, layout, &mut self.kernel);
                self.route(now, effects);
                if repaired {
                    self.termination.recount_now(now);
                }
                // No event signals that the slots for connections are running out, so they are looked at here.
                let is_nearly_full = self.connections_finding().is_some();
                self.changes.findings |=
                    is_nearly_full != std::mem::replace(&mut self.connections_nearly_full, is_nearly_full);
            }
            Input::GraceElapsed(epoch) => self.changes.findings |= self.publisher.on_grace_elapsed(epoch),
            Input::Sweep(report) => {
                for event in self.termination.on_report(now, &report) {
                    self.events.add(now.wall, event);
                }
            }
            Input::Saved(id, result) => self.persistence.on_saved(id, result),
            Input::Request(request) => self.on_request(now, request),
            Input::Timeout => self.on_timeout(now),
        }
    }

    /// Splits the state into the gate and what it works on.
    fn gate(&mut self, now: Now) -> (&mut EjectionGate, ejection::View<'_, K>) {
        let view = ejection::View {
            now,
            kernel: &mut self.kernel,
            layout: self.publisher.layout(),
            health: &mut self.health,
            frontends: &self.frontends,
            probing: self.settings.probes_per_second > 0,
        };
        (&mut self.gate, view)
    }

    fn on_outcomes(&mut self, now: Now, outcomes: Vec<Outcome>, drained: bool) {
        let (mut of_protocol, outcomes): (Vec<_>, Vec<_>) =
            outcomes.into_iter().partition(|outcome| outcome.kind == OutcomeKind::NotHttp);
        of_protocol.retain(|outcome| !self.gate.is_earlier(outcome));
        for outcome in &of_protocol {
            let own = self.health.pools_of(&outcome.backend);
            let pools = self.frontends.pools(outcome.frontend_id, outcome.frontend_epoch).unwrap_or_default();
            let mut effects = Vec::new();
            for pool in pools.iter().filter(|pool| own.contains(pool)) {
                let (layout, protocol) = (self.publisher.layout(), u64::from(outcome.errno));
                effects.extend(self.http.on_non_http(pool, protocol, &mut self.health, layout, &self.kernel));
            }
            self.route(now, effects);
        }
        let (gate, mut view) = self.gate(now);
        let effects = gate.on_outcomes(&mut view, &outcomes, drained);
        self.route(now, effects);
    }

    fn on_probe_report(&mut self, now: Now, report: ProbeReport) {
        let ProbeReport { target, number, failing } = report;
        let (endpoint, probe) = (target.endpoint, &target.probe);
        // The connection to a Service address is rewritten: which endpoint answered is unknown.
        let dialed = portolan_core::table::key(probe.dialed(endpoint), portolan_core::model::Protocol::Tcp);
        if failing.is_some() && self.publisher.layout().frontend_id(&dialed).is_some() {
            tracing::warn!("{endpoint}: {probe} fails, but its address is also a Service's, so the result is ignored");
            return;
        }
        for pool in self.health.record_probe(&target, number, failing.clone()) {
            let (kind, message) = match &failing {
                Some(why) => (
                    EventKind::Unhealthy,
                    format!("{endpoint}: {probe} has {} consecutive failures, the last one: {why}", probe.failures),
                ),
                None => {
                    (EventKind::Healthy, format!("{endpoint}: {probe} has {} consecutive successes", probe.successes))
                }
            };
            self.events.add(now.wall, Event::of_pool(&pool, endpoint, kind, message));
            self.changes.services.insert(pool.service);
        }
    }

    fn on_override(&mut self, now: Now, command: &OverrideCommand, reply: persistence::Reply) {
        let wrong = overrides::validate(command, self.publisher.layout(), &self.compiler.output());
        match wrong.map_or_else(|| self.health.execute(command, now.wall), Err) {
            Err(wrong) => drop(reply.send(Err(wrong))),
            Ok(message) => {
                let endpoint = match command {
                    OverrideCommand::Eject { endpoint, .. } | OverrideCommand::Restore { endpoint } => {
                        Some(endpoint.to_string())
                    }
                    OverrideCommand::Drain { .. } | OverrideCommand::Undrain { .. } => None,
                };
                self.events.add(now.wall, Event { endpoint, ..Event::new(EventKind::Override, message.clone()) });
                self.persistence.reply_when_saved(message, reply);
                (self.changes.everything, self.changes.findings) = (true, true);
            }
        }
    }

    fn on_timeout(&mut self, now: Now) {
        let (planner, view) = self.termination();
        if let Some(request) = planner.handle_timeout(now, &view) {
            self.kernel.sweep(request);
        }
        self.persistence.handle_timeout(now);
        self.changes.findings |= self.publisher.handle_timeout(now);
        for message in self.health.expire_overrides(now.wall) {
            self.events.add(now.wall, Event::new(EventKind::Override, message));
            self.persistence.mark_dirty();
            (self.changes.everything, self.changes.findings) = (true, true);
        }
        let (gate, mut view) = self.gate(now);
        let effects = gate.handle_timeout(&mut view);
        self.route(now, effects);
        let (released, warmed) = self.health.handle_timeout(now.instant);
        for (pool, event) in &released {
            self.persistence.mark_dirty();
            self.events.add(now.wall, Event::of_detector(pool, event));
        }
        let pools = released.iter().map(|(pool, _)| pool).chain(&warmed);
        self.changes.services.extend(pools.map(|pool| pool.service.clone()));
    }

    fn route(&mut self, now: Now, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Log(event) => self.events.add(now.wall, event),
                Effect::Recompute(service) => drop(self.changes.services.insert(service)),
                Effect::Findings => self.changes.findings = true,
                Effect::Persist => self.persistence.mark_dirty(),
                Effect::Count(pool, count) => self.collector.count_health(&pool, count),
                Effect::Act(action) => self.actions.push(action),
            }
        }
    }

    /// Splits the state into the termination planner and what it looks at.
    fn termination(&mut self) -> (&mut TerminationPlanner, termination::View<'_, K>) {
        let layout = self.publisher.layout();
        let complete = self.unread.is_none() && layout.adopted() == 0;
        let in_sync = self.attached && self.publisher.write_errors().is_empty();
        (&mut self.termination, termination::View { kernel: &self.kernel, layout, complete, in_sync })
    }

    fn persist_if_due(&mut self, now: Now) {
        let unpublished = self.publisher.write_errors().first().map(|finding| finding.message.as_str());
        if let Some(id) = self.persistence.begin_save(now, unpublished) {
            let (pools, overrides) = (self.health.snapshot(now.instant), self.health.overrides().clone());
            self.actions.push(Action::Save { id, state: PersistedState::new(now.wall, pools, overrides) });
        }
    }
}
