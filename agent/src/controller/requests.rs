//! What the controller answers: reports, explanations, metrics, readiness.

use std::{collections::BTreeMap, net::SocketAddr, sync::atomic::Ordering};

use portolan_core::{
    health::OverrideCommand,
    model::{Finding, NamespacedName},
    policy::{self, Assignment, PoolKey},
    report::{
        EndpointKernel, EndpointReport, FrontendKernel, Report,
        explain::{Explanation, concerns},
    },
    table::{self, PoolId},
};
use tokio::sync::{broadcast, oneshot};

use super::{
    Controller,
    event_log::{Event, rfc3339},
    now::Now,
};
use crate::{kernel::Kernel, metrics::collect::MetricsSnapshot};

/// A question to the controller, with the way to answer it.
#[derive(Debug)]
pub enum Request {
    /// What `portolan get` shows.
    Report(oneshot::Sender<Report>),
    /// What `portolan explain` shows of a service, or of one port of it; `None` if clients of this node have no such service.
    Explain(NamespacedName, Option<u16>, oneshot::Sender<Option<Explanation>>),
    /// What `/metrics` shows.
    Metrics(oneshot::Sender<Box<MetricsSnapshot>>),
    /// Whether connections are served as they should be, or why not.
    Ready(oneshot::Sender<Result<(), String>>),
    /// Execute an override; the reply says what was done, or why not.
    Override(OverrideCommand, oneshot::Sender<Result<String, String>>),
    /// The events so far, and those to come.
    Events(oneshot::Sender<(Vec<Event>, broadcast::Receiver<Event>)>),
}

impl<K: Kernel> Controller<K> {
    /// Answers a request, or executes it.
    pub(super) fn on_request(&mut self, now: Now, request: Request) {
        // A client that has gone away needs no answer.
        match request {
            Request::Report(reply) => drop(reply.send(self.report(now))),
            Request::Explain(name, port, reply) => drop(reply.send(self.explain(now, &name, port))),
            Request::Metrics(reply) => drop(reply.send(Box::new(self.metrics(now)))),
            Request::Ready(reply) => drop(reply.send(self.ready())),
            Request::Events(reply) => drop(reply.send(self.events.follow())),
            Request::Override(command, reply) => self.on_override(now, &command, reply),
        }
    }

    fn ready(&self) -> Result<(), String> {
        if !self.store.synced() {
            return Err("initial sync incomplete".to_owned());
        }
        if !self.attached && self.kernel.replaces_another() {
            let why = self.publisher.write_errors().first().map(|finding| finding.message.clone());
            let why = why.or_else(|| self.unread.clone()).unwrap_or_else(|| "nothing is published yet".to_owned());
            return Err(format!("the previous version's programs are still serving: table incomplete: {why}"));
        }
        let adopted = self.publisher.layout().adopted();
        if let Some(unread) = self.unread.as_ref().filter(|_| adopted > 0) {
            return Err(format!("{adopted} frontends are unchanged since the previous agent published them: {unread}"));
        }
        if self.client.default_cluster_local {
            return Err("the mesh settings cannot be read, so connections stay in their cluster".to_owned());
        }
        if self.publisher.is_bypassing() {
            return Err(
                "BPF maps have no room for some services, and their connections bypass Portolan; restart the agent with larger sizes"
                    .to_owned(),
            );
        }
        self.kernel.check_hooks().map_err(|error| format!("{error:#}"))?;
        self.self_probe.seen().clone().map_err(|why| format!("the self-probe failed: {why}"))
    }

    fn metrics(&mut self, now: Now) -> MetricsSnapshot {
        self.collector.collect(self.publisher.layout(), &self.kernel);
        self.count_frontends();
        let (targets, failing, _) = self.health.probes();
        let counts = &self.probe_counts;
        MetricsSnapshot {
            services: self.collector.services().clone(),
            totals: self.collector.totals().clone(),
            ejected: self.health.ejected(),
            probed: [targets, failing],
            probes: [&counts.success, &counts.failing, &counts.unknown].map(|count| count.load(Ordering::Relaxed)),
            health: self.collector.health().clone(),
            publish_seconds: self.collector.publish_seconds(),
            ejection_seconds: self.collector.ejection_seconds(),
            counters: self.kernel.counters().unwrap_or_default(),
            times: self.kernel.latencies().unwrap_or_default(),
            overflow: self.connection_limit_refusals(),
            closing_passes: self.termination.sweeps(),
            closed: self.termination.closed().clone(),
            occupancy: self.publisher.layout().occupancy(),
            connection_slots: self.kernel.connection_slots(),
            ready: self.ready().is_ok(),
            findings: self.findings(now),
        }
    }

    /// Connections that the kernel refused because of `maxConnections`, by service and port.
    fn connection_limit_refusals(&self) -> BTreeMap<(NamespacedName, u16), u64> {
        let mut pools: BTreeMap<PoolId, (NamespacedName, u16)> = BTreeMap::new();
        for key in self.frontends.all_pools() {
            if let Some((id, _)) = self.publisher.layout().pool(key) {
                pools.insert(id, (key.service.name.clone(), key.port));
            }
        }
        let mut sums = BTreeMap::new();
        for (id, name) in pools {
            *sums.entry(name).or_default() += self.kernel.pool_stats(id).unwrap_or_default().overflow;
        }
        sums
    }

