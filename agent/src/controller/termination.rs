//! Which connections to terminate, and when to look for them. The helper does it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use portolan_common::{FrontendKey, LbPolicy};
use portolan_core::{
    model::{Protocol, ServiceId},
    policy::{Assignment, PoolKey},
    table::{self, Layout, RemovedEndpoints},
};
use portolan_datapath::{
    ActiveEndpoints, Closed, IDLE, Lifetime, Reason, Reconciled, RemovedEndpointTcp, SweepReport, SweepRequest,
};

use super::{
    event_log::{Event, EventKind},
    now::Now,
};
use crate::kernel::Kernel;

/// Bounds of the time between two sweeps for connections that exceed their pool's limits; a quarter of the shortest limit
/// within them.
const SWEEP_INTERVAL: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(60));
/// Recounts in a row, because counts changed while they were compared.
const MAX_RECOUNTS: u32 = 16;
/// The time between two of them.
const RECOUNT_INTERVAL: Duration = Duration::from_secs(1);
/// The delay of a recount that is not urgent.
const RECOUNT_DELAY: Duration = Duration::from_secs(30);
/// The time between recounts while counts decide about connections.
const RECOUNT_PERIOD: Duration = Duration::from_secs(60);
/// How often the planner looks whether a pool refuses connections, and the least time between recounts because of that.
/// That time doubles with each recount that corrects nothing, up to [`RECOUNT_PERIOD`].
const REFUSAL_INTERVAL: Duration = Duration::from_secs(1);

/// What a sweep request is made from.
pub(super) struct View<'a, K> {
    pub(super) kernel: &'a K,
    pub(super) layout: &'a Layout,
    /// Whether the endpoints of all frontends are known, so that an endpoint that is in none of them is gone.
    pub(super) complete: bool,
    /// Whether the kernel holds the desired table. Where not, no connection is sent back to where it came from.
    pub(super) in_sync: bool,
}

/// Plans sweeps, and keeps count of what they did.
#[derive(Debug, Default)]
pub(super) struct TerminationPlanner {
    policy: RemovedEndpointTcp,
    closed: Closed,
    sweeps: u64,
    /// Endpoints whose connected UDP sockets the last sweep could not all close.
    unfinished: Option<RemovedEndpoints>,
    /// Recounts that remain until every count has been seen at rest.
    recounts: u32,
    recount_at: Option<Instant>,
    /// Limits by pool, and the services whose connections use the pool: routes may share one.
    lifetimes: HashMap<PoolKey, (Lifetime, BTreeSet<ServiceId>)>,
    /// Endpoints that get connections, by frontend, where a rule closes idle connections to all others.
    active: HashMap<FrontendKey, ActiveEndpoints>,
    next: Option<Instant>,
    /// Pools whose counts decide about connections: with `maxConnections`, or balanced by LEAST_REQUEST.
    counted: HashMap<PoolKey, Counted>,
    /// When to look whether one of them refuses connections.
    look_at: Option<Instant>,
    /// When counts were compared last.
    recounted_at: Option<Instant>,
    /// The time between recounts because a pool refuses: it grows while they find nothing, as where a limit does its job.
    refusal_wait: Duration,
    /// Whether the log says that some counts cannot be verified.
    has_warned: bool,
}

/// A pool whose count of connections decides about further ones.
#[derive(Debug, Default)]
struct Counted {
    /// The services whose connections use it.
    users: BTreeSet<ServiceId>,
    /// Connections that it had refused when the planner looked last; `None` if it has not looked yet.
    refused: Option<u64>,
}

impl TerminationPlanner {
    /// Plans with this policy for TCP connections to removed endpoints.
    pub(super) fn new(policy: RemovedEndpointTcp) -> Self {
        Self { policy, ..Self::default() }
    }

    /// Returns the connections that were terminated so far, by reason and protocol.
    pub(super) fn closed(&self) -> &Closed {
        &self.closed
    }

    /// Returns how many sweeps looked for connections to terminate so far.
    pub(super) fn sweeps(&self) -> u64 {
        self.sweeps
    }

