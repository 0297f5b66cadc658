//! When connections are looked for that shall not go on, and what is told of them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use portolan_common::FrontendKey;
use portolan_core::{
    model::Protocol,
    policy::{Assignment, PoolKey},
    table::{self, RemovedEndpoints},
};
use portolan_datapath::{
    ActiveEndpoints, IDLE, Lifetime, Reason, Reconciled, RemovedEndpointTcp, SweepReport, SweepRequest,
};

use super::{Reconciler, event_log::Event};

/// Between two looks for connections that have outlived their pool's limits: a quarter of the shortest limit, within these.
const SWEEP: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(60));

/// Counts that change while they are looked at are looked at again: so often, after this time.
const RECOUNTS: u32 = 10;
const RECOUNT: Duration = Duration::from_secs(1);
const RECOUNT_LATER: Duration = Duration::from_secs(30);

/// Sockets that were ended, by reason and protocol.
pub type Closed = BTreeMap<(Reason, Protocol), u64>;

/// What is to be closed, and what was.
#[derive(Debug, Default)]
pub(super) struct Closing {
    pub(super) removed_endpoint_tcp: RemovedEndpointTcp,
    pub(super) closed: Closed,
    pub(super) passes: u64,
    /// Endpoints whose connected UDP sockets a pass could not end.
    unfinished: Option<RemovedEndpoints>,
    /// How often connections are to be counted anew, at the most, until no count changes meanwhile.
    recounts: u32,
    recount_at: Option<Instant>,
    lifetimes: HashMap<PoolKey, Lifetime>,
    /// The endpoints that get connections, by frontends whose rule wants those to others closed.
    served: HashMap<FrontendKey, ActiveEndpoints>,
    next: Option<Instant>,
}

impl Closing {
    pub(super) fn new(removed_endpoint_tcp: RemovedEndpointTcp) -> Self {
        Self { removed_endpoint_tcp, ..Self::default() }
    }

    /// When to look next, if nothing changes.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        [self.next, self.recount_at].into_iter().flatten().min()
    }

    /// Forgets the pools of what a service was assigned before.
    pub(super) fn forget<'a>(&mut self, assignments: impl Iterator<Item = &'a Assignment>) {
        for assignment in assignments {
            for route in &assignment.routes {
                self.lifetimes.remove(&route.pool.key);
            }
            for frontend in &assignment.frontends {
                self.served.remove(&table::key(*frontend, assignment.protocol));
            }
        }
    }

    /// Takes down how long connections to a service may live.
    pub(super) fn learn(&mut self, assignment: &Assignment) {
        // Where a frontend leads to several hosts, the rules of all of them must want it.
        let idle = assignment.routes.iter().map(|route| route.pool.close_idle_elsewhere);
        let idle = idle.reduce(|one, other| Some(one?.max(other?))).flatten();
        // Where nobody gets any, there is nowhere else to go.
        if let Some(idle) = idle.filter(|_| assignment.protocol == Protocol::Tcp && !assignment.schedule.is_empty()) {
            let members = assignment.schedule.runs.iter().flat_map(|run| run.members.iter().copied());
            let endpoints: Arc<[SocketAddr]> = members.collect::<BTreeSet<_>>().into_iter().collect();
            let served = ActiveEndpoints { endpoints, idle };
            for frontend in &assignment.frontends {
                self.served.insert(table::key(*frontend, assignment.protocol), served.clone());
            }
            self.look_again(idle);
        }
        for pool in assignment.routes.iter().map(|route| &route.pool) {
            let lifetime = Lifetime { idle: pool.limits.idle_timeout, max_age: pool.limits.max_duration };
            if lifetime == Lifetime::default() {
                self.lifetimes.remove(&pool.key);
            } else {
                self.lifetimes.insert(pool.key.clone(), lifetime);
            }
        }
        self.plan(Instant::now());
    }

    fn look_again(&mut self, after: Duration) {
        let soon = Instant::now() + after;
        self.next = Some(self.next.map_or(soon, |planned| planned.min(soon)));
    }

    fn plan(&mut self, now: Instant) {
        let limits = self.lifetimes.values().flat_map(|lifetime| [lifetime.idle, lifetime.max_age]).flatten();
        let sweep = limits.min().map(|shortest| now + (shortest / 4).clamp(SWEEP.0, SWEEP.1));
        self.next = match (self.next, sweep) {
            (Some(planned), Some(sweep)) => Some(planned.min(sweep)),
            (planned, sweep) => planned.or(sweep),
        };
    }
}

impl Reconciler {
    /// After another version's or another size's maps were replaced: what went while nobody looked is not known.
    pub(super) fn close_after_replacing(&self) {
        self.close(self.closing.removed_endpoint_tcp != RemovedEndpointTcp::Keep, Some(RemovedEndpoints::Any));
    }

