//! The API server's own service is never emptied: without it nobody would learn that it is back.

use std::{collections::BTreeMap, net::SocketAddr};

use portolan_core::{
    model::{Code, EndpointSlice, Finding, NamespacedName, Object, Protocol},
    store::Update,
};

use super::WatchContext;

/// Holds back what would leave `default/kubernetes` without an endpoint.
pub(super) struct Guard {
    context: WatchContext,
    name: NamespacedName,
    /// Endpoints by slice, as far as they were passed on.
    passed: BTreeMap<String, Vec<SocketAddr>>,
    /// What is held back.
    held: BTreeMap<String, Update>,
}

impl Guard {
    pub(super) fn new(context: &WatchContext) -> Self {
        let name = NamespacedName::new("default", "kubernetes");
        Self { context: context.clone(), name, passed: BTreeMap::new(), held: BTreeMap::new() }
    }

    /// What may go on of an update, and of those that were held back.
    pub(super) fn pass(&mut self, update: Update) -> Vec<Update> {
        let service = format!("{}/services/{}", self.context.cluster, self.name);
        match &update {
            Update::Remove { origin } if *origin == service => {
                self.note("is not there any more: it stays as it was");
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
                    // Broken: its last good state stays.
                    None if contents.objects.iter().any(|read| read.object.is_none()) => return vec![update],
                    None => (origin.clone(), Vec::new()),
                }
            }
            Update::Remove { origin } => (origin.clone(), Vec::new()),
            _ => return vec![update],
        };
        if endpoints.is_empty() && !self.passed.contains_key(&origin) {
            // None of its own, or none that ever had an endpoint.
            return vec![update];
        }
        let others = self.passed.iter().any(|(other, endpoints)| *other != origin && !endpoints.is_empty());
        if endpoints.is_empty() && !others {
            self.held.insert(origin, update);
            self.note("has no endpoint any more: the last ones stay");
            return Vec::new();
        }
        self.held.remove(&origin);
        self.passed.insert(origin, endpoints);
        let mut updates = vec![update];
        if self.passed.values().any(|endpoints| !endpoints.is_empty()) {
            for (origin, update) in std::mem::take(&mut self.held) {
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
        let message =
            format!("the API says that {} {what}, for without it nobody would learn that there are others", self.name);
        let finding = Finding::new(Code::ApiServerHeld, format!("Service {}", self.name), message);
        self.context.sources.note("guard", Some(finding));
    }
}

fn addresses(slice: &EndpointSlice) -> Vec<SocketAddr> {
    let port = slice.ports.iter().find(|port| port.protocol == Protocol::Tcp).map(|port| port.port);
    let ready = slice.endpoints.iter().filter(|endpoint| endpoint.ready);
    port.map(|port| ready.map(|endpoint| SocketAddr::new(endpoint.address, port)).collect()).unwrap_or_default()
}
