//! From documents to objects: which kind it is, and who reads it.

use std::{
    collections::BTreeSet,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::IpAddr,
    str::FromStr,
    sync::Arc,
};

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Contents, Read, core, destination_rule, document, entry, mesh, virtual_service};
use crate::model::{Code, Finding, Kind, NamespacedName, Object, ObjectKey, Position, Scope, Subnet};

/// How objects are read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reader {
    /// Accept endpoints and Service addresses in loopback and link-local ranges.
    pub allow_loopback: bool,
    /// Where the endpoints of a cluster may be; anywhere, for one that is not named.
    pub ranges: &'static [ClusterRanges],
}

/// The ranges of addresses that a cluster has for its endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterRanges {
    /// Its id.
    pub cluster: String,
    /// The ranges.
    pub ranges: Vec<Subnet>,
}

impl FromStr for ClusterRanges {
    type Err = String;

    /// `CLUSTER=CIDR[,CIDR…]`
    fn from_str(text: &str) -> Result<Self, String> {
        let (cluster, ranges) = text.split_once('=').ok_or("not CLUSTER=CIDR[,CIDR…]")?;
        let range = |text: &str| text.parse().map_err(|_| format!("{text:?} is no range of addresses"));
        let ranges = ranges.split(',').map(range).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { cluster: cluster.to_owned(), ranges })
    }
}

impl Reader {
    /// Whether an object of this scope may name an endpoint there.
    pub(super) fn is_in_range(self, scope: &Scope, address: IpAddr) -> bool {
        let of = |ranges: &&ClusterRanges| matches!(scope, Scope::Cluster(id) if *id == ranges.cluster);
        let mut own = self.ranges.iter().filter(of).peekable();
        own.peek().is_none() || own.any(|own| own.ranges.iter().any(|range| range.contains(address)))
    }
}

/// Bytes that are read again in one file in order to find positions: each one that is looked up reads its document up to there.
const READ_AGAIN: usize = 16 << 20;

/// Reads all objects of a file. Nothing in it can make this fail: what is wrong becomes a finding.
pub fn read_text(reader: Reader, scope: &Scope, origin: &str, text: &str) -> Contents {
    let mut contents = Contents { whole: true, fingerprint: fingerprint(text), ..Contents::default() };
    let documents = document::split(text);
    contents.blank = documents.is_empty();
    if text.is_empty() {
        // Nobody writes such a file on purpose: more likely its writer was cut off.
        contents.whole = false;
        let message = "the file is empty; delete it if nothing belongs into it";
        contents.findings.push(Finding::new(Code::EmptyFile, origin, message));
    }
    let mut read_again = 0;
    let mut seen = BTreeSet::new();
    for (line, document) in documents {
        let position = |(row, column): (usize, usize)| {
            let text = document.lines().nth(row.checked_sub(1)?)?.chars().take(200).collect();
            Some(Position { line: line + row - 1, column, text })
        };
        let value = match document::parse(&document) {
            Ok(value) => value,
            Err(error) => {
                contents.whole = false;
                let message = format!("{}. What this file last said well stays in force", error.message);
                let mut finding = Finding::new(Code::Syntax, origin, message);
                finding.position = error.at.and_then(position);
                contents.findings.push(finding);
                continue;
            }
        };
        for (path, value) in document::flatten(value) {
            let known = contents.findings.len();
            read_object(reader, scope, origin, value, &mut seen, &mut contents);
            for finding in contents.findings[known..].iter_mut().filter(|finding| !finding.field.is_empty()) {
                read_again += document.len();
                if read_again <= READ_AGAIN {
                    finding.position =
                        document::locate(&document, &format!("{path}{}", finding.field)).and_then(position);
                }
            }
        }
    }
    for finding in &mut contents.findings {
        *finding = finding.clone().from_source(origin);
    }
    contents
}

/// Reads one object, as an API gives it. Nothing in it can make this fail: what is wrong becomes a finding.
pub(super) fn read_value(reader: Reader, scope: &Scope, origin: &str, value: Value) -> Contents {
    let mut contents = Contents { whole: true, ..Contents::default() };
    // Keys are in order, so that equal objects have equal texts.
    contents.fingerprint = fingerprint(&value.to_string());
    read_object(reader, scope, origin, value, &mut BTreeSet::new(), &mut contents);
    for finding in &mut contents.findings {
        origin.clone_into(&mut finding.source);
    }
    contents
}

/// Where Istio keeps its own settings.
pub(super) const MESH_NAMESPACE: &str = "istio-system";

