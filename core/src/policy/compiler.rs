//! Compiles a snapshot into assignments. A change recompiles only the services that it affects.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use super::{
    context::PolicyContext,
    diagnose, pool,
    rule_index::RuleIndex,
    schedule::{Schedule, WeightedGroup},
    service_view::{self, ServiceView},
    share::{Group, Share},
    types::{Assignment, Client, HealthView, PolicyOutput, Pool, Route},
};
use crate::{
    model::{
        Algorithm, Code, Finding, IpFamily, Locality, NamespacedName, ObjectRef, Protocol, ServiceId, ServicePort,
    },
    store::{Changes, Snapshot},
};

/// Computes the policy output for one client from scratch.
pub fn assign(snapshot: &Snapshot, client: &Client, observed: &HealthView) -> PolicyOutput {
    let mut compiler = Compiler::default();
    compiler.compile(snapshot, client, observed, &Changes::everything());
    compiler.output()
}

/// Computes the policy output for one service, including the endpoints that its pools exclude.
pub fn explain(snapshot: &Snapshot, client: &Client, observed: &HealthView, service: &ServiceId) -> PolicyOutput {
    let mut compiler = Compiler { explain: Some(service.clone()), ..Compiler::default() };
    compiler.compile(snapshot, client, observed, &Changes::everything());
    compiler.output()
}

/// Assignments and findings of one service.
#[derive(Debug, Default)]
struct Compiled {
    assignments: Vec<Arc<Assignment>>,
    findings: Vec<Finding>,
}

/// A service whose assignments changed.
#[derive(Debug)]
pub struct ServiceChange {
    /// Service that was recompiled.
    pub service: ServiceId,
    /// Assignments before the change; empty for a new service.
    pub before: Vec<Arc<Assignment>>,
    /// Assignments after the change; empty for a removed service.
    pub after: Vec<Arc<Assignment>>,
}

/// Incremental compiler.
#[derive(Debug, Default)]
pub struct Compiler {
    rules: RuleIndex,
    /// Findings about rules, clusters and address conflicts.
    findings: Vec<Finding>,
    services: BTreeMap<ServiceId, Compiled>,
    /// Service that owns each address and port; the first one wins if several services claim it.
    owners: BTreeMap<(IpAddr, u16, Protocol), ServiceId>,
    /// Other services whose routes lead to a service.
    dependents: BTreeMap<ServiceId, BTreeSet<ServiceId>>,
    unknown_locality: Arc<Locality>,
    /// Findings that [`Self::fresh_findings`] has not returned yet.
    fresh: Vec<Finding>,
    /// Service to explain; `None` to compile all services.
    explain: Option<ServiceId>,
}

impl Compiler {
    /// Applies a change, and returns the services whose assignments changed.
    pub fn compile(
        &mut self,
        snapshot: &Snapshot,
        client: &Client,
        observed: &HealthView,
        changes: &Changes,
    ) -> Vec<ServiceChange> {
        let mut affected = BTreeSet::new();
        if changes.everything {
            self.prepare(snapshot, client);
        }
        if let Some(service) = &self.explain {
            affected.insert(service.clone());
        } else if changes.everything {
            affected.extend(self.services.keys().cloned());
            affected.extend(visible_services(snapshot, client));
            let slices = snapshot.clusters.values().flat_map(|objects| objects.slices.keys());
            affected.extend(slices.map(|service| ServiceId::service(service.clone())));
        } else {
            for service in &changes.services {
                affected.extend(self.dependents.get(service).into_iter().flatten().cloned());
                affected.insert(service.clone());
            }
        }
        affected.into_iter().filter_map(|service| self.recompile(snapshot, client, observed, service)).collect()
    }

    /// Returns the current policy output. Findings about the decoding of objects are not part of it.
    pub fn output(&self) -> PolicyOutput {
        let assignments = self.services.values().flat_map(|compiled| &compiled.assignments).cloned().collect();
        PolicyOutput { assignments, findings: self.findings().cloned().collect() }
    }

    /// Returns the findings about rules, addresses and services.
    pub fn findings(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().chain(self.services.values().flat_map(|compiled| &compiled.findings))
    }

    /// Returns the findings that are new since the previous call.
    pub fn fresh_findings(&mut self) -> Vec<Finding> {
        std::mem::take(&mut self.fresh)
    }

