//! Decoding of YAML documents and API objects into the domain model.

mod annotations;
mod context;
mod destination_rule;
mod kubernetes;
mod locality_lb;
mod mesh_config;
mod probe;
mod service_entry;
mod virtual_service;
mod yaml;

use std::{collections::BTreeSet, sync::Arc};

use serde_json::Value;

use self::context::{Context, Invalid};
use crate::{
    model::{Code, Finding, Kind, NamespacedName, Object, ObjectKey, ObjectRef, Position, Scope},
    store::{Contents, Decoded},
};

pub use self::context::{ClusterRanges, DecodeOptions, fingerprint};

/// The maximum number of bytes of a file to parse again to find positions.
/// Each lookup parses its document up to the position.
const READ_AGAIN: usize = 16 << 20;

/// Decodes all objects of a file. It never fails: problems become findings.
pub fn read_text(reader: DecodeOptions, scope: &Scope, origin: &str, text: &str) -> Contents {
    let mut contents = Contents { complete: true, fingerprint: fingerprint(text), ..Contents::default() };
    let documents = yaml::split(text);
    contents.empty = documents.is_empty();
    if text.is_empty() {
        // An empty file is more likely an interrupted write than intended.
        contents.complete = false;
        let message = "the file is empty; delete it if that is intended";
        contents.findings.push(Finding::new(Code::EmptyFile, ObjectRef::file(origin), message));
    }
    let mut resync = 0;
    let mut seen = BTreeSet::new();
    for (line, document) in documents {
        let position = |(row, column): (usize, usize)| {
            let text = document.lines().nth(row.checked_sub(1)?)?.chars().take(200).collect();
            Some(Position { line: line + row - 1, column, text })
        };
        let value = match yaml::parse(&document) {
            Ok(value) => value,
            Err(error) => {
                contents.complete = false;
                let message = format!("{}. Objects that this file defined before stay in effect", error.message);
                let mut finding = Finding::new(Code::Syntax, ObjectRef::file(origin), message);
                finding.position = error.at.and_then(position);
                contents.findings.push(finding);
                continue;
            }
        };
        for (path, value) in yaml::flatten(value) {
            let known = contents.findings.len();
            read_object(reader, scope, origin, value, &mut seen, &mut contents);
            for finding in contents.findings[known..].iter_mut().filter(|finding| !finding.field.is_empty()) {
                resync += document.len();
                if resync <= READ_AGAIN {
                    finding.position = yaml::locate(&document, &format!("{path}{}", finding.field)).and_then(position);
                }
            }
        }
    }
    for finding in &mut contents.findings {
        *finding = finding.clone().from_source(origin);
    }
    contents
}

/// Decodes one object from an API. It never fails: problems become findings.
pub fn read_value(reader: DecodeOptions, scope: &Scope, origin: &str, value: Value) -> Contents {
    let mut contents = Contents { complete: true, ..Contents::default() };
    // The keys are sorted, so equal objects have equal texts.
    contents.fingerprint = fingerprint(&value.to_string());
    read_object(reader, scope, origin, value, &mut BTreeSet::new(), &mut contents);
    for finding in &mut contents.findings {
        origin.clone_into(&mut finding.source);
    }
    contents
}

/// The namespace of Istio's own configuration.
pub const MESH_NAMESPACE: &str = "istio-system";

fn read_object(
    reader: DecodeOptions,
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
        contents.complete = false;
        let message = "the document has no `kind` or no `metadata.name`, so it is not a Kubernetes object";
        contents.findings.push(Finding::new(Code::NotAnObject, ObjectRef::file(origin), message));
        return;
    }
    let Some(known) = known_kind(group, &kind, &name) else {
        let (code, message) = match kind.as_str() {
            "ConfigMap" if name.name == "istio" => (Code::Misplaced, "is not in istio-system and is ignored"),
            "Endpoints" => (Code::UnusedKind, "is not supported; Portolan uses EndpointSlices instead"),
            _ => (Code::UnusedKind, "Portolan does not use this kind"),
        };
        contents.findings.push(Finding::new(code, ObjectRef::new(&kind, &name), message));
        return;
    };
    let is_cluster_owned =
        matches!(known, Kind::Service | Kind::EndpointSlice | Kind::Node | Kind::Pod | Kind::Namespace);
    if is_cluster_owned && *scope == Scope::Mesh {
        let message = "belongs to a cluster and is ignored here; move it to the directory of its cluster";
        contents.findings.push(Finding::new(Code::Misplaced, ObjectRef::new(&kind, &name), message));
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
    let mut context = Context { reader, scope, name, object: (&key).into(), findings: &mut contents.findings };
    let object = match object(&mut context, known, value) {
        Ok(Some(object)) => Some(object),
        // The object is valid but not relevant, as if it did not exist.
        Ok(None) => return,
        Err(Invalid { field, message }) => {
            let message = format!("{message}. The object is ignored; a running agent keeps its last valid version");
            context.finding(Code::InvalidObject, field, message);
            None
        }
    };
    if !seen.insert(key.clone()) {
        contents.findings.push(Finding::new(
            Code::Repeated,
            &key,
            "is in this file twice; the last one takes precedence",
        ));
    }
    contents.objects.push(Decoded { key, object });
}

fn object(context: &mut Context<'_>, kind: Kind, value: Value) -> Result<Option<Object>, Invalid> {
    annotations::check(context, kind, &value);
    Ok(match kind {
        Kind::Service => kubernetes::service(context, value)?.map(Arc::new).map(Object::Service),
        Kind::EndpointSlice => kubernetes::endpoint_slice(context, value)?.map(Arc::new).map(Object::EndpointSlice),
        Kind::Node => Some(Object::Node(Arc::new(kubernetes::node(context, value)?))),
        Kind::Pod => Some(Object::Pod(Arc::new(kubernetes::pod(context, value)?))),
        Kind::Namespace => Some(Object::Namespace(Arc::new(kubernetes::namespace(context, value)?))),
        Kind::ServiceEntry => service_entry::service_entry(context, value)?.map(Arc::new).map(Object::ServiceEntry),
        Kind::WorkloadEntry => Some(Object::WorkloadEntry(Arc::new(service_entry::workload_entry(context, value)?))),
        Kind::DestinationRule => {
            destination_rule::destination_rule(context, value)?.map(Arc::new).map(Object::DestinationRule)
        }
        Kind::VirtualService => {
            virtual_service::virtual_service(context, value)?.map(Arc::new).map(Object::VirtualService)
        }
        Kind::MeshConfig => Some(Object::MeshConfig(Arc::new(mesh_config::mesh_config(context, value)?))),
    })
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
