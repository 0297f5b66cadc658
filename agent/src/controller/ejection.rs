//! From outcomes of connections to ejections.
//!
//! The outlier detectors (`portolan_core::health`) count failures. Before an endpoint is ejected for the whole node, the gate
//! asks who saw them: a single pod must not be able to eject an endpoint that others use (a firewall of its own makes its
//! connections fail). Then the agent dials the endpoint itself, and ejects it only if that fails, too (ADR 14).

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use portolan_common::{BackendStats, OutcomeKind};
use portolan_core::{
    health::{Client, DetectorEventKind, Health, Signal, ThresholdReached},
    model::{Code, Finding, Probe, ProbeKind, Protocol},
    policy::PoolKey,
    table::{self, BackendId, Layout},
};
use portolan_datapath::Outcome;

use super::{
    effect::{Action, Effect, Unconfirmed},
    event_log::{Event, EventKind},
    frontend_index::FrontendIndex,
    now::Now,
};
use crate::{
    kernel::Kernel,
    metrics::collect::HealthCount,
    probe::{
        ProbeResult,
        confirm::{Confirmation, RECENT_USE, connect_probe},
    },
};

/// How long a finding stays after it was seen last.
const FINDING_TTL: Duration = Duration::from_secs(600);
/// Findings, and names of network namespaces, that are kept; the oldest finding is evicted.
const MAX_FINDINGS: usize = 200;
/// Backends whose counters are read in one turn of the loop, after outcomes were lost.
const RECOVERED_AT_ONCE: usize = 1_024;
/// Synthetic failures for outcomes that were lost: further ones change nothing.
const MAX_SYNTHETIC_FAILURES: u64 = 100;

/// What the gate looks at, and acts on.
pub(super) struct View<'a, K> {
    pub(super) now: Now,
    pub(super) kernel: &'a mut K,
    pub(super) layout: &'a Layout,
    pub(super) health: &'a mut Health,
    pub(super) frontends: &'a FrontendIndex,
    /// Whether active probes are enabled.
    pub(super) probing: bool,
}

impl<K: Kernel> View<'_, K> {
    /// Reports whether an address is a Service's: the agent's own connection to it would be rewritten.
    fn is_frontend(&self, address: &SocketAddr) -> bool {
        self.layout.frontend_id(&table::key(*address, Protocol::Tcp)).is_some()
    }

    /// Reports whether clients in other network namespaces use an endpoint.
    fn used_by_others(&self, endpoint: &SocketAddr, client: Client, on_open_connection: bool) -> bool {
        let since = self.now.monotonic.saturating_sub(RECENT_USE).as_nanos();
        let since = u64::try_from(since).unwrap_or(u64::MAX);
        let Some(id) = self.layout.backend_id(endpoint) else { return false };
        let recently = self.kernel.backend_use(id).is_ok_and(|uses| uses.used_by_others(client.netns, since));
        // Established connections may be older, and of any client. Connects in flight are not use by others. A failure on an
        // open connection is itself one of the established ones.
        let established =
            |stats: BackendStats| stats.active.total().min(stats.opened.wrapping_sub(stats.closed)) as i64 > 0;
        recently || !on_open_connection && self.kernel.backend_stats(id).is_ok_and(established)
    }
}

/// What is asked of an endpoint to confirm that it fails.
type Question = (SocketAddr, Arc<Probe>);