    /// Rebuilds what all services depend on: rules and address owners.
    fn prepare(&mut self, snapshot: &Snapshot, client: &Client) {
        let before = std::mem::take(&mut self.findings);
        self.owners.clear();
        self.dependents.clear();
        self.rules = RuleIndex::new(snapshot, client, &mut self.findings);
        if !snapshot.clusters.contains_key(&client.cluster) {
            let message = format!(
                "the configuration has no cluster {:?}, so its clients are not served; check --cluster",
                &*client.cluster
            );
            self.findings.push(Finding::new(
                Code::UnknownCluster,
                ObjectRef::global("Cluster", &client.cluster),
                message,
            ));
        }
        // Services come before entries: a ServiceEntry must not take a Service's address.
        let own = snapshot.clusters.get(&client.cluster);
        let services = own.into_iter().flat_map(|objects| objects.services.values());
        let of_services: BTreeMap<IpAddr, &NamespacedName> =
            services.flat_map(|service| service.addresses.iter().map(|address| (*address, &service.name))).collect();
        for id in visible_services(snapshot, client) {
            let Some(view) = service_view::find(snapshot, &client.cluster, &id) else { continue };
            for (i, address) in view.addresses.iter().enumerate() {
                if let Some(service) = of_services.get(address).filter(|_| id.is_entry) {
                    let message = format!("{address} is an address of Service {service}, which takes precedence");
                    self.findings
                        .push(Finding::new(Code::ServiceWins, id.object(), message).at(format!("spec.addresses[{i}]")));
                    continue;
                }
                for port in view.ports.iter().filter(|port| port.protocol.is_balanced()) {
                    let key = (*address, port.port, port.protocol);
                    let owner = self.owners.entry(key).or_insert_with(|| id.clone());
                    if *owner != id {
                        let message = format!(
                            "{address} port {} belongs to {}, which comes first in name order",
                            port.port,
                            owner.object()
                        );
                        let field = if id.is_entry { "spec.addresses" } else { "spec.clusterIPs" };
                        self.findings.push(Finding::new(Code::AddressTaken, id.object(), message).at(field));
                    }
                }
            }
        }
        let before: BTreeSet<Finding> = before.into_iter().collect();
        self.fresh.extend(self.findings.iter().filter(|finding| !before.contains(finding)).cloned());
    }

    fn recompile(
        &mut self,
        snapshot: &Snapshot,
        client: &Client,
        observed: &HealthView,
        id: ServiceId,
    ) -> Option<ServiceChange> {
        let mut compiled = Compiled::default();
        diagnose::check(snapshot, &client.cluster, &id, &mut compiled.findings);
        // Services of other clusters have no frontends here.
        let own = [snapshot.clusters.get(&client.cluster), Some(&snapshot.mesh)];
        let is_own = own.into_iter().flatten().any(|objects| {
            if id.is_entry {
                objects.service_entries.contains_key(&id.name)
            } else {
                objects.services.contains_key(&id.name)
            }
        });
        let view = service_view::find(snapshot, &client.cluster, &id).filter(|_| is_own);
        if let (Some(view), Some(host)) = (&view, self.rules.host_of(&id)) {
            for port in view.ports {
                self.compile_port((snapshot, client, observed), view, &host, port, &mut compiled);
            }
        }
        for pool in compiled.assignments.iter().flat_map(|assignment| &assignment.routes).map(|route| &route.pool) {
            if pool.key.service != id {
                self.dependents.entry(pool.key.service.clone()).or_default().insert(id.clone());
            }
        }
        compiled.findings.sort();
        compiled.findings.dedup();
        let known = self.services.get(&id).map(|before| before.findings.as_slice()).unwrap_or_default();
        self.fresh.extend(compiled.findings.iter().filter(|finding| !known.contains(finding)).cloned());
        let after = compiled.assignments.clone();
        let before = if after.is_empty() && compiled.findings.is_empty() {
            self.services.remove(&id)
        } else {
            self.services.insert(id.clone(), compiled)
        };
        let before = before.map(|before| before.assignments).unwrap_or_default();
        (before != after).then_some(ServiceChange { service: id, before, after })
    }

    fn compile_port(
        &self,
        (snapshot, client, observed): (&Snapshot, &Client, &HealthView),
        view: &ServiceView<'_>,
        host: &str,
        port: &ServicePort,
        compiled: &mut Compiled,
    ) {
        let id = &view.id;
        if !port.protocol.is_balanced() {
            let message = format!("port {}: {} is not load-balanced", port.port, port.protocol);
            compiled.findings.push(Finding::new(Code::ProtocolNotHandled, id.object(), message));
            return;
        }
        let own =
            view.addresses.iter().filter(|address| self.owners.get(&(**address, port.port, port.protocol)) == Some(id));
        for family in IpFamily::BOTH {
            let context = PolicyContext {
                snapshot,
                client,
                rules: &self.rules,
                observed,
                family,
                unknown_locality: &self.unknown_locality,
                explain: self.explain.as_ref() == Some(id),
            };
            // Routes may match individual addresses, so addresses are grouped by route. Usually there is one group.
            let mut remaining: Vec<IpAddr> = own.clone().copied().filter(|address| family.contains(address)).collect();
            while let Some(first) = remaining.first().copied() {
                let route = |address: IpAddr| self.rules.route(id, port, address);
                let matched = route(first);
                let same_route = |address: &mut IpAddr| {
                    let other = route(*address);
                    match (matched, other) {
                        (None, None) => true,
                        (Some((_, a)), Some((_, b))) => std::ptr::eq(a, b),
                        _ => false,
                    }
                };
                let group: Vec<IpAddr> = remaining.extract_if(.., same_route).collect();
                let frontends = group.into_iter().map(|address| SocketAddr::new(address, port.port)).collect();
                let ports = |service: &ServiceId| -> Vec<u16> {
                    let view = service_view::find(snapshot, &client.cluster, service);
                    let same = |other: &&ServicePort| other.protocol == port.protocol;
                    view.map(|view| view.ports.iter().filter(same).map(|port| port.port).collect()).unwrap_or_default()
                };
                let at = (port.port, port.protocol, family);
                let destinations = self.rules.destinations(id, at, matched, &ports, &mut compiled.findings);
                // Routes are large and long-lived: allocate no spare capacity.
                let mut routes = Vec::with_capacity(destinations.len());
                let mut groups = Vec::with_capacity(destinations.len());
                for destination in destinations {
                    let (pool, own) =
                        pool::build(&context, destination.key, destination.via_route, &mut compiled.findings);
                    groups.push(own);
                    routes.push(Route { weight: destination.weight, pool });
                }
                if let [_, _, ..] = routes.as_slice() {
                    for pool in routes.iter_mut().map(|route| &mut route.pool) {
                        reject_partial_passthrough(pool, id, &mut compiled.findings);
                    }
                }
                let assignment = Assignment {
                    service: id.clone(),
                    host: host.to_owned(),
                    port: port.port,
                    protocol: port.protocol,
                    frontends,
                    routed_by: matched.map(|(rule, _)| rule.name.clone()),
                    passthrough: matches!(routes.as_slice(), [only] if only.pool.algorithm == Algorithm::Passthrough),
                    schedule: Arc::new(schedule(&routes, groups)),
                    affinity: affinity(view, &routes, &mut compiled.findings),
                    routes,
                };
                report_refusals(&context, &assignment, &mut compiled.findings);
                compiled.assignments.push(Arc::new(assignment));
            }
        }
    }
}

