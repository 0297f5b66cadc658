//! The state of the fake API server: objects, and the history of their changes.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use serde_json::{Value, json};

/// Resource (plural and group, as in `endpointslices.discovery.k8s.io`), namespace, and name.
type Key = (String, String, String);

/// An entry of the history.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) version: u64,
    pub(super) resource: String,
    /// The previous version of the object; `None` if it is new.
    pub(super) before: Option<Value>,
    pub(super) object: Value,
    pub(super) gone: bool,
}

impl Change {
    /// Returns the type of the event in a watch of this query; `None` if the watch does not see the change.
    /// An object that starts or stops matching the selectors is added or deleted.
    pub(super) fn told(&self, query: &super::request::Query) -> Option<&'static str> {
        if self.resource != query.resource {
            return None;
        }
        let was = self.before.as_ref().is_some_and(|before| query.wants(before));
        match (was, !self.gone && query.wants(&self.object)) {
            (false, true) => Some("ADDED"),
            (true, true) => Some("MODIFIED"),
            (true, false) => Some("DELETED"),
            (false, false) => None,
        }
    }
}

/// Faults that the server simulates.
#[derive(Clone, Debug, Default)]
pub(super) struct Manners {
    /// Resources whose requests get 403.
    pub(super) forbidden: HashSet<String>,
    /// API groups whose requests get 404.
    pub(super) missing: HashSet<String>,
    /// Whether watches stay open but send nothing.
    pub(super) stalls: bool,
    /// Whether the lines of watches arrive byte by byte.
    pub(super) dribbles: bool,
    /// Watches that began before this version break in the middle of a line.
    pub(super) breaks_before: u64,
    /// Whether the next continue token gets 410.
    pub(super) expires_page: bool,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) version: u64,
    objects: BTreeMap<Key, Value>,
    pub(super) history: VecDeque<Change>,
    /// The history up to this version has been compacted.
    pub(super) forgotten: u64,
    pub(super) tokens: HashSet<String>,
    pub(super) manners: Manners,
    /// Number of requests by verb and resource.
    pub(super) asked: HashMap<(&'static str, String), u64>,
    /// Field selectors of requests, by resource.
    pub(super) selectors: HashMap<String, HashSet<String>>,
    /// Events that clients created.
    pub(super) events: Vec<Value>,
    /// Maximum number of objects in a page of a list.
    pub(super) page: usize,
}

impl State {
    pub(super) fn new(token: &str) -> Self {
        Self {
            version: 1,
            objects: BTreeMap::new(),
            history: VecDeque::new(),
            forgotten: 0,
            tokens: HashSet::from([token.to_owned()]),
            manners: Manners::default(),
            asked: HashMap::new(),
            selectors: HashMap::new(),
            events: Vec::new(),
            page: usize::MAX,
        }
    }

    /// Creates or updates an object. An unchanged object causes no event.
    pub(super) fn apply(&mut self, object: &Value) {
        let (resource, namespaced) = resource_of(object);
        let field = |path: &str| object.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
        let namespace = match field("/metadata/namespace") {
            none if none.is_empty() && namespaced => "default".to_owned(),
            some => some,
        };
        let key = (resource.clone(), namespace.clone(), field("/metadata/name"));
        let known = self.objects.get(&key);
        let mut object = object.clone();
        if !namespace.is_empty() {
            object["metadata"]["namespace"] = json!(namespace);
        }
        let is_same = |known: &Value| {
            let mut known = known.clone();
            for field in ["resourceVersion", "uid", "managedFields"] {
                known["metadata"].as_object_mut().map(|metadata| metadata.remove(field));
            }
            known == object
        };
        if known.is_some_and(is_same) {
            return;
        }
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        object["metadata"]["uid"] = json!(format!("uid-{}-{}", key.1, key.2));
        object["metadata"]["managedFields"] = json!([{"manager": "test", "fieldsV1": {"f:spec": {}}}]);
        let before = self.objects.insert(key, object.clone());
        self.history.push_back(Change { version: self.version, resource, before, object, gone: false });
    }

    pub(super) fn delete(&mut self, resource: &str, namespace: &str, name: &str) -> bool {
        let key = (resource.to_owned(), namespace.to_owned(), name.to_owned());
        let Some(before) = self.objects.remove(&key) else { return false };
        let mut object = before.clone();
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.history.push_back(Change {
            version: self.version,
            resource: key.0,
            before: Some(before),
            object,
            gone: true,
        });
        true
    }

    /// Deletes all other objects except Secrets, then applies these.
    pub(super) fn replace(&mut self, objects: &[Value]) {
        let kept: HashSet<Key> = objects
            .iter()
            .map(|object| {
                let (resource, namespaced) = resource_of(object);
                let field = |path: &str| object.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
                let namespace = match field("/metadata/namespace") {
                    none if none.is_empty() && namespaced => "default".to_owned(),
                    some => some,
                };
                (resource, namespace, field("/metadata/name"))
            })
            .collect();
        let gone: Vec<Key> =
            self.objects.keys().filter(|key| !kept.contains(*key) && key.0 != "secrets").cloned().collect();
        for (resource, namespace, name) in gone {
            self.delete(&resource, &namespace, &name);
        }
        objects.iter().for_each(|object| self.apply(object));
    }

    /// Returns the objects that match a query, in key order, that follow the position `after` (namespace, name).
    pub(super) fn list<'a>(
        &'a self,
        query: &'a super::request::Query,
        after: Option<&(String, String)>,
    ) -> impl Iterator<Item = (&'a Key, &'a Value)> {
        let of = query.resource.clone();
        let after = after.cloned();
        self.objects.iter().filter(move |((resource, namespace, name), object)| {
            *resource == of && after.as_ref().is_none_or(|(n, m)| (namespace, name) > (n, m)) && query.wants(object)
        })
    }
}

/// Returns the resource of an object (plural and group), and whether it is namespaced.
pub(super) fn resource_of(object: &Value) -> (String, bool) {
    let group = object["apiVersion"].as_str().unwrap_or_default().split_once('/').map_or("", |(group, _)| group);
    let kind = object["kind"].as_str().unwrap_or_default().to_lowercase();
    let plural = match kind.as_str() {
        "serviceentry" => "serviceentries".to_owned(),
        "workloadentry" => "workloadentries".to_owned(),
        kind => format!("{kind}s"),
    };
    let namespaced = !matches!(kind.as_str(), "node" | "namespace");
    (if group.is_empty() { plural } else { format!("{plural}.{group}") }, namespaced)
}