    /// Stops tracking what a service was assigned before.
    pub(super) fn untrack<'a>(&mut self, assignments: impl IntoIterator<Item = &'a Arc<Assignment>>) {
        for assignment in assignments {
            for key in assignment.routes.iter().map(|route| &route.pool.key) {
                if let Some(counted) = self.counted.get_mut(key) {
                    counted.users.remove(&assignment.service);
                    if counted.users.is_empty() {
                        self.counted.remove(key);
                    }
                }
                if let Some((_, users)) = self.lifetimes.get_mut(key) {
                    users.remove(&assignment.service);
                    if users.is_empty() {
                        self.lifetimes.remove(key);
                    }
                }
            }
            for frontend in &assignment.frontends {
                self.active.remove(&table::key(*frontend, assignment.protocol));
            }
        }
    }

    /// Tracks how long connections of an assignment may live.
    pub(super) fn track(&mut self, now: Now, assignment: &Assignment) {
        // Where a frontend leads to several hosts, the rules of all of them must agree, and the longest time counts.
        let idle = assignment.routes.iter().map(|route| route.pool.close_idle_elsewhere);
        let idle = idle.reduce(|one, other| Some(one?.max(other?))).flatten();
        // Without active endpoints there is nowhere else to go.
        if let Some(idle) = idle.filter(|_| assignment.protocol == Protocol::Tcp && !assignment.schedule.is_empty()) {
            let members = assignment.schedule.runs.iter().flat_map(|run| run.members.iter().copied());
            let endpoints: Arc<[SocketAddr]> = members.collect::<BTreeSet<_>>().into_iter().collect();
            let active = ActiveEndpoints { endpoints, idle };
            for frontend in &assignment.frontends {
                self.active.insert(table::key(*frontend, assignment.protocol), active.clone());
            }
            self.schedule_sweep(now, idle);
        }
        let compares = assignment.schedule.runs.iter().any(|run| run.choice == LbPolicy::LeastRequest);
        for pool in assignment.routes.iter().map(|route| &route.pool) {
            if compares || pool.limits.max_connections.is_some() {
                self.counted.entry(pool.key.clone()).or_default().users.insert(assignment.service.clone());
                self.look_at.get_or_insert(now.instant + REFUSAL_INTERVAL);
            }
            let lifetime = Lifetime { idle: pool.limits.idle_timeout, max_age: pool.limits.max_duration };
            if lifetime == Lifetime::default() {
                self.lifetimes.remove(&pool.key);
            } else {
                let (known, users) = self.lifetimes.entry(pool.key.clone()).or_default();
                *known = lifetime;
                users.insert(assignment.service.clone());
            }
        }
        self.schedule_by_limits(now);
    }

    fn schedule_sweep(&mut self, now: Now, after: Duration) {
        let soon = now.instant + after;
        self.next = Some(self.next.map_or(soon, |planned| planned.min(soon)));
    }

    fn schedule_by_limits(&mut self, now: Now) {
        let limits = self.lifetimes.values().flat_map(|(lifetime, _)| [lifetime.idle, lifetime.max_age]).flatten();
        if let Some(shortest) = limits.min() {
            self.schedule_sweep(now, (shortest / 4).clamp(SWEEP_INTERVAL.0, SWEEP_INTERVAL.1));
        }
    }

    /// Compares the counts of connections with the sockets that exist, as soon as possible: connections may have ended
    /// unnoticed.
    pub(super) fn recount_now(&mut self, now: Now) {
        self.recounts = MAX_RECOUNTS;
        self.recount_at = Some(now.instant);
    }

    /// Does the same later, where a count may be off by one.
    pub(super) fn recount_later(&mut self, now: Now) {
        if self.recount_at.is_none() {
            self.recounts = MAX_RECOUNTS;
            self.recount_at = Some(now.instant + RECOUNT_DELAY);
        }
    }

    /// Returns when [`Self::handle_timeout`] wants to be called.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        [self.next, self.recount_at, self.look_at].into_iter().flatten().min()
    }

    /// Returns the sweep that is due: for connections that exceed their limits, and for those that were not idle before.
    pub(super) fn handle_timeout<K: Kernel>(&mut self, now: Now, view: &View<'_, K>) -> Option<SweepRequest> {
        if self.look_at.take_if(|at| *at <= now.instant).is_some() {
            self.look_at_counted(now, view);
        }
        let recount = self.recount_at.take_if(|at| *at <= now.instant).is_some();
        if self.next.take_if(|at| *at <= now.instant).is_none() {
            return recount.then(|| self.request(view, false, None)).flatten();
        }
        self.schedule_by_limits(now);
        let unfinished = self.unfinished.take();
        self.request(view, self.policy != RemovedEndpointTcp::Keep, unfinished)
    }

    /// Plans a recount if a pool refuses connections, or if counts that decide about them were compared long ago.
    fn look_at_counted<K: Kernel>(&mut self, now: Now, view: &View<'_, K>) {
        if self.counted.is_empty() {
            return;
        }
        self.look_at = Some(now.instant + REFUSAL_INTERVAL);
        let (mut is_used, mut refuses) = (false, false);
        for (key, counted) in &mut self.counted {
            let Some((id, _)) = view.layout.pool(key) else {
                // LEAST_REQUEST without limits: only its endpoints have counts.
                is_used = true;
                continue;
            };
            let Ok(stats) = view.kernel.pool_stats(id) else { continue };
            // Also if a count is below zero.
            is_used |= !stats.active.is_zero();
            refuses |= counted.refused.replace(stats.overflow).is_some_and(|before| stats.overflow > before);
        }
        let is_older = |than| self.recounted_at.is_none_or(|at| now.instant >= at + than);
        if self.recounts == 0 && (refuses && is_older(self.refusal_wait) || is_used && is_older(RECOUNT_PERIOD)) {
            self.recount_now(now);
        }
    }

    /// Returns the sweep for endpoints that a publication removed.
    pub(super) fn on_removed<K: Kernel>(
        &self,
        mut removed: BTreeMap<Protocol, RemovedEndpoints>,
        view: &View<'_, K>,
    ) -> Option<SweepRequest> {
        let tcp = removed.contains_key(&Protocol::Tcp) && self.policy != RemovedEndpointTcp::Keep;
        let udp = removed.remove(&Protocol::Udp);
        (tcp || udp.is_some()).then(|| self.request(view, tcp, udp)).flatten()
    }

    /// Returns the sweep after maps of another version or size were replaced: what was removed meanwhile is unknown.
    pub(super) fn on_replaced<K: Kernel>(&self, view: &View<'_, K>) -> Option<SweepRequest> {
        self.request(view, self.policy != RemovedEndpointTcp::Keep, Some(RemovedEndpoints::Any))
    }

    fn request<K: Kernel>(
        &self,
        view: &View<'_, K>,
        removed_tcp: bool,
        removed_udp: Option<RemovedEndpoints>,
    ) -> Option<SweepRequest> {
        let removed = removed_tcp || removed_udp.is_some();
        let mut request = SweepRequest { removed_udp, recount: self.recounts > 0, ..SweepRequest::default() };
        if removed {
            request.endpoints = view.layout.endpoints();
            request.complete = view.complete;
        }
        if removed_tcp {
            request.removed_endpoint_tcp = self.policy;
        }
        for (key, (lifetime, _)) in &self.lifetimes {
            let Some((id, epoch)) = view.layout.pool(key) else { continue };
            // A pool without connections needs no look at all sockets.
            if view.kernel.pool_stats(id).is_ok_and(|stats| stats.active.total() > 0) {
                request.lifetimes.insert((id.get(), epoch as u16), *lifetime);
            }
        }
        if view.in_sync {
            request.served.clone_from(&self.active);
        }
        let is_needed = removed || request.recount || !request.lifetimes.is_empty() || !request.served.is_empty();
        is_needed.then_some(request)
    }

    /// Handles the report of a sweep; returns what to log.
    pub(super) fn on_report(&mut self, now: Now, report: &SweepReport) -> Vec<Event> {
        let mut events = Vec::new();
        self.sweeps += u64::from(report.closing);
        for ((reason, protocol, endpoint), count) in &report.closed {
            *self.closed.entry((*reason, *protocol)).or_default() += count;
            let why = match reason {
                Reason::Gone => "the endpoint is gone",
                Reason::Idle => "idleTimeout",
                Reason::Age => "maxConnectionDuration",
                Reason::Inactive => "it was idle, and the endpoint gets no new connections",
            };
            let message = format!("{count} {protocol} connections to {endpoint} were closed: {why}");
            events.push(Event { endpoint: Some(endpoint.to_string()), ..Event::new(EventKind::Closed, message) });
        }
        if let Some(unfinished) = report.unfinished.clone() {
            self.unfinished.get_or_insert_default().add(unfinished);
            self.schedule_sweep(now, IDLE);
        }
        if !report.errors.is_empty() && !self.active.is_empty() {
            self.schedule_sweep(now, IDLE);
        }
        for error in &report.errors {
            tracing::warn!("failed to terminate some connections: {error}");
        }
        if let Some(wait) = report.wait {
            self.schedule_sweep(now, wait.max(SWEEP_INTERVAL.0));
        }
        if let Some(Reconciled { freed, corrected, .. }) = report.recounted
            && freed + corrected > 0
        {
            let message = format!(
                "repaired connection accounting after missed close events: {corrected} counts were wrong, {freed} slots were not free"
            );
            events.push(Event::new(EventKind::Repaired, message));
        }
        if report.counting {
            self.recounted_at = Some(now.instant);
            let is_right = report.recounted.is_some_and(|recounted| recounted.freed + recounted.corrected == 0);
            self.refusal_wait = if is_right {
                (self.refusal_wait * 2).clamp(REFUSAL_INTERVAL, RECOUNT_PERIOD)
            } else {
                REFUSAL_INTERVAL
            };
            let done = report.recounted.is_some_and(|recounted| recounted.unsettled == 0);
            self.recounts = if done { 0 } else { self.recounts.saturating_sub(1) };
            self.has_warned &= !done;
            if self.recounts > 0 {
                self.recount_at = Some(now.instant + RECOUNT_INTERVAL);
            } else if !done && !std::mem::replace(&mut self.has_warned, true) {
                tracing::warn!(
                    "cannot verify all counts of connections: they keep changing, or not all sockets are visible"
                );
            }
        }
        events
    }
}
