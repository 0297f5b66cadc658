//! Other clusters: those that Secrets of Istio's name, as they come, change and go.

use std::{
    collections::{BTreeMap, HashSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
};

use k8s_openapi::ByteString;
use kube::{Client, api::ListParams, runtime::watcher::DefaultBackoff};
use portolan_core::{
    decode::MESH_NAMESPACE,
    model::{Code, Finding},
};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{
    WatchContext, client,
    cluster::Cluster,
    list_watch::{Sink, describe},
    raw_object::Raw,
    resources::RESOURCES,
};
use crate::source::Trouble;

/// The label of Secrets that hold the kubeconfigs of other clusters.
pub(super) const LABEL: &str = "istio/multiCluster=true";

/// How long a server may take that is asked for the first time.
const ANSWER: std::time::Duration = std::time::Duration::from_secs(10);

/// What Secrets say: by the name of each, kubeconfigs by the id of their cluster.
pub(super) type Secrets = BTreeMap<String, BTreeMap<String, String>>;

/// Takes the Secrets.
pub(super) struct SecretSink {
    context: WatchContext,
    secrets: Secrets,
    listed: Option<HashSet<String>>,
    wanted: watch::Sender<Secrets>,
}

impl SecretSink {
    pub(super) fn new(context: &WatchContext) -> (Self, watch::Receiver<Secrets>) {
        let (wanted, told) = watch::channel(Secrets::new());
        (Self { context: context.clone(), secrets: Secrets::new(), listed: None, wanted }, told)
    }

    fn take(&mut self, object: Raw) {
        let name = object.name();
        let note = format!("secret/{name}");
        match serde_json::from_value::<Option<BTreeMap<String, ByteString>>>(object.field("data")) {
            Ok(data) => {
                let data = data.unwrap_or_default().into_iter();
                let kubeconfigs = data.map(|(id, text)| (id, String::from_utf8_lossy(&text.0).into_owned())).collect();
                self.secrets.insert(name, kubeconfigs);
                self.context.sources.note(&note, None);
            }
            Err(error) => {
                let message = format!("cannot be read: {error}. The clusters that it last named stay");
                self.context
                    .sources
                    .note(&note, Some(Finding::new(Code::RemoteCluster, format!("Secret {name}"), message)));
            }
        }
    }
}

impl Sink for SecretSink {
    fn init(&mut self) {
        self.listed = Some(HashSet::new());
    }

    fn init_apply(&mut self, object: Raw) {
        if let Some(listed) = &mut self.listed {
            listed.insert(object.name());
        }
        self.take(object);
    }

    fn init_done(&mut self) {
        if let Some(listed) = self.listed.take() {
            self.secrets.retain(|name, _| listed.contains(name));
        }
    }

    fn apply(&mut self, object: Raw) {
        self.take(object);
    }

    fn delete(&mut self, object: &Raw) {
        self.secrets.remove(&object.name());
    }

    fn unavailable(&mut self) {}

    fn len(&self) -> usize {
        self.secrets.len()
    }

    async fn flush(&mut self) -> bool {
        // Before anybody asks whether all of them were read.
        for id in self.secrets.values().flat_map(BTreeMap::keys).filter(|id| **id != self.context.cluster) {
            self.context.sources.expect(id, &RESOURCES[0].name());
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
    /// `None`: it is named no more. That the sender is gone means nothing but that the agent ends.
    kubeconfig: watch::Sender<Option<String>>,
    task: JoinHandle<()>,
}

/// Follows other clusters, as Secrets name them.
pub(super) async fn run(context: WatchContext, mut secrets: watch::Receiver<Secrets>) {
    let mut running: BTreeMap<String, Remote> = BTreeMap::new();
    loop {
        let wanted = choose(&context, &running, &secrets.borrow_and_update());
        let gone: Vec<String> = running.keys().filter(|id| !wanted.contains_key(*id)).cloned().collect();
        for id in gone {
            let Some(Remote { task, kubeconfig, .. }) = running.remove(&id) else { continue };
            tracing::info!(cluster = id, "no Secret names it any more");
            kubeconfig.send_replace(None);
            // A cluster that comes back at once shall not be forgotten after that.
            let _ = task.await;
        }
        // Those that were named so shortly that nobody has followed them.
        let is_known = |id: &String| *id == context.cluster || wanted.contains_key(id);
        for id in context.sources.clusters().into_iter().filter(|id| !is_known(id)) {
            context.sources.forget(&id, None);
        }
        for (id, (secret, text)) in wanted {
            match running.get_mut(&id) {
                Some(remote) => {
                    remote.secret = secret;
                    remote.kubeconfig.send_if_modified(|before| {
                        let new = before.as_ref() != Some(&text);
                        if new {
                            *before = Some(text);
                        }
                        new
                    });
                }
                None => {
                    tracing::info!(cluster = id, secret, "another cluster");
                    let (kubeconfig, told) = watch::channel(Some(text));
                    let task = tokio::spawn(follow(context.clone(), id.clone(), secret.clone(), told));
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
fn choose(
    context: &WatchContext,
    running: &BTreeMap<String, Remote>,
    secrets: &Secrets,
) -> BTreeMap<String, (String, String)> {
    let mut chosen: BTreeMap<String, (String, String)> = BTreeMap::new();
    let mut doubles = Vec::new();
    let all = || secrets.iter().flat_map(|(secret, of)| of.iter().map(move |(id, text)| (secret, id, text)));
    let holds = |id: &String, secret: &String| running.get(id).is_some_and(|remote| remote.secret == *secret);
    let (first, then): (Vec<_>, Vec<_>) = all().partition(|(secret, id, _)| holds(id, secret));
    for (secret, id, text) in first.into_iter().chain(then) {
        if *id == context.cluster {
            continue;
        }
        match chosen.get(id) {
            Some((other, _)) => {
                doubles.push(format!("cluster {id} is named by {secret} as well as by {other}, which counts"));
            }
            None => drop(chosen.insert(id.clone(), (secret.clone(), text.clone()))),
        }
    }
    let finding = (!doubles.is_empty())
        .then(|| Finding::new(Code::RemoteCluster, format!("Secrets of {MESH_NAMESPACE}"), doubles.join("; ")));
    context.sources.note("double", finding);
    chosen
}

/// Follows one cluster, until nobody names it any more.
async fn follow(context: WatchContext, id: String, secret: String, mut kubeconfig: watch::Receiver<Option<String>>) {
    let note = format!("remote/{id}");
    let find = |message: String| {
        Finding::new(Code::RemoteCluster, format!("Secret {secret}"), format!("cluster {id} {message}"))
    };
    let mut cluster: Option<Cluster> = None;
    let mut backoff = DefaultBackoff::default();
    let mut in_force = 0;
    loop {
        let Some(text) = kubeconfig.borrow_and_update().clone() else { break };
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
                        cluster = Some(Cluster::start(&context, &id, &client));
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
                        Err(error) => {
                            Some((find(format!("does not answer to its new kubeconfig: {error}{stays}")), true))
                        }
                    },
                },
            }
        };
        let again = found.as_ref().is_some_and(|(_, again)| *again);
        if cluster.is_none() {
            context.sources.trouble(&id, &RESOURCES[0].name(), Trouble::Skipped);
        }
        context.sources.note(&note, found.map(|(finding, _)| finding));
        let wait = async {
            if again { sleep(backoff.next().unwrap_or(context.resync)).await } else { std::future::pending().await }
        };
        tokio::select! {
            changed = kubeconfig.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            () = wait => {}
        }
    }
    context.sources.note(&note, None);
    match cluster {
        Some(cluster) => cluster.init_done().await,
        None => context.sources.forget(&id, None),
    }
}

/// Whether everything that would be read can be; if not, why.
async fn answers(client: &Client) -> Result<(), String> {
    for resource in RESOURCES.iter().filter(|resource| resource.of_all) {
        let mut params = ListParams::default().limit(1);
        params.field_selector = resource.fields.map(str::to_owned);
        let (api, _) = resource.api(client.clone(), 0);
        match timeout(ANSWER, api.list_metadata(&params)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(describe(&error)),
            Err(_) => return Err(format!("no answer within {ANSWER:?}")),
        }
    }
    Ok(())
}

fn fingerprint(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}
