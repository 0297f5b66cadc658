//! The pods to exclude, and those that are excluded.
//! The source sets the former, the enforcer applies them, and the admin API reports the latter.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// The opt-out label of a pod, or of a namespace for all of its pods. `"true"` excludes the pods.
///
/// `"false"` on a pod overrides the label of its namespace.
pub const LABEL: &str = "portolan.io/opt-out";

/// The object whose label excludes a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AskedBy {
    /// The pod itself.
    Pod,
    /// The pod's namespace.
    Namespace,
}

/// A pod that opts out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pod {
    /// The namespace of the pod.
    pub namespace: String,
    /// The name of the pod, without the namespace.
    pub name: String,
    /// The object whose label excludes the pod.
    pub asked_by: AskedBy,
    /// The pod's excluded cgroups, relative to the served one.
    ///
    /// Empty while the pod is not excluded yet, for example because the kubelet has not created its cgroup.
    #[serde(default)]
    pub cgroups: Vec<String>,
}

/// The response to `get opt-outs`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The pods of this node that opt out, ordered by UID.
    pub pods: Vec<Pod>,
}

/// Pods by UID, which is part of the name of a pod's cgroup.
pub type ByUid = BTreeMap<String, Pod>;

/// The pods to exclude, and those that are excluded.
///
/// The source sets the former, the [`Enforcer`](super::Enforcer) applies them, and the admin API reports the latter.
#[derive(Debug, Default)]
pub struct OptOutRegistry {
    pub(super) wanted: watch::Sender<Option<ByUid>>,
    /// The pods as the enforcer last applied them, with their cgroups.
    done: Mutex<ByUid>,
}

impl OptOutRegistry {
    /// Sets the pods to exclude, in place of all previous ones.
    ///
    /// Until the first call, the pods that the previous agent excluded stay excluded.
    pub fn want(&self, pods: ByUid) {
        self.wanted.send_if_modified(|wanted| {
            let new = wanted.as_ref() != Some(&pods);
            if new {
                *wanted = Some(pods);
            }
            new
        });
    }

    /// Returns the report that `get opt-outs` shows.
    pub fn report(&self) -> Report {
        Report { pods: self.done().values().cloned().collect() }
    }

    pub(super) fn done(&self) -> MutexGuard<'_, ByUid> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