/// Tells texts apart.
pub(super) fn fingerprint(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

fn read_object(
    reader: Reader,
    scope: &Scope,
    origin: &str,
    value: Value,
    seen: &mut BTreeSet<ObjectKey>,
    contents: &mut Contents,
) {
    let field = |path: &str| value.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (group, kind) = (field("/apiVersion"), field("/kind"));
    let group = group.split_once('/').map_or("", |(group, _)| group);
    let name = NamespacedName::new(field("/metadata/namespace"), field("/metadata/name"));
    if kind.is_empty() || name.name.is_empty() {
        contents.whole = false;
        let message = "a document without `kind` or `metadata.name` is no Kubernetes object";
        contents.findings.push(Finding::new(Code::NotAnObject, origin, message));
        return;
    }
    let Some(known) = known_kind(group, &kind, &name) else {
        let (code, message) = match kind.as_str() {
            "ConfigMap" if name.name == "istio" => (
                Code::Misplaced,
                "is not in istio-system: the mesh's settings are not for others to make, so it is not used",
            ),
            "Endpoints" => (Code::UnusedKind, "EndpointSlices are used instead: its endpoints are not"),
            _ => (Code::UnusedKind, "Portolan does not use this kind"),
        };
        contents.findings.push(Finding::new(code, format!("{kind} {name}"), message));
        return;
    };
    let of_a_cluster = matches!(known, Kind::Service | Kind::EndpointSlice | Kind::Node | Kind::Pod | Kind::Namespace);
    if of_a_cluster && *scope == Scope::Mesh {
        let message = "belongs to a cluster: put it into the folder of that cluster, for here it is not used";
        contents.findings.push(Finding::new(Code::Misplaced, format!("{kind} {name}"), message));
        return;
    }
    let name = if matches!(known, Kind::Node | Kind::Namespace) {
        NamespacedName::new("", name.name)
    } else if name.namespace.is_empty() {
        NamespacedName::new("default", name.name)
    } else {
        name
    };
    let key = ObjectKey { scope: scope.clone(), kind: known, name: name.clone() };
    let mut context = Context { reader, scope, name, object: key.to_string(), findings: &mut contents.findings };
    let object = match object(&mut context, known, value) {
        Ok(Some(object)) => Some(object),
        // Understood, and none of Portolan's business: as if it were not there.
        Ok(None) => return,
        Err(Invalid { field, message }) => {
            let message = format!("{message}. Its last good state stays in force, if there was one");
            context.finding(Code::InvalidObject, field, message);
            None
        }
    };
    if !seen.insert(key.clone()) {
        contents.findings.push(Finding::new(Code::Repeated, &key, "is in this file twice; the last one counts"));
    }
    contents.objects.push(Read { key, object });
}

fn object(context: &mut Context<'_>, kind: Kind, value: Value) -> Result<Option<Object>, Invalid> {
    annotations(context, kind, &value);
    Ok(match kind {
        Kind::Service => core::service(context, value)?.map(Arc::new).map(Object::Service),
        Kind::EndpointSlice => core::endpoint_slice(context, value)?.map(Arc::new).map(Object::EndpointSlice),
        Kind::Node => Some(Object::Node(Arc::new(core::node(context, value)?))),
        Kind::Pod => Some(Object::Pod(Arc::new(core::pod(context, value)?))),
        Kind::Namespace => Some(Object::Namespace(Arc::new(core::namespace(context, value)?))),
        Kind::ServiceEntry => entry::service_entry(context, value)?.map(Arc::new).map(Object::ServiceEntry),
        Kind::WorkloadEntry => Some(Object::WorkloadEntry(Arc::new(entry::workload_entry(context, value)?))),
        Kind::DestinationRule => {
            destination_rule::destination_rule(context, value)?.map(Arc::new).map(Object::DestinationRule)
        }
        Kind::VirtualService => {
            virtual_service::virtual_service(context, value)?.map(Arc::new).map(Object::VirtualService)
        }
        Kind::MeshConfig => Some(Object::MeshConfig(Arc::new(mesh::mesh_config(context, value)?))),
    })
}

/// Annotations of Portolan's own, by the kind that they mean something on.
pub(super) const DISTRIBUTE_WITH_FAILOVER: &str = "portolan.io/distribute-with-failover";
pub(super) const ALWAYS_EJECT_ONE: &str = "portolan.io/always-eject-one";
pub(super) const COUNT_EARLY_RESETS: &str = "portolan.io/count-early-resets";
pub(super) const PREFER_CLUSTER_LOCAL: &str = "portolan.io/prefer-cluster-local";
pub(super) const PROBE: &str = "portolan.io/probe";
pub(super) const CLOSE_IDLE_ELSEWHERE: &str = "portolan.io/close-idle-elsewhere";
const ANNOTATIONS: [(&str, &[Kind]); 6] = [
    (DISTRIBUTE_WITH_FAILOVER, &[Kind::DestinationRule, Kind::MeshConfig]),
    (ALWAYS_EJECT_ONE, &[Kind::DestinationRule]),
    (COUNT_EARLY_RESETS, &[Kind::DestinationRule]),
    (PREFER_CLUSTER_LOCAL, &[Kind::MeshConfig]),
    (PROBE, &[Kind::DestinationRule]),
    (CLOSE_IDLE_ELSEWHERE, &[Kind::DestinationRule]),
];

/// Portolan's own annotations are not for mistyping.
fn annotations(context: &mut Context<'_>, kind: Kind, value: &Value) {
    let annotations = value.pointer("/metadata/annotations").and_then(Value::as_object);
    for key in annotations.into_iter().flat_map(|map| map.keys()).filter(|key| key.starts_with("portolan.io/")) {
        let known = ANNOTATIONS.iter().find(|(name, _)| name == key);
        if known.is_none_or(|(_, kinds)| !kinds.contains(&kind)) {
            let here: Vec<_> =
                ANNOTATIONS.iter().filter(|(_, kinds)| kinds.contains(&kind)).map(|(name, _)| *name).collect();
            let here = if here.is_empty() { "none".to_owned() } else { here.join(", ") };
            let message = format!("means nothing on a {kind}; those that do: {here}");
            context.finding(Code::UnknownAnnotation, format!("metadata.annotations[\"{key}\"]"), message);
        }
    }
}

fn known_kind(group: &str, kind: &str, name: &NamespacedName) -> Option<Kind> {
    match (group, kind) {
        ("", "Service") => Some(Kind::Service),
        ("", "Node") => Some(Kind::Node),
        ("", "Pod") => Some(Kind::Pod),
        ("", "Namespace") => Some(Kind::Namespace),
        ("", "ConfigMap") if name.name == "istio" && name.namespace == MESH_NAMESPACE => Some(Kind::MeshConfig),
        ("discovery.k8s.io", "EndpointSlice") => Some(Kind::EndpointSlice),
        ("networking.istio.io", "DestinationRule") => Some(Kind::DestinationRule),
        ("networking.istio.io", "VirtualService") => Some(Kind::VirtualService),
        ("networking.istio.io", "ServiceEntry") => Some(Kind::ServiceEntry),
        ("networking.istio.io", "WorkloadEntry") => Some(Kind::WorkloadEntry),
        _ => None,
    }
}

/// Why an object cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Invalid {
    /// The field.
    pub(super) field: String,
    /// What is wrong with it.
    pub(super) message: String,
}