/// What stands between outcomes and ejections.
#[derive(Debug)]
pub(super) struct EjectionGate {
    /// Thresholds that a single client reached, with the time of the failure (`CLOCK_MONOTONIC`), by the question
    /// that confirms them.
    pending: HashMap<Question, Vec<(PoolKey, ThresholdReached, Duration)>>,
    /// Findings with the time they were seen last.
    findings: BTreeMap<(PoolKey, SocketAddr, Code), (Instant, Finding)>,
    /// Names of network namespaces by cookie; `None` where there is none to be found.
    names: HashMap<u64, Option<String>>,
    /// Whether a namespace is being named: one at a time, for it goes through all processes.
    naming: bool,
    /// Outcomes before this time happened while no agent was running.
    started: Duration,
    /// Failed connects of each backend that were reported, to tell how many were not.
    failures_reported: HashMap<BackendId, u64>,
    /// The last count of failures of each backend that came with an outcome, to tell how many reports were lost.
    /// Failed connects that no rule evaluates are not reported, and not lost.
    failures_seen: HashMap<BackendId, u32>,
    /// Outcomes that were lost, when that was looked at last.
    events_lost: u64,
    /// Backends whose failures have yet to be compared with those that were reported, because outcomes were lost.
    recovering: Vec<(SocketAddr, BackendId)>,
    /// When the first failure happened whose ejection is not published yet (`CLOCK_MONOTONIC`).
    first_unpublished_failure: Option<Duration>,
}

impl EjectionGate {
    /// A gate that ignores what happened before now.
    pub(super) fn new(now: Now) -> Self {
        Self {
            pending: HashMap::new(),
            findings: BTreeMap::new(),
            names: HashMap::new(),
            naming: false,
            started: now.monotonic,
            failures_reported: HashMap::new(),
            failures_seen: HashMap::new(),
            events_lost: 0,
            recovering: Vec::new(),
            first_unpublished_failure: None,
        }
    }

    /// Ignores failures that were counted before this agent started.
    pub(super) fn ignore_earlier_failures(&mut self, layout: &Layout, kernel: &impl Kernel) {
        for (_, id) in layout.backends() {
            if let Some(stats) = kernel.backend_stats(id).ok().filter(|stats| stats.failed > 0) {
                self.failures_reported.insert(id, stats.failed);
            }
            if let Some(failures) = kernel.failures(id).ok().filter(|failures| *failures > 0) {
                self.failures_seen.insert(id, failures);
            }
        }
        self.events_lost = kernel.counters().map_or(0, |counters| counters.events_lost);
    }

    /// Forgets what was reported of a backend whose id got another endpoint.
    pub(super) fn reset_backend(&mut self, id: BackendId) {
        self.failures_reported.remove(&id);
        self.failures_seen.remove(&id);
    }

    /// Takes the time of the first failure whose ejection was not published until now.
    pub(super) fn take_first_failure(&mut self) -> Option<Duration> {
        self.first_unpublished_failure.take()
    }

    /// Reports whether an outcome is from before this agent started: its ids may mean something else by now.
    pub(super) fn is_earlier(&self, outcome: &Outcome) -> bool {
        outcome.at < self.started
    }

    /// Handles outcomes; `drained` says that the ring buffer was empty after them.
    pub(super) fn on_outcomes<K: Kernel>(
        &mut self,
        view: &mut View<'_, K>,
        outcomes: &[Outcome],
        drained: bool,
    ) -> Vec<Effect> {
        let mut effects = Vec::new();
        for outcome in outcomes {
            if self.is_earlier(outcome) {
                continue;
            }
            let Some(pools) = view.frontends.pools(outcome.frontend_id, outcome.frontend_epoch) else { continue };
            let signal = signal(outcome);
            if signal.is_failure() {
                self.log_failure(view.layout, pools, outcome, signal, &mut effects);
            }
            let client = Client { netns: outcome.netns_cookie, pod: outcome.pod };
            for (pool, reached) in view.health.observe(pools, outcome.backend, signal, client) {
                if self.evaluate(view, pool, reached, (signal, outcome.at), &mut effects) {
                    self.first_unpublished_failure.get_or_insert(outcome.at);
                }
            }
        }
        // Outcomes that are still in the ring buffer have been counted, and will be reported.
        if drained {
            self.recover_lost_outcomes(view, &mut effects);
        }
        // Each endpoint once, after all its outcomes: successes matter only while failures are being counted.
        let mut evaluated: HashMap<SocketAddr, u32> = HashMap::new();
        for outcome in outcomes {
            let last = evaluated.entry(outcome.backend).or_insert(outcome.failures);
            // Outcomes of several CPUs may be out of order, and the count may wrap around.
            if outcome.failures.wrapping_sub(*last) as i32 > 0 {
                *last = outcome.failures;
            }
        }
        for (endpoint, failures) in evaluated {
            let Some(id) = view.layout.backend_id(&endpoint) else { continue };
            self.failures_seen.insert(id, failures);
            if !view.health.is_counting_failures(&endpoint)
                && let Err(error) = view.kernel.acknowledge_failures(id, failures)
            {
                tracing::warn!("cannot end the reports of successes of {endpoint}: {error:#}");
            }
        }
        effects
    }

