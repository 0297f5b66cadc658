//! The status of each source: for `get sources`, for the metrics, and to detect the end of the initial sync.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Mutex,
    time::{Duration, Instant, SystemTime},
};

use portolan_core::model::Finding;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// The status of one resource of one cluster, as `get sources` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceReport {
    /// The cluster ID; empty for the configuration directory.
    pub cluster: String,
    /// The resource, as `kubectl api-resources` names it (`plural.group`), or `files`.
    pub resource: String,
    /// The number of objects (or files) currently known.
    pub objects: usize,
    /// The `resourceVersion` up to which changes have been received; `None` for files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// The time of the last complete list or scan (RFC 3339); `None` before the first one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub synced: Option<String>,
    /// Seconds since the last sign of life: an object, a bookmark, or the start of a watch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_seconds: Option<f64>,
    /// The number of complete lists or scans so far.
    pub lists: u64,
    /// The current error; `None` while the source is healthy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The response to `get sources`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourcesReport {
    /// One entry per cluster and resource, sorted by both.
    pub sources: Vec<SourceReport>,
}

/// The reason why a source cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The API server does not have the resource, which is not an error.
    Missing,
    /// The source is not watched. A finding in [`Sources::notes`] gives the reason.
    Skipped,
    /// The API server denies access. Holds the error message.
    Forbidden(String),
    /// The source cannot be reached or sends invalid data. Holds the error message.
    Unreachable(String),
}

/// The status of one resource of one cluster.
#[derive(Clone, Debug, Default)]
pub struct Status {
    objects: usize,
    version: Option<String>,
    synced: Option<SystemTime>,
    last_seen: Option<Instant>,
    lists: u64,
    /// The current trouble and its start; `None` while the source is healthy.
    pub trouble: Option<(Trouble, Instant)>,
}

impl Status {
    /// Returns whether the source was read once or is known to be unavailable.
    fn is_settled(&self) -> bool {
        let known = |trouble: &Trouble| matches!(trouble, Trouble::Missing | Trouble::Skipped | Trouble::Forbidden(_));
        self.synced.is_some() || self.trouble.as_ref().is_some_and(|(trouble, _)| known(trouble))
    }
}

type ByResource = BTreeMap<(String, String), Status>;
type Notes = BTreeMap<String, Finding>;

/// The status of all sources. The sources write it; the admin API, metrics and readiness checks read it.
#[derive(Debug)]
pub struct Sources {
    all: Mutex<ByResource>,
    notes: Mutex<Notes>,
    changed: watch::Sender<()>,
    /// How often each cluster was marked healthy.
    recoveries: watch::Sender<HashMap<String, u64>>,
}

impl Default for Sources {
    fn default() -> Self {
        Self {
            all: Mutex::default(),
            notes: Mutex::default(),
            changed: watch::Sender::new(()),
            recoveries: watch::Sender::default(),
        }
    }
}

