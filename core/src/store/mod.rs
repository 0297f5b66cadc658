//! Updates in, snapshot out. The one place that remembers what the sources said.

mod snapshot;
mod update;

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use self::snapshot::SYSTEM;
use crate::model::{Code, Finding, Kind, Labels, NamespacedName, Object, ObjectKey, Pod, Scope, ServiceId};

pub use self::{
    snapshot::{NETWORK, Objects, Snapshot},
    update::{Contents, Decoded, Update},
};

/// Something that could not be read, and never was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnreadInput {
    /// What, for people.
    pub what: String,
    /// Whose objects may be in it.
    pub scope: Scope,
    /// Whether it is the mesh's settings, which say what traffic must stay in its cluster.
    pub settings: bool,
    /// Whether there is no knowing what else is in it.
    pub anything: bool,
}

impl UnreadInput {
    /// Whether it is about the cluster itself, or the mesh: other clusters add endpoints, and decide nothing.
    pub fn concerns(&self, cluster: &str) -> bool {
        match &self.scope {
            Scope::Mesh => true,
            Scope::Cluster(id) => id == cluster,
        }
    }
}

/// What a change concerns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// All services: rules, places, or the services themselves are not as they were.
    pub everything: bool,
    /// These services: their endpoints are not as they were.
    pub services: BTreeSet<ServiceId>,
    /// Whether there is anything new to say about the objects.
    pub findings: bool,
    /// Whether all sources have reported for the first time.
    pub synced: bool,
}