    fn log_failure(
        &mut self,
        layout: &Layout,
        pools: &[PoolKey],
        outcome: &Outcome,
        signal: Signal,
        effects: &mut Vec<Effect>,
    ) {
        if matches!(signal, Signal::Refused | Signal::TimedOut)
            && let Some(id) = layout.backend_id(&outcome.backend)
        {
            *self.failures_reported.entry(id).or_default() += 1;
        }
        let Some(pool) = pools.first() else { return };
        let message = match signal {
            Signal::Status(status) => format!("{} responded with status {status}", outcome.backend),
            signal => {
                let error = std::io::Error::from_raw_os_error(outcome.errno as i32);
                let when = if signal == Signal::Broken { "broke before a response, " } else { "failed " };
                format!("connection to {} {when}after {:.1?}: {error}", outcome.backend, outcome.latency)
            }
        };
        let event = Event::of_pool(pool, outcome.backend, EventKind::Failed, message);
        effects.push(Effect::Log(Event { client_netns: Some(outcome.netns_cookie), ..event }));
    }

    /// Decides about an endpoint that reached a threshold. Reports whether it is ejected at once.
    fn evaluate<K: Kernel>(
        &mut self,
        view: &mut View<'_, K>,
        pool: PoolKey,
        reached: ThresholdReached,
        (signal, failed_at): (Signal, Duration),
        effects: &mut Vec<Effect>,
    ) -> bool {
        let Some(client) = reached.client else { return self.eject(view, &pool, reached, effects) };
        // A response, or its absence, is seen on an open connection, which is the client's own.
        let on_open_connection = matches!(signal, Signal::Status(_) | Signal::Broken);
        if !view.used_by_others(&reached.address, client, on_open_connection) {
            return self.eject(view, &pool, reached, effects);
        }
        // A connect does not confirm bad responses; only an active probe that asks for one does.
        let confirms = |probe: &&Arc<Probe>| on_open_connection && probe.kind != ProbeKind::Tcp && view.probing;
        let probe = view.health.probe_of(&pool).filter(confirms).cloned();
        if on_open_connection && probe.is_none() {
            let why =
                "established connections say nothing about responses, and no portolan.io/probe says what to ask for";
            self.report_unconfirmed(view.now, pool, reached, why, effects);
        } else if view.is_frontend(&probe.as_ref().map_or(reached.address, |probe| probe.dialed(reached.address))) {
            let why = "the agent cannot dial it, because its address is also a Service's";
            self.report_unconfirmed(view.now, pool, reached, why, effects);
        } else {
            let probe = probe.unwrap_or_else(|| Arc::new(connect_probe(view.health.connect_timeout_of(&pool))));
            let waiting = self.pending.entry((reached.address, Arc::clone(&probe))).or_default();
            let first = waiting.is_empty();
            // A pool that reaches the threshold again is waiting already.
            if waiting.iter().all(|(known, ..)| *known != pool) {
                waiting.push((pool, reached, failed_at));
            }
            if first {
                effects.push(Effect::Act(Action::Confirm { endpoint: reached.address, probe }));
            }
        }
        false
    }

