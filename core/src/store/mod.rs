//! The object store: applies updates from the sources and maintains the snapshot for the policy.

mod origin;
mod snapshot;
mod update;

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use self::snapshot::SYSTEM;
use crate::model::{Code, Finding, Kind, Labels, Object, ObjectKey, Pod, Scope, ServiceId};

pub use self::{
    origin::Origin,
    snapshot::{NETWORK, Objects, Snapshot},
    update::{Contents, Decoded, Update},
};

/// An input that has never been read successfully.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnreadInput {
    /// A description of the input and the problem, for messages.
    pub what: String,
    /// The mesh or the cluster whose objects the input may contain.
    pub scope: Scope,
    /// Whether the input is the MeshConfig, which decides what traffic must stay in its cluster.
    pub settings: bool,
    /// Whether the input may contain objects of any kind.
    pub anything: bool,
}

impl UnreadInput {
    /// Returns whether the input belongs to this cluster or the mesh.
    /// Other clusters only add endpoints, so the agent does not wait for them.
    pub fn concerns(&self, cluster: &str) -> bool {
        match &self.scope {
            Scope::Mesh => true,
            Scope::Cluster(id) => id == cluster,
        }
    }
}

/// The effects of updates, accumulated by [`Store::apply`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Whether all services must be recompiled, because rules, topology, or the set of services changed.
    pub everything: bool,
    /// The services whose endpoints changed.
    pub services: BTreeSet<ServiceId>,
    /// Whether findings or the set of unread inputs changed.
    pub findings: bool,
    /// Whether the initial sync completed.
    pub synced: bool,
}

impl Changes {
    /// Returns changes that require a full recompilation.
    pub fn everything() -> Self {
        Self { everything: true, ..Self::default() }
    }

    /// Returns whether nothing changed.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// All objects, by identity and by the origin that contains them.
#[derive(Debug, Default)]
pub struct Store {
    objects: BTreeMap<Arc<ObjectKey>, Owners>,
    /// The keys of the objects in each origin, sorted.
    keys_by_origin: BTreeMap<Origin, Vec<Arc<ObjectKey>>>,
    snapshot: Snapshot,
    findings: BTreeMap<Origin, Vec<Finding>>,
    source_findings: Vec<Finding>,
    /// Origins that were read completely at least once.
    complete_origins: BTreeSet<Origin>,
    /// Origins with content that has never been read successfully.
    unread: BTreeMap<Origin, UnreadInput>,
    fingerprints: BTreeMap<Origin, u64>,
    /// Interned pod labels; pods with equal labels share one allocation.
    labels: BTreeSet<Arc<Labels>>,
    synced: bool,
}

/// The origins that contain an object, sorted by name. The object of the first one applies.
type Owners = Vec<(Origin, Object)>;

impl Store {
    /// Returns whether the initial sync is complete.
    /// Until then, nothing may be removed from the kernel.
    pub fn synced(&self) -> bool {
        self.synced
    }

    /// Returns an input that has never been read, and whether it may contain the MeshConfig for the cluster.
    /// Inputs that may contain the MeshConfig come first, because it decides what must never leave the cluster;
    /// then inputs that concern the cluster itself.
    pub fn first_unread(&self, cluster: &str) -> Option<(&UnreadInput, bool)> {
        let settings = |unread: &UnreadInput| {
            let own = Scope::Cluster(cluster.to_owned());
            let of = |scope: &Scope| match scope {
                Scope::Mesh => self.snapshot.mesh.mesh_config.is_some(),
                Scope::Cluster(id) => {
                    self.snapshot.clusters.get(id.as_str()).is_some_and(|it| it.mesh_config.is_some())
                }
            };
            // The MeshConfig comes from the mesh or from the cluster itself.
            // An unread input of the cluster matters only while neither is known.
            let may_be_here = unread.scope == Scope::Mesh || (unread.scope == own && !of(&Scope::Mesh) && !of(&own));
            unread.settings || unread.anything && may_be_here
        };
        let all = self.unread.values().map(|unread| (unread, settings(unread)));
        all.max_by_key(|(unread, settings)| (*settings, unread.concerns(cluster)))
    }

