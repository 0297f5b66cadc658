//! Kubernetes API servers: the local cluster's, and those of the remote clusters that Secrets name.
//!
//! Each object is an origin of its own, `cluster/resource/namespace/name`.
//! The decoders are the same as for files.

mod apiserver_guard;
mod body_limit;
mod client;
mod cluster;
mod event_recorder;
mod list_watch;
mod opt_out;
mod raw_object;
mod remote_clusters;
mod resources;
mod sink;

use std::{
    collections::{BTreeSet, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use kube::Client;
use portolan_core::{
    decode::DecodeOptions,
    model::{Code, Finding, Kind, ObjectRef},
    store::{Contents, Origin, Update},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval},
};

use self::{
    client::DirectAddress,
    cluster::Cluster,
    event_recorder::EventRecorder,
    list_watch::{ListWatcher, Selectors},
    opt_out::Lists,
    remote_clusters::{LABEL, SecretSink},
    resources::{LABELLED_NAMESPACES, OWN_PODS, PODS, SECRETS},
};
use super::status::{Sources, Trouble};
use crate::{
    error::{Context as _, Result, bail},
    opt_out::{self as opted_out, OptOutRegistry},
};

/// Maximum time that unreachable remote clusters delay the initial sync, after the local cluster is synced.
const MAX_REMOTE_WAIT: Duration = Duration::from_secs(30);
/// Interval of the checks for clusters that have been unreachable for too long.
const TICK: Duration = Duration::from_secs(1);

/// How to reach and watch API servers.
#[derive(Clone, Debug)]
pub struct Options {
    /// ID of the local cluster.
    pub cluster: String,
    /// Name of this node, to find its opted-out pods and to report Events. Empty if unknown.
    pub node: String,
    /// Kubeconfig for the local API server; `None` to use the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// Address of the local API server, which overrides the one in the configuration.
    pub server: Option<http::Uri>,
    /// Whether to watch the remote clusters that Secrets name.
    pub others: bool,
    /// Maximum interval between full lists.
    pub resync: Duration,
    /// Timeout of a watch request, after which the server ends the watch.
    pub watch_timeout: Duration,
    /// How long the endpoints of an unreachable remote cluster stay in use.
    pub remote_grace: Duration,
    /// Options for decoding objects.
    pub reader: DecodeOptions,
}

/// The context that all watches share.
#[derive(Clone)]
struct WatchContext {
    cluster: String,
    reader: DecodeOptions,
    resync: Duration,
    watch_timeout: Duration,
    updates: mpsc::Sender<Vec<Update>>,
    sources: Arc<Sources>,
    wants: Arc<PodLabelDemand>,
    direct: DirectAddress,
}

/// The objects that need pod labels. Pods are watched only while there are any.
#[derive(Debug)]
struct PodLabelDemand {
    asking: Mutex<HashSet<String>>,
    wanted: watch::Sender<bool>,
}

impl PodLabelDemand {
    fn new() -> Self {
        Self { asking: Mutex::default(), wanted: watch::Sender::new(false) }
    }

    /// Records whether the object `origin` needs pod labels.
    fn note(&self, origin: &str, asks: bool) {
        let mut asking = self.asking.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let new = if asks { asking.insert(origin.to_owned()) } else { asking.remove(origin) };
        if new {
            let any = !asking.is_empty();
            self.wanted.send_if_modified(|wanted| std::mem::replace(wanted, any) != any);
        }
    }

    fn follow(&self) -> watch::Receiver<bool> {
        self.wanted.subscribe()
    }

    fn any(&self) -> bool {
        *self.wanted.borrow()
    }
}

/// A client for the local API server.
pub struct ApiServer {
    client: Client,
    direct: DirectAddress,
}

/// Creates the client for the local API server. Sends no request yet.
///
/// # Errors
/// Returns an error if there is no configuration for the API server, or if it is invalid.
pub async fn connect(options: &Options) -> Result<ApiServer> {
    let direct = DirectAddress::default();
    let client = client::own(options.kubeconfig.as_deref(), options.server.as_ref(), &direct).await?;
    Ok(ApiServer { client, direct })
}

/// Watches the local cluster and all remote clusters until the receiver of `updates` is gone.
///
/// Findings received from `findings` become Events on their objects.
/// The opted-out pods of this node go to `registry`.
///
/// # Errors
/// Returns an error if a background task ends.
pub async fn run(
    options: Options,
    ApiServer { client, direct }: ApiServer,
    sources: Arc<Sources>,
    updates: mpsc::Sender<Vec<Update>>,
    findings: Option<mpsc::Receiver<Finding>>,
    registry: Arc<OptOutRegistry>,
) -> Result<()> {
    let context = WatchContext {
        cluster: options.cluster.clone(),
        reader: options.reader,
        resync: options.resync,
        watch_timeout: options.watch_timeout,
        updates: updates.clone(),
        sources: Arc::clone(&sources),
        wants: Arc::new(PodLabelDemand::new()),
        direct,
    };
    tracing::info!(cluster = options.cluster, "watching the API server");
    let _own = Cluster::start(&context, &options.cluster, &client);
    let mut others = JoinSet::new();
    if let Some(findings) = findings {
        let (client, cluster, node) = (client.clone(), options.cluster.clone(), options.node.clone());
        others.spawn(EventRecorder { client, cluster, node }.run(findings));
    }
    if options.others {
        let (sink, secrets) = SecretSink::new(&context);
        let cluster = options.cluster.clone();
        sources.expect(&cluster, &SECRETS.name());
        let selectors = Selectors { labels: Some(LABEL), ..Selectors::default() };
        let client = client.clone();
        others.spawn(
            ListWatcher { context: context.clone(), cluster, resource: &SECRETS, selectors, client, sink }.run(),
        );
        others.spawn(remote_clusters::run(context.clone(), secrets));
    }

    if options.node.is_empty() {
        // Without a node name there are no pods of this node that could opt out.
        registry.want(opted_out::ByUid::new());
    } else {
        let lists = Lists::new(registry, Arc::clone(&sources));
        let own_pods = Selectors { fields: Some(format!("spec.nodeName={}", options.node)), ..Selectors::default() };
        let labelled = Selectors { labels: Some(opted_out::LABEL), ..Selectors::default() };
        for (resource, selectors, sink) in
            [(&OWN_PODS, own_pods, lists.pods()), (&LABELLED_NAMESPACES, labelled, lists.namespaces())]
        {
            let (context, cluster, client) = (context.clone(), options.cluster.clone(), client.clone());
            sources.expect(&cluster, &resource.name());
            others.spawn(ListWatcher { context, cluster, resource, selectors, client, sink }.run());
        }
    }

    let mut overseer = Overseer {
        options,
        sources,
        context,
        began: Instant::now(),
        own: None,
        unknown: BTreeSet::new(),
        synced: false,
        lost: BTreeSet::new(),
        reported: Vec::new(),
    };
    let mut changes = overseer.sources.changes();
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            changed = changes.changed() => changed.ok().context("all watches ended")?,
            _ = ticks.tick() => {}
            Some(ended) = others.join_next() => {
                ended?;
                bail!("a background watch ended unexpectedly (Secrets, remote clusters, opt-outs or Events)");
            }
            () = updates.closed() => return Ok(()),
        }
        let news = overseer.check();
        if !news.is_empty() && updates.send(news).await.is_err() {
            return Ok(());
        }
    }
}

