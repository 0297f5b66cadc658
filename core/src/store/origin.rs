//! Where objects come from.

use std::{borrow::Borrow, fmt, sync::Arc};

use crate::model::{NamespacedName, Scope};

/// What holds objects: a file, or one object of an API. A source replaces the contents of an origin as a whole.
///
/// Written as the path relative to the configuration directory, or as `cluster/resource/namespace/name`. Findings show it as
/// their `source`. Clones share the text.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin(Arc<str>);

impl Origin {
    /// A file, by its path relative to the configuration directory.
    pub fn file(path: impl AsRef<str>) -> Self {
        Self(Arc::from(path.as_ref()))
    }

    /// An object of an API; `resource` is the plural, such as `endpointslices`.
    pub fn object(cluster: &str, resource: &str, name: &NamespacedName) -> Self {
        Self(format!("{cluster}/{resource}/{name}").into())
    }

    /// A whole resource of an API, for a resource that cannot be read.
    pub fn resource(cluster: &str, resource: &str) -> Self {
        Self(format!("{cluster}/{resource}").into())
    }

    /// Returns the text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns what the objects in it belong to: the cluster of its first folder, or the mesh.
    pub fn scope(&self) -> Scope {
        self.0.split_once('/').map_or(Scope::Mesh, |(cluster, _)| Scope::Cluster(cluster.to_owned()))
    }
}

impl Borrow<str> for Origin {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
