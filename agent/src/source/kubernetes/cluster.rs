//! The watches of one cluster.

use std::collections::{HashMap, HashSet};

use kube::Client;
use portolan_core::store::Update;
use tokio::task::JoinSet;

use super::{
    WatchContext,
    list_watch::{ListWatcher, Selectors},
    resources::{PODS, RESOURCES, Resource},
    sink::{Known, Objects, unread_resource},
};

/// A cluster whose objects are watched. Dropping this value stops the watches.
pub(super) struct Cluster {
    context: WatchContext,
    id: String,
    tasks: JoinSet<()>,
    known: HashMap<&'static str, Known>,
}

impl Cluster {
    /// Starts to watch a cluster.
    pub(super) fn start(context: &WatchContext, id: &str, client: &Client) -> Self {
        let mut cluster =
            Self { context: context.clone(), id: id.to_owned(), tasks: JoinSet::new(), known: HashMap::new() };
        cluster.follow(client);
        cluster
    }

    /// Switches to another client. Known objects stay in effect until the new client has listed them.
    pub(super) async fn swap(&mut self, client: &Client) {
        self.tasks.shutdown().await;
        self.follow(client);
    }

    /// Stops all watches and removes the cluster's objects from the store.
    pub(super) async fn remove(mut self) {
        self.tasks.shutdown().await;
        self.context.sources.forget(&self.id, None);
        // An error means that the agent is shutting down.
        let _ = self
            .context
            .updates
            .send(vec![Update::Prune { prefix: format!("{}/", self.id), except: HashSet::new() }])
            .await;
    }

    fn follow(&mut self, client: &Client) {
        let own = self.id == self.context.cluster;
        let wanted: Vec<_> = RESOURCES.iter().filter(|resource| own || resource.of_all).collect();
        for resource in wanted {
            self.context.sources.expect(&self.id, &resource.name());
            let work = self.list_watch(resource, client);
            self.tasks.spawn(work);
        }
        let pods = self.pods(client);
        self.tasks.spawn(pods);
    }

    fn list_watch(&mut self, resource: &'static Resource, client: &Client) -> impl Future<Output = ()> + Send + use<> {
        let known = Known::clone(self.known.entry(resource.plural).or_default());
        let (context, id, client) = (self.context.clone(), self.id.clone(), client.clone());
        async move {
            let sink = Objects::new(&context, resource, &id, client.clone(), known).await;
            ListWatcher { context, cluster: id, resource, selectors: Selectors::default(), client, sink }.run().await;
        }
    }

    /// Watches pods while a rule needs their labels.
    fn pods(&mut self, client: &Client) -> impl Future<Output = ()> + Send + use<> {
        let known = Known::clone(self.known.entry(PODS.plural).or_default());
        let (context, id, client) = (self.context.clone(), self.id.clone(), client.clone());
        async move {
            let mut wanted = context.wants.follow();
            loop {
                if wanted.wait_for(|wanted| *wanted).await.is_err() {
                    return;
                }
                let sink = Objects::new(&context, &PODS, &id, client.clone(), Known::clone(&known)).await;
                let (context, cluster, client) = (context.clone(), id.clone(), client.clone());
                let list_watch = ListWatcher {
                    context: context.clone(),
                    cluster,
                    resource: &PODS,
                    selectors: Selectors::default(),
                    client,
                    sink,
                };
                tokio::select! {
                    () = list_watch.run() => return,
                    gone = wanted.wait_for(|wanted| !*wanted) => {
                        if gone.is_err() {
                            return;
                        }
                    }
                }
                known.lock().await.clear();
                context.sources.forget(&id, Some(&PODS.name()));
                let prefix = format!("{id}/{}/", PODS.plural);
                let news = vec![
                    Update::Prune { prefix, except: HashSet::new() },
                    // If pods could not be read, that no longer matters.
                    Update::Remove { origin: unread_resource(&id, &PODS) },
                ];
                if context.updates.send(news).await.is_err() {
                    return;
                }
            }
        }
    }
}
