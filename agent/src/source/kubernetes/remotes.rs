//! Other clusters: those that Secrets of Istio's name, as they come, change and go.

use std::{
    collections::{BTreeMap, HashSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
};

use k8s_openapi::ByteString;
use kube::{Client, api::ListParams, runtime::watcher::DefaultBackoff};
use tokio::{sync::watch, task::JoinHandle, time::sleep};

use super::{
    Feed, client,
    cluster::Cluster,
    follow::{Sink, describe},
    object::Raw,
    resources::RESOURCES,
};
use crate::{
    model::{Code, Finding},
    source::{Trouble, read::MESH_NAMESPACE},
};

/// The label of Secrets that hold the kubeconfigs of other clusters.
pub(super) const LABEL: &str = "istio/multiCluster=true";

/// What Secrets say: by the name of each, kubeconfigs by the id of their cluster.
pub(super) type Secrets = BTreeMap<String, BTreeMap<String, String>>;

/// Takes the Secrets.
pub(super) struct SecretSink {
    feed: Feed,
    secrets: Secrets,
    listed: Option<HashSet<String>>,
    wanted: watch::Sender<Secrets>,
}

impl SecretSink {
    pub(super) fn new(feed: &Feed) -> (Self, watch::Receiver<Secrets>) {
        let (wanted, told) = watch::channel(Secrets::new());
        (Self { feed: feed.clone(), secrets: Secrets::new(), listed: None, wanted }, told)
    }

    fn take(&mut self, object: Raw) {
        let name = object.name();
        let note = format!("secret/{name}");
        match serde_json::from_value::<Option<BTreeMap<String, ByteString>>>(object.field("data")) {
            Ok(data) => {
                let data = data.unwrap_or_default().into_iter();
                let kubeconfigs = data.map(|(id, text)| (id, String::from_utf8_lossy(&text.0).into_owned())).collect();
                self.secrets.insert(name, kubeconfigs);
                self.feed.sources.note(&note, None);
            }
            Err(error) => {
                let message = format!("cannot be read: {error}. The clusters that it last named stay");
                self.feed
                    .sources
                    .note(&note, Some(Finding::new(Code::RemoteCluster, format!("Secret {name}"), message)));
            }
        }
    }
}

impl Sink for SecretSink {
    fn begin(&mut self) {
        self.listed = Some(HashSet::new());
    }

    fn item(&mut self, object: Raw) {
        if let Some(listed) = &mut self.listed {
            listed.insert(object.name());
        }
        self.take(object);
    }

    fn end(&mut self) {
        if let Some(listed) = self.listed.take() {
            self.secrets.retain(|name, _| listed.contains(name));
        }
    }

    fn changed(&mut self, object: Raw) {
        self.take(object);
    }

    fn gone(&mut self, object: &Raw) {
        self.secrets.remove(&object.name());
    }

    fn unknown(&mut self) {}

    fn held(&self) -> usize {
        self.secrets.len()
    }

    async fn flush(&mut self) -> bool {
        // Before anybody asks whether all of them were read.
        for id in self.secrets.values().flat_map(BTreeMap::keys).filter(|id| **id != self.feed.cluster) {
            self.feed.sources.expect(id, &RESOURCES[0].name());
        }
        self.wanted.send_if_modified(|before| {
            let new = *before != self.secrets;
            if new {
                before.clone_from(&self.secrets);
            }
            new
        });
        !self.wanted.is_closed()
    }
}

/// A cluster that is followed: the Secret that names it, and how it is told of another kubeconfig.
struct Remote {
    secret: String,
    kubeconfig: watch::Sender<String>,
    task: JoinHandle<()>,
}

/// Follows other clusters, as Secrets name them.
pub(super) async fn run(feed: Feed, mut secrets: watch::Receiver<Secrets>) {
    let mut running: BTreeMap<String, Remote> = BTreeMap::new();
    loop {
        let wanted = choose(&feed, &running, &secrets.borrow_and_update());
        let gone: Vec<String> = running.keys().filter(|id| !wanted.contains_key(*id)).cloned().collect();
        for id in gone {
            let Some(Remote { task, kubeconfig, .. }) = running.remove(&id) else { continue };
            tracing::info!(cluster = id, "no Secret names it any more");
            drop(kubeconfig);
            // A cluster that comes back at once shall not be forgotten after that.
            let _ = task.await;
        }
        for (id, (secret, text)) in wanted {
            match running.get_mut(&id) {
                Some(remote) => {
                    remote.secret = secret;
                    remote.kubeconfig.send_if_modified(|before| {
                        let new = *before != text;
                        if new {
                            *before = text;
                        }
                        new
                    });
                }
                None => {
                    tracing::info!(cluster = id, secret, "another cluster");
                    let (kubeconfig, told) = watch::channel(text);
                    let task = tokio::spawn(follow(feed.clone(), id.clone(), secret.clone(), told));
                    running.insert(id, Remote { secret, kubeconfig, task });
                }
            }
        }
        if secrets.changed().await.is_err() {
            return;
        }
    }
}

/// Whose kubeconfig counts for each cluster: who has named it already, or else the first by name.
fn choose(feed: &Feed, running: &BTreeMap<String, Remote>, secrets: &Secrets) -> BTreeMap<String, (String, String)> {
    let mut chosen: BTreeMap<String, (String, String)> = BTreeMap::new();
    let mut doubles = Vec::new();
    let all = || secrets.iter().flat_map(|(secret, of)| of.iter().map(move |(id, text)| (secret, id, text)));
    let holds = |id: &String, secret: &String| running.get(id).is_some_and(|remote| remote.secret == *secret);
    let (first, then): (Vec<_>, Vec<_>) = all().partition(|(secret, id, _)| holds(id, secret));
    for (secret, id, text) in first.into_iter().chain(then) {
        if *id == feed.cluster {
            continue;
        }
        match chosen.get(id) {
            Some((other, _)) => {
                doubles.push(format!("cluster {id} is named by {secret} as well as by {other}, which counts"))
            }
            None => drop(chosen.insert(id.clone(), (secret.clone(), text.clone()))),
        }
    }
    let finding = (!doubles.is_empty())
        .then(|| Finding::new(Code::RemoteCluster, format!("Secrets of {MESH_NAMESPACE}"), doubles.join("; ")));
    feed.sources.note("double", finding);
    chosen
}

/// Follows one cluster, until nobody names it any more.
async fn follow(feed: Feed, id: String, secret: String, mut kubeconfig: watch::Receiver<String>) {
    let note = format!("remote/{id}");
    let find = |message: String| {
        Finding::new(Code::RemoteCluster, format!("Secret {secret}"), format!("cluster {id} {message}"))
    };
    let mut cluster: Option<Cluster> = None;
    let mut backoff = DefaultBackoff::default();
    let mut in_force = 0;
    loop {
        let text = kubeconfig.borrow_and_update().clone();
        let print = fingerprint(&text);
        let stays = if cluster.is_some() { "; the former kubeconfig stays in force" } else { "" };
        let found = if print == in_force {
            // It was changed, and changed back.
            None
        } else {
            match client::of_secret(&text).await {
                Err(error) => Some((find(format!("cannot be followed: its kubeconfig {error:#}{stays}")), false)),
                Ok(client) => match &mut cluster {
                    None => {
                        cluster = Some(Cluster::start(&feed, &id, &client));
                        in_force = print;
                        None
                    }
                    // The new one counts once it has answered.
                    Some(cluster) => match answers(&client).await {
                        Ok(()) => {
                            cluster.swap(&client).await;
                            in_force = print;
                            None
                        }
                        Err(error) => Some((
                            find(format!("does not answer to its new kubeconfig: {}{stays}", describe(&error))),
                            true,
                        )),
                    },
                },
            }
        };
        let again = found.as_ref().is_some_and(|(_, again)| *again);
        if cluster.is_none() {
            feed.sources.trouble(&id, &RESOURCES[0].name(), Trouble::Noted);
        }
        feed.sources.note(&note, found.map(|(finding, _)| finding));
        let wait = async {
            if again { sleep(backoff.next().unwrap_or(feed.resync)).await } else { std::future::pending().await }
        };
        tokio::select! {
            changed = kubeconfig.changed() => {
                if changed.is_err() {
                    break;
                }
            }
            () = wait => {}
        }
    }
    feed.sources.note(&note, None);
    match cluster {
        Some(cluster) => cluster.end().await,
        None => feed.sources.forget(&id, None),
    }
}

/// Whether everything that would be read can be.
async fn answers(client: &Client) -> Result<(), kube::Error> {
    for resource in RESOURCES.iter().filter(|resource| resource.of_all) {
        let mut params = ListParams::default().limit(1);
        params.field_selector = resource.fields.map(str::to_owned);
        resource.api(client.clone(), 0).0.list_metadata(&params).await?;
    }
    Ok(())
}

fn fingerprint(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}
