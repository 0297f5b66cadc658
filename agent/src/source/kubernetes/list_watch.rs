//! One resource of an API server, followed for ever: listed page by page, watched from there, listed again where that is called for.
//!
//! Not kube's own watcher, for it keeps to itself what `get sources` is to tell: that a watch has begun, and that a bookmark has come
//! (docs/adr/0016-kubernetes.md). What is sent and read is kube's.

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

/// Letters of an error that are shown.
const LONGEST: usize = 500;
/// Objects of a page; fewer where so many are too long an answer.
const PAGE: u32 = 500;
/// So many times fewer.
const SMALLER: u32 = 8;
/// A server ends a watch itself after the time that it is asked for; one that is silent for so much longer has stalled.
const SLACK: Duration = Duration::from_secs(5);
/// An answer to a list takes no longer than this.
const ANSWER: Duration = Duration::from_secs(60);
/// What is not there, or may not be read, is asked for again after this time, or when everything is read again anyway.
const LATER: Duration = Duration::from_secs(60);
/// A watch that ends sooner was not worth beginning: the next one waits.
const SHORTEST: Duration = Duration::from_secs(1);
/// Of one kind of objects there are no more than that, whatever a server says.
const MOST: usize = 1_000_000;
/// A watch is refused so often before everything is listed again.
const REFUSALS: u32 = 5;
/// What was there and is not any more, or may not be read, may be so because the server is on its way up: for so long, what it last said stays in
/// force, and it is asked again soon.
const PATIENCE: Duration = Duration::from_secs(300);

/// What takes the objects.
pub(super) trait Sink: Send {
    /// A list begins.
    fn init(&mut self);
    /// An object of it.
    fn init_apply(&mut self, object: Raw);
    /// It has ended: what was not in it is gone.
    fn init_done(&mut self);
    /// An object is new, or not as it was.
    fn apply(&mut self, object: Raw);
    /// An object is gone.
    fn delete(&mut self, object: &Raw);
    /// Nothing is known, for it may not be read, and never was.
    fn unavailable(&mut self);
    /// How many objects are held.
    fn len(&self) -> usize;
    /// Passes on what has come; whether somebody still wants it.
    fn flush(&mut self) -> impl Future<Output = bool> + Send;
}

/// Why following has to begin again.
enum WatchEnd {
    /// What is asked for is too long ago.
    Gone,
    /// It is time to read everything again.
    Resync,
    /// Nothing came for too long.
    Stalled,
    Api(kube::Error),
    /// It says more than can be.
    TooMuch(String),
    /// Nobody listens any more.
    Over,
}

impl From<kube::Error> for WatchEnd {
    fn from(error: kube::Error) -> Self {
        match &error {
            kube::Error::Api(status) if status.code == 410 => Self::Gone,
            _ if TooLong::is_behind(&error) => Self::TooMuch(format!("an answer has more than {MOST_BYTES} bytes")),
            _ => Self::Api(error),
        }
    }
}

/// Which objects of a resource are meant, as far as the resource itself leaves it open.
#[derive(Clone, Debug, Default)]
pub(super) struct Only {
    pub(super) fields: Option<String>,
    pub(super) labels: Option<&'static str>,
}

/// Follows one resource of one cluster.
pub(super) struct ListWatcher<S> {
    pub(super) context: WatchContext,
    pub(super) cluster: String,
    pub(super) resource: &'static Resource,
    /// Which of them.
    pub(super) sole_kind: Only,
    pub(super) client: kube::Client,
    pub(super) sink: S,
}

