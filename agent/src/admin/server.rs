//! Server side of the admin socket and of the HTTP address.

use std::{
    convert::Infallible,
    os::unix::{fs::FileTypeExt as _, net::UnixStream},
    path::Path,
    sync::Arc,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{FromRef, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use portolan_core::{health::OverrideCommand, model::NamespacedName};
use rustix::fs::Mode;
use serde::Deserialize;
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{mpsc, oneshot},
};
use tokio_stream::{Stream, StreamExt as _, wrappers::BroadcastStream};

use crate::{
    controller::{Request, event_log::Event},
    error::{Context as _, Result, bail},
    metrics,
    opt_out::OptOutRegistry,
    source::{Sources, SourcesReport},
};

type Questions = mpsc::Sender<Request>;

/// Shared state of the request handlers.
#[derive(Clone)]
pub struct AdminState {
    /// Requests to the controller, which owns all state.
    pub questions: mpsc::Sender<Request>,
    /// Status of the sources, by cluster and resource.
    pub sources: Arc<Sources>,
    /// Pods that are excluded by the opt-out label.
    pub registry: Arc<OptOutRegistry>,
}

impl FromRef<AdminState> for Questions {
    fn from_ref(state: &AdminState) -> Self {
        state.questions.clone()
    }
}

impl FromRef<AdminState> for Arc<Sources> {
    fn from_ref(state: &AdminState) -> Self {
        Self::clone(&state.sources)
    }
}

impl FromRef<AdminState> for Arc<OptOutRegistry> {
    fn from_ref(state: &AdminState) -> Self {
        Self::clone(&state.registry)
    }
}

/// Binds the admin socket, with access only for its owner. Replaces the stale socket of an agent that is gone.
///
/// # Errors
/// Returns an error if another agent is listening on `path`, or if the socket cannot be created there.
pub fn bind_admin(path: &Path) -> Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("--admin: cannot create {}", folder.display()))?;
    }
    if UnixStream::connect(path).is_ok() {
        bail!("--admin {}: another agent is listening on this socket; choose another path", path.display());
    }
    match std::fs::symlink_metadata(path) {
        // Stale: left behind by an agent that was killed.
        Ok(metadata) if metadata.file_type().is_socket() => {
            std::fs::remove_file(path).with_context(|| format!("--admin: cannot replace {}", path.display()))?;
        }
        Ok(_) => bail!("--admin {}: the existing file is not a socket; choose another path", path.display()),
        Err(_) => {}
    }
    // The umask restricts the mode from the start, which a later chmod would not. No other thread creates files yet.
    let before = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
    let listener = UnixListener::bind(path);
    rustix::process::umask(before);
    listener.with_context(|| format!("--admin: cannot listen on {}", path.display()))
}

/// The admin socket, which answers only root and the user of this process, whatever its mode is by now.
struct TrustedListener(UnixListener);

impl TrustedListener {
    fn is_trusted(stream: &tokio::net::UnixStream) -> bool {
        let own = rustix::process::geteuid().as_raw();
        stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own)
    }
}

impl axum::serve::Listener for TrustedListener {
    type Io = tokio::net::UnixStream;
    type Addr = tokio::net::unix::SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            match self.0.accept().await {
                Ok((stream, address)) if Self::is_trusted(&stream) => return (stream, address),
                // Closed without an answer.
                Ok(_) => {}
                // A lack of descriptors would be repeated at once.
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.0.local_addr()
    }
}

/// Pause after an error of the listener.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// Serves the admin API until the future is dropped.
///
/// # Errors
/// Returns an error if the socket fails.
pub async fn serve_admin(listener: UnixListener, state: AdminState) -> Result<()> {
    let router = Router::new()
        .route("/v1/report", get(report))
        .route("/v1/explain", get(explain))
        .route("/v1/sources", get(show_sources))
        .route("/v1/opt-outs", get(show_opt_outs))
        .route("/v1/events", get(events))
        .route("/v1/orders", post(order))
        .route("/readyz", get(readyz))
        .with_state(state);
    Ok(axum::serve(TrustedListener(listener), router).await?)
}

