//! What the task answers to those who ask: reports, explanations, metrics, readiness.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::atomic::Ordering,
    time::{Instant, SystemTime},
};

use portolan_core::{
    model::{Finding, NamespacedName},
    policy::{self, Assignment, PoolKey},
    report::{
        EndpointKernel, EndpointReport, FrontendKernel, Report,
        explain::{Explanation, concerns},
    },
    table,
};

use super::{Reconciler, Request, event_log::rfc3339};
use crate::metrics::collect::MetricsSnapshot;

impl Reconciler {
    /// Whether it changes something.
    pub(super) fn answer(&mut self, request: Request) -> bool {
        // Where the one who asked has gone away, the answer is for nobody.
        match request {
            Request::Report(reply) => drop(reply.send(self.report())),
            Request::Explain(name, port, reply) => drop(reply.send(self.explain(&name, port))),
            Request::MetricsSnapshot(reply) => drop(reply.send(self.sample())),
            Request::Ready(reply) => drop(reply.send(self.ready())),
            Request::Events(reply) => drop(reply.send(self.events.follow())),
            Request::OverrideCommand(order, reply) => return self.take_order(&order, reply),
        }
        false
    }

    fn ready(&self) -> Result<(), String> {
        if !self.store.synced() {
            return Err("not everything has been read yet".to_owned());
        }
        if !self.attached && self.datapath.replaces_another() {
            let why = self.trouble.first().map_or_else(
                || self.doubt.clone().unwrap_or_else(|| "nothing is published yet".to_owned()),
                |finding| finding.message.clone(),
            );
            return Err(format!("a former version's programs go on serving until this one's table is whole: {why}"));
        }
        let adopted = self.layout.adopted();
        if let Some(doubt) = self.doubt.as_ref().filter(|_| adopted > 0) {
            return Err(format!("{adopted} frontends are left as a former agent published them, for {doubt}"));
        }
        if self.client.default_cluster_local {
            return Err("the mesh's settings cannot be read, so connections are kept in their cluster".to_owned());
        }
        if self.passes {
            return Err(
                "some services have no room in the kernel's maps, and their connections go past Portolan".to_owned()
            );
        }
        self.datapath.check_hooks().map_err(|error| format!("{error:#}"))?;
        self.probe.seen.clone().map_err(|why| format!("the self-probe failed: {why}"))
    }

    fn sample(&mut self) -> MetricsSnapshot {
        self.collector.collect(&self.layout, &self.datapath.maps);
        self.count_frontends();
        let ((targets, failing, _), counts) = (self.health.probes(), &self.prober.counts);
        MetricsSnapshot {
            services: self.collector.services().clone(),
            totals: self.collector.totals().clone(),
            ejected: self.health.ejected(),
            probed: [targets, failing],
            probes: [&counts.well, &counts.failing, &counts.unknown].map(|count| count.load(Ordering::Relaxed)),
            health: self.collector.health().clone(),
            publish_seconds: self.collector.publish_seconds(),
            ejection_seconds: self.collector.ejection_seconds(),
            counters: self.datapath.maps.counters().unwrap_or_default(),
            times: self.datapath.maps.times().unwrap_or_default(),
            overflow: self.overflow(),
            closing_passes: self.closing.passes,
            closed: self.closing.closed.clone(),
            occupancy: self.layout.occupancy(),
            places: self.datapath.closer.places(),
            ready: self.ready().is_ok(),
            findings: self.findings(),
        }
    }

    /// What the kernel has counted over the limits of pools.
    fn overflow(&self) -> BTreeMap<(NamespacedName, u16), u64> {
        let mut pools: BTreeMap<u32, (NamespacedName, u16)> = BTreeMap::new();
        for key in self.pools.values().flatten() {
            if let Some((id, _)) = self.layout.pool(key) {
                pools.insert(id, (key.service.name.clone(), key.port));
            }
        }
        let mut sums = BTreeMap::new();
        for (id, name) in pools {
            let stats = self.datapath.maps.pool_stats(id).unwrap_or_default();
            *sums.entry(name).or_default() += stats.overflow;
        }
        sums
    }

