//! The list-and-watch loop for one resource of an API server: list in pages, watch from there, list again when needed.
//!
//! kube's own watcher hides the start of a watch and the arrival of bookmarks, both of which `get sources` reports
//! (docs/adr/0016-kubernetes.md). Requests and responses still go through kube's types.

use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use kube::{
    Api,
    api::{ListParams, WatchEvent, WatchParams},
    runtime::{utils::Backoff as _, watcher::DefaultBackoff},
};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::{
    WatchContext,
    body_limit::{MOST as MOST_BYTES, TooLong},
    raw_object::Raw,
    resources::{RESOURCES, Resource},
};
use crate::source::Trouble;

/// Maximum number of characters shown of an error.
const MAX_ERROR_CHARS: usize = 500;
/// Objects per list page. A page that exceeds the body limit is requested again with fewer.
const PAGE: u32 = 500;
/// Factor by which a page that is too large shrinks.
const PAGE_DIVISOR: u32 = 8;
/// Grace period after the requested watch timeout, at which the server should have ended the watch. A watch that is
/// silent for longer has stalled.
const STALL_GRACE: Duration = Duration::from_secs(5);
/// Timeout for one page of a list.
const LIST_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum delay before a retry, for example of a resource that is missing or forbidden. The resync interval caps it.
const RETRY_DELAY: Duration = Duration::from_secs(60);
/// Minimum duration of a watch. After one that ends sooner, the next one waits for the backoff.
const MIN_WATCH: Duration = Duration::from_secs(1);
/// Maximum number of objects of one resource. Protects the agent's memory from a faulty server.
const MAX_OBJECTS: usize = 1_000_000;
/// Number of rejected watches after which everything is listed again.
const MAX_WATCH_REFUSALS: u32 = 5;
/// How long a 403, or a 404 for a resource that existed, may be due to a server that is starting.
/// Until then, the last known state stays in effect and retries follow the backoff.
const STARTUP_GRACE: Duration = Duration::from_secs(300);

/// Receives the objects of a resource. The method names follow kube's watcher events.
pub(super) trait Sink: Send {
    /// Handles the start of a list.
    fn init(&mut self);
    /// Handles an object of the current list.
    fn init_apply(&mut self, object: Raw);
    /// Handles the end of the list. Objects that were not in it are gone.
    fn init_done(&mut self);
    /// Handles a new or changed object.
    fn apply(&mut self, object: Raw);
    /// Handles a deleted object.
    fn delete(&mut self, object: &Raw);
    /// Handles a resource that is forbidden and has no known objects.
    fn unavailable(&mut self);
    /// Returns the number of known objects.
    fn len(&self) -> usize;
    /// Passes on pending changes. Returns `false` if their receiver is gone.
    fn flush(&mut self) -> impl Future<Output = bool> + Send;
}

/// The reason why a list or watch ended early.
enum WatchEnd {
    /// The server no longer has the requested version (410).
    Gone,
    /// A full list is due.
    Resync,
    /// The server was silent for too long.
    Stalled,
    Api(kube::Error),
    /// The response exceeds a limit. Holds the error message.
    TooMuch(String),
    /// The receiver of changes is gone.
    Over,
}

impl From<kube::Error> for WatchEnd {
    fn from(error: kube::Error) -> Self {
        match &error {
            kube::Error::Api(status) if status.code == 410 => Self::Gone,
            _ if TooLong::is_behind(&error) => Self::TooMuch(format!("a response exceeds {MOST_BYTES} bytes")),
            _ => Self::Api(error),
        }
    }
}

/// Selectors that limit which objects of a resource are read, in addition to those of the [`Resource`] itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Selectors {
    pub(super) fields: Option<String>,
    pub(super) labels: Option<&'static str>,
}

/// Lists and watches one resource of one cluster.
pub(super) struct ListWatcher<S> {
    pub(super) context: WatchContext,
    pub(super) cluster: String,
    pub(super) resource: &'static Resource,
    /// Selectors for the objects to read.
    pub(super) selectors: Selectors,
    pub(super) client: kube::Client,
    pub(super) sink: S,
}

