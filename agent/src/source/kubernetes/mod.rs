//! API servers: the own cluster's, and those of others that Secrets name.
//!
//! Each object is an origin of its own, `cluster/resource/namespace/name`; what it means is for the same readers as in files.

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

use anyhow::{Context as _, Result, bail};
use kube::Client;
use portolan_core::{
    decode::DecodeOptions,
    model::{Code, Finding, Kind},
    store::{Contents, Update},
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
    list_watch::{ListWatcher, Only},
    opt_out::Lists,
    remote_clusters::{LABEL, SecretSink},
    resources::{LABELLED_NAMESPACES, OWN_PODS, PODS, SECRETS},
};
use super::status::{Sources, Trouble};
use crate::opt_out::{self as opted_out, OptOutRegistry};

/// Other clusters that cannot be reached hold up the beginning for no longer than this.
const FIRST: Duration = Duration::from_secs(30);
/// How often it is looked whether a cluster has been away for too long.
const TICK: Duration = Duration::from_secs(1);

/// How API servers are reached and followed.
#[derive(Clone, Debug)]
pub struct Options {
    /// Id of the own cluster.
    pub cluster: String,
    /// The node: whose pods may be left alone, and for Events.
    pub node: String,
    /// How the own API server is reached; without it, as a pod reaches it.
    pub kubeconfig: Option<PathBuf>,
    /// The own API server, in place of the one that the configuration names.
    pub server: Option<http::Uri>,
    /// Whether other clusters are followed, as Secrets name them.
    pub others: bool,
    /// How often everything is read again as a whole, at the latest.
    pub resync: Duration,
    /// How long a watch goes on.
    pub watch_timeout: Duration,
    /// How long the endpoints of another cluster that is out of reach are believed.
    pub remote_grace: Duration,
    /// How objects are read.
    pub reader: DecodeOptions,
}

/// What all who follow something have at hand.
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

/// Who asks for the labels of pods: nobody reads pods for nothing.
#[derive(Debug)]
struct PodLabelDemand {
    asking: Mutex<HashSet<String>>,
    wanted: watch::Sender<bool>,
}

impl PodLabelDemand {
    fn new() -> Self {
        Self { asking: Mutex::default(), wanted: watch::Sender::new(false) }
    }

    /// An object asks for them, or does not.
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

/// The way to the own API server.
pub struct ApiServer {
    client: Client,
    direct: DirectAddress,
}

/// Finds the way to the own API server; nothing is asked of it yet.
///
/// # Errors
/// Nothing says how to reach it, or what does makes no sense.
pub async fn connect(options: &Options) -> Result<ApiServer> {
    let direct = DirectAddress::default();
    let client = client::own(options.kubeconfig.as_deref(), options.server.as_ref(), &direct).await?;
    Ok(ApiServer { client, direct })
}

/// Follows the own cluster and all others, until the receiver is gone.
///
/// `told`: findings that are to become Events on their objects; `registry`: where pods are named that are to be left alone.
///
/// # Errors
/// A part of it has ended.
pub async fn run(
    options: Options,
    ApiServer { client, direct }: ApiServer,
    sources: Arc<Sources>,
    updates: mpsc::Sender<Vec<Update>>,
    told: Option<mpsc::Receiver<Finding>>,
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
    tracing::info!(cluster = options.cluster, "reading from the API server");
    let _own = Cluster::start(&context, &options.cluster, &client);
    let mut others = JoinSet::new();
    if let Some(told) = told {
        let (client, cluster, node) = (client.clone(), options.cluster.clone(), options.node.clone());
        others.spawn(EventRecorder { client, cluster, node }.run(told));
    }
    if options.others {
        let (sink, secrets) = SecretSink::new(&context);
        let cluster = options.cluster.clone();
        sources.expect(&cluster, &SECRETS.name());
        let sole_kind = Only { labels: Some(LABEL), ..Only::default() };
        let client = client.clone();
        others.spawn(
            ListWatcher { context: context.clone(), cluster, resource: &SECRETS, sole_kind, client, sink }.run(),
        );
        others.spawn(remote_clusters::run(context.clone(), secrets));
    }

    if options.node.is_empty() {
        // Clients are in a place, and on no node that could have pods.
        registry.want(opted_out::ByUid::new());
    } else {
        let lists = Lists::new(registry, Arc::clone(&sources));
        let own_pods = Only { fields: Some(format!("spec.nodeName={}", options.node)), ..Only::default() };
        let labelled = Only { labels: Some(opted_out::LABEL), ..Only::default() };
        for (resource, sole_kind, sink) in
            [(&OWN_PODS, own_pods, lists.pods()), (&LABELLED_NAMESPACES, labelled, lists.namespaces())]
        {
            let (context, cluster, client) = (context.clone(), options.cluster.clone(), client.clone());
            sources.expect(&cluster, &resource.name());
            others.spawn(ListWatcher { context, cluster, resource, sole_kind, client, sink }.run());
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
        said: Vec::new(),
    };
    let mut changes = overseer.sources.changes();
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            changed = changes.changed() => changed.context("nobody follows anything any more")?,
            _ = ticks.tick() => {}
            Some(ended) = others.join_next() => {
                ended?;
                bail!("who follows Secrets, other clusters or pods to be left alone has ended");
            }
            () = updates.closed() => return Ok(()),
        }
        let news = overseer.look();
        if !news.is_empty() && updates.send(news).await.is_err() {
            return Ok(());
        }
    }
}

