//! Which rules are for a host: names are resolved, the most specific wins, the rule's namespace must be entitled.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
};

use super::{Client, PoolKey};
use crate::{
    model::{DestinationRule, Finding, MeshConfig, NamespacedName, Service, TrafficPolicy, VirtualService},
    store::{Objects, Snapshot},
};

/// The rules that are in force for a client: the mesh's and its own cluster's.
#[derive(Debug)]
pub struct RuleBook {
    /// The mesh's settings.
    pub mesh: MeshConfig,
    destination_rules: ByHost<DestinationRule>,
    virtual_services: ByHost<VirtualService>,
    /// Every service that exists, by host name.
    hosts: BTreeMap<String, NamespacedName>,
}

/// Rules by the namespace that they are in and the host that they are for, a full name or one with a leading `*`.
type ByHost<T> = BTreeMap<String, BTreeMap<String, (NamespacedName, Arc<T>)>>;

/// Where a connection to a frontend may go.
#[derive(Debug)]
pub struct Destination {
    /// Relative to the others'.
    pub weight: u32,
    /// The pool.
    pub key: PoolKey,
    /// Whether a route led here.
    pub by_rule: bool,
}

impl RuleBook {
    /// Collects the rules for the client.
    pub fn new(snapshot: &Snapshot, client: &Client, findings: &mut Vec<Finding>) -> Self {
        let own = snapshot.clusters.get(&client.cluster);
        let scopes: Vec<&Objects> = [Some(&snapshot.mesh), own].into_iter().flatten().collect();
        // The cluster's own settings come before those of the mesh.
        let mesh = scopes.iter().rev().find_map(|objects| objects.mesh_config.as_deref()).cloned().unwrap_or_default();
        let mut book =
            Self { mesh, destination_rules: ByHost::new(), virtual_services: ByHost::new(), hosts: BTreeMap::new() };
        for name in snapshot.clusters.values().flat_map(|objects| objects.services.keys()) {
            book.hosts.insert(book.host_of(name), name.clone());
        }
        for objects in scopes {
            for rule in objects.destination_rules.values() {
                let host = book.full_name(&rule.host, &rule.name.namespace);
                book.check_host(&format!("DestinationRule {}", rule.name), "spec.host", &rule.name, &host, findings);
                check_failover(rule, findings);
                insert("DestinationRule", &mut book.destination_rules, host, &rule.name, rule, findings);
            }
            for rule in objects.virtual_services.values().filter(|rule| !rule.tcp.is_empty()) {
                for host in &rule.hosts {
                    let host = book.full_name(host, &rule.name.namespace);
                    book.check_host(
                        &format!("VirtualService {}", rule.name),
                        "spec.hosts",
                        &rule.name,
                        &host,
                        findings,
                    );
                    insert("VirtualService", &mut book.virtual_services, host, &rule.name, rule, findings);
                }
            }
        }
        book
    }

    /// The host name of a Service.
    pub fn host_of(&self, name: &NamespacedName) -> String {
        name.host(&self.mesh.domain)
    }

    /// A name without dots means a Service in the rule's own namespace.
    fn full_name(&self, host: &str, namespace: &str) -> String {
        if host.contains(['.', '*']) {
            host.to_owned()
        } else {
            NamespacedName::new(namespace, host).host(&self.mesh.domain)
        }
    }

    /// A rule that means nobody, or others' services, has no effect, which its author should know.
    fn check_host(&self, object: &str, field: &str, rule: &NamespacedName, host: &str, findings: &mut Vec<Finding>) {
        let exact = self.hosts.get(host).into_iter();
        // Only a pattern has to be compared with every name.
        let all = if host.starts_with('*') { self.hosts.iter() } else { Default::default() };
        let by_pattern = all.filter(|(name, _)| matches(host, name)).map(|(_, name)| name);
        let mut meant = exact.chain(by_pattern).peekable();
        if meant.peek().is_none() {
            let message = format!("{field}: no Service is named {host:?}; the rule has no effect");
            findings.push(Finding::warning(object, message));
        } else if rule.namespace != self.mesh.root_namespace
            && !meant.any(|service| service.namespace == rule.namespace)
        {
            let message = format!(
                "{field}: {host:?} is in another namespace, whose traffic this rule may not change; put the rule there, \
                 or into {}",
                self.mesh.root_namespace
            );
            findings.push(Finding::error(object, message));
        }
    }