impl<S: Sink> ListWatcher<S> {
    /// Runs until the sink's receiver is gone.
    pub(super) async fn run(mut self) {
        let name = self.resource.name();
        let (mut backoff, mut version, mut tried) = (DefaultBackoff::default(), 0, 0);
        // The version that the last list or watch event had; `None` if a list is needed.
        let mut at: Option<String> = None;
        let mut again = self.next_resync();
        // Since when the resource has been missing (404), and forbidden (403).
        let (mut missing, mut forbidden): (Option<Instant>, Option<Instant>) = (None, None);
        // Whether another watch's recovery has already cut a wait short since the last success.
        let mut hurried = false;
        let (mut refusals, mut listed_at) = (0, Instant::now());
        // Whether the last watch stalled. The start of a new one then does not prove that the server works.
        let mut stalled = false;
        self.context.sources.expect(&self.cluster, &name);
        loop {
            let (api, _) = self.resource.api(self.client.clone(), version);
            let began = Instant::now();
            let result = match &mut at {
                None => self.list(&api).await.map(Some),
                Some(at) => self.watch(&api, at, again, &mut stalled).await.map(|()| None),
            };
            let broken = match result {
                Ok(listed) => {
                    (missing, forbidden, hurried) = (None, None, false);
                    if listed.is_some() {
                        (at, again, tried) = (listed, self.next_resync(), 0);
                        (refusals, listed_at, stalled) = (0, Instant::now(), false);
                    } else if began.elapsed() < MIN_WATCH {
                        sleep(backoff.next().unwrap_or(MIN_WATCH)).await;
                    } else {
                        backoff.reset();
                    }
                    continue;
                }
                Err(broken) => broken,
            };
            let later = RETRY_DELAY.min(self.context.resync);
            let error = match broken {
                WatchEnd::Over => return,
                WatchEnd::Resync => {
                    at = None;
                    continue;
                }
                // List again at once, but not in a tight loop: a list's continue token may expire too, and a faulty
                // server may reject every version.
                WatchEnd::Gone => {
                    if at.take().is_none() || listed_at.elapsed() < STALL_GRACE {
                        sleep(backoff.next().unwrap_or(later)).await;
                    }
                    continue;
                }
                WatchEnd::Stalled => {
                    stalled = true;
                    let why = format!(
                        "nothing received for {:?} although the connection is open",
                        self.context.watch_timeout + STALL_GRACE
                    );
                    self.context.sources.trouble(&self.cluster, &name, Trouble::Unreachable(why));
                    continue;
                }
                WatchEnd::TooMuch(why) => {
                    self.context.sources.trouble(&self.cluster, &name, Trouble::Unreachable(why));
                    sleep(jittered(later)).await;
                    continue;
                }
                WatchEnd::Api(error) => error,
            };
            let status = match &error {
                kube::Error::Api(status) => status.code,
                _ => 0,
            };
            // A server that keeps rejecting a watch may have lost the history that `at` refers to.
            refusals += u32::from(!matches!(status, 0 | 401 | 403 | 429));
            if status == 400 || refusals >= MAX_WATCH_REFUSALS || Instant::now() >= again {
                (at, refusals) = (None, 0);
            }
            let optional = self.resource.versions.len() > 1;
            let trouble = match status {
                404 if optional => {
                    tried += 1;
                    if tried % self.resource.versions.len() != 0 {
                        version += 1;
                        at = None;
                        continue;
                    }
                    let since = *missing.get_or_insert_with(Instant::now);
                    // A proxy in front of the API server may return 404 for everything: check that Services work.
                    let itself = self.context.sources.is_well(&self.cluster, &RESOURCES[0].name());
                    if self.sink.len() == 0 || (since.elapsed() > STARTUP_GRACE && itself) {
                        self.sink.init();
                        self.sink.init_done();
                        Trouble::Missing
                    } else {
                        Trouble::Unreachable("no longer exists".to_owned())
                    }
                }
                403 => {
                    if at.is_none() && self.sink.len() == 0 {
                        self.sink.unavailable();
                    }
                    (missing, forbidden) = (None, forbidden.or_else(|| Some(Instant::now())));
                    let verb = if at.is_some() { "watch" } else { "list" };
                    Trouble::Forbidden(format!("not allowed to {verb} {name}: the API server returned 403 Forbidden"))
                }
                _ => {
                    missing = None;
                    Trouble::Unreachable(describe(&error))
                }
            };
            // A starting API server returns 403 for everything until it has loaded its RBAC roles.
            let for_long = forbidden.is_some_and(|since| since.elapsed() > STARTUP_GRACE);
            let wait = match &trouble {
                Trouble::Forbidden(_) if !for_long => backoff.next().unwrap_or(later).min(later),
                Trouble::Missing | Trouble::Skipped | Trouble::Forbidden(_) => jittered(later),
                Trouble::Unreachable(_) => backoff.next().unwrap_or(later).min(later),
            };
            tracing::debug!(cluster = self.cluster, resource = name, ?wait, "{error}");
            self.context.sources.trouble(&self.cluster, &name, trouble);
            if !self.sink.flush().await {
                return;
            }
            // When another watch of the cluster recovers, retry early, but only once.
            let soon = wait.min(jittered(MIN_WATCH));
            let recoveries = self.context.sources.recoveries(&self.cluster);
            sleep(soon).await;
            tokio::select! {
                () = sleep(wait - soon) => {}
                () = recoveries, if !hurried => hurried = true,
            }
        }
    }

