//! Finds the rules for a host: resolves names, prefers the most specific rule, and checks that the rule's namespace may
//! configure the host.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    net::IpAddr,
    sync::Arc,
};

use super::types::{Client, PoolKey};
use crate::{
    model::{
        ClusterLocal, ClusterLocalRule, Code, DestinationRule, Finding, IpFamily, MeshConfig, NamespacedName,
        ObjectRef, Protocol, Route, ServiceId, ServicePort, TrafficPolicy, VirtualService,
    },
    store::{Objects, Snapshot},
};

/// Rules in effect for a client: those of the mesh and of the client's cluster.
#[derive(Debug, Default)]
pub struct RuleIndex {
    /// Effective mesh settings: the cluster's own ones, otherwise those of the mesh.
    pub mesh: MeshConfig,
    destination_rules: ByHost<DestinationRule>,
    virtual_services: ByHost<VirtualService>,
    /// All services, by host name.
    hosts: BTreeMap<String, ServiceId>,
    /// Host names of ServiceEntries; those of Services are derived from their names.
    entries: BTreeMap<NamespacedName, String>,
}

/// Rules by namespace, then by host, which is a full name or has a leading `*`.
type ByHost<T> = BTreeMap<String, BTreeMap<String, Arc<T>>>;

/// A possible destination of the connections to a frontend.
#[derive(Debug)]
pub struct Destination {
    /// Weight relative to the other destinations.
    pub weight: u32,
    /// Pool that receives the connections.
    pub key: PoolKey,
    /// Whether a VirtualService route leads to this destination.
    pub via_route: bool,
}

/// A route, together with the VirtualService that contains it.
type MatchedRoute<'a> = (&'a VirtualService, &'a Route);

impl RuleIndex {
    /// Builds the index for the client, and reports rules that have no effect.
    pub fn new(snapshot: &Snapshot, client: &Client, findings: &mut Vec<Finding>) -> Self {
        let own = snapshot.clusters.get(&client.cluster);
        // Objects of the client's cluster take precedence over those of the mesh.
        let scopes: Vec<&Objects> = [own, Some(&snapshot.mesh)].into_iter().flatten().collect();
        let mut configs = scopes.iter().filter_map(|objects| objects.mesh_config.as_deref());
        let mut mesh = configs.next().cloned().unwrap_or_default();
        if configs.next().is_some() {
            let message = format!("cluster {} has its own settings, so those of the mesh are ignored", client.cluster);
            findings.push(Finding::new(
                Code::NotTogether,
                ObjectRef::new("ConfigMap", &NamespacedName::new("istio-system", "istio")),
                message,
            ));
        }
        if client.default_cluster_local {
            mesh.cluster_local
                .insert(0, ClusterLocalRule { host: "*".to_owned(), cluster_local: ClusterLocal::Strict });
        }
        let mut index = Self { mesh, ..Self::default() };
        for name in snapshot.clusters.values().flat_map(|objects| objects.services.keys()) {
            index.hosts.insert(name.host(&index.mesh.domain), ServiceId::service(name.clone()));
        }
        for entry in scopes.iter().flat_map(|objects| objects.service_entries.values()) {
            let host = &entry.hosts[0];
            let id = ServiceId::entry(entry.name.clone());
            match index.hosts.get(host) {
                // A Service that only another cluster has does not take the name of an entry.
                Some(other) if !other.is_entry && own.is_some_and(|own| own.services.contains_key(&other.name)) => {
                    let message =
                        format!("{host:?} belongs to Service {other}, which takes precedence; the entry is ignored");
                    findings.push(Finding::new(Code::ServiceWins, id.object(), message).at("spec.hosts[0]"));
                    continue;
                }
                Some(other) if other.is_entry => {
                    let message =
                        format!("{host:?} is also the host of {}, which receives routed connections", other.object());
                    findings.push(Finding::new(Code::SecondRule, id.object(), message).at("spec.hosts[0]"));
                }
                _ => drop(index.hosts.insert(host.clone(), id)),
            }
            index.entries.insert(entry.name.clone(), host.clone());
        }
        index.check_cluster_local(findings);
        for objects in scopes {
            for rule in objects.destination_rules.values() {
                let host = index.full_name(&rule.host, &rule.name.namespace);
                index.check_host("DestinationRule", "spec.host", &rule.name, &host, findings);
                check_failover(rule, findings);
                index.add_destination_rule(host, rule, findings);
            }
            for rule in objects.virtual_services.values().filter(|rule| !(rule.tcp.is_empty() && rule.http.is_empty()))
            {
                for host in &rule.hosts {
                    let host = index.full_name(host, &rule.name.namespace);
                    index.check_host("VirtualService", "spec.hosts", &rule.name, &host, findings);
                    index.add_virtual_service(host, rule, findings);
                }
            }
        }
        index
    }