impl<S: Sink> ListWatcher<S> {
    /// Works until nobody listens any more.
    pub(super) async fn run(mut self) {
        let name = self.resource.name();
        let (mut backoff, mut version, mut tried) = (DefaultBackoff::default(), 0, 0);
        // Where in time the last list was taken, or the watch has come to.
        let mut at: Option<String> = None;
        let mut again = self.next_resync();
        // Since when it is not there, and since when it may not be read.
        let (mut missing, mut forbidden): (Option<Instant>, Option<Instant>) = (None, None);
        // Whether it was tried at once because something else got through, in vain.
        let mut hurried = false;
        let (mut report_refusals, mut listed_at) = (0, Instant::now());
        // Whether what came last was silence: that a watch begins says nothing then.
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
                        (report_refusals, listed_at, stalled) = (0, Instant::now(), false);
                    } else if began.elapsed() < SHORTEST {
                        sleep(backoff.next().unwrap_or(SHORTEST)).await;
                    } else {
                        backoff.reset();
                    }
                    continue;
                }
                Err(broken) => broken,
            };
            let later = LATER.min(self.context.resync);
            let error = match broken {
                WatchEnd::Over => return,
                WatchEnd::Resync => {
                    at = None;
                    continue;
                }
                // At once, but not in a circle: of a list, the next page may be too long ago, and of a server everything.
                WatchEnd::Gone => {
                    if at.take().is_none() || listed_at.elapsed() < SLACK {
                        sleep(backoff.next().unwrap_or(later)).await;
                    }
                    continue;
                }
                WatchEnd::Stalled => {
                    stalled = true;
                    let why = format!(
                        "nothing came for {:?}, though the connection stands",
                        self.context.watch_timeout + SLACK
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
            // A server that refuses a watch again and again may have another history by now.
            report_refusals += u32::from(!matches!(status, 0 | 401 | 403 | 429));
            if status == 400 || report_refusals >= REFUSALS || Instant::now() >= again {
                (at, report_refusals) = (None, 0);
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
                    // Who answers so to everything is not the API server.
                    let itself = self.context.sources.is_well(&self.cluster, &RESOURCES[0].name());
                    if self.sink.len() == 0 || (since.elapsed() > PATIENCE && itself) {
                        self.sink.init();
                        self.sink.init_done();
                        Trouble::Missing
                    } else {
                        Trouble::Unreachable("is not there any more".to_owned())
                    }
                }
                403 => {
                    if at.is_none() && self.sink.len() == 0 {
                        self.sink.unavailable();
                    }
                    (missing, forbidden) = (None, forbidden.or_else(|| Some(Instant::now())));
                    let verb = if at.is_some() { "watch" } else { "list" };
                    Trouble::Forbidden(format!("may not {verb} {name}: the API server says that it is forbidden"))
                }
                _ => {
                    missing = None;
                    Trouble::Unreachable(describe(&error))
                }
            };
            // A server that starts forbids everything until it has read its roles.
            let for_long = forbidden.is_some_and(|since| since.elapsed() > PATIENCE);
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
            // Where one gets through, all try, but once.
            let soon = wait.min(jittered(SHORTEST));
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

    /// Reads everything; the moment in the server's history that this was.
    async fn list(&mut self, api: &Api<Raw>) -> Result<String, WatchEnd> {
        let mut params = ListParams {
            limit: Some(PAGE),
            field_selector: self.sole_kind.fields.clone().or(self.resource.fields.map(str::to_owned)),
            label_selector: self.sole_kind.labels.map(str::to_owned),
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
            let page = timeout(ANSWER, page).await.map_err(|_| WatchEnd::Stalled)?.map_err(WatchEnd::from);
            let (items, list): (Vec<Raw>, _) = match (page, params.limit) {
                (Err(WatchEnd::TooMuch(_)), Some(limit @ 2..)) => {
                    params.limit = Some((limit / SMALLER).max(1));
                    continue;
                }
                (page, _) => page?,
            };
            (objects, pages) = (objects + items.len(), pages + 1);
            if objects > MOST || pages > objects + MOST / PAGE as usize {
                return Err(WatchEnd::TooMuch(format!("it says that there are more than {MOST} of them")));
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

    /// Takes in what changes from a moment on, until the server ends it.
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
            field_selector: self.sole_kind.fields.clone().or(self.resource.fields.map(str::to_owned)),
            label_selector: self.sole_kind.labels.map(str::to_owned),
            ..WatchParams::default()
        };
        let silence = self.context.watch_timeout + SLACK;
        let begun = async {
            Ok::<BoxStream<'_, kube::Result<WatchEvent<Raw>>>, kube::Error>(if self.resource.metadata_only {
                api.watch_metadata(&params, at).await?.map_ok(of_metadata).boxed()
            } else {
                api.watch(&params, at).await?.boxed()
            })
        };
        let mut events = timeout(silence, begun).await.map_err(|_| WatchEnd::Stalled)??;
        // Once nothing has broken for a while; after silence, that says nothing either.
        let mut mark_healthy = (!*stalled).then(|| Instant::now() + SHORTEST);
        if !*stalled {
            self.context.sources.touch(&self.cluster, &name, self.sink.len(), at);
        }
        loop {
            let until = again.min(Instant::now() + silence);
            let Ok(next) = timeout_at(mark_healthy.map_or(until, |at| until.min(at)), events.next()).await else {
                if mark_healthy.take().is_some_and(|at| at < until) {
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

/// Half to the whole of a time: what many agents do again and again, they shall not do all at once.
fn jittered(time: Duration) -> Duration {
    time.mul_f64(rand::random_range(0.5..=1.0))
}

/// An error and what is behind it, once each, in one line.
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
    // A server may say whatever it likes.
    text.chars().take(LONGEST).collect::<String>().replace('\n', " ")
}
