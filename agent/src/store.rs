//! Updates in, snapshot out. The one place that remembers what the sources said.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use crate::{
    model::{
        DestinationRule, EndpointSlice, Finding, Kind, MeshConfig, NamespacedName, Node, Object, ObjectKey, Pod, Scope,
        Service, VirtualService,
    },
    source::{Contents, Update},
};

/// Something that could not be read, and never was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doubt {
    /// What, for people.
    pub what: String,
    /// Whether the mesh's settings may be in it, which say what traffic must stay in its cluster.
    pub settings: bool,
}

/// All objects, by identity and by the origin that holds them.
#[derive(Debug, Default)]
pub struct Store {
    objects: BTreeMap<ObjectKey, BTreeMap<String, Object>>,
    findings: BTreeMap<String, Vec<Finding>>,
    troubles: Vec<Finding>,
    /// Origins that have been read in full.
    good: BTreeSet<String>,
    /// Origins of which something could not be read, and never was.
    doubtful: BTreeMap<String, Doubt>,
    fingerprints: BTreeMap<String, u64>,
    synced: bool,
}

impl Store {
    /// Whether everything that the sources have has been reported once. Before that, nothing may be removed from the
    /// kernel.
    pub fn synced(&self) -> bool {
        self.synced
    }

    /// What could not be read, and never was, so that nothing is known of what it says. Settings before services, for they say what must
    /// never happen.
    pub fn doubt(&self) -> Option<&Doubt> {
        self.doubtful.values().max_by_key(|doubt| doubt.settings)
    }

    /// Takes in a change. Returns whether anything is different now.
    pub fn apply(&mut self, update: Update) -> bool {
        match update {
            Update::Replace { origin, contents } => {
                self.fingerprints.insert(origin.clone(), contents.fingerprint);
                self.replace(&origin, contents);
                true
            }
            Update::Remove { origin } => {
                self.fingerprints.remove(&origin);
                self.replace(&origin, Contents { whole: true, ..Contents::default() });
                self.good.remove(&origin);
                true
            }
            Update::Trouble(findings) => std::mem::replace(&mut self.troubles, findings.clone()) != findings,
            Update::Synced => !std::mem::replace(&mut self.synced, true),
        }
    }

    fn replace(&mut self, origin: &str, contents: Contents) {
        let known = |key: &ObjectKey| self.objects.get(key).is_some_and(|origins| origins.contains_key(origin));
        // A rule that cannot be read is not in force; without a Service or its endpoints, connections would be refused, and without the
        // settings they could leave their cluster.
        let vital = |key: &ObjectKey| matches!(key.kind, Kind::Service | Kind::EndpointSlice | Kind::MeshConfig);
        let lost = contents.objects.iter().find(|read| read.object.is_none() && vital(&read.key) && !known(&read.key));
        let doubt = match lost {
            Some(read) => Some(Doubt {
                what: format!("{} in {origin} is broken", read.key),
                settings: read.key.kind == Kind::MeshConfig,
            }),
            // The mesh's objects are in no folder.
            None if !contents.whole => {
                Some(Doubt { what: format!("{origin} cannot be read"), settings: !origin.contains('/') })
            }
            None => None,
        };
        match doubt {
            None => {
                self.good.insert(origin.to_owned());
                self.doubtful.remove(origin);
            }
            Some(doubt) if !self.good.contains(origin) => drop(self.doubtful.insert(origin.to_owned(), doubt)),
            Some(_) => {}
        }
        let listed: BTreeSet<_> = contents.objects.iter().map(|read| read.key.clone()).collect();
        if contents.whole {
            self.objects.retain(|key, origins| {
                if !listed.contains(key) {
                    origins.remove(origin);
                }
                !origins.is_empty()
            });
        }
        for read in contents.objects {
            // A broken object leaves its last good state alone.
            if let Some(object) = read.object {
                self.objects.entry(read.key).or_default().insert(origin.to_owned(), object);
            }
        }
        if contents.findings.is_empty() {
            self.findings.remove(origin);
        } else {
            self.findings.insert(origin.to_owned(), contents.findings);
        }
    }

    /// Tells whether two stores have read the same: two agents, or an agent and `plan`.
    pub fn fingerprint(&self) -> String {
        let mut hasher = DefaultHasher::new();
        self.fingerprints.hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    }

    /// Everything at this moment, arranged for the policy.
    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for (key, origins) in &self.objects {
            let mut origins = origins.iter();
            let Some((first, object)) = origins.next() else { continue };
            snapshot.insert(key, object);
            snapshot.origins.insert((key.scope.clone(), key.to_string()), first.clone());
            for (other, _) in origins {
                let message = format!("is in {first} as well, which counts; remove one of them");
                snapshot.findings.push(Finding::error(key, message).from_source(other));
            }
        }
        let read = self.findings.values().flatten();
        snapshot.findings.extend(read.chain(&self.troubles).cloned());
        snapshot
    }
}

/// The objects of one cluster, or those of the whole mesh.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    /// Services by name.
    pub services: BTreeMap<NamespacedName, Arc<Service>>,
    /// EndpointSlices by the Service that they belong to, and their own name.
    pub slices: BTreeMap<NamespacedName, BTreeMap<String, Arc<EndpointSlice>>>,
    /// Nodes by name.
    pub nodes: BTreeMap<String, Arc<Node>>,
    /// Pods by name.
    pub pods: BTreeMap<NamespacedName, Arc<Pod>>,
    /// DestinationRules by name.
    pub destination_rules: BTreeMap<NamespacedName, Arc<DestinationRule>>,
    /// VirtualServices by name.
    pub virtual_services: BTreeMap<NamespacedName, Arc<VirtualService>>,
    /// Settings.
    pub mesh_config: Option<Arc<MeshConfig>>,
}

/// All inputs at one moment. The objects are shared with the store, not copied.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Objects of the whole mesh.
    pub mesh: Objects,
    /// Objects by cluster.
    pub clusters: BTreeMap<String, Objects>,
    /// What is wrong with the objects themselves.
    pub findings: Vec<Finding>,
    /// Where each object (as findings name it) comes from.
    pub origins: BTreeMap<(Scope, String), String>,
}

impl Snapshot {
    /// Where an object comes from, as a finding names it: for people of this cluster its own one, or else the mesh's.
    pub fn origin(&self, cluster: &str, object: &str) -> Option<&String> {
        let of = |scope: Scope| self.origins.get(&(scope, object.to_owned()));
        of(Scope::Cluster(cluster.to_owned())).or_else(|| of(Scope::Mesh))
    }

    fn insert(&mut self, key: &ObjectKey, object: &Object) {
        let into = match &key.scope {
            Scope::Mesh => &mut self.mesh,
            Scope::Cluster(id) => self.clusters.entry(id.clone()).or_default(),
        };
        let name = key.name.clone();
        match object.clone() {
            Object::Service(it) => drop(into.services.insert(name, it)),
            Object::EndpointSlice(it) => {
                into.slices.entry(it.service.clone()).or_default().insert(name.name, it);
            }
            Object::Node(it) => drop(into.nodes.insert(name.name, it)),
            Object::Pod(it) => drop(into.pods.insert(name, it)),
            Object::DestinationRule(it) => drop(into.destination_rules.insert(name, it)),
            Object::VirtualService(it) => drop(into.virtual_services.insert(name, it)),
            Object::MeshConfig(it) => into.mesh_config = Some(it),
        }
    }
}