    /// Reports clusterLocal hosts that match no service: a mistyped host would not stay in its cluster.
    fn check_cluster_local(&self, findings: &mut Vec<Finding>) {
        for rule in self.mesh.cluster_local.iter().filter(|rule| rule.host != "*") {
            let pattern = rule.host.starts_with('*');
            let known = if pattern {
                self.hosts.keys().any(|host| matches(&rule.host, host))
            } else {
                self.hosts.contains_key(&rule.host)
            };
            if !known {
                let message = format!(
                    "no service has the host {:?}, so the clusterLocal setting has no effect; hosts are full names \
                     (reviews.default.svc.{}) or begin with `*`",
                    rule.host, self.mesh.domain
                );
                findings.push(
                    Finding::new(
                        Code::UnknownHost,
                        ObjectRef::new("ConfigMap", &NamespacedName::new("istio-system", "istio")),
                        message,
                    )
                    .at("serviceSettings.hosts"),
                );
            }
        }
    }

    /// Returns the host name of a service; `None` for a ServiceEntry that is ignored.
    pub fn host_of(&self, service: &ServiceId) -> Option<String> {
        if service.is_entry {
            self.entries.get(&service.name).cloned()
        } else {
            Some(service.name.host(&self.mesh.domain))
        }
    }

    /// Resolves a host name. A name without dots is that of a Service in the rule's own namespace.
    fn full_name(&self, host: &str, namespace: &str) -> String {
        if host.contains(['.', '*']) {
            host.to_owned()
        } else {
            NamespacedName::new(namespace, host).host(&self.mesh.domain)
        }
    }

    /// Reports a rule without effect, because its host matches no service, or only services of other namespaces.
    fn check_host(&self, kind: &str, field: &str, rule: &NamespacedName, host: &str, findings: &mut Vec<Finding>) {
        let exact = self.hosts.get(host).into_iter();
        // Only a pattern has to be compared with every host.
        let all = if host.starts_with('*') { self.hosts.iter() } else { Default::default() };
        let by_pattern = all.filter(|(name, _)| matches(host, name)).map(|(_, name)| name);
        let entries: Vec<ServiceId> =
            self.entries.iter().filter(|(_, name)| *name == host).map(|(id, _)| ServiceId::entry(id.clone())).collect();
        let mut meant = exact.chain(by_pattern).chain(&entries).peekable();
        if meant.peek().is_none() {
            let message = format!("no service is named {host:?}; the rule has no effect");
            findings.push(Finding::new(Code::UnknownHost, ObjectRef::new(kind, rule), message).at(field));
        } else if rule.namespace != self.mesh.root_namespace
            && !meant.any(|service| service.name.namespace == rule.namespace)
        {
            let message = format!(
                "{host:?} is in another namespace, whose traffic this rule may not change; move it there or to {}",
                self.mesh.root_namespace
            );
            findings.push(Finding::new(Code::ForeignHost, ObjectRef::new(kind, rule), message).at(field));
        }
    }

