//! From snapshot to verdict, and from one snapshot to the next: a change recomputes the services that it concerns, and no others.

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
    model::{Algorithm, Code, Finding, Locality, NamespacedName, Protocol, ServiceId, ServicePort},
    store::{Changes, Snapshot},
};

/// Everything for one client, from nothing.
pub fn assign(snapshot: &Snapshot, client: &Client, observed: &HealthView) -> PolicyOutput {
    let mut compiler = Compiler::default();
    compiler.compile(snapshot, client, observed, &Changes::everything());
    compiler.output()
}

/// The same for one service, with what left endpoints out.
pub fn explain(snapshot: &Snapshot, client: &Client, observed: &HealthView, service: &ServiceId) -> PolicyOutput {
    let mut compiler = Compiler { explain: Some(service.clone()), ..Compiler::default() };
    compiler.compile(snapshot, client, observed, &Changes::everything());
    compiler.output()
}

/// What a service was assigned, and what is wrong with it.
#[derive(Debug, Default)]
struct Compiled {
    assignments: Vec<Arc<Assignment>>,
    findings: Vec<Finding>,
}

/// A service that was computed anew.
#[derive(Debug)]
pub struct ServiceChange {
    /// Which one.
    pub service: ServiceId,
    /// What it was assigned before.
    pub before: Vec<Arc<Assignment>>,
    /// And now.
    pub after: Vec<Arc<Assignment>>,
}

/// The verdict, kept so that a change costs what it concerns.
#[derive(Debug, Default)]
pub struct Compiler {
    rules: RuleIndex,
    /// What is wrong with rules and places.
    findings: Vec<Finding>,
    services: BTreeMap<ServiceId, Compiled>,
    /// Whose address it is, where several services claim it.
    owners: BTreeMap<(IpAddr, u16, Protocol), ServiceId>,
    /// Services whose routes lead to a service, beside itself.
    dependents: BTreeMap<ServiceId, BTreeSet<ServiceId>>,
    unknown_locality: Arc<Locality>,
    /// Findings that were not there before, since somebody asked.
    fresh: Vec<Finding>,
    /// The service that somebody wants explained.
    explain: Option<ServiceId>,
}

impl Compiler {
    /// Follows a change. Returns the services that are not as they were.
    pub fn compile(
        &mut self,
        snapshot: &Snapshot,
        client: &Client,
        observed: &HealthView,
        changes: &Changes,
    ) -> Vec<ServiceChange> {
        let mut concerned = BTreeSet::new();
        if changes.everything {
            self.prepare(snapshot, client);
        }
        if let Some(service) = &self.explain {
            concerned.insert(service.clone());
        } else if changes.everything {
            concerned.extend(self.services.keys().cloned());
            concerned.extend(visible_services(snapshot, client));
            let slices = snapshot.clusters.values().flat_map(|objects| objects.slices.keys());
            concerned.extend(slices.map(|service| ServiceId::service(service.clone())));
        } else {
            for service in &changes.services {
                concerned.extend(self.dependents.get(service).into_iter().flatten().cloned());
                concerned.insert(service.clone());
            }
        }
        concerned.into_iter().filter_map(|service| self.recompile(snapshot, client, observed, service)).collect()
    }

    /// The verdict as it is now, without what is wrong with the objects themselves.
    pub fn output(&self) -> PolicyOutput {
        let assignments = self.services.values().flat_map(|compiled| &compiled.assignments).cloned().collect();
        PolicyOutput { assignments, findings: self.findings().cloned().collect() }
    }

    /// What people should know of rules, places and services.
    pub fn findings(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().chain(self.services.values().flat_map(|compiled| &compiled.findings))
    }

    /// Findings that were not there when this was asked before.
    pub fn fresh_findings(&mut self) -> Vec<Finding> {
        std::mem::take(&mut self.fresh)
    }

