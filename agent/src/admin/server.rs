//! The serving side.

use std::{
    convert::Infallible,
    os::unix::{fs::FileTypeExt as _, net::UnixStream},
    path::Path,
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};
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
    metrics,
    opt_out::OptOutRegistry,
    source::{Sources, SourcesReport},
};

type Questions = mpsc::Sender<Request>;

/// Whom the doors ask.
#[derive(Clone)]
pub struct AdminState {
    /// The one task that knows.
    pub questions: mpsc::Sender<Request>,
    /// Those who read.
    pub sources: Arc<Sources>,
    /// Who is left alone.
    pub registry: Arc<OptOutRegistry>,
}

impl FromRef<AdminState> for Questions {
    fn from_ref(asked: &AdminState) -> Self {
        asked.questions.clone()
    }
}

impl FromRef<AdminState> for Arc<Sources> {
    fn from_ref(asked: &AdminState) -> Self {
        Self::clone(&asked.sources)
    }
}

impl FromRef<AdminState> for Arc<OptOutRegistry> {
    fn from_ref(asked: &AdminState) -> Self {
        Self::clone(&asked.registry)
    }
}

/// The admin socket, for its owner alone.
///
/// # Errors
/// Another agent listens there, or the path cannot be used.
pub fn bind_admin(path: &Path) -> Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("--admin: cannot create {}", folder.display()))?;
    }
    if UnixStream::connect(path).is_ok() {
        bail!("--admin {}: another agent listens there; give this one its own", path.display());
    }
    match std::fs::symlink_metadata(path) {
        // Left behind by an agent that was killed.
        Ok(metadata) if metadata.file_type().is_socket() => {
            std::fs::remove_file(path).with_context(|| format!("--admin: cannot replace {}", path.display()))?;
        }
        Ok(_) => bail!("--admin {}: there is a file that is no socket; give another path", path.display()),
        Err(_) => {}
    }
    // The mode must be right from the first moment on. No other thread makes files yet.
    let before = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
    let listener = UnixListener::bind(path);
    rustix::process::umask(before);
    listener.with_context(|| format!("--admin: cannot listen on {}", path.display()))
}

/// Answers on the admin socket, for ever.
///
/// # Errors
/// The socket fails.
pub async fn serve_admin(listener: UnixListener, asked: AdminState) -> Result<()> {
    let router = Router::new()
        .route("/v1/report", get(report))
        .route("/v1/explain", get(explain))
        .route("/v1/sources", get(show_sources))
        .route("/v1/opt-outs", get(show_opt_outs))
        .route("/v1/events", get(events))
        .route("/v1/orders", post(order))
        .route("/readyz", get(readyz))
        .with_state(asked);
    Ok(axum::serve(listener, router).await?)
}

/// Answers on the HTTP address, for ever.
///
/// # Errors
/// The socket fails.
pub async fn serve_metrics(listener: TcpListener, asked: AdminState) -> Result<()> {
    let router = Router::new()
        .route("/metrics", get(show_metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .with_state(asked);
    Ok(axum::serve(listener, router).await?)
}

/// Asks the one task that knows.
async fn ask<T>(questions: &Questions, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T, Response> {
    let (reply, answer) = oneshot::channel();
    let ending = |_| (StatusCode::SERVICE_UNAVAILABLE, "the agent is ending\n").into_response();
    questions.send(request(reply)).await.map_err(|_| ending(()))?;
    answer.await.map_err(|_| ending(()))
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

/// What was done, or why it was not.
async fn order(State(questions): State<Questions>, Json(order): Json<OverrideCommand>) -> Result<Response, Response> {
    Ok(match ask(&questions, |reply| Request::OverrideCommand(order, reply)).await? {
        Ok(said) => Json(said).into_response(),
        Err(why) => (StatusCode::CONFLICT, format!("{why}\n")).into_response(),
    })
}

#[derive(Deserialize)]
struct Follow {
    #[serde(default)]
    follow: bool,
}

/// One JSON object on each line.
async fn events(State(questions): State<Questions>, Query(query): Query<Follow>) -> Result<Response, Response> {
    let (kept, live) = ask(&questions, Request::Events).await?;
    let kept = tokio_stream::iter(kept);
    let body = if query.follow {
        // Who is too slow misses records; the stream goes on.
        lines(kept.chain(BroadcastStream::new(live).filter_map(Result::ok)))
    } else {
        lines(kept)
    };
    Ok(([("content-type", "application/x-ndjson")], body).into_response())
}

fn lines(records: impl Stream<Item = Event> + Send + 'static) -> Body {
    Body::from_stream(records.map(|record| {
        let mut line = serde_json::to_vec(&record).unwrap_or_default();
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

async fn show_metrics(State(asked): State<AdminState>) -> Result<Response, Response> {
    let sample = ask(&asked.questions, Request::MetricsSnapshot).await?;
    let text = metrics::render(&sample, &asked.sources.report(), &asked.registry.report())
        .map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response())?;
    Ok(([("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response())
}

async fn readyz(State(questions): State<Questions>) -> Result<Response, Response> {
    Ok(match ask(&questions, Request::Ready).await? {
        Ok(()) => "ready\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")).into_response(),
    })
}
