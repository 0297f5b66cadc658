//! The updates that sources send to the store.

use std::collections::HashSet;

use super::origin::Origin;
use crate::model::{Finding, Kind, Object, ObjectKey};

/// The result of decoding one object.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    /// The identity of the object.
    pub key: ObjectKey,
    /// The object; `None` if it is invalid, in which case the store keeps the last valid version.
    pub object: Option<Object>,
}

/// The complete current contents of one origin: a file, or an object of an API.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Contents {
    /// The objects in the origin, including invalid ones.
    pub objects: Vec<Decoded>,
    /// Problems of the origin and its objects.
    pub findings: Vec<Finding>,
    /// A hash of the input, valid or not.
    pub fingerprint: u64,
    /// Whether the origin contains no documents, only comments and whitespace.
    pub empty: bool,
    /// Whether all objects could be identified.
    /// If false, an object that is missing may be in the unreadable part, so the store keeps it.
    pub complete: bool,
    /// The only kind of object that the origin can contain; `None` if unknown.
    pub sole_kind: Option<Kind>,
}

/// A change that a source reports to the store.
#[derive(Clone, Debug)]
pub enum Update {
    /// Replaces the contents of an origin.
    Replace {
        /// What holds them.
        origin: Origin,
        /// What replaces everything that the origin held.
        contents: Contents,
    },
    /// Removes an origin and its objects.
    Remove {
        /// What no longer exists.
        origin: Origin,
    },
    /// Removes all origins with a common prefix, except some, and their objects.
    Prune {
        /// The prefix of the origins to remove.
        prefix: String,
        /// The origins to keep.
        except: HashSet<Origin>,
    },
    /// Marks a cluster as unreachable, so that its endpoints count as unhealthy, or as reachable again.
    ClusterUnreachable {
        /// The ID of the cluster.
        cluster: String,
        /// Whether the cluster is unreachable.
        unreachable: bool,
    },
    /// Replaces the findings about the source itself. An empty list means that the source is healthy.
    SourceFindings(Vec<Finding>),
    /// Reports that the initial sync is complete.
    Synced,
}
