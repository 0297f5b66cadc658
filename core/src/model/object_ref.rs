//! What a finding is about.

use std::{
    cmp::Ordering,
    fmt,
    hash::{Hash, Hasher},
};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::name::NamespacedName;

/// A reference to an object of Kubernetes or Istio, or to something of the agent such as a map.
///
/// Written `Kind namespace/name`, `Kind name` without a namespace, or `name` without a kind. That is its form in JSON, and
/// references are compared and ordered by their texts.
#[derive(Clone, Debug, Default)]
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

impl PartialEq for ObjectRef {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for ObjectRef {}

impl Hash for ObjectRef {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.parts().into_iter().for_each(|part| state.write(part.as_bytes()));
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
    /// Reads the text that another process wrote. A kind is a word in upper camel case; all else is taken for a name.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let is_kind = |word: &str| {
            word.starts_with(|c: char| c.is_ascii_uppercase()) && word.chars().all(|c| c.is_ascii_alphanumeric())
        };
        let Some((kind, name)) = text.split_once(' ').filter(|(kind, _)| is_kind(kind)) else {
            return Ok(Self::file(text));
        };
        Ok(match name.split_once('/') {
            Some((namespace, name)) => Self::new(kind, &NamespacedName::new(namespace, name)),
            None => Self::global(kind, name),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};

    use super::*;

    fn hash(object: &ObjectRef) -> u64 {
        BuildHasherDefault::<DefaultHasher>::default().hash_one(object)
    }

    #[test]
    fn text_is_stable_and_read_back() {
        let web = NamespacedName::new("default", "web");
        for (object, text) in [
            (ObjectRef::new("Service", &web), "Service default/web"),
            (ObjectRef::global("Node", "n1"), "Node n1"),
            (ObjectRef::global("Frontend", "[::1]:80"), "Frontend [::1]:80"),
            (ObjectRef::global("Kernel", ""), "Kernel"),
            (ObjectRef::file("c1/web.yaml"), "c1/web.yaml"),
            (ObjectRef::file("c1/my rules.yaml"), "c1/my rules.yaml"),
        ] {
            assert_eq!(object.to_string(), text);
            let json = serde_json::to_string(&object).unwrap();
            assert_eq!(json, format!("{text:?}"));
            let read: ObjectRef = serde_json::from_str(&json).unwrap();
            assert_eq!(read.to_string(), text);
            assert_eq!(read, object, "equal texts are equal references");
            assert_eq!(hash(&read), hash(&object));
            assert!(!read.kind.contains(['/', '.']), "{read:?}");
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