/// Where the store is told that nothing is known of a cluster.
fn doubt(id: &str) -> String {
    format!("{id}/")
}

/// What the store is told: it may have endpoints.
fn doubted(id: &str) -> Update {
    let contents = Contents { sole_kind: Some(Kind::EndpointSlice), ..Contents::default() };
    Update::Replace { origin: doubt(id), contents }
}

/// In place of a cluster's id: any that may be there. No cluster is called so.
const ANY: &str = "*";

/// What is read of the own cluster that its services are not made of.
fn aside() -> [String; 3] {
    [SECRETS.name(), OWN_PODS.name(), LABELLED_NAMESPACES.name()]
}

/// Sees to it that what is known is said as a whole: that everything was read, what is wrong, who has been away for too long.
struct Overseer {
    options: Options,
    sources: Arc<Sources>,
    context: WatchContext,
    began: Instant,
    /// When all of the own cluster was read.
    own: Option<Instant>,
    synced: bool,
    /// Clusters that were not waited for, and of which nothing is known yet.
    unknown: BTreeSet<String>,
    /// Clusters whose endpoints are not believed any more.
    lost: BTreeSet<String>,
    said: Vec<Finding>,
}

impl Overseer {
    fn look(&mut self) -> Vec<Update> {
        let mut news = Vec::new();
        let mut others = self.sources.clusters();
        others.retain(|id| *id != self.options.cluster);
        let others = others.as_slice();
        for id in others {
            let away = self.sources.out_of_reach(id).is_some_and(|time| time >= self.options.remote_grace);
            if away != self.lost.contains(id) {
                if away {
                    tracing::warn!(cluster = id, "out of reach for too long: its endpoints get no connections");
                    self.lost.insert(id.clone());
                } else {
                    tracing::info!(cluster = id, "within reach again");
                    self.lost.remove(id);
                }
                news.push(Update::ClusterUnreachable { cluster: id.clone(), unreachable: away });
            }
        }
        for id in self.lost.extract_if(.., |id| !others.contains(id)) {
            news.push(Update::ClusterUnreachable { cluster: id, unreachable: false });
        }
        let findings = self.findings(others);
        if findings != self.said {
            if !self.synced {
                // Nothing is published yet that would tell of them.
                for finding in findings.iter().filter(|finding| !self.said.contains(finding)) {
                    tracing::warn!("{} {}: {}", finding.code, finding.object, finding.message);
                }
            }
            self.said.clone_from(&findings);
            news.push(Update::SourceFindings(findings));
        }
        self.init(others, &mut news);
        news
    }

    /// Whether all of a cluster was read that its services are made of.
    fn is_settled(&self, id: &str) -> bool {
        let pods = !self.context.wants.any() || self.sources.knows(id, &PODS.name());
        self.sources.is_settled(id, &aside()) && pods
    }

