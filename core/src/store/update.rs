//! What a source reports to the store.

use std::collections::HashSet;

use crate::model::{Finding, Kind, Object, ObjectKey};

/// What was read of one object.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    /// Which object it is.
    pub key: ObjectKey,
    /// The object; `None` where it is broken, in which case its last good state stays.
    pub object: Option<Object>,
}

/// All that one origin (a file, or an object of an API) holds now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Contents {
    /// Its objects.
    pub objects: Vec<Decoded>,
    /// What is wrong with them.
    pub findings: Vec<Finding>,
    /// Fingerprint of all that was read, sound or not.
    pub fingerprint: u64,
    /// Whether there is nothing at all in it but comments.
    pub empty: bool,
    /// Whether everything could at least be told apart. Where not, an object that is missing may be in the
    /// broken part, and stays.
    pub complete: bool,
    /// The only kind of objects that it can hold, where that is known.
    pub sole_kind: Option<Kind>,
}

/// A change that a source reports.
#[derive(Clone, Debug)]
pub enum Update {
    /// The origin now holds this.
    Replace {
        /// The file, relative to the configuration directory; or `cluster/resource/namespace/name`.
        origin: String,
        /// What it holds.
        contents: Contents,
    },
    /// The origin is gone, and its objects with it.
    Remove {
        /// Which one.
        origin: String,
    },
    /// All origins whose names begin so are gone but for some, and their objects with them.
    Prune {
        /// How they begin.
        prefix: String,
        /// Those that are not gone.
        except: HashSet<String>,
    },
    /// A cluster has been out of reach for so long that its endpoints are not believed any more; or no longer is.
    ClusterUnreachable {
        /// Its id.
        cluster: String,
        /// Whether it is.
        unreachable: bool,
    },
    /// The source itself is in trouble (or, with an empty list, no longer is).
    SourceFindings(Vec<Finding>),
    /// All that there is has been reported once.
    Synced,
}
