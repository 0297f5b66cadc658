//! How each source is doing: what `get sources` and the metrics show, and whether everything has been read once.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Mutex,
    time::{Duration, Instant, SystemTime},
};

use portolan_core::model::Finding;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// One kind of objects of one cluster, as `get sources` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceReport {
    /// The cluster; empty for what is of the whole mesh.
    pub cluster: String,
    /// What is read: a resource as `kubectl api-resources` names it, or `files`.
    pub resource: String,
    /// Objects that are held.
    pub objects: usize,
    /// How far it has come: the server's own `resourceVersion`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// When everything was last read as a whole (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub synced: Option<String>,
    /// Seconds since anything was last heard: an object, a bookmark, or that a watch has begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_seconds: Option<f64>,
    /// How often everything was read as a whole.
    pub lists: u64,
    /// What is wrong now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The answer of `get sources`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourcesReport {
    /// Each kind of objects of each cluster.
    pub sources: Vec<SourceReport>,
}

/// What is wrong with a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The resource is not there: nothing is wrong.
    Missing,
    /// It is not read, for a reason that was noted.
    Skipped,
    /// It may not be read.
    Forbidden(String),
    /// It cannot be reached, or what comes from there makes no sense.
    Unreachable(String),
}

/// One kind of objects of one cluster.
#[derive(Clone, Debug, Default)]
pub struct Status {
    objects: usize,
    version: Option<String>,
    synced: Option<SystemTime>,
    touch: Option<Instant>,
    lists: u64,
    /// What is wrong now, and since when.
    pub trouble: Option<(Trouble, Instant)>,
}

impl Status {
    /// Whether all has been said that there is to say for now.
    fn is_settled(&self) -> bool {
        let known = |trouble: &Trouble| matches!(trouble, Trouble::Missing | Trouble::Skipped | Trouble::Forbidden(_));
        self.synced.is_some() || self.trouble.as_ref().is_some_and(|(trouble, _)| known(trouble))
    }
}

type ByResource = BTreeMap<(String, String), Status>;
type Notes = BTreeMap<String, Finding>;

