//! HTTP ports whose responses decide about ejections: whether their packets are read, and whether they carry HTTP/1 at all.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use portolan_common::DetectedProtocol;
use portolan_core::{
    health::Health,
    model::{Code, Finding, ObjectRef, ServiceId, SuccessCriterion},
    policy::{Assignment, PoolKey, ServiceChange},
    table::Layout,
};

use super::effect::Effect;
use crate::kernel::Kernel;

/// Which pools are judged by the status of HTTP responses, and what they carry instead.
#[derive(Debug, Default)]
pub(super) struct HttpDetection {
    /// What was detected in place of HTTP/1, by pool, as bits of [`DetectedProtocol`].
    detected: BTreeMap<PoolKey, u64>,
    /// Services with pools that are judged by status.
    services: HashSet<ServiceId>,
    /// Whether the program that reads packets is attached; `None` before the first attempt.
    sniffing: Option<bool>,
    /// Why it could not be attached.
    failure: Option<Finding>,
}

fn is_judged_by_status(assignment: &Arc<Assignment>) -> bool {
    assignment.routes.iter().any(|route| route.pool.success_criterion == SuccessCriterion::HttpStatus)
}

impl HttpDetection {
    /// Replaces all services.
    pub(super) fn reset(&mut self, assignments: &[Arc<Assignment>]) {
        let judged = assignments.iter().filter(|assignment| is_judged_by_status(assignment));
        self.services = judged.map(|assignment| assignment.service.clone()).collect();
    }

    /// Follows changes of services.
    pub(super) fn update(&mut self, changed: &[ServiceChange]) {
        for change in changed {
            if change.after.iter().any(is_judged_by_status) {
                self.services.insert(change.service.clone());
            } else {
                self.services.remove(&change.service);
            }
        }
    }

    /// Attaches the program that reads packets while a pool needs it, and detaches it afterward.
    pub(super) fn apply(&mut self, kernel: &mut impl Kernel) {
        let wanted = !self.services.is_empty();
        if self.sniffing == Some(wanted) {
            return;
        }
        match kernel.set_http_sniffing(wanted) {
            Ok(()) => (self.sniffing, self.failure) = (Some(wanted), None),
            Err(error) => {
                let message = format!("cannot observe HTTP responses: {error:#}");
                self.failure = Some(Finding::new(Code::KernelWrite, ObjectRef::global("Kernel", ""), message));
            }
        }
    }

    /// Records that something else than HTTP/1 came back on a connection to `pool`.
    ///
    /// One client or endpoint may speak anything: a pool with valid responses is HTTP/1.
    pub(super) fn on_non_http(
        &mut self,
        pool: &PoolKey,
        protocol: u64,
        health: &mut Health,
        layout: &Layout,
        kernel: &impl Kernel,
    ) -> Vec<Effect> {
        let has_responses = health.hosts_of(pool).into_iter().any(|address| {
            let uses = layout.backend_id(&address).and_then(|id| kernel.backend_use(id).ok());
            uses.is_some_and(|uses| uses.responses > 0)
        });
        if has_responses {
            return Vec::new();
        }
        *self.detected.entry(pool.both_families()).or_default() |= protocol;
        if health.not_http(pool) { vec![Effect::Recompute(pool.service.clone()), Effect::Findings] } else { Vec::new() }
    }

    /// Loads what was detected before this agent started, from the kernel's counters of pools.
    pub(super) fn load(
        &mut self,
        changed: &[ServiceChange],
        health: &mut Health,
        layout: &Layout,
        kernel: &impl Kernel,
    ) -> Vec<Effect> {
        let assignments = changed.iter().flat_map(|change| &change.after);
        let pools = assignments.flat_map(|assignment| &assignment.routes).map(|route| &route.pool);
        let judged = pools.filter(|pool| pool.success_criterion == SuccessCriterion::HttpStatus);
        let mut effects = Vec::new();
        for pool in judged.map(|pool| &pool.key) {
            let stats = layout.pool(pool).and_then(|(id, _)| kernel.pool_stats(id).ok());
            if let Some(stats) = stats.filter(|stats| stats.spoken != 0) {
                effects.extend(self.on_non_http(pool, stats.spoken, health, layout, kernel));
            }
        }
        effects
    }

    /// Returns what is wrong with HTTP ports.
    pub(super) fn findings<'a>(&'a self, health: &'a Health) -> impl Iterator<Item = Finding> + 'a {
        let of_pools = self.detected.iter().filter(|(pool, _)| health.knows(pool)).map(|(pool, protocol)| {
            let protocol = if protocol & DetectedProtocol::TLS != 0 {
                "TLS"
            } else if protocol & DetectedProtocol::HTTP2 != 0 {
                "HTTP/2"
            } else {
                "a protocol other than HTTP/1"
            };
            let message = format!(
                "port {} is an HTTP port by its name or appProtocol, but its endpoints speak {protocol}: no status can be read, so only \
                 connection failures lead to ejections",
                pool.port
            );
            Finding::new(Code::NotHttp, pool.service.object(), message)
        });
        of_pools.chain(self.failure.clone())
    }
}