pub(super) fn invalid(field: impl Into<String>, message: impl Into<String>) -> Invalid {
    Invalid { field: field.into(), message: message.into() }
}

/// What the readers of the kinds have at hand.
pub(super) struct Context<'a> {
    pub(super) reader: Reader,
    pub(super) scope: &'a Scope,
    pub(super) name: NamespacedName,
    object: String,
    findings: &'a mut Vec<Finding>,
}

impl Context<'_> {
    /// Something that people should know of a field of the object.
    pub(super) fn finding(&mut self, code: Code, field: impl Into<String>, message: impl Into<String>) {
        self.findings.push(Finding::new(code, &self.object, message).at(field));
    }

    /// A part cannot be used; the rest is.
    pub(super) fn part(&mut self, broken: Invalid) {
        self.finding(Code::InvalidPart, broken.field, broken.message);
    }

    /// The switch that an annotation is, which is off where it is absent.
    pub(super) fn switch(&mut self, value: &Value, annotation: &str) -> bool {
        let field = format!("metadata.annotations[\"{annotation}\"]");
        let set = value.pointer("/metadata/annotations").and_then(|map| map.get(annotation));
        match set.map(|set| (set, set.as_str())) {
            None | Some((_, Some("false"))) => false,
            Some((_, Some("true"))) => true,
            Some((other, _)) => {
                let message = format!("{other} is neither \"true\" nor \"false\", in quotes: it stays off");
                self.finding(Code::UnknownAnnotation, field, message);
                false
            }
        }
    }

    /// Whether clients of all namespaces are meant. A node serves all of them alike, so an object for some of them only is left out.
    pub(super) fn is_for_all(&mut self, export_to: &[String]) -> bool {
        let all = export_to.is_empty() || export_to.iter().any(|to| to == "*");
        if !all {
            let message = format!(
                "{export_to:?}: a node cannot tell clients of one namespace from those of another, so the object is left out; \
                 export it to \"*\""
            );
            self.finding(Code::LeftOut, "spec.exportTo", message);
        }
        all
    }

    /// Into a type, with the path of the field in the error.
    pub(super) fn typed<T: DeserializeOwned>(&self, at: &str, value: Value) -> Result<T, Invalid> {
        serde_path_to_error::deserialize(value).map_err(|error| {
            let path = error.path().to_string();
            invalid(join(at, &path), error.into_inner().to_string())
        })
    }

    /// Into a type that holds the honoured fields only: each other field becomes a finding, but for those
    /// that `silent` knows.
    pub(super) fn honoured<T: DeserializeOwned>(
        &mut self,
        at: &str,
        value: Value,
        silent: impl Fn(&str) -> bool,
    ) -> Result<T, Invalid> {
        let mut ignored = Vec::new();
        let mut track = serde_path_to_error::Track::new();
        let tracked = serde_path_to_error::Deserializer::new(value, &mut track);
        let typed = serde_ignored::deserialize(tracked, |path| ignored.push(path.to_string().replace(".?", "")));
        let typed = typed.map_err(|error| invalid(join(at, &track.path().to_string()), error.to_string()))?;
        for path in ignored.iter().filter(|path| !silent(path)) {
            self.finding(Code::NotHonoured, join(at, path), "is not honoured");
        }
        Ok(typed)
    }
}

fn join(at: &str, path: &str) -> String {
    match (at, path) {
        (at, ".") => at.to_owned(),
        ("", path) => path.to_owned(),
        (at, path) => format!("{at}.{path}"),
    }
}