    /// Applies an update and adds its effects to `changes`.
    pub fn apply(&mut self, update: Update, changes: &mut Changes) {
        match update {
            Update::Replace { origin, contents } => {
                // For an API source, each object is an origin. Share one allocation per name.
                let known = self.fingerprints.get_key_value(&origin).map(|(known, _)| known.clone());
                let origin = known.unwrap_or(origin);
                self.fingerprints.insert(origin.clone(), contents.fingerprint);
                self.replace(&origin, contents, changes);
            }
            Update::Remove { origin } => {
                self.fingerprints.remove(&origin);
                self.replace(&origin, Contents { complete: true, ..Contents::default() }, changes);
                self.complete_origins.remove(&origin);
            }
            Update::Prune { prefix, except } => {
                let gone = |origin: &&Origin| origin.as_str().starts_with(&prefix) && !except.contains(*origin);
                let gone: Vec<Origin> = self.fingerprints.keys().filter(gone).cloned().collect();
                for origin in gone {
                    self.apply(Update::Remove { origin }, changes);
                }
            }
            Update::ClusterUnreachable { cluster, unreachable } => {
                let of = &mut self.snapshot.lost;
                changes.everything |= if unreachable { of.insert(cluster.into()) } else { of.remove(cluster.as_str()) };
            }
            Update::SourceFindings(findings) => {
                changes.findings |= self.source_findings != findings;
                self.source_findings = findings;
            }
            Update::Synced => changes.synced |= !std::mem::replace(&mut self.synced, true),
        }
    }

    fn replace(&mut self, origin: &Origin, contents: Contents, changes: &mut Changes) {
        let is_owner = |owners: &Owners| owners.iter().any(|(owner, _)| owner == origin);
        let known = |key: &ObjectKey| self.objects.get(key).is_some_and(is_owner);
        // A rule that cannot be read can be ignored.
        // Without a Service or its endpoints, connections would be refused.
        // Without the MeshConfig, they could leave their cluster.
        let required = |key: &ObjectKey| {
            use Kind::{EndpointSlice, MeshConfig, Service, ServiceEntry, WorkloadEntry};
            matches!(key.kind, Service | EndpointSlice | ServiceEntry | WorkloadEntry | MeshConfig)
        };
        let missing =
            contents.objects.iter().find(|read| read.object.is_none() && required(&read.key) && !known(&read.key));
        let unread = match missing {
            Some(read) => Some(UnreadInput {
                what: format!("{} in {origin} is invalid", read.key),
                scope: read.key.scope.clone(),
                settings: read.key.kind == Kind::MeshConfig,
                anything: !contents.complete,
            }),
            None if !contents.complete => Some(UnreadInput {
                what: format!("{origin} cannot be read"),
                // Files of the mesh are in the root directory.
                scope: origin.scope(),
                settings: contents.sole_kind == Some(Kind::MeshConfig),
                anything: contents.sole_kind.is_none(),
            }),
            None => None,
        };
        match unread {
            None => {
                self.complete_origins.insert(origin.clone());
                // The set of unread inputs changed, which affects readiness.
                changes.findings |= self.unread.remove(origin).is_some();
            }
            Some(unread) if !self.complete_origins.contains(origin) => {
                drop(self.unread.insert(origin.clone(), unread));
            }
            Some(_) => {}
        }
        if contents.complete {
            let listed: BTreeSet<_> = contents.objects.iter().map(|read| &read.key).collect();
            let gone = self.keys_by_origin.get(origin).into_iter().flatten().filter(|key| !listed.contains(&***key));
            let gone: Vec<Arc<ObjectKey>> = gone.cloned().collect();
            for key in gone {
                self.set_owner(&key, origin, None, changes);
            }
        }
        for read in contents.objects {
            // An invalid object keeps its last valid version.
            if read.object.is_some() {
                self.set_owner(&Arc::new(read.key), origin, read.object, changes);
            }
        }
        let findings = self.findings.get(origin).map(Vec::as_slice).unwrap_or_default();
        changes.findings |= findings != contents.findings;
        if contents.findings.is_empty() {
            self.findings.remove(origin);
        } else {
            self.findings.insert(origin.clone(), contents.findings);
        }
    }