    /// After a time in which connections may have ended unseen: leads their counts and places to what there is.
    pub(super) fn recount(&mut self) {
        self.closing.recounts = RECOUNTS;
        self.closing.recount_at = Some(Instant::now());
    }

    /// The same, where a count may be one off, which can wait.
    pub(super) fn recount_later(&mut self) {
        if self.closing.recount_at.is_none() {
            self.closing.recounts = RECOUNTS;
            self.closing.recount_at = Some(Instant::now() + RECOUNT_LATER);
        }
    }

    /// After a publication: looks for connections to endpoints that went with it.
    pub(super) fn close_gone(&mut self) {
        let mut lost = self.layout.drain_removed();
        let tcp = lost.contains_key(&Protocol::Tcp) && self.closing.removed_endpoint_tcp != RemovedEndpointTcp::Keep;
        let udp = lost.remove(&Protocol::Udp);
        if self.attached && (tcp || udp.is_some()) {
            self.close(tcp, udp);
        }
    }

    /// Looks for connections that have outlived their pool's limits, and again for those that were not idle before; counts them where that is due.
    pub(super) fn sweep(&mut self, now: Instant) {
        let recount = self.closing.recount_at.take_if(|at| *at <= now).is_some();
        if self.closing.next.take_if(|at| *at <= now).is_none() {
            if recount {
                self.close(false, None);
            }
            return;
        }
        self.closing.plan(now);
        let unfinished = self.closing.unfinished.take();
        self.close(self.closing.removed_endpoint_tcp != RemovedEndpointTcp::Keep, unfinished);
    }

    fn close(&self, removed_endpoint_tcp: bool, gone_udp: Option<RemovedEndpoints>) {
        let gone = removed_endpoint_tcp || gone_udp.is_some();
        let mut order = SweepRequest { gone_udp, recount: self.closing.recounts > 0, ..SweepRequest::default() };
        if gone {
            order.endpoints = self.layout.endpoints();
            order.complete = self.doubt.is_none() && self.layout.adopted() == 0;
        }
        if removed_endpoint_tcp {
            order.removed_endpoint_tcp = self.closing.removed_endpoint_tcp;
        }
        for (key, lifetime) in &self.closing.lifetimes {
            let Some((id, epoch)) = self.layout.pool(key) else { continue };
            // Of those that have no connection there is nothing to look for.
            if self.datapath.maps.pool_stats(id).is_ok_and(|stats| stats.active as i64 > 0) {
                order.lifetimes.insert((id, epoch), *lifetime);
            }
        }
        // While the kernel may have another table than it should, nobody is sent back to where it was.
        if self.attached && self.trouble.is_empty() {
            order.served.clone_from(&self.closing.served);
        }
        if gone || order.recount || !order.lifetimes.is_empty() || !order.served.is_empty() {
            self.datapath.closer.begin(order);
        }
    }

    /// What a pass has done.
    pub(super) fn take_pass(&mut self, pass: &SweepReport) {
        self.closing.passes += u64::from(pass.closing);
        for ((reason, protocol, endpoint), count) in &pass.closed {
            *self.closing.closed.entry((*reason, *protocol)).or_default() += count;
            let why = match reason {
                Reason::Gone => "the endpoint is gone",
                Reason::Idle => "idleTimeout",
                Reason::Age => "maxConnectionDuration",
                Reason::Inactive => "it was idle, and the endpoint gets no connections any more",
            };
            let message = format!("{count} {protocol} connections to {endpoint} were closed: {why}");
            let record = Event { kind: Event::CLOSED.to_owned(), message, ..Event::default() };
            self.events.add(Event { endpoint: Some(endpoint.to_string()), ..record });
        }
        if let Some(lost) = pass.unfinished.clone() {
            self.closing.unfinished.get_or_insert_default().add(lost);
            self.closing.look_again(IDLE);
        }
        if !pass.trouble.is_empty() && !self.closing.served.is_empty() {
            self.closing.look_again(IDLE);
        }
        for trouble in &pass.trouble {
            tracing::warn!("connections that should end may go on: {trouble}");
        }
        if let Some(wait) = pass.wait {
            self.closing.look_again(wait.max(SWEEP.0));
        }
        if let Some(Reconciled { freed, corrected, .. }) = pass.recounted
            && freed + corrected > 0
        {
            let message =
                format!("connections had ended unseen: {corrected} counts were wrong, {freed} places were not free");
            self.events.add(Event { kind: Event::REPAIRED.to_owned(), message, ..Event::default() });
        }
        if pass.counting {
            let done = pass.recounted.is_some_and(|recounted| recounted.unsettled == 0);
            self.closing.recounts = if done { 0 } else { self.closing.recounts.saturating_sub(1) };
            if self.closing.recounts > 0 {
                self.closing.recount_at = Some(Instant::now() + RECOUNT);
            } else if !done {
                tracing::warn!(
                    "counts of connections could not all be checked: they change all the time, or not all sockets can be seen"
                );
            }
        }
    }
}
