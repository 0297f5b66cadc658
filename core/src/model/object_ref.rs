//! What a finding is about.

use std::{cmp::Ordering, fmt};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{
    name::NamespacedName,
    object::{Kind, ObjectKey},
};

/// A reference to an object of Kubernetes or Istio, or to something of the agent such as a map.
///
/// Written `Kind namespace/name`, `Kind name` without a namespace, or `name` without a kind. That is its form in JSON, and
/// the order of references is that of their texts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ObjectRef {
    /// The kind; empty for a file.
    pub kind: String,
    /// The namespace; empty for what has none.
    pub namespace: String,
    /// The name, or the path of a file; empty for something of which there is only one.
    pub name: String,
}

impl ObjectRef {
    /// A reference to a namespaced object.
    pub fn new(kind: impl fmt::Display, name: &NamespacedName) -> Self {
        Self { kind: kind.to_string(), namespace: name.namespace.clone(), name: name.name.clone() }
    }

    /// A reference to something without a namespace.
    pub fn global(kind: impl fmt::Display, name: impl fmt::Display) -> Self {
        Self { kind: kind.to_string(), namespace: String::new(), name: name.to_string() }
    }

    /// A reference to a file, or to another origin of objects whose content cannot be told apart.
    pub fn file(path: impl fmt::Display) -> Self {
        Self::global("", path)
    }

    /// Returns the kind, if it is one that Portolan decodes.
    pub fn known_kind(&self) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.to_string() == self.kind)
    }

    /// Returns namespace and name.
    pub fn namespaced_name(&self) -> NamespacedName {
        NamespacedName::new(&self.namespace, &self.name)
    }

    /// The text, in parts.
    fn parts(&self) -> [&str; 5] {
        let space = if self.kind.is_empty() || self.name.is_empty() { "" } else { " " };
        let slash = if self.namespace.is_empty() { "" } else { "/" };
        [&self.kind, space, &self.namespace, slash, &self.name]
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.parts().into_iter().try_for_each(|part| f.write_str(part))
    }
}

impl Ord for ObjectRef {
    fn cmp(&self, other: &Self) -> Ordering {
        let bytes = |parts: [&str; 5]| parts.map(str::as_bytes).concat();
        bytes(self.parts()).cmp(&bytes(other.parts()))
    }
}

impl PartialOrd for ObjectRef {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl From<&ObjectKey> for ObjectRef {
    fn from(key: &ObjectKey) -> Self {
        Self::new(key.kind, &key.name)
    }
}

impl From<&Self> for ObjectRef {
    fn from(object: &Self) -> Self {
        object.clone()
    }
}

impl Serialize for ObjectRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ObjectRef {
    /// Reads the text that another process wrote. A single word is taken for a name.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let Some((kind, name)) = text.split_once(' ') else { return Ok(Self::file(text)) };
        Ok(match name.split_once('/') {
            Some((namespace, name)) => Self::new(kind, &NamespacedName::new(namespace, name)),
            None => Self::global(kind, name),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_stable_and_read_back() {
        let web = NamespacedName::new("default", "web");
        for (object, text) in [
            (ObjectRef::new("Service", &web), "Service default/web"),
            (ObjectRef::global("Node", "n1"), "Node n1"),
            (ObjectRef::global("Frontend", "[::1]:80"), "Frontend [::1]:80"),
            (ObjectRef::global("Kernel", ""), "Kernel"),
            (ObjectRef::file("c1/web.yaml"), "c1/web.yaml"),
        ] {
            assert_eq!(object.to_string(), text);
            let json = serde_json::to_string(&object).unwrap();
            assert_eq!(json, format!("{text:?}"));
            assert_eq!(serde_json::from_str::<ObjectRef>(&json).unwrap().to_string(), text);
        }
    }

    #[test]
    fn order_is_that_of_the_texts() {
        let texts = ["Service a-b/c", "Service a/b", "ServiceEntry a/b", "a.yaml"];
        let mut objects: Vec<ObjectRef> =
            texts.iter().rev().map(|text| serde_json::from_str(&format!("{text:?}")).unwrap()).collect();
        objects.sort();
        assert_eq!(objects.iter().map(ToString::to_string).collect::<Vec<_>>(), texts);
    }
}