    /// Whether all has been read that services are not made of: who the other clusters are, who is left alone.
    fn is_settled_aside(&self) -> bool {
        let own = &self.options.cluster;
        aside().iter().all(|name| !self.sources.knows(own, name) || self.sources.has_settled(own, name))
    }

    /// Whether there is no knowing which other clusters there are.
    fn lacks_secrets(&self) -> bool {
        self.options.others && !self.sources.is_read(&self.options.cluster, &SECRETS.name())
    }

    /// Whether something of a cluster is not known.
    fn lacks(&self, id: &str) -> bool {
        !self.is_settled(id) || self.sources.is_refused(id)
    }

    /// Whether the others have been waited for as long as they may be.
    fn is_late(&self) -> bool {
        self.own.is_some_and(|own| own.elapsed() >= FIRST)
    }

    /// Says once that everything was read; and what of it was not, and when it is after all.
    fn init(&mut self, others: &[String], news: &mut Vec<Update>) {
        if self.own.is_none() && self.is_settled(&self.options.cluster) {
            self.own = Some(Instant::now());
        }
        let all = || self.is_settled_aside() && others.iter().all(|id| self.is_settled(id));
        if !self.synced && self.own.is_some() && (self.is_late() || all()) {
            self.synced = true;
            self.unknown = others.iter().filter(|id| self.lacks(id)).cloned().collect();
            self.unknown.extend(self.lacks_secrets().then(|| ANY.to_owned()));
            // What a former agent has published of them stays.
            news.extend(self.unknown.iter().map(|id| doubted(id)));
            tracing::info!(took = ?self.began.elapsed(), without = ?self.unknown, "everything has been read");
            news.push(Update::Synced);
        }
        // Those that are named now are not known yet.
        if self.unknown.contains(ANY) {
            let is_new = |id: &&String| self.lacks(id) && !self.unknown.contains(*id);
            let new: Vec<String> = others.iter().filter(is_new).cloned().collect();
            news.extend(new.iter().map(|id| doubted(id)));
            self.unknown.extend(new);
        }
        let is_known = |id: &String| match id.as_str() {
            ANY => !self.lacks_secrets(),
            id => !others.iter().any(|other| other == id) || !self.lacks(id),
        };
        let known: Vec<String> = self.unknown.iter().filter(|id| is_known(id)).cloned().collect();
        for id in known {
            news.push(Update::Remove { origin: doubt(&id) });
            self.unknown.remove(&id);
        }
    }

    fn findings(&self, others: &[String]) -> Vec<Finding> {
        let mut findings = self.sources.notes();
        let mut unreachable: Option<(String, String)> = None;
        let late = self.is_late();
        let mut seen = BTreeSet::new();
        for (cluster, resource, status) in self.sources.all() {
            let object = format!("Cluster {cluster}");
            match &status.trouble {
                Some((Trouble::Forbidden(why), _)) => {
                    let message = format!(
                        "{why}. What it last said stays in force; grant list and watch of {resource}, as deploy/ does"
                    );
                    findings.push(Finding::new(Code::SourceForbidden, object, message).in_cluster(&cluster));
                }
                Some((Trouble::Unreachable(why), _)) if seen.insert(cluster.clone()) => {
                    unreachable = Some((cluster, format!("{resource}: {why}")));
                }
                None if late && !self.sources.is_settled(&cluster, &[]) && seen.insert(cluster.clone()) => {
                    unreachable = Some((cluster, format!("{resource}: nothing has come yet")));
                }
                _ => {}
            }
            if let Some((cluster, why)) = unreachable.take() {
                let stays = if self.lost.contains(&cluster) {
                    "It has been away for too long, so its endpoints get no connections"
                } else if others.contains(&cluster) {
                    "What it last said stays in force for a while (--remote-grace)"
                } else {
                    "What it last said stays in force"
                };
                let message = format!("the API server cannot be read: {why}. {stays}");
                let finding = Finding::new(Code::SourceUnreachable, format!("Cluster {cluster}"), message);
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
    fn pods_are_wanted_while_somebody_asks() {
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