impl Changes {
    /// Everything is to be looked at.
    pub fn everything() -> Self {
        Self { everything: true, ..Self::default() }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// All objects, by identity and by the origin that holds them.
#[derive(Debug, Default)]
pub struct Store {
    objects: BTreeMap<Arc<ObjectKey>, Holders>,
    /// What each origin holds.
    held: BTreeMap<Arc<str>, Vec<Arc<ObjectKey>>>,
    snapshot: Snapshot,
    findings: BTreeMap<String, Vec<Finding>>,
    troubles: Vec<Finding>,
    /// Origins that have been read in full.
    good: BTreeSet<Arc<str>>,
    /// Origins of which something could not be read, and never was.
    doubtful: BTreeMap<String, UnreadInput>,
    fingerprints: BTreeMap<Arc<str>, u64>,
    /// The sets of labels that pods have: those of one workload share theirs.
    labels: BTreeSet<Arc<Labels>>,
    synced: bool,
}

/// The origins that hold an object, in order of their names; the first one counts.
type Holders = Vec<(Arc<str>, Object)>;

impl Store {
    /// Whether everything that the sources have has been reported once. Before that, nothing may be removed from the
    /// kernel.
    pub fn synced(&self) -> bool {
        self.synced
    }

    /// What could not be read, and never was, so that nothing is known of what it says; and whether the settings that count for a cluster may
    /// be in it. Those first, for they say what must never happen; then what is of the cluster itself.
    pub fn doubt(&self, cluster: &str) -> Option<(&UnreadInput, bool)> {
        let settings = |doubt: &UnreadInput| {
            let own = Scope::Cluster(cluster.to_owned());
            let of = |scope: &Scope| match scope {
                Scope::Mesh => self.snapshot.mesh.mesh_config.is_some(),
                Scope::Cluster(id) => {
                    self.snapshot.clusters.get(id.as_str()).is_some_and(|it| it.mesh_config.is_some())
                }
            };
            // A cluster's own settings are as good a place for them as the mesh's, unless they are known already.
            let may_be_here = doubt.scope == Scope::Mesh || (doubt.scope == own && !of(&Scope::Mesh) && !of(&own));
            doubt.settings || doubt.anything && may_be_here
        };
        let all = self.doubtful.values().map(|doubt| (doubt, settings(doubt)));
        all.max_by_key(|(doubt, settings)| (*settings, doubt.concerns(cluster)))
    }

    /// Takes in a change, and adds to `changes` what is different now.
    pub fn apply(&mut self, update: Update, changes: &mut Changes) {
        match update {
            Update::Replace { origin, contents } => {
                // Of an API, each object is an origin of its own: their names are kept once.
                let known = self.fingerprints.get_key_value(origin.as_str()).map(|(known, _)| Arc::clone(known));
                let origin = known.unwrap_or_else(|| Arc::from(origin));
                self.fingerprints.insert(Arc::clone(&origin), contents.fingerprint);
                self.replace(&origin, contents, changes);
            }
            Update::Remove { origin } => {
                let origin: Arc<str> = Arc::from(origin);
                self.fingerprints.remove(&origin);
                self.replace(&origin, Contents { complete: true, ..Contents::default() }, changes);
                self.good.remove(&origin);
            }
            Update::Prune { prefix, except } => {
                let gone = |origin: &&Arc<str>| origin.starts_with(&prefix) && !except.contains(&***origin);
                let gone: Vec<Arc<str>> = self.fingerprints.keys().filter(gone).cloned().collect();
                for origin in gone {
                    self.apply(Update::Remove { origin: origin.as_ref().to_owned() }, changes);
                }
            }
            Update::ClusterUnreachable { cluster, unreachable } => {
                let of = &mut self.snapshot.lost;
                changes.everything |= if unreachable { of.insert(cluster.into()) } else { of.remove(cluster.as_str()) };
            }
            Update::SourceFindings(findings) => {
                changes.findings |= self.troubles != findings;
                self.troubles = findings;
            }
            Update::Synced => changes.synced |= !std::mem::replace(&mut self.synced, true),
        }
    }

    fn replace(&mut self, origin: &Arc<str>, contents: Contents, changes: &mut Changes) {
        let holds = |holders: &Holders| holders.iter().any(|(holder, _)| holder == origin);
        let known = |key: &ObjectKey| self.objects.get(key).is_some_and(holds);
        // A rule that cannot be read is not in force; without a Service or its endpoints, connections would be refused, and without the
        // settings they could leave their cluster.
        let vital = |key: &ObjectKey| {
            use Kind::{EndpointSlice, MeshConfig, Service, ServiceEntry, WorkloadEntry};
            matches!(key.kind, Service | EndpointSlice | ServiceEntry | WorkloadEntry | MeshConfig)
        };
        let lost = contents.objects.iter().find(|read| read.object.is_none() && vital(&read.key) && !known(&read.key));
        let doubt = match lost {
            Some(read) => Some(UnreadInput {
                what: format!("{} in {origin} is broken", read.key),
                scope: read.key.scope.clone(),
                settings: read.key.kind == Kind::MeshConfig,
                anything: !contents.complete,
            }),
            None if !contents.complete => Some(UnreadInput {
                what: format!("{origin} cannot be read"),
                // The mesh's objects are in no folder.
                scope: origin.split_once('/').map_or(Scope::Mesh, |(cluster, _)| Scope::Cluster(cluster.to_owned())),
                settings: contents.sole_kind == Some(Kind::MeshConfig),
                anything: contents.sole_kind.is_none(),
            }),
            None => None,
        };
        match doubt {
            None => {
                self.good.insert(Arc::clone(origin));
                // That more is known is news, whatever it is.
                changes.findings |= self.doubtful.remove(&**origin).is_some();
            }
            Some(doubt) if !self.good.contains(origin) => drop(self.doubtful.insert(origin.as_ref().to_owned(), doubt)),
            Some(_) => {}
        }
        if contents.complete {
            let listed: BTreeSet<_> = contents.objects.iter().map(|read| &read.key).collect();
            let gone = self.held.get(origin).into_iter().flatten().filter(|key| !listed.contains(&***key));
            let gone: Vec<Arc<ObjectKey>> = gone.cloned().collect();
            for key in gone {
                self.hold(&key, origin, None, changes);
            }
        }
        for read in contents.objects {
            // A broken object leaves its last good state alone.
            if read.object.is_some() {
                self.hold(&Arc::new(read.key), origin, read.object, changes);
            }
        }
        let findings = self.findings.get(&**origin).map(Vec::as_slice).unwrap_or_default();
        changes.findings |= findings != contents.findings;
        if contents.findings.is_empty() {
            self.findings.remove(&**origin);
        } else {
            self.findings.insert(origin.as_ref().to_owned(), contents.findings);
        }
    }

    /// From now on the origin holds this object, or no longer does.
    fn hold(&mut self, key: &Arc<ObjectKey>, origin: &Arc<str>, object: Option<Object>, changes: &mut Changes) {
        if object.is_some() {
            let held = self.held.entry(Arc::clone(origin)).or_insert_with(|| Vec::with_capacity(1));
            if let Err(at) = held.binary_search(key) {
                held.insert(at, Arc::clone(key));
            }
        } else if let Some(held) = self.held.get_mut(origin) {
            if let Ok(at) = held.binary_search(key) {
                held.remove(at);
            }
            if held.is_empty() {
                self.held.remove(origin);
            }
        }
        let object = object.map(|object| self.shared(object));
        let holders = self.objects.entry(Arc::clone(key)).or_insert_with(|| Vec::with_capacity(1));
        let before = holders.first().map(|(_, object)| object.clone());
        match (holders.binary_search_by(|(holder, _)| holder.cmp(origin)), object) {
            (Ok(at), Some(object)) => holders[at].1 = object,
            (Ok(at), None) => drop(holders.remove(at)),
            (Err(at), Some(object)) => holders.insert(at, (Arc::clone(origin), object)),
            (Err(_), None) => {}
        }
        // Whoever holds it beside the others is a finding.
        changes.findings |= holders.len() > 1;
        let after = holders.first().map(|(_, object)| object.clone());
        if holders.is_empty() {
            self.objects.remove(key);
        }
        if before != after {
            let clusters = self.snapshot.clusters.len();
            for object in before.iter().chain(&after) {
                self.snapshot.concerned(key, object, changes);
            }
            changes.everything |= match (&before, &after) {
                (Some(before), Some(after)) => self::changes_everything(before, after),
                (Some(one), None) | (None, Some(one)) => comes_with_everything(one),
                (None, None) => false,
            };
            if let Some(before) = &before {
                self.snapshot.remove(key, before);
            }
            if let Some(after) = after {
                self.snapshot.insert(key, after);
            }
            changes.everything |= self.snapshot.clusters.len() != clusters;
        }
    }

    /// The same object, with the labels that others have as well.
    fn shared(&mut self, object: Object) -> Object {
        let Object::Pod(pod) = object else { return object };
        if self.labels.len() > 2 * self.objects.len() {
            self.labels.retain(|labels| Arc::strong_count(labels) > 1);
        }
        let labels = match self.labels.get(&pod.labels) {
            Some(known) => Arc::clone(known),
            None => {
                self.labels.insert(Arc::clone(&pod.labels));
                return Object::Pod(pod);
            }
        };
        Object::Pod(Arc::new(Pod { labels, ..Arc::unwrap_or_clone(pod) }))
    }

    /// Tells whether two stores have read the same: two agents, or an agent and `plan`.
    pub fn fingerprint(&self) -> String {
        let mut hasher = DefaultHasher::new();
        self.fingerprints.hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    }

    /// Everything at this moment, arranged for the policy.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// What is wrong with the objects themselves.
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings: Vec<Finding> = self.findings.values().flatten().chain(&self.troubles).cloned().collect();
        for (key, holders) in self.objects.iter().filter(|(_, holders)| holders.len() > 1) {
            for (other, _) in &holders[1..] {
                let message = format!("is in {} as well, which counts; remove one of them", holders[0].0);
                findings.push(Finding::new(Code::InSeveralFiles, key, message).from_source(other));
            }
        }
        findings
    }

    /// Adds to a finding about an object the file that the object is in: of the client's own cluster, or else of the mesh.
    pub fn add_source(&self, cluster: &str, finding: &mut Finding) {
        if !finding.source.is_empty() {
            return;
        }
        let Some((kind, name)) = finding.object.split_once(' ') else { return };
        let Some(kind) = Kind::ALL.into_iter().find(|known| known.to_string() == kind) else { return };
        let name = name.parse().unwrap_or_else(|_| NamespacedName::new("", name));
        let cluster = if finding.cluster.is_empty() { cluster } else { &finding.cluster };
        let source = [Scope::Cluster(cluster.to_owned()), Scope::Mesh].into_iter().find_map(|scope| {
            let holders = self.objects.get(&ObjectKey { scope, kind, name: name.clone() })?;
            holders.first().map(|(origin, _)| origin.to_string())
        });
        finding.source = source.unwrap_or_default();
    }
}

/// Whether a change of an object concerns more than the service that it belongs to.
fn changes_everything(before: &Object, after: &Object) -> bool {
    match (before, after) {
        (Object::Service(before), Object::Service(after)) => {
            before.addresses != after.addresses || before.ports != after.ports
        }
        (Object::ServiceEntry(before), Object::ServiceEntry(after)) => {
            (&before.hosts, &before.addresses, &before.ports) != (&after.hosts, &after.addresses, &after.ports)
        }
        (Object::EndpointSlice(_), _) | (Object::Pod(_), _) | (Object::WorkloadEntry(_), _) => false,
        (Object::Namespace(before), Object::Namespace(after)) => {
            before.name == SYSTEM && before.labels.get(NETWORK) != after.labels.get(NETWORK)
        }
        _ => true,
    }
}

/// Whether an object that comes or goes concerns more than the service that it belongs to.
fn comes_with_everything(object: &Object) -> bool {
    match object {
        Object::EndpointSlice(_) | Object::Pod(_) | Object::WorkloadEntry(_) => false,
        Object::Namespace(namespace) => namespace.name == SYSTEM,
        _ => true,
    }
}
