//! Undecoded API objects.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::{ApiResource, DynamicResourceScope, PartialObjectMeta, Resource};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

/// Metadata fields that can change although nothing of interest to Portolan has changed.
const BOOKKEEPING: [&str; 7] =
    ["managedFields", "resourceVersion", "generation", "uid", "creationTimestamp", "selfLink", "ownerReferences"];
/// Annotations that repeat the object or change often.
const NOISE: [&str; 2] =
    ["kubectl.kubernetes.io/last-applied-configuration", "endpoints.kubernetes.io/last-change-trigger-time"];

/// An API object of any kind, with any content.
///
/// Deserialization accepts malformed objects, so that one of them does not make its whole list unreadable.
/// The decoder of the kind reports what is wrong.
#[derive(Clone, Debug)]
pub(super) struct Raw {
    /// Name, namespace and version. With metadata-only reads, also the annotations and the UID.
    metadata: ObjectMeta,
    /// The whole object without `status`, bookkeeping and noise.
    object: Value,
}

impl Raw {
    fn new(mut object: Value) -> Self {
        let text =
            |field: &str| object.pointer(&format!("/metadata/{field}")).and_then(Value::as_str).map(str::to_owned);
        let metadata = ObjectMeta {
            name: text("name"),
            namespace: text("namespace"),
            resource_version: text("resourceVersion"),
            ..ObjectMeta::default()
        };
        if let Some(fields) = object.as_object_mut() {
            fields.remove("status");
        }
        if let Some(fields) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            fields.retain(|field, _| !BOOKKEEPING.contains(&field.as_str()));
        }
        if let Some(annotations) = object.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) {
            annotations.retain(|annotation, _| !NOISE.contains(&annotation.as_str()));
        }
        Self { metadata, object }
    }

    /// Creates an object from a metadata-only read. Keeps the name, namespace, labels, annotations, UID and version.
    pub(super) fn of_metadata(object: PartialObjectMeta<Self>) -> Self {
        let ObjectMeta { name, namespace, labels, annotations, uid, resource_version, .. } = object.metadata;
        let metadata = ObjectMeta { name, namespace, annotations, uid, resource_version, ..ObjectMeta::default() };
        let object = json!({"metadata": {"name": metadata.name, "namespace": metadata.namespace, "labels": labels}});
        Self { metadata, object }
    }

    /// Returns `namespace/name`. Either part is empty if the object lacks it.
    pub(super) fn name(&self) -> String {
        let namespace = self.metadata.namespace.as_deref().unwrap_or_default();
        format!("{namespace}/{}", self.metadata.name.as_deref().unwrap_or_default())
    }

    /// Returns the namespace and the name, each empty if missing.
    pub(super) fn parts(&self) -> (String, String) {
        (self.metadata.namespace.clone().unwrap_or_default(), self.metadata.name.clone().unwrap_or_default())
    }

    /// Returns the value of a label; `None` if it is missing or not a string.
    pub(super) fn label(&self, name: &str) -> Option<String> {
        let labels = self.object.pointer("/metadata/labels")?;
        labels.get(name)?.as_str().map(str::to_owned)
    }

    /// Returns the UID. Empty unless only the metadata was read.
    pub(super) fn uid(&self) -> String {
        self.metadata.uid.clone().unwrap_or_default()
    }

    /// Returns whether the annotation is present. Always `false` unless only the metadata was read.
    pub(super) fn has_annotation(&self, name: &str) -> bool {
        self.metadata.annotations.as_ref().is_some_and(|annotations| annotations.contains_key(name))
    }

    /// Returns a copy of a top-level field; null if it is missing.
    pub(super) fn field(&self, name: &str) -> Value {
        self.object.get(name).cloned().unwrap_or_default()
    }

    pub(super) fn version(&self) -> Option<&str> {
        self.metadata.resource_version.as_deref()
    }

    /// Returns the object as it would be in a file. Adds `apiVersion` and `kind`, which list items lack.
    pub(super) fn into_value(self, resource: &ApiResource) -> Value {
        let mut object = self.object;
        if let Some(fields) = object.as_object_mut() {
            fields.insert("apiVersion".to_owned(), Value::String(resource.api_version.clone()));
            fields.insert("kind".to_owned(), Value::String(resource.kind.clone()));
        }
        object
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(Self::new)
    }
}

impl Resource for Raw {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(resource: &ApiResource) -> Cow<'_, str> {
        resource.kind.as_str().into()
    }

    fn group(resource: &ApiResource) -> Cow<'_, str> {
        resource.group.as_str().into()
    }

    fn version(resource: &ApiResource) -> Cow<'_, str> {
        resource.version.as_str().into()
    }

    fn api_version(resource: &ApiResource) -> Cow<'_, str> {
        resource.api_version.as_str().into()
    }

    fn plural(resource: &ApiResource) -> Cow<'_, str> {
        resource.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bookkeeping_is_stripped_and_malformed_objects_are_accepted() {
        let read = |value: Value| serde_json::from_value::<Raw>(value).unwrap();
        let of = |version: &str| {
            read(json!({"metadata": {"name": "a", "namespace": "n", "resourceVersion": version, "labels": {"a": "b"},
                "managedFields": [1], "annotations": {"kubectl.kubernetes.io/last-applied-configuration": version}},
                "spec": {"x": 1}, "status": {"y": version}}))
        };
        let (one, other) = (of("1"), of("2"));
        assert_eq!((one.version(), other.version()), (Some("1"), Some("2")));
        assert_eq!(one.name(), "n/a");
        assert_eq!(one.object, other.object);
        assert_eq!(read(json!({"metadata": {"name": 7, "labels": 3}})).name(), "/");
        assert_eq!(read(json!([1])).name(), "/");
    }
}