    fn next_resync(&self) -> Instant {
        Instant::now() + jittered(self.context.resync)
    }

    /// Lists all objects. Returns the list's `resourceVersion`.
    async fn list(&mut self, api: &Api<Raw>) -> Result<String, WatchEnd> {
        let mut params = ListParams {
            limit: Some(PAGE),
            field_selector: self.selectors.fields.clone().or(self.resource.fields.map(str::to_owned)),
            label_selector: self.selectors.labels.map(str::to_owned),
            ..ListParams::default()
        };
        self.sink.init();
        let (mut objects, mut pages) = (0, 0);
        let at = loop {
            let page = async {
                if self.resource.metadata_only {
                    let list = api.list_metadata(&params).await?;
                    Ok((list.items.into_iter().map(Raw::of_metadata).collect(), list.metadata))
                } else {
                    let list = api.list(&params).await?;
                    Ok::<_, kube::Error>((list.items, list.metadata))
                }
            };
            let page = timeout(LIST_TIMEOUT, page).await.map_err(|_| WatchEnd::Stalled)?.map_err(WatchEnd::from);
            let (items, list): (Vec<Raw>, _) = match (page, params.limit) {
                (Err(WatchEnd::TooMuch(_)), Some(limit @ 2..)) => {
                    params.limit = Some((limit / PAGE_DIVISOR).max(1));
                    continue;
                }
                (page, _) => page?,
            };
            (objects, pages) = (objects + items.len(), pages + 1);
            if objects > MAX_OBJECTS || pages > objects + MAX_OBJECTS / PAGE as usize {
                return Err(WatchEnd::TooMuch(format!("the list exceeds {MAX_OBJECTS} objects or has too many pages")));
            }
            items.into_iter().for_each(|object| self.sink.init_apply(object));
            match list.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params.continue_token = Some(token),
                None => break list.resource_version.unwrap_or_default(),
            }
        };
        self.sink.init_done();
        if !self.sink.flush().await {
            return Err(WatchEnd::Over);
        }
        self.context.sources.synced(&self.cluster, &self.resource.name(), self.sink.len(), Some(&at));
        Ok(at)
    }

    /// Watches for changes since the version `at`, and advances it, until the server ends the watch.
    async fn watch(
        &mut self,
        api: &Api<Raw>,
        at: &mut String,
        again: Instant,
        stalled: &mut bool,
    ) -> Result<(), WatchEnd> {
        let name = self.resource.name();
        let params = WatchParams {
            timeout: Some(u32::try_from(self.context.watch_timeout.as_secs()).unwrap_or(u32::MAX).max(1)),
            field_selector: self.selectors.fields.clone().or(self.resource.fields.map(str::to_owned)),
            label_selector: self.selectors.labels.map(str::to_owned),
            ..WatchParams::default()
        };
        let silence = self.context.watch_timeout + STALL_GRACE;
        let begun = async {
            Ok::<BoxStream<'_, kube::Result<WatchEvent<Raw>>>, kube::Error>(if self.resource.metadata_only {
                api.watch_metadata(&params, at).await?.map_ok(of_metadata).boxed()
            } else {
                api.watch(&params, at).await?.boxed()
            })
        };
        let mut events = timeout(silence, begun).await.map_err(|_| WatchEnd::Stalled)??;
        // A watch that holds for a while proves that the server works, except after a stall.
        let mut healthy_at = (!*stalled).then(|| Instant::now() + MIN_WATCH);
        if !*stalled {
            self.context.sources.touch(&self.cluster, &name, self.sink.len(), at);
        }
        loop {
            let until = again.min(Instant::now() + silence);
            let Ok(next) = timeout_at(healthy_at.map_or(until, |at| until.min(at)), events.next()).await else {
                if healthy_at.take().is_some_and(|at| at < until) {
                    self.context.sources.mark_healthy(&self.cluster);
                    continue;
                }
                return Err(if until == again { WatchEnd::Resync } else { WatchEnd::Stalled });
            };
            let Some(event) = next else {
                *stalled = false;
                self.context.sources.touch(&self.cluster, &name, self.sink.len(), at);
                return Ok(());
            };
            match event? {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    advance(at, object.version());
                    self.sink.apply(object);
                }
                WatchEvent::Deleted(object) => {
                    advance(at, object.version());
                    self.sink.delete(&object);
                }
                WatchEvent::Bookmark(bookmark) => advance(at, Some(&bookmark.metadata.resource_version)),
                WatchEvent::Error(status) => return Err(kube::Error::Api(status).into()),
            }
            if !self.sink.flush().await {
                return Err(WatchEnd::Over);
            }
            *stalled = false;
            self.context.sources.touch(&self.cluster, &name, self.sink.len(), at);
        }
    }
}