/// Returns the service of this name that the client can dial: a Service, otherwise a ServiceEntry.
pub fn service_named(snapshot: &Snapshot, client: &Client, name: &NamespacedName) -> Option<ServiceId> {
    let all = visible_services(snapshot, client);
    [ServiceId::service(name.clone()), ServiceId::entry(name.clone())].into_iter().find(|id| all.contains(id))
}

/// Returns the services that clients can dial: those of their own cluster, and ServiceEntries of the cluster or the
/// mesh.
fn visible_services(snapshot: &Snapshot, client: &Client) -> BTreeSet<ServiceId> {
    let own = snapshot.clusters.get(&client.cluster);
    let services = own.into_iter().flat_map(|objects| objects.services.keys()).cloned().map(ServiceId::service);
    let entries = [own, Some(&snapshot.mesh)].into_iter().flatten().flat_map(|objects| objects.service_entries.keys());
    services.chain(entries.cloned().map(ServiceId::entry)).collect()
}

/// Reports which connections are refused, and why.
fn report_refusals(context: &PolicyContext<'_>, assignment: &Assignment, findings: &mut Vec<Finding>) {
    for pool in assignment.routes.iter().map(|route| &route.pool).filter(|pool| pool.groups == 0) {
        if assignment.passthrough {
            continue;
        }
        let why = diagnose::explain_empty(context, pool);
        let message = format!("port {}: connections to {} are refused: {why}", assignment.port, pool.key);
        findings.push(Finding::new(Code::NoUsableEndpoint, assignment.service.object(), message));
    }
}

/// Replaces `PASSTHROUGH` by round robin.
fn reject_partial_passthrough(pool: &mut Pool, id: &ServiceId, findings: &mut Vec<Finding>) {
    if pool.algorithm == Algorithm::Passthrough {
        let message =
            format!("PASSTHROUGH of {} has no effect where a route splits connections; ROUND_ROBIN is used", pool.key);
        findings.push(Finding::new(Code::NotTogether, id.object(), message));
        pool.algorithm = Algorithm::RoundRobin;
    }
}

/// Returns how long clients return to the same endpoint.
fn affinity(view: &ServiceView<'_>, routes: &[Route], findings: &mut Vec<Finding>) -> Option<Duration> {
    let affinity = view.affinity?;
    if routes.iter().any(|route| route.pool.algorithm == Algorithm::ConsistentHash) {
        let message = "has no effect: consistentHash of the DestinationRule decides where clients return to";
        findings.push(Finding::new(Code::NotTogether, view.id.object(), message).at("spec.sessionAffinity"));
        return None;
    }
    Some(affinity)
}

/// Builds the schedule over all routes.
fn schedule(routes: &[Route], groups: Vec<Vec<Group>>) -> Schedule {
    if groups.iter().all(Vec::is_empty) {
        return Schedule::default();
    }
    let total: u128 = routes.iter().map(|route| u128::from(route.weight)).sum();
    let mut weighted = Vec::new();
    for (i, (route, groups)) in routes.iter().zip(groups).enumerate() {
        let share = Share::new(u128::from(route.weight), total.max(1));
        let choice = route.pool.choice();
        if groups.is_empty() {
            weighted.push(WeightedGroup { share, members: Vec::new(), choice, route: i as u32 });
        }
        weighted.extend(groups.into_iter().map(|group| WeightedGroup {
            share: group.share * share,
            members: group.members,
            choice,
            route: i as u32,
        }));
    }
    Schedule::new(weighted)
}
