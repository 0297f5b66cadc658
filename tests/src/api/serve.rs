//! Request handling, with one task per connection.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::body::{Body, Bytes};
use hyper::{Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::mpsc,
    task::JoinSet,
    time::{Instant, timeout_at},
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;

use super::{Shared, request::Query};

/// Interval between bookmarks in watches that request them.
const BOOKMARKS: Duration = Duration::from_millis(500);
/// Seconds after which a watch without `timeoutSeconds` ends.
const LONGEST: u64 = 1_800;

/// The tasks of all listeners. Each owns the tasks of its connections.
#[derive(Default)]
pub(super) struct Server {
    tasks: JoinSet<()>,
}

impl Server {
    pub(super) fn begin(&mut self, listener: TcpListener, acceptor: TlsAcceptor, shared: Arc<Shared>) {
        self.tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                // Reap finished connections.
                while connections.try_join_next().is_some() {}
                let (acceptor, shared) = (acceptor.clone(), Arc::clone(&shared));
                connections.spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let answer = service_fn(move |request| answer(Arc::clone(&shared), request));
                    // A broken connection is not the server's concern.
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
                });
            }
        });
    }

    /// Closes all listeners and breaks all connections.
    pub(super) async fn end(mut self) {
        self.tasks.shutdown().await;
    }
}

async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    if request.method() == hyper::Method::POST {
        return Ok(create(&shared, request).await);
    }
    let Some(query) = Query::read(request.uri(), request.headers()) else {
        return Ok(refusal(404, "NotFound", "the server could not find the requested resource"));
    };
    let verb = if query.is_watch() { "watch" } else { "list" };
    let bearer = request.headers().get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
    {
        let mut state = shared.state();
        *state.asked.entry((verb, query.resource.clone())).or_default() += 1;
        let selector = query.parameter("fieldSelector").unwrap_or_default().to_owned();
        state.selectors.entry(query.resource.clone()).or_default().insert(selector);
        if !bearer.strip_prefix("Bearer ").is_some_and(|token| state.tokens.contains(token)) {
            return Ok(refusal(401, "Unauthorized", "Unauthorized"));
        }
        if state.manners.missing.contains(query.group()) && !query.group().is_empty() {
            return Ok(refusal(404, "NotFound", "the server could not find the requested resource"));
        }
        if state.manners.forbidden.contains(&query.resource) {
            let message = format!("{} is forbidden: User \"it\" cannot {verb} resource", query.resource);
            return Ok(refusal(403, "Forbidden", &message));
        }
    }
    if !query.is_watch() {
        return Ok(list(&shared, &query));
    }
    let (lines, receiver) = mpsc::channel(16);
    tokio::spawn(watch(shared, query, lines));
    let body = Body::from_stream(ReceiverStream::new(receiver));
    Ok(Response::builder().header("content-type", "application/json").body(body).unwrap_or_default())
}

/// Creates an Event. Any other resource gets 405.
async fn create(shared: &Shared, request: Request<Incoming>) -> Response<Body> {
    let Some(query) = Query::read(request.uri(), request.headers()) else {
        return refusal(404, "NotFound", "the server could not find the requested resource");
    };
    let body = axum::body::to_bytes(Body::new(request.into_body()), 1 << 20).await.unwrap_or_default();
    let mut state = shared.state();
    *state.asked.entry(("create", query.resource.clone())).or_default() += 1;
    let Ok(object) = serde_json::from_slice::<Value>(&body) else {
        return refusal(400, "BadRequest", "the body is not JSON");
    };
    if query.resource != "events.events.k8s.io" {
        return refusal(405, "MethodNotAllowed", "only Events can be created");
    }
    // A MicroTime has exactly six fractional digits.
    let time = object["eventTime"].as_str().unwrap_or_default();
    if time.len() != "2026-01-01T00:00:00.000000Z".len() || time.as_bytes().get(19) != Some(&b'.') {
        return refusal(400, "BadRequest", &format!("eventTime: {time:?} is not a MicroTime"));
    }
    let same = |known: &Value| known["metadata"]["name"] == object["metadata"]["name"];
    if state.events.iter().any(same) {
        return refusal(409, "AlreadyExists", "the Event already exists");
    }
    state.events.push(object.clone());
    let mut response = Response::new(Body::from(object.to_string()));
    *response.status_mut() = StatusCode::CREATED;
    response
}

fn refusal(code: u16, reason: &str, message: &str) -> Response<Body> {
    let status = status(code, reason, message);
    let mut response = Response::new(Body::from(status.to_string()));
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or_default();
    response.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static("application/json"));
    response
}

fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": reason, "code": code})
}

fn list(shared: &Shared, query: &Query) -> Response<Body> {
    let mut state = shared.state();
    let token = query.parameter("continue").map(str::to_owned);
    if token.is_some() && std::mem::take(&mut state.manners.expires_page) {
        return refusal(410, "Expired", "The provided continue parameter is too old");
    }
    let after = token.as_deref().and_then(|token| {
        let (namespace, name) = token.split_once('~')?;
        Some((namespace.to_owned(), name.to_owned()))
    });
    let size = state.page.min(query.number("limit").map_or(usize::MAX, |limit| limit as usize));
    let mut found = state.list(query, after.as_ref()).peekable();
    let mut items = Vec::new();
    let mut last = String::new();
    while items.len() < size
        && let Some(((_, namespace, name), object)) = found.next()
    {
        last = format!("{namespace}~{name}");
        let mut shown = query.shown(object);
        // Items of a list have no `kind` and no `apiVersion`.
        if let Some(fields) = shown.as_object_mut() {
            fields.remove("kind");
            fields.remove("apiVersion");
        }
        items.push(shown);
    }
    let more = if found.peek().is_some() { last } else { String::new() };
    let list = json!({
        "kind": if query.metadata_only { "PartialObjectMetadataList" } else { "List" },
        "apiVersion": query.api_version,
        "metadata": {"resourceVersion": state.version.to_string(), "continue": more},
        "items": items,
    });
    let mut response = Response::new(Body::from(list.to_string()));
    response.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static("application/json"));
    response
}

type Lines = mpsc::Sender<Result<Bytes, std::io::Error>>;

/// Streams the changes after a resource version as lines, until the timeout or until the client disconnects.
async fn watch(shared: Arc<Shared>, query: Query, lines: Lines) {
    let end = Instant::now() + Duration::from_secs(query.number("timeoutSeconds").unwrap_or(LONGEST));
    let began = shared.state().version;
    let mut at = query.number("resourceVersion").unwrap_or(began);
    let bookmarks = query.parameter("allowWatchBookmarks") == Some("true");
    let mut next_bookmark = Instant::now() + BOOKMARKS;
    let mut changed = shared.changed.subscribe();
    loop {
        changed.mark_unchanged();
        let (news, forgotten, version, manners) = {
            let state = shared.state();
            let first = state.history.partition_point(|change| change.version <= at);
            let visible = |change: &super::state::Change| Some((change.told(&query)?, query.shown(&change.object)));
            let news: Vec<_> = state.history.range(first..).filter_map(visible).collect();
            (news, at < state.forgotten, state.version, state.manners.clone())
        };
        if manners.stalls {
            lines.closed().await;
            return;
        }
        if manners.breaks_before > began {
            let _ = lines.send(Ok(Bytes::from_static(b"{\"type\":\"MODIFIED\",\"obj"))).await;
            let _ = lines.send(Err(std::io::Error::other("broken"))).await;
            return;
        }
        if forgotten {
            let gone = status(410, "Expired", &format!("too old resource version: {at} ({version})"));
            let _ = send_line(&lines, &json!({"type": "ERROR", "object": gone}), false).await;
            return;
        }
        for (kind, object) in news {
            let line = json!({"type": kind, "object": object});
            if !send_line(&lines, &line, manners.dribbles).await {
                return;
            }
        }
        at = version;
        if bookmarks && Instant::now() >= next_bookmark {
            next_bookmark = Instant::now() + BOOKMARKS;
            let kind = if query.metadata_only { "PartialObjectMetadata" } else { "Any" };
            let object = json!({"kind": kind, "apiVersion": "v1", "metadata": {"resourceVersion": at.to_string(), "creationTimestamp": null}});
            if !send_line(&lines, &json!({"type": "BOOKMARK", "object": object}), manners.dribbles).await {
                return;
            }
        }
        tokio::select! {
            _ = timeout_at(end.min(next_bookmark), changed.changed()) => {}
            () = lines.closed() => return,
        }
        if Instant::now() >= end {
            return;
        }
    }
}

/// Sends a line. Returns whether the client is still connected.
async fn send_line(lines: &Lines, value: &Value, dribbles: bool) -> bool {
    let line = Bytes::from(format!("{value}\n"));
    if !dribbles {
        return lines.send(Ok(line)).await.is_ok();
    }
    for i in 0..line.len() {
        if lines.send(Ok(line.slice(i..=i))).await.is_err() {
            return false;
        }
        tokio::task::yield_now().await;
    }
    true
}