    /// Returns all findings, in order, each once.
    fn findings(&self, now: Now) -> Vec<Finding> {
        let mut findings: Vec<Finding> = self.compiler.findings().cloned().chain(self.standing_findings(now)).collect();
        for finding in &mut findings {
            self.store.add_source(&self.settings.cluster, finding);
        }
        findings.sort();
        findings.dedup();
        findings
    }

    /// What is intended, beside what the kernel holds.
    fn report(&self, now: Now) -> Report {
        let mut output = self.compiler.output();
        output.findings = self.findings(now);
        let mut report = Report::new(&self.client, self.store.fingerprint(), &output);
        let routes = output
            .assignments
            .iter()
            .flat_map(|assignment| assignment.routes.iter().map(move |route| (assignment, route)));
        for (service, (assignment, route)) in report.services.iter_mut().zip(routes) {
            if std::ptr::eq(route, &raw const assignment.routes[0]) {
                service.kernel = Some(self.frontend_kernel(assignment));
            }
            for (endpoint, intended) in service.endpoints.iter_mut().zip(&route.pool.endpoints) {
                endpoint.kernel = self.endpoint_kernel(&intended.address);
                self.explain_ejection(now, &route.pool.key, intended, endpoint);
            }
        }
        report
    }

    /// The decision for one service, step by step.
    fn explain(&self, now: Now, name: &NamespacedName, port: Option<u16>) -> Option<Explanation> {
        let snapshot = self.store.snapshot();
        let service = policy::service_named(snapshot, &self.client, name)?;
        let mut output = policy::explain(snapshot, &self.client, self.health.observed(), &service);
        output.findings.extend(self.store.findings());
        output.findings.extend(self.client_findings.clone());
        output.findings.retain(|finding| concerns(finding, &service));
        output.findings.sort();
        output.findings.dedup();
        let mut explanation = Explanation::new(&self.client, &output, port);
        for finding in &mut explanation.findings {
            self.store.add_source(&self.settings.cluster, finding);
        }
        let routes = output.assignments.iter().filter(|assignment| port.is_none_or(|port| port == assignment.port));
        let pools = routes.flat_map(|assignment| &assignment.routes).map(|route| &route.pool);
        for (route, pool) in explanation.routes_mut().zip(pools) {
            for (endpoint, intended) in route.endpoints.iter_mut().zip(&pool.endpoints) {
                self.explain_ejection(now, &pool.key, intended, &mut endpoint.endpoint);
            }
        }
        Some(explanation)
    }

    /// Adds why an endpoint is ejected, and until when.
    fn explain_ejection(&self, now: Now, pool: &PoolKey, intended: &policy::Endpoint, shown: &mut EndpointReport) {
        let overrides = self.health.overrides();
        let drain = overrides.drain(&pool.service.name, &intended.locality.region).map(|drain| &drain.ordered);
        if let Some(terms) = overrides.ejection(&intended.address).or(drain) {
            shown.ejected_until = terms.until.map(rfc3339);
            let reason = if terms.reason.is_empty() { String::new() } else { format!(": {}", terms.reason) };
            shown.ejected_by = Some(format!("operator{reason}"));
        } else if let Some(ejection) = self.health.ejection(pool, &intended.address) {
            let left = ejection.until.saturating_duration_since(now.instant);
            shown.ejected_until = Some(rfc3339(now.wall + left));
            let (field, failures) = (ejection.cause.threshold.field(), ejection.cause.failures);
            shown.ejected_by = Some(format!("{field} ({failures} consecutive failures)"));
        }
    }

    fn frontend_kernel(&self, assignment: &Assignment) -> FrontendKernel {
        let mut sum = FrontendKernel::default();
        let keys = assignment.frontends.iter().map(|address| table::key(*address, assignment.protocol));
        for (id, published, generation) in keys.filter_map(|key| self.kernel.frontend(&key)) {
            let stats = self.kernel.frontend_stats(id).unwrap_or_default();
            sum.slots += published.period();
            sum.generation = sum.generation.max(generation.get());
            sum.connections += stats.given();
            sum.refused += stats.refused_in_all();
        }
        sum
    }

    fn endpoint_kernel(&self, address: &SocketAddr) -> Option<EndpointKernel> {
        let id = self.publisher.layout().backend_id(address)?;
        let stats = self.kernel.backend_stats(id).ok()?;
        let uses = self.kernel.backend_use(id).ok()?;
        Some(EndpointKernel {
            connections: stats.opened + stats.flows,
            active: stats.active.total(),
            failures: stats.failed,
            responses: uses.responses,
            server_errors: uses.server_errors,
            gateway_errors: uses.gateway_errors,
            connect_micros: (uses.connect_ns > 0).then_some(uses.connect_ns as f64 / 1e3),
        })
    }
}