    /// What all services depend on.
    fn prepare(&mut self, snapshot: &Snapshot, client: &Client) {
        let before = std::mem::take(&mut self.findings);
        self.owners.clear();
        self.dependents.clear();
        self.rules = RuleIndex::new(snapshot, client, &mut self.findings);
        if !snapshot.clusters.contains_key(&client.cluster) {
            let message = format!(
                "the configuration has no cluster {:?}: there is nothing to do for its clients",
                &*client.cluster
            );
            self.findings.push(Finding::new(Code::UnknownCluster, format!("Cluster {}", client.cluster), message));
        }
        // Services come before entries: a ServiceEntry does not take what is a Service's.
        // Of other clusters' addresses nobody here need know.
        let own = snapshot.clusters.get(&client.cluster);
        let services = own.into_iter().flat_map(|objects| objects.services.values());
        let of_services: BTreeMap<IpAddr, &NamespacedName> =
            services.flat_map(|service| service.addresses.iter().map(|address| (*address, &service.name))).collect();
        for id in visible_services(snapshot, client) {
            let Some(view) = service_view::find(snapshot, &client.cluster, &id) else { continue };
            for (i, address) in view.addresses.iter().enumerate() {
                if let Some(service) = of_services.get(address).filter(|_| id.is_entry) {
                    let message = format!("{address} is an address of Service {service}, which counts");
                    self.findings
                        .push(Finding::new(Code::ServiceWins, id.object(), message).at(format!("spec.addresses[{i}]")));
                    continue;
                }
                for port in view.ports.iter().filter(|port| port.protocol.is_balanced()) {
                    let key = (*address, port.port, port.protocol);
                    let owner = self.owners.entry(key).or_insert_with(|| id.clone());
                    if *owner != id {
                        let message = format!(
                            "{address} port {} belongs to {}, which comes first by its name",
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
            let message = format!("port {}: {} is left alone", port.port, port.protocol);
            compiled.findings.push(Finding::new(Code::ProtocolNotHandled, id.object(), message));
            return;
        }
        let own =
            view.addresses.iter().filter(|address| self.owners.get(&(**address, port.port, port.protocol)) == Some(id));
        for family in [IpAddr::is_ipv4 as fn(&IpAddr) -> bool, IpAddr::is_ipv6] {
            let context = PolicyContext {
                snapshot,
                client,
                rules: &self.rules,
                observed,
                family,
                unknown_locality: &self.unknown_locality,
                explain: self.explain.as_ref() == Some(id),
            };
            // Addresses may be told apart by routes; as a rule they are not.
            let mut rest: Vec<IpAddr> = own.clone().copied().filter(family).collect();
            while let Some(first) = rest.first().copied() {
                let route = |address: IpAddr| self.rules.route(id, port, address);
                let taken = route(first);
                let same = |address: &mut IpAddr| {
                    let other = route(*address);
                    match (taken, other) {
                        (None, None) => true,
                        (Some((_, a)), Some((_, b))) => std::ptr::eq(a, b),
                        _ => false,
                    }
                };
                let alike: Vec<IpAddr> = rest.extract_if(.., same).collect();
                let frontends = alike.into_iter().map(|address| SocketAddr::new(address, port.port)).collect();
                let ports = |service: &ServiceId| -> Vec<u16> {
                    let view = service_view::find(snapshot, &client.cluster, service);
                    let alike = |other: &&ServicePort| other.protocol == port.protocol;
                    view.map(|view| view.ports.iter().filter(alike).map(|port| port.port).collect()).unwrap_or_default()
                };
                let at = (port.port, port.protocol, first.is_ipv6());
                let destinations = self.rules.destinations(id, at, taken, &ports, &mut compiled.findings);
                // A route is large, and kept: no room for more than there are.
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
                    routed_by: taken.map(|(rule, _)| rule.name.clone()),
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

/// The service of this name that the client can dial: a Service, or else a ServiceEntry.
pub fn service_named(snapshot: &Snapshot, client: &Client, name: &NamespacedName) -> Option<ServiceId> {
    let all = visible_services(snapshot, client);
    [ServiceId::service(name.clone()), ServiceId::entry(name.clone())].into_iter().find(|id| all.contains(id))
}

/// The services that clients can dial: those of their own cluster, and entries of it and of the mesh.
fn visible_services(snapshot: &Snapshot, client: &Client) -> BTreeSet<ServiceId> {
    let own = snapshot.clusters.get(&client.cluster);
    let services = own.into_iter().flat_map(|objects| objects.services.keys()).cloned().map(ServiceId::service);
    let entries = [own, Some(&snapshot.mesh)].into_iter().flatten().flat_map(|objects| objects.service_entries.keys());
    services.chain(entries.cloned().map(ServiceId::entry)).collect()
}

/// Says which connections are refused, and why.
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

/// A part of a service's connections cannot be left alone while others are given endpoints.
fn reject_partial_passthrough(pool: &mut Pool, id: &ServiceId, findings: &mut Vec<Finding>) {
    if pool.algorithm == Algorithm::Passthrough {
        let message =
            format!("PASSTHROUGH of {} has no effect where a route splits connections; ROUND_ROBIN is used", pool.key);
        findings.push(Finding::new(Code::NotTogether, id.object(), message));
        pool.algorithm = Algorithm::RoundRobin;
    }
}

/// How long clients come back to their endpoint. A hash has them come back anyway, as long as the endpoints are the same.
fn affinity(view: &ServiceView<'_>, routes: &[Route], findings: &mut Vec<Finding>) -> Option<Duration> {
    let affinity = view.affinity?;
    if routes.iter().any(|route| route.pool.algorithm == Algorithm::ConsistentHash) {
        let message = "has no effect: consistentHash of the DestinationRule says where clients come back to";
        findings.push(Finding::new(Code::NotTogether, view.id.object(), message).at("spec.sessionAffinity"));
        return None;
    }
    Some(affinity)
}

/// The turns over all routes. A route that leads to nobody keeps its turns, and they refuse: its connections were not meant for
/// the others.
fn schedule(routes: &[Route], groups: Vec<Vec<Group>>) -> Schedule {
    if groups.iter().all(Vec::is_empty) {
        return Schedule::default();
    }
    let total: u128 = routes.iter().map(|route| u128::from(route.weight)).sum();
    let mut parts = Vec::new();
    for (i, (route, groups)) in routes.iter().zip(groups).enumerate() {
        let share = Share::new(u128::from(route.weight), total.max(1));
        let choice = route.pool.choice();
        if groups.is_empty() {
            parts.push(WeightedGroup { share, members: Vec::new(), choice, route: i as u32 });
        }
        parts.extend(groups.into_iter().map(|group| WeightedGroup {
            share: group.share * share,
            members: group.members,
            choice,
            route: i as u32,
        }));
    }
    Schedule::new(parts)
}
