//! From documents to objects: which kind it is, and who reads it.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Contents, Read, core, document, istio, mesh};
use crate::model::{Finding, Kind, NamespacedName, Object, ObjectKey, Scope};

/// How objects are read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reader {
    /// Accept endpoints and Service addresses in loopback and link-local ranges.
    pub allow_loopback: bool,
}

/// Reads all objects of a file. Nothing in it can make this fail: what is wrong becomes a finding.
pub fn read_text(reader: Reader, scope: &Scope, origin: &str, text: &str) -> Contents {
    let mut contents = Contents { whole: true, fingerprint: fingerprint(text), ..Contents::default() };
    let documents = document::split(text);
    contents.blank = documents.is_empty();
    if text.is_empty() {
        // Nobody writes such a file on purpose: more likely its writer was cut off.
        contents.whole = false;
        contents.findings.push(Finding::warning(origin, "the file is empty; delete it if nothing belongs into it"));
    }
    for (line, document) in documents {
        let value = match document::parse(line, &document) {
            Ok(value) => value,
            Err(message) => {
                contents.whole = false;
                contents
                    .findings
                    .push(Finding::error(origin, format!("{message}. What this file last said well stays in force")));
                continue;
            }
        };
        for value in document::flatten(value) {
            read_object(reader, scope, origin, value, &mut contents);
        }
    }
    for finding in &mut contents.findings {
        *finding = finding.clone().from_source(origin);
    }
    contents
}

/// Where Istio keeps its own settings.
const MESH_NAMESPACE: &str = "istio-system";

/// Tells texts apart.
pub(super) fn fingerprint(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

fn read_object(reader: Reader, scope: &Scope, origin: &str, value: Value, contents: &mut Contents) {
    let field = |path: &str| value.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (group, kind) = (field("/apiVersion"), field("/kind"));
    let group = group.split_once('/').map_or("", |(group, _)| group);
    let name = NamespacedName::new(field("/metadata/namespace"), field("/metadata/name"));
    if kind.is_empty() || name.name.is_empty() {
        contents.whole = false;
        contents
            .findings
            .push(Finding::error(origin, "a document without `kind` or `metadata.name` is no Kubernetes object"));
        return;
    }
    let Some(known) = known_kind(group, &kind, &name) else {
        let object = format!("{kind} {name}");
        let message = match kind.as_str() {
            "ConfigMap" if name.name == "istio" => {
                "is not in istio-system: the mesh's settings are not for others to make, so it is not used"
            }
            "ServiceEntry" | "WorkloadEntry" | "Endpoints" => {
                "this kind is not honoured yet: its endpoints are not used"
            }
            _ => "Portolan does not use this kind",
        };
        contents.findings.push(Finding::warning(object, message));
        return;
    };
    let of_a_cluster = matches!(known, Kind::Service | Kind::EndpointSlice | Kind::Node | Kind::Pod);
    if of_a_cluster && *scope == Scope::Mesh {
        let message = "belongs to a cluster: put it into the folder of that cluster, for here it is not used";
        contents.findings.push(Finding::error(format!("{kind} {name}"), message));
        return;
    }
    let name = if matches!(known, Kind::Node) {
        NamespacedName::new("", name.name)
    } else if name.namespace.is_empty() {
        NamespacedName::new("default", name.name)
    } else {
        name
    };
    let key = ObjectKey { scope: scope.clone(), kind: known, name: name.clone() };
    let mut context = Context { reader, name, object: key.to_string(), findings: &mut contents.findings };
    let result = match known {
        Kind::Service => {
            core::service(&mut context, value).map(|read| read.map(|read| Object::Service(Arc::new(read))))
        }
        Kind::EndpointSlice => {
            core::endpoint_slice(&mut context, value).map(|read| read.map(|read| Object::EndpointSlice(Arc::new(read))))
        }
        Kind::Node => core::node(&mut context, value).map(|read| Some(Object::Node(Arc::new(read)))),
        Kind::Pod => core::pod(&mut context, value).map(|read| Some(Object::Pod(Arc::new(read)))),
        Kind::DestinationRule => istio::destination_rule(&mut context, value)
            .map(|read| read.map(|read| Object::DestinationRule(Arc::new(read)))),
        Kind::VirtualService => istio::virtual_service(&mut context, value)
            .map(|read| read.map(|read| Object::VirtualService(Arc::new(read)))),
        Kind::MeshConfig => mesh::mesh_config(&mut context, value).map(|read| Some(Object::MeshConfig(Arc::new(read)))),
    };
    let object = match result {
        Ok(Some(object)) => Some(object),
        // Understood, and none of Portolan's business: as if it were not there.
        Ok(None) => return,
        Err(message) => {
            context.error(format!("{message}. Its last good state stays in force, if there was one"));
            None
        }
    };
    if contents.objects.iter().any(|read| read.key == key) {
        contents.findings.push(Finding::warning(&key, "is in this file twice; the last one counts"));
    }
    contents.objects.push(Read { key, object });
}

fn known_kind(group: &str, kind: &str, name: &NamespacedName) -> Option<Kind> {
    match (group, kind) {
        ("", "Service") => Some(Kind::Service),
        ("", "Node") => Some(Kind::Node),
        ("", "Pod") => Some(Kind::Pod),
        ("", "ConfigMap") if name.name == "istio" && name.namespace == MESH_NAMESPACE => Some(Kind::MeshConfig),
        ("discovery.k8s.io", "EndpointSlice") => Some(Kind::EndpointSlice),
        ("networking.istio.io", "DestinationRule") => Some(Kind::DestinationRule),
        ("networking.istio.io", "VirtualService") => Some(Kind::VirtualService),
        _ => None,
    }
}

/// What the readers of the kinds have at hand.
pub(super) struct Context<'a> {
    pub(super) reader: Reader,
    pub(super) name: NamespacedName,
    object: String,
    findings: &'a mut Vec<Finding>,
}

