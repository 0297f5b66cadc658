//! Orders by hand, and what outlives the agent: ejections and those orders.

use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use portolan_core::{
    health::OverrideCommand,
    model::{Code, Finding},
};
use tokio::sync::oneshot;

use super::{Reconciler, event_log::Event, state_file::PersistedState};

/// Who gave an order waits for it to be kept, but no longer.
const WRITTEN: Duration = Duration::from_secs(5);

impl Reconciler {
    /// Takes an order by hand; whether it changes anything. Who gave it is told once it is in force and kept.
    pub(super) fn take_order(
        &mut self,
        order: &OverrideCommand,
        reply: oneshot::Sender<Result<String, String>>,
    ) -> bool {
        let said = match self.makes_no_sense(order) {
            Some(wrong) => Err(wrong),
            None => self.health.execute(order, SystemTime::now()),
        };
        match said {
            Err(wrong) => {
                // Where the one who asked has gone away, the answer is for nobody.
                let _ = reply.send(Err(wrong));
                false
            }
            Ok(message) => {
                let endpoint = match order {
                    OverrideCommand::Eject { endpoint, .. } | OverrideCommand::Restore { endpoint } => {
                        Some(endpoint.to_string())
                    }
                    _ => None,
                };
                self.tell_order(message.clone(), endpoint);
                self.judging.orders.push((message, reply));
                true
            }
        }
    }

    /// Why an order would concern nobody.
    fn makes_no_sense(&self, order: &OverrideCommand) -> Option<String> {
        match order {
            OverrideCommand::Eject { endpoint, .. } => {
                let known = self.layout.backend_id(endpoint).is_some();
                (!known).then(|| format!("no service has an endpoint {endpoint}; portolan get endpoints lists them"))
            }
            OverrideCommand::Drain { service, region, .. } => {
                let output = self.compiler.output();
                let of = output.assignments.iter().filter(|assignment| assignment.service.name == *service);
                let pools: Vec<_> = of.flat_map(|assignment| &assignment.routes).map(|route| &route.pool).collect();
                if pools.is_empty() {
                    return Some(format!("clients of this node have no service {service}"));
                }
                let mut endpoints = pools.iter().flat_map(|pool| &pool.endpoints);
                let there = endpoints.any(|endpoint| endpoint.locality.region == *region);
                (!there).then(|| format!("{service} has no endpoint in region {region}"))
            }
            OverrideCommand::Restore { .. } | OverrideCommand::Undrain { .. } => None,
        }
    }

    fn tell_order(&mut self, message: String, endpoint: Option<String>) {
        self.events.add(Event { kind: Event::BY_HAND.to_owned(), message, endpoint, ..Event::default() });
        self.judging.dirty = true;
        self.changes.everything = true;
        self.changes.findings = true;
    }

    /// Ends the orders whose time is up.
    pub(super) fn expire_overrides(&mut self) {
        for message in self.health.expire_overrides(SystemTime::now()) {
            self.tell_order(message, None);
        }
    }

    /// Takes what a former agent has left.
    pub(super) fn take_kept(&mut self, kept: Result<Option<PersistedState>>) {
        match kept {
            Ok(Some(kept)) => {
                let (now, away) = (Instant::now(), kept.age(SystemTime::now()));
                self.health.restore(now, away, kept.pools(), kept.overrides);
            }
            Ok(None) => {}
            Err(error) => {
                let message = format!("{error:#}; ejections begin anew, and orders by hand have to be given again");
                self.start_findings.push(Finding::new(Code::KeptUnreadable, "State", message));
            }
        }
        // What was counted before this agent began is nobody's news.
        for (_, id) in self.layout.backends().collect::<Vec<_>>() {
            if let Some(stats) = self.datapath.maps.backend_stats(id).ok().filter(|stats| stats.failed > 0) {
                self.judging.heard.insert(id, stats.failed);
            }
        }
        self.judging.lost = self.datapath.maps.counters().map_or(0, |counters| counters.events_lost);
    }

    /// Has kept what the next agent shall know, if that is new, and tells those who gave orders.
    pub(super) fn keep(&mut self) {
        let now = Instant::now();
        if self.judging.orders.is_empty() && self.judging.poll_timeout().is_none_or(|at| at > now) {
            return;
        }
        (self.judging.dirty, self.judging.kept_at) = (false, now);
        let pools = self.health.snapshot(now);
        let kept = self.judging.state_writer.keep(PersistedState::new(
            SystemTime::now(),
            pools,
            self.health.overrides().clone(),
        ));
        let orders = std::mem::take(&mut self.judging.orders);
        if orders.is_empty() {
            return;
        }
        let unpublished = self.trouble.first().map(|finding| finding.message.clone());
        tokio::spawn(async move {
            let kept = tokio::time::timeout(WRITTEN, kept).await;
            let lost = match kept {
                Ok(Ok(Ok(()))) => None,
                Ok(Ok(Err(error))) => Some(error),
                _ => Some("it takes too long".to_owned()),
            };
            for (message, reply) in orders {
                let published = unpublished.iter().map(|why| format!("; but the kernel has not taken it yet: {why}"));
                let lost =
                    lost.iter().map(|why| format!("; but it will be forgotten at a restart of the agent: {why}"));
                let _ = reply.send(Ok(message + &published.chain(lost).collect::<String>()));
            }
        });
    }
}
