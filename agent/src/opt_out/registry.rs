//! Which pods are to be excluded, and which are. The source writes, the enforcer acts, everyone may look.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// The label, of a pod or of a namespace for all of its pods: `"true"`, or `"false"` for a pod of a namespace that has it.
pub const LABEL: &str = "portolan.io/opt-out";

/// Who has asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AskedBy {
    /// The pod's own label.
    Pod,
    /// The label of its namespace.
    Namespace,
}

/// A pod that is to be left alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Who has asked for it.
    pub asked_by: AskedBy,
    /// Its cgroups, relative to the one that is served: it is left alone where there is one. Its containers may not have begun.
    #[serde(default)]
    pub cgroups: Vec<String>,
}

/// The answer of `get opt-outs`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Each pod of this node.
    pub pods: Vec<Pod>,
}

/// Pods by the id that their cgroups are named after.
pub type ByUid = BTreeMap<String, Pod>;

/// Who is to be left alone, and who is. The source writes, the [`Enforcer`] does it, everybody may look.
#[derive(Debug, Default)]
pub struct OptOutRegistry {
    pub(super) wanted: watch::Sender<Option<ByUid>>,
    /// As far as it was done.
    done: Mutex<ByUid>,
}

impl OptOutRegistry {
    /// These are to be left alone, and no others. Until this is said for the first time, whom a former agent left alone stays so.
    pub fn want(&self, pods: ByUid) {
        self.wanted.send_if_modified(|wanted| {
            let new = wanted.as_ref() != Some(&pods);
            if new {
                *wanted = Some(pods);
            }
            new
        });
    }

    /// As `get opt-outs` shows it.
    pub fn report(&self) -> Report {
        Report { pods: self.done().values().cloned().collect() }
    }

    pub(super) fn done(&self) -> MutexGuard<'_, ByUid> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
