//! Decodes the objects of a cluster and sends them to the store.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use kube::core::ApiResource;
use portolan_core::{
    decode::read_value,
    model::{Kind, NamespacedName, Object, Scope},
    store::{Contents, Origin, Update},
};
use tokio::sync::OwnedMutexGuard;

use super::{WatchContext, apiserver_guard::Guard, list_watch::Sink, raw_object::Raw, resources::Resource};

/// The objects of one resource of a cluster that are in the store: fingerprint by origin. Outlives a single watch.
pub(super) type Known = Arc<tokio::sync::Mutex<HashMap<Origin, u64>>>;

/// The sink for the objects of one resource.
pub(super) struct Objects {
    context: WatchContext,
    resource: &'static Resource,
    cluster: String,
    scope: Scope,
    api: ApiResource,
    known: OwnedMutexGuard<HashMap<Origin, u64>>,
    /// Origins received so far in the current list.
    listed: HashSet<Origin>,
    /// Whether the store has the mark that the resource cannot be read.
    marked_unread: bool,
    /// Whether the store may hold objects that are not in `known`, because the previous watch was interrupted.
    stale: bool,
    guard: Option<Guard>,
    out: Vec<Update>,
}

impl Objects {
    pub(super) async fn new(
        context: &WatchContext,
        resource: &'static Resource,
        cluster: &str,
        client: kube::Client,
        known: Known,
    ) -> Self {
        let guarded = matches!(resource.kind, Some(Kind::EndpointSlice | Kind::Service));
        let guard = (cluster == context.cluster && guarded).then(|| Guard::new(context));
        let mut known = known.lock_owned().await;
        // Send each known object once more. The store ignores those that did not change.
        known.values_mut().for_each(|print| *print = 0);
        let stale = !known.is_empty();
        Self {
            context: context.clone(),
            resource,
            cluster: cluster.to_owned(),
            scope: Scope::Cluster(cluster.to_owned()),
            api: resource.api(client, 0).1,
            known,
            listed: HashSet::new(),
            marked_unread: false,
            stale,
            guard,
            out: Vec::new(),
        }
    }

    fn origin(&self, object: &Raw) -> Origin {
        let (namespace, name) = object.parts();
        Origin::object(&self.cluster, self.resource.plural, &NamespacedName::new(namespace, name))
    }

    fn take(&mut self, origin: Origin, object: Raw) {
        let contents = read_value(self.context.reader, &self.scope, origin.as_str(), object.into_value(&self.api));
        if self.known.insert(origin.clone(), contents.fingerprint) != Some(contents.fingerprint) {
            // A broken object keeps its last valid state in effect, and with it the need for pod labels.
            if self.cluster == self.context.cluster && contents.objects.iter().all(|read| read.object.is_some()) {
                self.context.wants.note(origin.as_str(), asks_for_labels(&contents));
            }
            self.push(Update::Replace { origin, contents });
        }
    }

    fn remove(&mut self, origin: Origin) {
        if self.known.remove(&origin).is_some() {
            self.context.wants.note(origin.as_str(), false);
            self.push(Update::Remove { origin });
        }
    }

    fn push(&mut self, update: Update) {
        match &mut self.guard {
            Some(guard) => self.out.extend(guard.pass(update)),
            None => self.out.push(update),
        }
    }

    fn unread_resource(&self) -> Origin {
        unread_resource(&self.cluster, self.resource)
    }
}

impl Sink for Objects {
    fn init(&mut self) {
        self.listed.clear();
    }

    fn init_apply(&mut self, object: Raw) {
        let origin = self.origin(&object);
        self.listed.insert(origin.clone());
        self.take(origin, object);
    }

    fn init_done(&mut self) {
        let gone: Vec<Origin> = self.known.keys().filter(|origin| !self.listed.contains(*origin)).cloned().collect();
        gone.into_iter().for_each(|origin| self.remove(origin));
        let listed = std::mem::take(&mut self.listed);
        if std::mem::take(&mut self.stale) {
            let prefix = format!("{}/{}/", self.cluster, self.resource.plural);
            self.out.push(Update::Prune { prefix, except: listed });
        }
        if std::mem::take(&mut self.marked_unread) {
            let origin = self.unread_resource();
            self.out.push(Update::Remove { origin });
        }
    }

    fn apply(&mut self, object: Raw) {
        let origin = self.origin(&object);
        self.take(origin, object);
    }

    fn delete(&mut self, object: &Raw) {
        self.remove(self.origin(object));
    }

    fn unavailable(&mut self) {
        // Remote clusters hold no policy, so unread resources of theirs leave no decision open.
        if self.cluster == self.context.cluster && !std::mem::replace(&mut self.marked_unread, true) {
            let contents = Contents { sole_kind: self.resource.kind, ..Contents::default() };
            let origin = self.unread_resource();
            self.out.push(Update::Replace { origin, contents });
        }
    }

    fn len(&self) -> usize {
        self.known.len()
    }

    async fn flush(&mut self) -> bool {
        let updates = std::mem::take(&mut self.out);
        updates.is_empty() || self.context.updates.send(updates).await.is_ok()
    }
}

/// Returns the origin that stands for a whole resource while it cannot be read.
pub(super) fn unread_resource(cluster: &str, resource: &Resource) -> Origin {
    Origin::resource(cluster, resource.plural)
}

/// Returns whether a rule in `contents` needs pod labels, for a subset or a `failoverPriority`.
fn asks_for_labels(contents: &Contents) -> bool {
    contents.objects.iter().filter_map(|read| read.object.as_ref()).any(|object| match object {
        Object::DestinationRule(rule) => {
            let needs_labels = |policy: &portolan_core::model::TrafficPolicy| {
                policy.locality().is_some_and(|setting| !setting.failover_priority.is_empty())
            };
            let policies = [&rule.policy].into_iter().chain(rule.policy.ports.values());
            rule.subsets.iter().any(|subset| !subset.labels.is_empty() || needs_labels(&subset.policy))
                || policies.into_iter().any(needs_labels)
        }
        Object::MeshConfig(config) => !config.locality.failover_priority.is_empty(),
        _ => false,
    })
}