    /// Returns the most specific rule for a service, from its own namespace or else from the root namespace.
    fn find<'a, T>(&self, rules: &'a ByHost<T>, service: &ServiceId) -> Option<&'a Arc<T>> {
        let host = self.host_of(service)?;
        [&service.name.namespace, &self.mesh.root_namespace].into_iter().find_map(|namespace| {
            let rules = rules.get(namespace)?;
            // The exact host, otherwise the longest pattern: each shorter one is a shorter suffix behind a `*`.
            let exact = rules.get(&host);
            let patterns =
                || (0..=host.len()).filter(|i| host.is_char_boundary(*i)).map(|i| format!("*{}", &host[i..]));
            exact.or_else(|| patterns().find_map(|pattern| rules.get(&pattern)))
        })
    }

    /// Returns the DestinationRule that applies to a service, if any.
    pub fn destination_rule(&self, service: &ServiceId) -> Option<&Arc<DestinationRule>> {
        self.find(&self.destination_rules, service)
    }

    /// Returns the route for a connection to this address of a service, if a VirtualService has one.
    pub fn route(&self, service: &ServiceId, port: &ServicePort, address: IpAddr) -> Option<MatchedRoute<'_>> {
        // Istio routes apply to connections, so they are limited to TCP.
        let rule = self.find(&self.virtual_services, service).filter(|_| port.protocol == Protocol::Tcp)?;
        // The port's protocol decides which routes apply; unless it is HTTP, TCP routes come first.
        let lists = if port.http { [&rule.http, &rule.tcp] } else { [&rule.tcp, &rule.http] };
        let route = lists.into_iter().flatten().find(|route| route.holds(address, port.port))?;
        Some((rule, route))
    }

    /// Returns where connections to a service port go: to the destinations of the route, otherwise to the service
    /// itself.
    pub fn destinations(
        &self,
        service: &ServiceId,
        (port, protocol, family): (u16, Protocol, IpFamily),
        route: Option<MatchedRoute<'_>>,
        ports: &dyn Fn(&ServiceId) -> Vec<u16>,
        findings: &mut Vec<Finding>,
    ) -> Vec<Destination> {
        let Some((rule, route)) = route else {
            let key = PoolKey { service: service.clone(), port, protocol, subset: None, family };
            return vec![Destination { weight: 1, key, via_route: false }];
        };
        let object = || ObjectRef::new("VirtualService", &rule.name);
        let mut destinations = Vec::new();
        for destination in route.destinations.iter().filter(|destination| destination.weight > 0) {
            let host = self.full_name(&destination.host, &rule.name.namespace);
            let id = self.hosts.get(&host).cloned().unwrap_or_else(|| {
                let message = format!("no service is named {host:?}; its share of connections is refused");
                findings.push(Finding::new(Code::UnknownDestination, object(), message).at("route.destination.host"));
                ServiceId::service(NamespacedName::new(&rule.name.namespace, &destination.host))
            });
            // Istio: the port that the route names, otherwise the only port that exists, otherwise the dialed port.
            let known = ports(&id);
            let only = known.first().copied().filter(|_| known.len() == 1);
            let port = destination.port.or(only).unwrap_or(port);
            if !known.is_empty() && !known.contains(&port) {
                let message =
                    format!("{id} has no TCP port {port}; its share of connections is refused; use one of {known:?}");
                findings.push(Finding::new(Code::UnknownDestination, object(), message).at("route.destination.port"));
            }
            let key = PoolKey { service: id, port, protocol, subset: destination.subset.clone(), family };
            destinations.push(Destination { weight: destination.weight, key, via_route: true });
        }
        destinations
    }

    /// Returns the traffic policy of a pool.
    pub fn traffic_policy(&self, rule: &DestinationRule, key: &PoolKey) -> TrafficPolicy {
        let for_port = |policy: &TrafficPolicy| policy.ports.get(&key.port).cloned();
        let base = for_port(&rule.policy).unwrap_or_else(|| rule.policy.clone());
        let subset = rule.subsets.iter().find(|subset| Some(&subset.name) == key.subset.as_ref());
        let Some(own) = subset.map(|subset| &subset.policy) else { return base };
        for_port(own).unwrap_or_else(|| TrafficPolicy {
            balancer: own.balancer.clone().or(base.balancer),
            outlier: own.outlier.clone().or(base.outlier),
            pool: own.pool.clone().or(base.pool),
            ports: BTreeMap::new(),
        })
    }

    /// Indexes a rule by its host; further rules for the same host are merged or ignored.
    fn add_destination_rule(&mut self, host: String, rule: &Arc<DestinationRule>, findings: &mut Vec<Finding>) {
        match self.destination_rules.entry(rule.name.namespace.clone()).or_default().entry(host) {
            Entry::Vacant(entry) => drop(entry.insert(Arc::clone(rule))),
            Entry::Occupied(mut entry) => {
                let host = entry.key().clone();
                let merged = Arc::make_mut(entry.get_mut());
                let mut ignored = Vec::new();
                if merged.policy == TrafficPolicy::default() {
                    merged.policy = rule.policy.clone();
                } else if rule.policy != TrafficPolicy::default() {
                    ignored.push("spec.trafficPolicy".to_owned());
                }
                for (i, subset) in rule.subsets.iter().enumerate() {
                    if merged.subsets.iter().any(|other| other.name == subset.name) {
                        ignored.push(format!("spec.subsets[{i}]"));
                    } else {
                        merged.subsets.push(subset.clone());
                    }
                }
                for field in ignored {
                    let message = format!(
                        "{host:?} already has a rule, DestinationRule {}, which takes precedence; merge them",
                        merged.name
                    );
                    let finding =
                        Finding::new(Code::SecondRule, ObjectRef::new("DestinationRule", &rule.name), message);
                    findings.push(finding.at(field));
                }
            }
        }
    }

    /// Adds a VirtualService, unless its namespace already has one for the same host.
    fn add_virtual_service(&mut self, host: String, rule: &Arc<VirtualService>, findings: &mut Vec<Finding>) {
        match self.virtual_services.entry(rule.name.namespace.clone()).or_default().entry(host) {
            Entry::Vacant(entry) => drop(entry.insert(Arc::clone(rule))),
            Entry::Occupied(entry) => {
                let (host, other) = (entry.key(), &entry.get().name);
                let message =
                    format!("{host:?} already has a rule, VirtualService {other}, which takes precedence; merge them");
                let finding = Finding::new(Code::SecondRule, ObjectRef::new("VirtualService", &rule.name), message);
                findings.push(finding.at("spec.hosts"));
            }
        }
    }
}