    fn findings(&self) -> Vec<Finding> {
        let of_rules =
            self.compiler.findings().chain(&self.client_findings).chain(&self.trouble).chain(&self.crowded).cloned();
        let of_rules = of_rules.chain(self.findings_of_health()).chain(self.start_findings.clone());
        let mut findings: Vec<Finding> = self.store.findings().into_iter().chain(of_rules).collect();
        for finding in &mut findings {
            self.store.add_source(&self.cluster, finding);
        }
        findings.sort();
        findings.dedup();
        findings
    }

    /// The verdict, with what the kernel holds beside it.
    fn report(&self) -> Report {
        let mut output = self.compiler.output();
        output.findings = self.findings();
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
                self.explain_ejection(&route.pool.key, intended, endpoint);
            }
        }
        report
    }

    /// The verdict for one service, step by step.
    fn explain(&self, name: &NamespacedName, port: Option<u16>) -> Option<Explanation> {
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
            self.store.add_source(&self.cluster, finding);
        }
        let routes = output.assignments.iter().filter(|assignment| port.is_none_or(|port| port == assignment.port));
        let pools = routes.flat_map(|assignment| &assignment.routes).map(|route| &route.pool);
        for (route, pool) in explanation.routes_mut().zip(pools) {
            for (endpoint, intended) in route.endpoints.iter_mut().zip(&pool.endpoints) {
                self.explain_ejection(&pool.key, intended, &mut endpoint.endpoint);
            }
        }
        Some(explanation)
    }

    /// Why an endpoint is out, and until when.
    fn explain_ejection(&self, pool: &PoolKey, intended: &policy::Endpoint, shown: &mut EndpointReport) {
        let hand = self.health.overrides();
        let drain = hand.drain(&pool.service.name, &intended.locality.region).map(|drain| &drain.ordered);
        if let Some(ordered) = hand.ejection(&intended.address).or(drain) {
            shown.ejected_until = ordered.until.map(rfc3339);
            let reason = if ordered.reason.is_empty() { String::new() } else { format!(": {}", ordered.reason) };
            shown.ejected_by = Some(format!("hand{reason}"));
        } else if let Some(ejection) = self.health.ejection(pool, &intended.address) {
            let left = ejection.until.saturating_duration_since(Instant::now());
            shown.ejected_until = Some(rfc3339(SystemTime::now() + left));
            shown.ejected_by =
                Some(format!("{} ({} failures in a row)", ejection.cause.threshold.field(), ejection.cause.failures));
        }
    }

    fn frontend_kernel(&self, assignment: &Assignment) -> FrontendKernel {
        let mut sum = FrontendKernel::default();
        let keys = assignment.frontends.iter().map(|address| table::key(*address, assignment.protocol));
        for (id, version) in keys.filter_map(|key| self.datapath.maps.frontend(&key)) {
            let stats = self.datapath.maps.frontend_stats(id).unwrap_or_default();
            sum.slots += version.period;
            sum.generation = sum.generation.max(version.generation);
            sum.connections += stats.given();
            sum.refused += stats.refused_in_all();
        }
        sum
    }

    fn endpoint_kernel(&self, address: &SocketAddr) -> Option<EndpointKernel> {
        let id = self.layout.backend_id(address)?;
        let stats = self.datapath.maps.backend_stats(id).ok()?;
        let uses = self.datapath.maps.backend_use(id).ok()?;
        Some(EndpointKernel {
            connections: stats.opened + stats.flows,
            active: u64::try_from(stats.active as i64).unwrap_or(0),
            failures: stats.failed,
            responses: uses.responses,
            server_errors: uses.server_errors,
            gateway_errors: uses.gateway_errors,
            connect_micros: (uses.connect_ns > 0).then_some(uses.connect_ns as f64 / 1e3),
        })
    }
}