/// Serves `/metrics`, `/healthz` and `/readyz` until the future is dropped.
///
/// # Errors
/// Returns an error if the socket fails.
pub async fn serve_metrics(listener: TcpListener, state: AdminState) -> Result<()> {
    let router = Router::new()
        .route("/metrics", get(show_metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .with_state(state);
    Ok(axum::serve(listener, router).await?)
}

/// Sends a request to the controller and waits for its reply. Returns a 503 response if the agent is shutting down.
async fn ask<T>(questions: &Questions, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T, Response> {
    let (reply, answer) = oneshot::channel();
    let shutting_down = |_| (StatusCode::SERVICE_UNAVAILABLE, "the agent is shutting down\n").into_response();
    questions.send(request(reply)).await.map_err(|_| shutting_down(()))?;
    answer.await.map_err(|_| shutting_down(()))
}

async fn report(State(questions): State<Questions>) -> Result<Response, Response> {
    Ok(Json(ask(&questions, Request::Report).await?).into_response())
}

#[derive(Deserialize)]
struct Which {
    namespace: String,
    name: String,
    port: Option<u16>,
}

async fn explain(State(questions): State<Questions>, Query(which): Query<Which>) -> Result<Response, Response> {
    let name = NamespacedName::new(which.namespace, which.name);
    let unknown = format!("clients of this node have no service {name}\n");
    let explanation = ask(&questions, |reply| Request::Explain(name, which.port, reply)).await?;
    Ok(explanation.map_or_else(|| (StatusCode::NOT_FOUND, unknown).into_response(), |it| Json(it).into_response()))
}

/// Applies a manual override. Returns what was done, or 409 with the reason why it was rejected.
async fn order(State(questions): State<Questions>, Json(order): Json<OverrideCommand>) -> Result<Response, Response> {
    Ok(match ask(&questions, |reply| Request::Override(order, reply)).await? {
        Ok(said) => Json(said).into_response(),
        Err(why) => (StatusCode::CONFLICT, format!("{why}\n")).into_response(),
    })
}

#[derive(Deserialize)]
struct Follow {
    #[serde(default)]
    follow: bool,
}

/// Streams events as NDJSON: one JSON object per line.
async fn events(State(questions): State<Questions>, Query(query): Query<Follow>) -> Result<Response, Response> {
    let (history, live) = ask(&questions, Request::Events).await?;
    let history = tokio_stream::iter(history);
    let body = if query.follow {
        // A client that is too slow misses events; the stream continues.
        lines(history.chain(BroadcastStream::new(live).filter_map(Result::ok)))
    } else {
        lines(history)
    };
    Ok(([("content-type", "application/x-ndjson")], body).into_response())
}

fn lines(events: impl Stream<Item = Event> + Send + 'static) -> Body {
    Body::from_stream(events.map(|event| {
        let mut line = serde_json::to_vec(&event).unwrap_or_default();
        line.push(b'\n');
        Ok::<_, Infallible>(Bytes::from(line))
    }))
}

async fn show_sources(State(sources): State<Arc<Sources>>) -> Response {
    Json(SourcesReport { sources: sources.report() }).into_response()
}

async fn show_opt_outs(State(registry): State<Arc<OptOutRegistry>>) -> Response {
    Json(registry.report()).into_response()
}

async fn show_metrics(State(state): State<AdminState>) -> Result<Response, Response> {
    let sample = ask(&state.questions, Request::Metrics).await?;
    let text = metrics::render(&sample, &state.sources.report(), &state.registry.report())
        .map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response())?;
    Ok(([("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response())
}

async fn readyz(State(questions): State<Questions>) -> Result<Response, Response> {
    Ok(match ask(&questions, Request::Ready).await? {
        Ok(()) => "ready\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")).into_response(),
    })
}