fn advance(at: &mut String, version: Option<&str>) {
    if let Some(version) = version.filter(|version| !version.is_empty()) {
        version.clone_into(at);
    }
}

fn of_metadata(event: WatchEvent<kube::core::PartialObjectMeta<Raw>>) -> WatchEvent<Raw> {
    match event {
        WatchEvent::Added(object) => WatchEvent::Added(Raw::of_metadata(object)),
        WatchEvent::Modified(object) => WatchEvent::Modified(Raw::of_metadata(object)),
        WatchEvent::Deleted(object) => WatchEvent::Deleted(Raw::of_metadata(object)),
        WatchEvent::Bookmark(bookmark) => WatchEvent::Bookmark(bookmark),
        WatchEvent::Error(status) => WatchEvent::Error(status),
    }
}

/// Returns a random duration between half of `time` and all of it, so that agents do not act in lockstep.
fn jittered(time: Duration) -> Duration {
    time.mul_f64(rand::random_range(0.5..=1.0))
}

/// Formats an error with its causes on one line. Omits causes that the text already contains.
pub(super) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let own = error.to_string();
        if text.is_empty() {
            text = own;
        } else if !text.contains(&own) {
            text = format!("{text}: {own}");
        }
        next = error.source();
    }
    // The text may come from the server, so limit its length and keep it on one line.
    text.chars().take(MAX_ERROR_CHARS).collect::<String>().replace('\n', " ")
}
