//! When connections are looked for that shall not go on, and what is told of them.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use super::Reconciler;
use crate::{
    datapath::{GoneTcp, IDLE, Lifetime, Order, Pass, Reason},
    journal::Record,
    model::Protocol,
    policy::{Assignment, PoolKey},
    table::Lost,
};

/// Between two looks for connections that have outlived their pool's limits: a quarter of the shortest limit, within these.
const SWEEP: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(60));

/// Sockets that were ended, by reason and protocol.
pub type Closed = BTreeMap<(Reason, Protocol), u64>;

/// What is to be closed, and what was.
#[derive(Debug, Default)]
pub(super) struct Closing {
    pub(super) gone_tcp: GoneTcp,
    pub(super) closed: Closed,
    pub(super) passes: u64,
    /// Endpoints whose connected UDP sockets a pass could not end.
    unfinished: Option<Lost>,
    lifetimes: HashMap<PoolKey, Lifetime>,
    next: Option<Instant>,
}

impl Closing {
    pub(super) fn new(gone_tcp: GoneTcp) -> Self {
        Self { gone_tcp, ..Self::default() }
    }

    /// When to look next, if nothing changes.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.next
    }

    /// Forgets the pools of what a service was assigned before.
    pub(super) fn forget<'a>(&mut self, assignments: impl Iterator<Item = &'a Assignment>) {
        for route in assignments.flat_map(|assignment| &assignment.routes) {
            self.lifetimes.remove(&route.pool.key);
        }
    }

    /// Takes down the lifetimes of the pools of a service.
    pub(super) fn learn<'a>(&mut self, assignments: impl Iterator<Item = &'a Assignment>) {
        for pool in assignments.flat_map(|assignment| &assignment.routes).map(|route| &route.pool) {
            let lifetime = Lifetime { idle: pool.limits.idle_timeout, whole: pool.limits.max_duration };
            if lifetime == Lifetime::default() {
                self.lifetimes.remove(&pool.key);
            } else {
                self.lifetimes.insert(pool.key.clone(), lifetime);
            }
        }
        self.plan(Instant::now());
    }

    fn plan(&mut self, now: Instant) {
        let limits = self.lifetimes.values().flat_map(|lifetime| [lifetime.idle, lifetime.whole]).flatten();
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
        self.close(self.closing.gone_tcp != GoneTcp::Keep, Some(Lost::Any));
    }

    /// After a publication: looks for connections to endpoints that went with it.
    pub(super) fn close_gone(&mut self) {
        let mut lost = self.layout.take_lost();
        let tcp = lost.contains_key(&Protocol::Tcp) && self.closing.gone_tcp != GoneTcp::Keep;
        let udp = lost.remove(&Protocol::Udp);
        if self.attached && (tcp || udp.is_some()) {
            self.close(tcp, udp);
        }
    }

    /// Looks for connections that have outlived their pool's limits, and again for those that were not idle before.
    pub(super) fn sweep(&mut self, now: Instant) {
        if self.closing.next.take_if(|at| *at <= now).is_none() {
            return;
        }
        self.closing.plan(now);
        let unfinished = self.closing.unfinished.take();
        self.close(self.closing.gone_tcp != GoneTcp::Keep, unfinished);
    }

    fn close(&self, gone_tcp: bool, gone_udp: Option<Lost>) {
        let gone = gone_tcp || gone_udp.is_some();
        let mut order = Order { gone_udp, ..Order::default() };
        if gone {
            order.endpoints = self.layout.endpoints();
            order.complete = self.doubt.is_none() && self.layout.inherited() == 0;
        }
        if gone_tcp {
            order.gone_tcp = self.closing.gone_tcp;
        }
        for (key, lifetime) in &self.closing.lifetimes {
            let Some((id, epoch)) = self.layout.pool(key) else { continue };
            // Of those that have no connection there is nothing to look for.
            if self.datapath.maps.pool_stats(id).is_ok_and(|stats| stats.active as i64 > 0) {
                order.lifetimes.insert((id, epoch), *lifetime);
            }
        }
        if gone || !order.lifetimes.is_empty() {
            self.datapath.closer.begin(order);
        }
    }

    /// What a pass has done.
    pub(super) fn take_pass(&mut self, pass: &Pass) {
        self.closing.passes += 1;
        for ((reason, protocol, endpoint), count) in &pass.closed {
            *self.closing.closed.entry((*reason, *protocol)).or_default() += count;
            let why = match reason {
                Reason::Gone => "the endpoint is gone",
                Reason::Idle => "idleTimeout",
                Reason::Age => "maxConnectionDuration",
            };
            let message = format!("{count} {protocol} connections to {endpoint} were closed: {why}");
            let record = Record { kind: Record::CLOSED.to_owned(), message, ..Record::default() };
            self.journal.add(Record { endpoint: Some(endpoint.to_string()), ..record });
        }
        if let Some(lost) = pass.unfinished.clone() {
            self.closing.unfinished.get_or_insert_default().add(lost);
            let soon = Instant::now() + IDLE;
            self.closing.next = Some(self.closing.next.map_or(soon, |planned| planned.min(soon)));
        }
        for trouble in &pass.trouble {
            tracing::warn!("connections that should end may go on: {trouble}");
        }
        if pass.waiting > 0 {
            let soon = Instant::now() + IDLE / 4;
            self.closing.next = Some(self.closing.next.map_or(soon, |planned| planned.min(soon)));
        }
    }
}