impl Sources {
    fn with<T>(&self, work: impl FnOnce(&mut ByResource) -> T) -> T {
        // Reusing a poisoned lock is safe: a panic leaves no invariant broken, only counters out of date.
        work(&mut self.all.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Updates a status and notifies watchers if it changed beyond its counters.
    fn status(&self, cluster: &str, resource: &str, work: impl FnOnce(&mut Status)) {
        let news = self.with(|all| {
            let mut new = false;
            let status = all.entry((cluster.to_owned(), resource.to_owned())).or_insert_with(|| {
                new = true;
                Status::default()
            });
            let before = (status.synced, status.trouble.clone());
            work(status);
            new || before != (status.synced, status.trouble.clone())
        });
        if news {
            self.changed.send_replace(());
        }
    }

    /// Sets the finding stored under the key `about`, or clears it if `finding` is `None`.
    pub fn note(&self, about: &str, finding: Option<Finding>) {
        let mut notes = self.notes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let before = match &finding {
            Some(finding) => notes.insert(about.to_owned(), finding.clone()),
            None => notes.remove(about),
        };
        drop(notes);
        if before != finding {
            self.changed.send_replace(());
        }
    }

    /// Returns all current findings about sources, ordered by key.
    pub fn notes(&self) -> Vec<Finding> {
        self.notes.lock().unwrap_or_else(std::sync::PoisonError::into_inner).values().cloned().collect()
    }

    /// Returns whether the resource is registered as a source.
    pub fn knows(&self, cluster: &str, resource: &str) -> bool {
        self.with(|all| all.contains_key(&(cluster.to_owned(), resource.to_owned())))
    }

    /// Registers a resource that will be read. Idempotent.
    pub fn expect(&self, cluster: &str, resource: &str) {
        self.status(cluster, resource, |_| {});
    }

    /// Records that data arrived, up to `version`, with `objects` objects now known. Clears any trouble.
    pub fn touch(&self, cluster: &str, resource: &str, objects: usize, version: &str) {
        self.status(cluster, resource, |status| {
            (status.objects, status.last_seen, status.trouble) = (objects, Some(Instant::now()), None);
            status.version = Some(version.to_owned());
        });
    }

    /// Records a complete list or scan. Clears any trouble.
    pub fn synced(&self, cluster: &str, resource: &str, objects: usize, version: Option<&str>) {
        self.status(cluster, resource, |status| {
            (status.objects, status.last_seen, status.trouble) = (objects, Some(Instant::now()), None);
            status.version = version.map(str::to_owned);
            status.synced = Some(SystemTime::now());
            status.lists += 1;
        });
    }

    /// Records that a source is in trouble. Keeps the start time of trouble that is already recorded.
    pub fn trouble(&self, cluster: &str, resource: &str, trouble: Trouble) {
        self.status(cluster, resource, |status| {
            let since = status.trouble.as_ref().map_or_else(Instant::now, |(_, since)| *since);
            if trouble == Trouble::Missing {
                status.objects = 0;
            }
            status.trouble = Some((trouble, since));
        });
    }

    /// Records that a cluster's API server works again, which wakes the waiters of [`Sources::recoveries`].
    pub fn mark_healthy(&self, cluster: &str) {
        self.recoveries.send_modify(|of| *of.entry(cluster.to_owned()).or_default() += 1);
    }

    /// Returns a future that completes when the cluster is next marked healthy after this call.
    pub fn recoveries(&self, cluster: &str) -> impl Future<Output = ()> + Send + use<> {
        let mut recoveries = self.recoveries.subscribe();
        let before = recoveries.borrow().get(cluster).copied();
        let cluster = cluster.to_owned();
        async move {
            // An error means that the agent is shutting down.
            let _ = recoveries.wait_for(|of| of.get(&cluster).copied() != before).await;
        }
    }

    /// Removes a resource of a cluster, or all of the cluster if `resource` is `None`.
    pub fn forget(&self, cluster: &str, resource: Option<&str>) {
        self.with(|all| all.retain(|(of, what), _| of != cluster || resource.is_some_and(|gone| gone != what)));
        self.changed.send_replace(());
    }

    /// Returns whether every resource of a cluster, except those in `except`, is settled: read once or known to be
    /// unavailable. Returns `false` for an unknown cluster.
    pub fn is_settled(&self, cluster: &str, except: &[String]) -> bool {
        self.with(|all| {
            let mut own = all.iter().filter(|((of, what), _)| of == cluster && !except.contains(what)).peekable();
            own.peek().is_some() && own.all(|(_, status)| status.is_settled())
        })
    }

    /// Returns whether the resource was read once or is known to be unavailable.
    pub fn has_settled(&self, cluster: &str, resource: &str) -> bool {
        let key = (cluster.to_owned(), resource.to_owned());
        self.with(|all| all.get(&key).is_some_and(Status::is_settled))
    }

    /// Returns whether the resource was read at least once.
    pub fn is_read(&self, cluster: &str, resource: &str) -> bool {
        let key = (cluster.to_owned(), resource.to_owned());
        self.with(|all| all.get(&key).is_some_and(|status| status.synced.is_some()))
    }

    /// Returns whether the resource was read and has no trouble now.
    pub fn is_well(&self, cluster: &str, resource: &str) -> bool {
        let key = (cluster.to_owned(), resource.to_owned());
        self.with(|all| all.get(&key).is_some_and(|status| status.synced.is_some() && status.trouble.is_none()))
    }

    /// Returns whether any resource of a cluster was never read and is forbidden or skipped.
    pub fn is_refused(&self, cluster: &str) -> bool {
        let refused = |status: &Status| {
            status.synced.is_none() && matches!(status.trouble, Some((Trouble::Forbidden(_) | Trouble::Skipped, _)))
        };
        self.with(|all| all.iter().any(|((of, _), status)| of == cluster && refused(status)))
    }

    /// Returns each source as cluster, resource and status, ordered by cluster and resource.
    pub fn all(&self) -> Vec<(String, String, Status)> {
        self.with(|all| {
            all.iter().map(|((cluster, what), status)| (cluster.clone(), what.clone(), status.clone())).collect()
        })
    }

    /// Returns the IDs of all clusters that have sources, sorted.
    pub fn clusters(&self) -> Vec<String> {
        self.with(|all| {
            let mut clusters: Vec<String> = all.keys().map(|(cluster, _)| cluster.clone()).collect();
            clusters.dedup();
            clusters
        })
    }

    /// Returns a receiver that is notified of each later change, except changes of counters.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Returns the report that `get sources` shows.
    pub fn report(&self) -> Vec<SourceReport> {
        let shown = |(cluster, resource, status): (String, String, Status)| SourceReport {
            cluster,
            resource,
            objects: status.objects,
            version: status.version,
            synced: status.synced.map(|at| humantime::format_rfc3339_millis(at).to_string()),
            lag_seconds: status.last_seen.map(|at| at.elapsed().as_secs_f64()),
            lists: status.lists,
            error: status.trouble.map(|(trouble, _)| match trouble {
                Trouble::Missing => "is not installed".to_owned(),
                Trouble::Skipped => "not watched: see the findings".to_owned(),
                Trouble::Forbidden(why) | Trouble::Unreachable(why) => why,
            }),
        };
        self.all().into_iter().map(shown).collect()
    }

    /// Returns how long a cluster has been unreachable: the shortest outage among its resources.
    ///
    /// Returns `None` while at least one of its resources is healthy.
    pub fn out_of_reach(&self, cluster: &str) -> Option<Duration> {
        self.with(|all| {
            let own = all.iter().filter(|((of, _), _)| of == cluster);
            let mut shortest = None;
            for (_, status) in own {
                match &status.trouble {
                    Some((Trouble::Unreachable(_) | Trouble::Forbidden(_), since)) => {
                        shortest = Some(shortest.unwrap_or(Duration::MAX).min(since.elapsed()));
                    }
                    Some(_) => {}
                    None => return None,
                }
            }
            shortest
        })
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[test]
    fn cluster_is_settled_once_every_resource_is_synced_or_unavailable() {
        let sources = Sources::default();
        assert!(!sources.is_settled("c1", &[]));
        for what in ["services", "virtualservices", "pods"] {
            sources.expect("c1", what);
        }
        sources.synced("c1", "services", 3, Some("7"));
        sources.trouble("c1", "virtualservices", Trouble::Missing);
        assert!(!sources.is_settled("c1", &[]));
        sources.trouble("c1", "pods", Trouble::Unreachable("refused".to_owned()));
        assert!(!sources.is_settled("c1", &[]));
        sources.trouble("c1", "pods", Trouble::Forbidden("no".to_owned()));
        assert!(sources.is_settled("c1", &[]));
        let report = sources.report();
        assert_eq!((report[1].objects, report[1].lists, &report[1].error), (3, 1, &None));
    }

    #[test]
    fn recovery_wakes_only_waiters_of_that_cluster() {
        let sources = Sources::default();
        sources.mark_healthy("c2");
        let mut waiting = std::pin::pin!(sources.recoveries("c2"));
        sources.mark_healthy("c3");
        sources.touch("c2", "services", 1, "8");
        assert_eq!(waiting.as_mut().now_or_never(), None);
        sources.mark_healthy("c2");
        assert_eq!(waiting.as_mut().now_or_never(), Some(()));
    }

    #[test]
    fn cluster_is_out_of_reach_only_while_every_resource_is_unreachable() {
        let sources = Sources::default();
        sources.synced("c2", "services", 1, None);
        sources.synced("c2", "nodes", 1, None);
        sources.trouble("c2", "nodes", Trouble::Unreachable("refused".to_owned()));
        assert_eq!(sources.out_of_reach("c2"), None);
        sources.trouble("c2", "services", Trouble::Unreachable("refused".to_owned()));
        assert!(sources.out_of_reach("c2").is_some());
        sources.touch("c2", "services", 1, "8");
        assert_eq!(sources.out_of_reach("c2"), None);
    }
}
