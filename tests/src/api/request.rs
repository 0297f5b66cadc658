//! Parsing of list and watch requests.

use std::collections::HashMap;

use hyper::{Uri, header::HeaderMap};
use serde_json::Value;

/// A list or watch request.
#[derive(Clone, Debug)]
pub(super) struct Query {
    /// Plural and group, as in `endpointslices.discovery.k8s.io`.
    pub(super) resource: String,
    /// Group and version, as in `discovery.k8s.io/v1`.
    pub(super) api_version: String,
    namespace: Option<String>,
    parameters: HashMap<String, String>,
    /// Whether the client asks for `PartialObjectMetadata`.
    pub(super) metadata_only: bool,
}

impl Query {
    /// Parses a request. Returns `None` if the path names no resource.
    pub(super) fn read(uri: &Uri, headers: &HeaderMap) -> Option<Self> {
        let parts: Vec<&str> = uri.path().split('/').filter(|part| !part.is_empty()).collect();
        let (group, version, rest) = match parts.as_slice() {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return None,
        };
        let (namespace, plural) = match rest {
            ["namespaces", namespace, plural] => (Some((*namespace).to_owned()), *plural),
            [plural] => (None, *plural),
            _ => return None,
        };
        let parameters = uri.query().unwrap_or_default().split('&').filter_map(|pair| {
            let (name, value) = pair.split_once('=')?;
            Some((name.to_owned(), decode(value)))
        });
        let accept = headers.get("accept").and_then(|accept| accept.to_str().ok()).unwrap_or_default();
        Some(Self {
            resource: if group.is_empty() { plural.to_owned() } else { format!("{plural}.{group}") },
            api_version: if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") },
            namespace,
            parameters: parameters.collect(),
            metadata_only: accept.contains("as=PartialObjectMetadata"),
        })
    }

    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.parameter(name)?.parse().ok()
    }

    pub(super) fn is_watch(&self) -> bool {
        matches!(self.parameter("watch"), Some("true" | "1"))
    }

    /// Returns the API group; empty for the core group.
    pub(super) fn group(&self) -> &str {
        self.resource.split_once('.').map_or("", |(_, group)| group)
    }

    /// Returns whether an object of this resource matches the namespace and the selectors.
    pub(super) fn wants(&self, object: &Value) -> bool {
        let metadata = &object["metadata"];
        let in_namespace = self.namespace.as_ref().is_none_or(|namespace| metadata["namespace"] == namespace.as_str());
        let terms = |selector: Option<&'_ str>| -> Vec<(String, Option<String>)> {
            let terms = selector.into_iter().flat_map(|selector| selector.split(','));
            let parts = terms.map(|term| term.split_once('=').map_or((term, None), |(key, value)| (key, Some(value))));
            parts.map(|(key, value)| (key.to_owned(), value.map(str::to_owned))).collect()
        };
        let labelled = |selector: Option<&str>, labels: &Value| {
            let mut terms = terms(selector).into_iter();
            terms.all(|(key, wanted)| labels[&key].as_str().is_some_and(|value| wanted.is_none_or(|it| it == value)))
        };
        let selected = |selector: Option<&str>, value: &dyn Fn(&str) -> Value| {
            terms(selector).into_iter().all(|(key, wanted)| value(&key) == wanted.unwrap_or_default())
        };
        in_namespace
            && labelled(self.parameter("labelSelector"), &metadata["labels"])
            && selected(self.parameter("fieldSelector"), &|key| {
                object.pointer(&format!("/{}", key.replace('.', "/"))).cloned().unwrap_or_default()
            })
    }

    /// Returns the object in the representation that the client asks for.
    pub(super) fn shown(&self, object: &Value) -> Value {
        if self.metadata_only {
            return serde_json::json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"]});
        }
        let mut shown = object.clone();
        shown["apiVersion"] = self.api_version.clone().into();
        shown
    }
}

fn decode(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), text.bytes());
    while let Some(byte) = rest.next() {
        match byte {
            b'%' => {
                let digits = [rest.next().unwrap_or_default(), rest.next().unwrap_or_default()];
                let digits = std::str::from_utf8(&digits).unwrap_or_default();
                bytes.push(u8::from_str_radix(digits, 16).unwrap_or_default());
            }
            b'+' => bytes.push(b' '),
            byte => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