/// Returns the origin that stands for a whole cluster while it is not fully read.
fn unread_origin(id: &str) -> Origin {
    Origin::resource(id, "")
}

/// Returns the update that marks a cluster as not fully read: it may have endpoints that are not known.
fn unread_marker(id: &str) -> Update {
    let contents = Contents { sole_kind: Some(Kind::EndpointSlice), ..Contents::default() };
    Update::Replace { origin: unread_origin(id), contents }
}

/// Wildcard in place of a cluster ID: any remote cluster that may exist. No cluster has this name.
const ANY: &str = "*";

/// Returns the names of the local cluster's resources that do not define services.
fn auxiliary_resources() -> [String; 3] {
    [SECRETS.name(), OWN_PODS.name(), LABELLED_NAMESPACES.name()]
}

/// Derives cluster-wide updates from the status of all sources: the end of the initial sync, findings, and clusters
/// that have been unreachable for too long.
struct Overseer {
    options: Options,
    sources: Arc<Sources>,
    context: WatchContext,
    began: Instant,
    /// When the local cluster was fully read for the first time.
    own: Option<Instant>,
    synced: bool,
    /// Remote clusters that were not fully read in time for the initial sync, and still are not.
    unknown: BTreeSet<String>,
    /// Clusters that have been unreachable for longer than `remote_grace`.
    lost: BTreeSet<String>,
    /// The findings that were sent last.
    reported: Vec<Finding>,
}

impl Overseer {
    /// Returns the updates that a change of the sources' status calls for.
    fn check(&mut self) -> Vec<Update> {
        let mut news = Vec::new();
        let mut others = self.sources.clusters();
        others.retain(|id| *id != self.options.cluster);
        let others = others.as_slice();
        for id in others {
            let away = self.sources.out_of_reach(id).is_some_and(|time| time >= self.options.remote_grace);
            if away != self.lost.contains(id) {
                if away {
                    tracing::warn!(
                        cluster = id,
                        "cluster unreachable for longer than --remote-grace: its endpoints receive no connections"
                    );
                    self.lost.insert(id.clone());
                } else {
                    tracing::info!(cluster = id, "cluster reachable again");
                    self.lost.remove(id);
                }
                news.push(Update::ClusterUnreachable { cluster: id.clone(), unreachable: away });
            }
        }
        for id in self.lost.extract_if(.., |id| !others.contains(id)) {
            news.push(Update::ClusterUnreachable { cluster: id, unreachable: false });
        }
        let findings = self.findings(others);
        if findings != self.reported {
            if !self.synced {
                // Findings are not published before the initial sync completes, so log them here.
                for finding in findings.iter().filter(|finding| !self.reported.contains(finding)) {
                    tracing::warn!("{} {}: {}", finding.code, finding.object, finding.message);
                }
            }
            self.reported.clone_from(&findings);
            news.push(Update::SourceFindings(findings));
        }
        self.report_sync(others, &mut news);
        news
    }