/// Returns whether a rule's host (a full name, or with a leading `*`) matches this host.
fn matches(rule: &str, host: &str) -> bool {
    rule == host || rule.strip_prefix('*').is_some_and(|suffix| host.ends_with(suffix))
}

/// Reports failover rules without outlier detection, which have no effect because nothing is ever ejected.
fn check_failover(rule: &DestinationRule, findings: &mut Vec<Finding>) {
    let policies = || [&rule.policy].into_iter().chain(rule.subsets.iter().map(|subset| &subset.policy));
    let own = policies().map(|policy| (policy, policy.outlier.is_some() || rule.policy.outlier.is_some()));
    // Port-level settings replace everything and inherit no block.
    let of_ports = policies().flat_map(|policy| policy.ports.values()).map(|policy| (policy, policy.outlier.is_some()));
    for (policy, ejects) in own.chain(of_ports) {
        let Some(locality) = policy.locality().filter(|locality| !locality.distribute_with_failover) else { continue };
        let fields = [
            ("failover", !locality.failover.is_empty()),
            ("failoverPriority", !locality.failover_priority.is_empty() && locality.distribute.is_empty()),
        ];
        for (field, _) in fields.iter().filter(|(_, set)| *set && !ejects) {
            let message = "has no effect without outlierDetection; add that block beside it";
            let finding =
                Finding::new(Code::NeedsOutlierDetection, ObjectRef::new("DestinationRule", &rule.name), message);
            findings.push(finding.at(format!("localityLbSetting.{field}")));
        }
    }
}