    /// The most specific rule for a host from a namespace that may make rules for it.
    fn find<'a, T>(&self, rules: &'a ByHost<T>, service: &NamespacedName) -> Option<&'a Arc<T>> {
        let host = self.host_of(service);
        [&service.namespace, &self.mesh.root_namespace].into_iter().find_map(|namespace| {
            let rules = rules.get(namespace)?;
            // The host itself, or else the longest pattern: each shorter one is a suffix with a `*` before it.
            let exact = rules.get(&host);
            let patterns =
                || (0..=host.len()).filter(|i| host.is_char_boundary(*i)).map(|i| format!("*{}", &host[i..]));
            exact.or_else(|| patterns().find_map(|pattern| rules.get(&pattern))).map(|(_, rule)| rule)
        })
    }

    /// The DestinationRule for a service.
    pub fn destination_rule(&self, service: &NamespacedName) -> Option<&Arc<DestinationRule>> {
        self.find(&self.destination_rules, service)
    }

    /// Where connections to a port of a service go: by its `tcp` route, or to itself.
    pub fn destinations(&self, service: &Service, port: u16, findings: &mut Vec<Finding>) -> Vec<Destination> {
        let rule = self.find(&self.virtual_services, &service.name);
        let route =
            rule.and_then(|rule| rule.tcp.iter().find(|route| route.ports.is_empty() || route.ports.contains(&port)));
        let (Some(rule), Some(route)) = (rule, route) else {
            let key = PoolKey { service: service.name.clone(), port, subset: None };
            return vec![Destination { weight: 1, key, by_rule: false }];
        };
        let mut destinations = Vec::new();
        for destination in route.destinations.iter().filter(|destination| destination.weight > 0) {
            let host = self.full_name(&destination.host, &rule.name.namespace);
            let name = self.hosts.get(&host).cloned().unwrap_or_else(|| {
                let message = format!("tcp.route.destination.host: no Service is named {host:?}; its share is refused");
                findings.push(Finding::error(format!("VirtualService {}", rule.name), message));
                NamespacedName::new(&rule.name.namespace, &destination.host)
            });
            let key =
                PoolKey { service: name, port: destination.port.unwrap_or(port), subset: destination.subset.clone() };
            destinations.push(Destination { weight: destination.weight, key, by_rule: true });
        }
        destinations
    }

    /// The policy for a pool: port level replaces all, a subset overrides block by block.
    pub fn traffic_policy(&self, rule: &DestinationRule, key: &PoolKey) -> TrafficPolicy {
        let for_port = |policy: &TrafficPolicy| policy.ports.get(&key.port).cloned();
        let base = for_port(&rule.policy).unwrap_or_else(|| rule.policy.clone());
        let subset = rule.subsets.iter().find(|subset| Some(&subset.name) == key.subset.as_ref());
        let Some(own) = subset.map(|subset| &subset.policy) else { return base };
        for_port(own).unwrap_or_else(|| TrafficPolicy {
            // `loadBalancer` is one block: both fields come from the same one.
            algorithm: if own.has_load_balancer() { own.algorithm } else { base.algorithm },
            locality: if own.has_load_balancer() { own.locality.clone() } else { base.locality },
            outlier: own.outlier.clone().or(base.outlier),
            connect_timeout: own.connect_timeout.or(base.connect_timeout),
            ports: BTreeMap::new(),
        })
    }
}

/// Whether a rule's host (full, or with a leading `*`) means this host.
fn matches(rule: &str, host: &str) -> bool {
    rule == host || rule.strip_prefix('*').is_some_and(|suffix| host.ends_with(suffix))
}

/// Adds a rule, unless its namespace has another one for the same host.
fn insert<T>(
    kind: &str,
    rules: &mut ByHost<T>,
    host: String,
    name: &NamespacedName,
    rule: &Arc<T>,
    findings: &mut Vec<Finding>,
) {
    match rules.entry(name.namespace.clone()).or_default().entry(host) {
        Entry::Vacant(place) => drop(place.insert((name.clone(), Arc::clone(rule)))),
        Entry::Occupied(place) => {
            let (host, (other, _)) = (place.key(), place.get());
            let message = format!("{host:?} has a rule already, {kind} {other}, which counts; make one of them");
            findings.push(Finding::warning(format!("{kind} {name}"), message));
        }
    }
}

/// Failover rules do nothing while nothing is ever ejected.
fn check_failover(rule: &DestinationRule, findings: &mut Vec<Finding>) {
    let policies = || [&rule.policy].into_iter().chain(rule.subsets.iter().map(|subset| &subset.policy));
    let own = policies().map(|policy| (policy, policy.outlier.is_some() || rule.policy.outlier.is_some()));
    // A port's settings replace everything: they inherit no block.
    let of_ports = policies().flat_map(|policy| policy.ports.values()).map(|policy| (policy, policy.outlier.is_some()));
    for (policy, ejects) in own.chain(of_ports) {
        let explicit = policy.locality.as_ref().is_some_and(|locality| !locality.failover.is_empty());
        if explicit && !ejects {
            let message = "localityLbSetting.failover has no effect without outlierDetection beside it; add that block";
            findings.push(Finding::warning(format!("DestinationRule {}", rule.name), message));
        }
    }
}