impl Context<'_> {
    /// Something in the object does not work.
    pub(super) fn error(&mut self, message: impl Into<String>) {
        self.findings.push(Finding::error(&self.object, message));
    }

    /// Something in the object is not honoured.
    pub(super) fn warning(&mut self, message: impl Into<String>) {
        self.findings.push(Finding::warning(&self.object, message));
    }

    /// Into a type, with the path of the field in the message of an error.
    pub(super) fn typed<T: DeserializeOwned>(&self, at: &str, value: Value) -> Result<T, String> {
        serde_path_to_error::deserialize(value).map_err(|error| located(at, &error))
    }

    /// Into a type that holds the honoured fields only: each other field becomes a finding, but for those
    /// that `silent` knows.
    pub(super) fn honoured<T: DeserializeOwned>(
        &mut self,
        at: &str,
        value: Value,
        silent: impl Fn(&str) -> bool,
    ) -> Result<T, String> {
        let mut ignored = Vec::new();
        let mut track = serde_path_to_error::Track::new();
        let tracked = serde_path_to_error::Deserializer::new(value, &mut track);
        let typed = serde_ignored::deserialize(tracked, |path| ignored.push(path.to_string().replace(".?", "")));
        let typed = typed.map_err(|error| {
            let path = track.path().to_string();
            if path == "." { format!("{at}: {error}") } else { format!("{at}.{path}: {error}") }
        })?;
        for path in ignored.iter().filter(|path| !silent(path)) {
            self.warning(format!("{at}.{path} is not honoured"));
        }
        Ok(typed)
    }
}

fn located(at: &str, error: &serde_path_to_error::Error<serde_json::Error>) -> String {
    let path = error.path().to_string();
    match (at, path.as_str()) {
        ("", _) => format!("{path}: {}", error.inner()),
        (_, ".") => format!("{at}: {}", error.inner()),
        _ => format!("{at}.{path}: {}", error.inner()),
    }
}