    /// Returns whether all resources that define a cluster's services are settled.
    fn is_settled(&self, id: &str) -> bool {
        let pods = !self.context.wants.any() || self.sources.knows(id, &PODS.name());
        self.sources.is_settled(id, &auxiliary_resources()) && pods
    }

    /// Returns whether the resources that do not define services are settled: Secrets of remote clusters, and opt-outs.
    fn auxiliary_settled(&self) -> bool {
        let own = &self.options.cluster;
        auxiliary_resources().iter().all(|name| !self.sources.knows(own, name) || self.sources.has_settled(own, name))
    }

    /// Returns whether the set of remote clusters is not known yet.
    fn lacks_secrets(&self) -> bool {
        self.options.others && !self.sources.is_read(&self.options.cluster, &SECRETS.name())
    }

    /// Returns whether a part of a cluster has not been read, or is forbidden.
    fn lacks(&self, id: &str) -> bool {
        !self.is_settled(id) || self.sources.is_refused(id)
    }

    /// Returns whether the time limit for the initial sync of remote clusters has passed.
    fn is_late(&self) -> bool {
        self.own.is_some_and(|own| own.elapsed() >= MAX_REMOTE_WAIT)
    }

    /// Reports the end of the initial sync, once. Also marks the remote clusters that are missing from it, and clears
    /// each mark when the cluster is read.
    fn report_sync(&mut self, others: &[String], news: &mut Vec<Update>) {
        if self.own.is_none() && self.is_settled(&self.options.cluster) {
            self.own = Some(Instant::now());
        }
        let all = || self.auxiliary_settled() && others.iter().all(|id| self.is_settled(id));
        if !self.synced && self.own.is_some() && (self.is_late() || all()) {
            self.synced = true;
            self.unknown = others.iter().filter(|id| self.lacks(id)).cloned().collect();
            self.unknown.extend(self.lacks_secrets().then(|| ANY.to_owned()));
            // What the previous agent published of these clusters stays in effect.
            news.extend(self.unknown.iter().map(|id| unread_marker(id)));
            tracing::info!(took = ?self.began.elapsed(), without = ?self.unknown, "initial sync complete");
            news.push(Update::Synced);
        }
        // Clusters that have been named since are not fully read yet.
        if self.unknown.contains(ANY) {
            let is_new = |id: &&String| self.lacks(id) && !self.unknown.contains(*id);
            let new: Vec<String> = others.iter().filter(is_new).cloned().collect();
            news.extend(new.iter().map(|id| unread_marker(id)));
            self.unknown.extend(new);
        }
        let is_known = |id: &String| match id.as_str() {
            ANY => !self.lacks_secrets(),
            id => !others.iter().any(|other| other == id) || !self.lacks(id),
        };
        let known: Vec<String> = self.unknown.iter().filter(|id| is_known(id)).cloned().collect();
        for id in known {
            news.push(Update::Remove { origin: unread_origin(&id) });
            self.unknown.remove(&id);
        }
    }

    fn findings(&self, others: &[String]) -> Vec<Finding> {
        let mut findings = self.sources.notes();
        let mut unreachable: Option<(String, String)> = None;
        let late = self.is_late();
        let mut seen = BTreeSet::new();
        for (cluster, resource, status) in self.sources.all() {
            let object = ObjectRef::global("Cluster", &cluster);
            match &status.trouble {
                Some((Trouble::Forbidden(why), _)) => {
                    let message = format!(
                        "{why}; its last known state stays in effect; grant list and watch on {resource}, as in deploy/"
                    );
                    findings.push(Finding::new(Code::SourceForbidden, object, message).in_cluster(&cluster));
                }
                Some((Trouble::Unreachable(why), _)) if seen.insert(cluster.clone()) => {
                    unreachable = Some((cluster, format!("{resource}: {why}")));
                }
                None if late && !self.sources.is_settled(&cluster, &[]) && seen.insert(cluster.clone()) => {
                    unreachable = Some((cluster, format!("{resource}: no response yet")));
                }
                _ => {}
            }
            if let Some((cluster, why)) = unreachable.take() {
                let stays = if self.lost.contains(&cluster) {
                    "unreachable for longer than --remote-grace, so its endpoints receive no connections"
                } else if others.contains(&cluster) {
                    "its last known state stays in effect for --remote-grace"
                } else {
                    "its last known state stays in effect"
                };
                let message = format!("cannot read from the API server: {why}; {stays}");
                let finding = Finding::new(Code::SourceUnreachable, ObjectRef::global("Cluster", &cluster), message);
                findings.push(finding.in_cluster(&cluster));
            }
        }
        findings.sort();
        findings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_watched_while_an_object_needs_their_labels() {
        let wants = PodLabelDemand::new();
        wants.note("a", true);
        wants.note("b", true);
        wants.note("a", false);
        assert!(wants.any());
        wants.note("b", false);
        wants.note("b", false);
        assert!(!wants.any());
    }
}
