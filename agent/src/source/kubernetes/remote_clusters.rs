//! Remote clusters. Istio's remote-cluster Secrets add, change and remove them.

use std::{
    collections::{BTreeMap, HashSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
};

use k8s_openapi::ByteString;
use kube::{Client, api::ListParams, runtime::watcher::DefaultBackoff};
use portolan_core::{
    decode::MESH_NAMESPACE,
    model::{Code, Finding, ObjectRef},
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

/// Label selector for the Secrets that hold the kubeconfigs of remote clusters.
pub(super) const LABEL: &str = "istio/multiCluster=true";

/// Timeout of each request that verifies a new kubeconfig.
const REQUEST_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// Kubeconfigs by cluster ID, for each Secret by its `namespace/name`.
pub(super) type Secrets = BTreeMap<String, BTreeMap<String, String>>;

/// The sink for remote-cluster Secrets.
pub(super) struct SecretSink {
    context: WatchContext,
    secrets: Secrets,
    listed: Option<HashSet<String>>,
    wanted: watch::Sender<Secrets>,
}

impl SecretSink {
    pub(super) fn new(context: &WatchContext) -> (Self, watch::Receiver<Secrets>) {
        let (wanted, receiver) = watch::channel(Secrets::new());
        (Self { context: context.clone(), secrets: Secrets::new(), listed: None, wanted }, receiver)
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
                let message = format!("cannot be decoded: {error}; the clusters that it last named stay in effect");
                self.context
                    .sources
                    .note(&note, Some(Finding::new(Code::RemoteCluster, ObjectRef::global("Secret", &name), message)));
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
        // Register the clusters before the initial sync can complete without them.
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

/// A watched remote cluster: the Secret that names it, and the channel for new kubeconfigs.
struct Remote {
    secret: String,
    /// The current kubeconfig; `None` once no Secret names the cluster.
    /// A dropped sender means only that the agent is shutting down.
    kubeconfig: watch::Sender<Option<String>>,
    task: JoinHandle<()>,
}

/// Watches the remote clusters that Secrets name.
pub(super) async fn run(context: WatchContext, mut secrets: watch::Receiver<Secrets>) {
    let mut running: BTreeMap<String, Remote> = BTreeMap::new();
    loop {
        let wanted = choose(&context, &running, &secrets.borrow_and_update());
        let gone: Vec<String> = running.keys().filter(|id| !wanted.contains_key(*id)).cloned().collect();
        for id in gone {
            let Some(Remote { task, kubeconfig, .. }) = running.remove(&id) else { continue };
            tracing::info!(cluster = id, "remote cluster removed: no Secret names it");
            kubeconfig.send_replace(None);
            // Wait for the end, so that a cluster that returns at once is not removed afterwards.
            let _ = task.await;
        }
        // Remove clusters that were named too briefly for a watch to start.
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
                    tracing::info!(cluster = id, secret, "remote cluster added");
                    let (kubeconfig, receiver) = watch::channel(Some(text));
                    let task = tokio::spawn(follow(context.clone(), id.clone(), secret.clone(), receiver));
                    running.insert(id, Remote { secret, kubeconfig, task });
                }
            }
        }
        if secrets.changed().await.is_err() {
            return;
        }
    }
}

/// Selects the Secret and kubeconfig for each cluster.
///
/// The Secret already in use has precedence, then the first by name.
fn choose(
    context: &WatchContext,
    running: &BTreeMap<String, Remote>,
    secrets: &Secrets,
) -> BTreeMap<String, (String, String)> {
    let mut chosen: BTreeMap<String, (String, String)> = BTreeMap::new();
    let mut duplicates = Vec::new();
    let all = || secrets.iter().flat_map(|(secret, of)| of.iter().map(move |(id, text)| (secret, id, text)));
    let holds = |id: &String, secret: &String| running.get(id).is_some_and(|remote| remote.secret == *secret);
    let (first, then): (Vec<_>, Vec<_>) = all().partition(|(secret, id, _)| holds(id, secret));
    for (secret, id, text) in first.into_iter().chain(then) {
        if *id == context.cluster {
            continue;
        }
        match chosen.get(id) {
            Some((other, _)) => {
                duplicates.push(format!("cluster {id} is also named by {secret}, which is ignored; {other} is used"));
            }
            None => drop(chosen.insert(id.clone(), (secret.clone(), text.clone()))),
        }
    }
    let finding = (!duplicates.is_empty()).then(|| {
        Finding::new(Code::RemoteCluster, ObjectRef::global("Namespace", MESH_NAMESPACE), duplicates.join("; "))
    });
    context.sources.note("double", finding);
    chosen
}

/// Watches one cluster until no Secret names it.
async fn follow(context: WatchContext, id: String, secret: String, mut kubeconfig: watch::Receiver<Option<String>>) {
    let note = format!("remote/{id}");
    let find = |message: String| {
        Finding::new(Code::RemoteCluster, ObjectRef::global("Secret", &secret), format!("cluster {id} {message}"))
    };
    let mut cluster: Option<Cluster> = None;
    let mut backoff = DefaultBackoff::default();
    let mut active_fingerprint = 0;
    loop {
        let Some(text) = kubeconfig.borrow_and_update().clone() else { break };
        let print = fingerprint(&text);
        let stays = if cluster.is_some() { "; the previous kubeconfig stays in use" } else { "" };
        let found = if print == active_fingerprint {
            // The kubeconfig was changed and changed back.
            None
        } else {
            match client::of_secret(&text).await {
                Err(error) => Some((find(format!("cannot be watched: kubeconfig rejected: {error:#}{stays}")), false)),
                Ok(client) => match &mut cluster {
                    None => {
                        cluster = Some(Cluster::start(&context, &id, &client));
                        active_fingerprint = print;
                        None
                    }
                    // Use the new kubeconfig only once it has been verified.
                    Some(cluster) => match verify_access(&client).await {
                        Ok(()) => {
                            cluster.swap(&client).await;
                            active_fingerprint = print;
                            None
                        }
                        Err(error) => {
                            Some((find(format!("cannot be read with its new kubeconfig: {error}{stays}")), true))
                        }
                    },
                },
            }
        };
        let retry = found.as_ref().is_some_and(|(_, retry)| *retry);
        if cluster.is_none() {
            context.sources.trouble(&id, &RESOURCES[0].name(), Trouble::Skipped);
        }
        context.sources.note(&note, found.map(|(finding, _)| finding));
        let wait = async {
            if retry { sleep(backoff.next().unwrap_or(context.resync)).await } else { std::future::pending().await }
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
        Some(cluster) => cluster.remove().await,
        None => context.sources.forget(&id, None),
    }
}

/// Checks that all resources of a remote cluster can be listed. Returns the first failure as text.
async fn verify_access(client: &Client) -> Result<(), String> {
    for resource in RESOURCES.iter().filter(|resource| resource.of_all) {
        let mut params = ListParams::default().limit(1);
        params.field_selector = resource.fields.map(str::to_owned);
        let (api, _) = resource.api(client.clone(), 0);
        match timeout(REQUEST_TIMEOUT, api.list_metadata(&params)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(describe(&error)),
            Err(_) => return Err(format!("no response within {REQUEST_TIMEOUT:?}")),
        }
    }
    Ok(())
}

fn fingerprint(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}