    /// Handles the result of a connection of the agent's own.
    pub(super) fn on_confirmation<K: Kernel>(
        &mut self,
        view: &mut View<'_, K>,
        confirmation: Confirmation,
    ) -> Vec<Effect> {
        let mut effects = Vec::new();
        let question = (confirmation.endpoint, confirmation.probe);
        for (pool, reached, failed_at) in self.pending.remove(&question).unwrap_or_default() {
            let why = match &confirmation.result {
                ProbeResult::Failing(_) => {
                    if self.eject(view, &pool, reached, &mut effects) {
                        self.first_unpublished_failure.get_or_insert(failed_at);
                    }
                    continue;
                }
                ProbeResult::Success => "the agent's own connection to it succeeded".to_owned(),
                ProbeResult::Unknown(error) => format!("the agent could not dial it: {error}"),
            };
            self.report_unconfirmed(view.now, pool, reached, &why, &mut effects);
        }
        effects
    }

    /// Ejects an endpoint, as far as `maxEjectionPercent` allows it.
    fn eject<K: Kernel>(
        &mut self,
        view: &mut View<'_, K>,
        pool: &PoolKey,
        reached: ThresholdReached,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let Some(event) = view.health.eject(view.now.instant, pool, reached.address, reached.cause) else {
            return false;
        };
        let logged = Event::of_detector(pool, &event);
        let limited = matches!(event.kind, DetectorEventKind::Overflow { .. });
        let count = if limited { HealthCount::Limited } else { HealthCount::Ejected };
        effects.push(Effect::Count(pool.clone(), count));
        if limited {
            self.add_finding(view.now, pool, reached.address, Code::EjectionRefused, logged.message.clone());
        } else {
            effects.extend([Effect::Persist, Effect::Recompute(pool.service.clone())]);
        }
        effects.push(Effect::Log(logged));
        !limited
    }

    fn report_unconfirmed(
        &mut self,
        now: Now,
        pool: PoolKey,
        reached: ThresholdReached,
        why: &str,
        effects: &mut Vec<Effect>,
    ) {
        let (endpoint, client) = (reached.address, reached.client.unwrap_or_default().netns);
        let message = format!(
            "{endpoint} of {pool} has {} consecutive failures, but only a single pod saw them and others use it: not ejected, because {why}",
            reached.cause.failures
        );
        effects.push(Effect::Count(pool.clone(), HealthCount::Unconfirmed));
        let event = Event::of_pool(&pool, endpoint, EventKind::Unconfirmed, message.clone());
        effects.push(Effect::Log(Event { client_netns: Some(client), ..event }));
        let name = self.names.get(&client).cloned();
        let whose = name.clone().flatten().map_or_else(
            || format!("the pod has network namespace {client}"),
            |name| format!("the pod is that of {name}"),
        );
        if !self.findings.contains_key(&(pool.clone(), endpoint, Code::EjectionUnconfirmed)) {
            effects.push(Effect::Findings);
        }
        self.add_finding(now, &pool, endpoint, Code::EjectionUnconfirmed, format!("{message}; {whose}"));
        if name.is_none() && !std::mem::replace(&mut self.naming, true) {
            effects.push(Effect::Act(Action::NameNamespace(Unconfirmed { pool, endpoint, message, client })));
        }
    }

    /// Handles the name of a network namespace; `None` where it cannot be found.
    pub(super) fn on_namespace_name(&mut self, now: Now, unconfirmed: Unconfirmed, name: Option<String>) {
        let Unconfirmed { pool, endpoint, message, client } = unconfirmed;
        self.naming = false;
        if self.names.len() >= MAX_FINDINGS {
            self.names.clear();
        }
        if let Some(name) = &name {
            let message = format!("{message}; the pod is that of {name}");
            tracing::warn!("{message}");
            self.add_finding(now, &pool, endpoint, Code::EjectionUnconfirmed, message);
        }
        self.names.insert(client, name);
    }