/// All of them. Who reads writes here, and everybody may look.
#[derive(Debug)]
pub struct Sources {
    all: Mutex<ByResource>,
    notes: Mutex<Notes>,
    changed: watch::Sender<()>,
    /// How often something of a cluster was proven to be well.
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
        // A panic of another holder leaves figures, nothing that could be half done.
        work(&mut self.all.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Has everybody told where something is otherwise than before, beside the figures.
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

    /// What people should know of what is read, beside how it is doing; `None`: no longer.
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

    /// All that was noted.
    pub fn notes(&self) -> Vec<Finding> {
        self.notes.lock().unwrap_or_else(std::sync::PoisonError::into_inner).values().cloned().collect()
    }

    /// Whether this is read.
    pub fn knows(&self, cluster: &str, resource: &str) -> bool {
        self.with(|all| all.contains_key(&(cluster.to_owned(), resource.to_owned())))
    }

    /// This will be read.
    pub fn expect(&self, cluster: &str, resource: &str) {
        self.status(cluster, resource, |_| {});
    }

    /// Something came from there, up to this version; so many objects are held now.
    pub fn touch(&self, cluster: &str, resource: &str, objects: usize, version: &str) {
        self.status(cluster, resource, |status| {
            (status.objects, status.touch, status.trouble) = (objects, Some(Instant::now()), None);
            status.version = Some(version.to_owned());
        });
    }

    /// Everything was read as a whole.
    pub fn synced(&self, cluster: &str, resource: &str, objects: usize, version: Option<&str>) {
        self.status(cluster, resource, |status| {
            (status.objects, status.touch, status.trouble) = (objects, Some(Instant::now()), None);
            status.version = version.map(str::to_owned);
            status.synced = Some(SystemTime::now());
            status.lists += 1;
        });
    }

    /// Something is wrong there.
    pub fn trouble(&self, cluster: &str, resource: &str, trouble: Trouble) {
        self.status(cluster, resource, |status| {
            let since = status.trouble.as_ref().map_or_else(Instant::now, |(_, since)| *since);
            if trouble == Trouble::Missing {
                status.objects = 0;
            }
            status.trouble = Some((trouble, since));
        });
    }

    /// A cluster's server does what it is asked: who waits for it need not wait any longer.
    pub fn mark_healthy(&self, cluster: &str) {
        self.recoveries.send_modify(|of| *of.entry(cluster.to_owned()).or_default() += 1);
    }

    /// Waits until something of a cluster is proven to be well, from this call on.
    pub fn recoveries(&self, cluster: &str) -> impl Future<Output = ()> + Send + use<> {
        let mut recoveries = self.recoveries.subscribe();
        let before = recoveries.borrow().get(cluster).copied();
        let cluster = cluster.to_owned();
        async move {
            // An error means that the agent is ending.
            let _ = recoveries.wait_for(|of| of.get(&cluster).copied() != before).await;
        }
    }

    /// This is no longer read; `None`: nothing of the cluster.
    pub fn forget(&self, cluster: &str, resource: Option<&str>) {
        self.with(|all| all.retain(|(of, what), _| of != cluster || resource.is_some_and(|gone| gone != what)));
        self.changed.send_replace(());
    }

    /// Whether all that is read of a cluster was read once, but for some.
    pub fn is_settled(&self, cluster: &str, but: &[String]) -> bool {
        self.with(|all| {
            let mut own = all.iter().filter(|((of, what), _)| of == cluster && !but.contains(what)).peekable();
            own.peek().is_some() && own.all(|(_, status)| status.is_settled())
        })
    }

    /// Whether this was read once, or cannot be.
    pub fn has_settled(&self, cluster: &str, resource: &str) -> bool {
        let key = (cluster.to_owned(), resource.to_owned());
        self.with(|all| all.get(&key).is_some_and(Status::is_settled))
    }

    /// Whether this was read once.
    pub fn is_read(&self, cluster: &str, resource: &str) -> bool {
        let key = (cluster.to_owned(), resource.to_owned());
        self.with(|all| all.get(&key).is_some_and(|status| status.synced.is_some()))
    }

    /// Whether nothing is wrong with this now.
    pub fn is_well(&self, cluster: &str, resource: &str) -> bool {
        let key = (cluster.to_owned(), resource.to_owned());
        self.with(|all| all.get(&key).is_some_and(|status| status.synced.is_some() && status.trouble.is_none()))
    }

    /// Whether something of a cluster may not be read, and never was.
    pub fn is_refused(&self, cluster: &str) -> bool {
        let refused = |status: &Status| {
            status.synced.is_none() && matches!(status.trouble, Some((Trouble::Forbidden(_) | Trouble::Skipped, _)))
        };
        self.with(|all| all.iter().any(|((of, _), status)| of == cluster && refused(status)))
    }

    /// Everything, by cluster and resource.
    pub fn all(&self) -> Vec<(String, String, Status)> {
        self.with(|all| {
            all.iter().map(|((cluster, what), status)| (cluster.clone(), what.clone(), status.clone())).collect()
        })
    }

    /// The clusters of which something is read.
    pub fn clusters(&self) -> Vec<String> {
        self.with(|all| {
            let mut clusters: Vec<String> = all.keys().map(|(cluster, _)| cluster.clone()).collect();
            clusters.dedup();
            clusters
        })
    }

    /// Tells of every change from now on.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// As `get sources` shows it.
    pub fn report(&self) -> Vec<SourceReport> {
        let shown = |(cluster, resource, status): (String, String, Status)| SourceReport {
            cluster,
            resource,
            objects: status.objects,
            version: status.version,
            synced: status.synced.map(|at| humantime::format_rfc3339_millis(at).to_string()),
            lag_seconds: status.touch.map(|touch| touch.elapsed().as_secs_f64()),
            lists: status.lists,
            error: status.trouble.map(|(trouble, _)| match trouble {
                Trouble::Missing => "is not installed".to_owned(),
                Trouble::Skipped => "cannot be followed: see the findings".to_owned(),
                Trouble::Forbidden(why) | Trouble::Unreachable(why) => why,
            }),
        };
        self.all().into_iter().map(shown).collect()
    }

    /// How long a cluster has been out of reach: the shortest time of all that is read of it, and nothing while anything of it is well.
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
    fn a_cluster_is_settled_once_all_of_it_was_read_or_cannot_be() {
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
    fn who_waits_for_a_cluster_hears_that_it_is_proven_and_of_no_other() {
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
    fn a_cluster_is_out_of_reach_when_nothing_of_it_is_heard() {
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