    /// Records that the origin now contains the object, or no longer does if `object` is `None`.
    fn set_owner(&mut self, key: &Arc<ObjectKey>, origin: &Origin, object: Option<Object>, changes: &mut Changes) {
        if object.is_some() {
            let keys = self.keys_by_origin.entry(origin.clone()).or_insert_with(|| Vec::with_capacity(1));
            if let Err(at) = keys.binary_search(key) {
                keys.insert(at, Arc::clone(key));
            }
        } else if let Some(keys) = self.keys_by_origin.get_mut(origin) {
            if let Ok(at) = keys.binary_search(key) {
                keys.remove(at);
            }
            if keys.is_empty() {
                self.keys_by_origin.remove(origin);
            }
        }
        let object = object.map(|object| self.intern_labels(object));
        let owners = self.objects.entry(Arc::clone(key)).or_insert_with(|| Vec::with_capacity(1));
        let before = owners.first().map(|(_, object)| object.clone());
        match (owners.binary_search_by(|(owner, _)| owner.cmp(origin)), object) {
            (Ok(at), Some(object)) => owners[at].1 = object,
            (Ok(at), None) => drop(owners.remove(at)),
            (Err(at), Some(object)) => owners.insert(at, (origin.clone(), object)),
            (Err(_), None) => {}
        }
        // A duplicate object is a finding.
        changes.findings |= owners.len() > 1;
        let after = owners.first().map(|(_, object)| object.clone());
        if owners.is_empty() {
            self.objects.remove(key);
        }
        if before != after {
            let clusters = self.snapshot.clusters.len();
            for object in before.iter().chain(&after) {
                self.snapshot.concerned(key, object, changes);
            }
            changes.everything |= match (&before, &after) {
                (Some(before), Some(after)) => self::changes_everything(before, after),
                (Some(one), None) | (None, Some(one)) => affects_all_services(one),
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

    /// Replaces the labels of a pod by the interned copy.
    fn intern_labels(&mut self, object: Object) -> Object {
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

    /// Returns a fingerprint of all inputs.
    /// If it is equal for two agents, or for an agent and `plan`, they read the same configuration.
    pub fn fingerprint(&self) -> String {
        let mut hasher = DefaultHasher::new();
        self.fingerprints.hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    }

    /// Returns the current objects, indexed for the policy.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Returns the findings about objects and sources, including objects that several origins contain.
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings: Vec<Finding> =
            self.findings.values().flatten().chain(&self.source_findings).cloned().collect();
        for (key, owners) in self.objects.iter().filter(|(_, owners)| owners.len() > 1) {
            for (other, _) in &owners[1..] {
                let message = format!("is also in {}, which takes precedence; remove one of them", owners[0].0);
                findings.push(Finding::new(Code::InSeveralFiles, &**key, message).from_source(other.as_str()));
            }
        }
        findings
    }

    /// Sets the source of a finding to the origin of its object, unless it has one.
    /// Looks in the cluster of the finding (`cluster` if it names none), then in the mesh.
    pub fn add_source(&self, cluster: &str, finding: &mut Finding) {
        if !finding.source.is_empty() {
            return;
        }
        let Some(kind) = Kind::of(&finding.object) else { return };
        let name = finding.object.namespaced_name();
        let cluster = if finding.cluster.is_empty() { cluster } else { &finding.cluster };
        let source = [Scope::Cluster(cluster.to_owned()), Scope::Mesh].into_iter().find_map(|scope| {
            let owners = self.objects.get(&ObjectKey { scope, kind, name: name.clone() })?;
            owners.first().map(|(origin, _)| origin.to_string())
        });
        finding.source = source.unwrap_or_default();
    }
}

/// Returns whether a change of an object affects services other than its own.
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

/// Returns whether the addition or removal of an object affects services other than its own.
fn affects_all_services(object: &Object) -> bool {
    match object {
        Object::EndpointSlice(_) | Object::Pod(_) | Object::WorkloadEntry(_) => false,
        Object::Namespace(namespace) => namespace.name == SYSTEM,
        _ => true,
    }
}