    /// Returns when [`Self::handle_timeout`] wants to be called.
    pub(super) fn poll_timeout(&self, now: Now) -> Option<Instant> {
        (!self.recovering.is_empty()).then_some(now.instant)
    }

    /// Continues what was too much for one turn of the loop.
    pub(super) fn handle_timeout<K: Kernel>(&mut self, view: &mut View<'_, K>) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.recover_some(view, &mut effects);
        effects
    }

    /// Outcomes that found the ring buffer full are gone, but the programs have counted their failures.
    fn recover_lost_outcomes<K: Kernel>(&mut self, view: &mut View<'_, K>, effects: &mut Vec<Effect>) {
        let lost = view.kernel.counters().map_or(self.events_lost, |counters| counters.events_lost);
        if std::mem::replace(&mut self.events_lost, lost) != lost {
            // Starts over if it was under way: backends that were looked at may have lost more since.
            self.recovering = view.layout.backends().collect();
        }
        self.recover_some(view, effects);
    }

    /// Compares the failures of some backends with those that were reported.
    fn recover_some<K: Kernel>(&mut self, view: &mut View<'_, K>, effects: &mut Vec<Effect>) {
        let rest = self.recovering.len().saturating_sub(RECOVERED_AT_ONCE);
        for (address, id) in self.recovering.split_off(rest) {
            // Its id may be that of another endpoint by now.
            if view.layout.backend_id(&address) != Some(id) {
                continue;
            }
            let Ok(stats) = view.kernel.backend_stats(id) else { continue };
            let reported = self.failures_reported.insert(id, stats.failed).unwrap_or_default();
            let failures = view.kernel.failures(id).unwrap_or_default();
            let lost = failures.wrapping_sub(self.failures_seen.insert(id, failures).unwrap_or_default());
            let missing = stats.failed.saturating_sub(reported).min(lost.into());
            if missing == 0 {
                continue;
            }
            let pools = view.health.pools_of(&address);
            for _ in 0..missing.min(MAX_SYNTHETIC_FAILURES) {
                // The client is unknown, so that the agent has to confirm them where the endpoint is in use.
                for (pool, reached) in view.health.observe(&pools, address, Signal::Refused, Client::default()) {
                    self.evaluate(view, pool, reached, (Signal::Refused, view.now.monotonic), effects);
                }
            }
        }
    }

    fn add_finding(&mut self, now: Now, pool: &PoolKey, endpoint: SocketAddr, code: Code, message: String) {
        let finding = Finding::new(code, pool.service.object(), message);
        self.findings.retain(|_, (at, _)| now.instant.saturating_duration_since(*at) < FINDING_TTL);
        if self.findings.len() >= MAX_FINDINGS {
            let oldest = self.findings.iter().min_by_key(|(_, (at, _))| *at).map(|(key, _)| key.clone());
            oldest.map(|key| self.findings.remove(&key));
        }
        self.findings.insert((pool.clone(), endpoint, code), (now.instant, finding));
    }

    /// Returns the findings of the last minutes.
    pub(super) fn findings(&self, now: Now) -> impl Iterator<Item = &Finding> {
        let recent = move |at: &Instant| now.instant.saturating_duration_since(*at) < FINDING_TTL;
        self.findings.values().filter(move |(at, _)| recent(at)).map(|(_, finding)| finding)
    }
}

fn signal(outcome: &Outcome) -> Signal {
    match outcome.kind {
        OutcomeKind::Established => Signal::Connected,
        OutcomeKind::Failed => Signal::Refused,
        OutcomeKind::TimedOut => Signal::TimedOut,
        OutcomeKind::Responded => Signal::Status(outcome.errno as u16),
        OutcomeKind::Broken => Signal::Broken,
        // The controller hands `NotHttp` to `HttpDetection` and not to the gate.
        OutcomeKind::Answered | OutcomeKind::NotHttp => Signal::Answered,
    }
}
