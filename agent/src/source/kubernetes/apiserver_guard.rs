//! Keeps the API server's own Service from losing its last endpoint.
//! Without one, the agent could not reach the API server to learn of new endpoints.

use std::{collections::BTreeMap, net::SocketAddr};

use portolan_core::{
    model::{Code, EndpointSlice, Finding, NamespacedName, Object, ObjectRef, Protocol},
    store::{Origin, Update},
};

use super::WatchContext;

/// Defers updates that would leave `default/kubernetes` without an endpoint.
pub(super) struct Guard {
    context: WatchContext,
    name: NamespacedName,
    /// Ready endpoints of each slice that was passed on, by origin.
    passed: BTreeMap<Origin, Vec<SocketAddr>>,
    /// Deferred updates by origin.
    deferred: BTreeMap<Origin, Update>,
}

impl Guard {
    pub(super) fn new(context: &WatchContext) -> Self {
        let name = NamespacedName::new("default", "kubernetes");
        Self { context: context.clone(), name, passed: BTreeMap::new(), deferred: BTreeMap::new() }
    }

    /// Returns the updates that may be applied now: `update` unless it must wait, and deferred ones that need not.
    pub(super) fn pass(&mut self, update: Update) -> Vec<Update> {
        let service = Origin::object(&self.context.cluster, "services", &self.name);
        match &update {
            Update::Remove { origin } if *origin == service => {
                self.note("was deleted; its last known state stays in effect");
                return Vec::new();
            }
            Update::Replace { origin, .. } if *origin == service => {
                self.context.sources.note("guard", None);
                return vec![update];
            }
            _ => {}
        }
        let (origin, endpoints) = match &update {
            Update::Replace { origin, contents } => {
                let slice = contents.objects.iter().find_map(|read| match &read.object {
                    Some(Object::EndpointSlice(slice)) if slice.service == self.name => Some(slice),
                    _ => None,
                });
                match slice {
                    Some(slice) => (origin.clone(), addresses(slice)),
                    // The store keeps the last valid state of a broken slice.
                    None if contents.objects.iter().any(|read| read.object.is_none()) => return vec![update],
                    None => (origin.clone(), Vec::new()),
                }
            }
            Update::Remove { origin } => (origin.clone(), Vec::new()),
            _ => return vec![update],
        };
        if endpoints.is_empty() && !self.passed.contains_key(&origin) {
            // Not a slice of this Service, or one that has had no endpoints so far.
            return vec![update];
        }
        let others = self.passed.iter().any(|(other, endpoints)| *other != origin && !endpoints.is_empty());
        if endpoints.is_empty() && !others {
            self.deferred.insert(origin, update);
            self.note("has no endpoints; the last known ones stay in effect");
            return Vec::new();
        }
        self.deferred.remove(&origin);
        self.passed.insert(origin, endpoints);
        let mut updates = vec![update];
        if self.passed.values().any(|endpoints| !endpoints.is_empty()) {
            for (origin, update) in std::mem::take(&mut self.deferred) {
                self.passed.remove(&origin);
                updates.push(update);
            }
            self.context.sources.note("guard", None);
        }
        self.context.direct.set(self.passed.values().flatten().copied().collect());
        updates
    }
}

impl Guard {
    fn note(&self, what: &str) {
        let message = format!("the API server reports that {} {what}, to keep the API server reachable", self.name);
        let finding = Finding::new(Code::ApiServerHeld, ObjectRef::new("Service", &self.name), message);
        self.context.sources.note("guard", Some(finding));
    }
}

fn addresses(slice: &EndpointSlice) -> Vec<SocketAddr> {
    let port = slice.ports.iter().find(|port| port.protocol == Protocol::Tcp).map(|port| port.port);
    let ready = slice.endpoints.iter().filter(|endpoint| endpoint.ready);
    port.map(|port| ready.map(|endpoint| SocketAddr::new(endpoint.address, port)).collect()).unwrap_or_default()
}
