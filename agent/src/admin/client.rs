//! Client of the admin API: HTTP over a Unix socket.

use std::{io::ErrorKind, path::Path};

use axum::body::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Request, StatusCode,
    body::Incoming,
    client::conn::http1,
    header::{CONTENT_TYPE, HOST},
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use crate::error::{Context as _, Error, Result, bail};

/// A streaming response, read line by line.
pub struct Stream {
    body: Incoming,
    /// Bytes that were received, but not yet returned as a line.
    rest: Vec<u8>,
}

impl Stream {
    /// Sends a GET request for `path` (with its query) and returns the response once its headers have arrived.
    ///
    /// # Errors
    /// Returns an error if the connection to the agent fails, or if the status of the response is not 2xx.
    pub async fn open(socket: &Path, path: &str) -> Result<Self> {
        Self::ask(socket, Request::get(path).header(HOST, "portolan").body(Full::default())?).await
    }

    async fn ask(socket: &Path, request: Request<Full<Bytes>>) -> Result<Self> {
        let stream = UnixStream::connect(socket).await.map_err(|error| {
            let what = if error.kind() == ErrorKind::PermissionDenied {
                format!("{}: permission denied; run as root", socket.display())
            } else {
                format!("no agent is listening on {}; start one, or pass its socket with --admin", socket.display())
            };
            Error::Context { context: what, source: Box::new(error.into()) }
        })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = response.into_body();
        if !status.is_success() {
            let text = body.collect().await?.to_bytes();
            let text = String::from_utf8_lossy(&text).trim().to_owned();
            if status == StatusCode::CONFLICT {
                bail!("{text}");
            }
            bail!("the agent returned {status}: {text}");
        }
        Ok(Self { body, rest: Vec::new() })
    }

    /// Returns the next line without its newline, or `None` at the end of the stream.
    ///
    /// # Errors
    /// Returns an error if the connection breaks.
    pub async fn next_line(&mut self) -> Result<Option<String>> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return Ok(Some(String::from_utf8_lossy(&line[..end]).into_owned()));
            }
            match self.body.frame().await {
                Some(frame) => self.rest.extend(frame?.data_ref().into_iter().flatten()),
                None => return Ok(None),
            }
        }
    }
}

/// Sends a GET request and decodes the JSON response.
///
/// # Errors
/// Returns an error if no agent is listening, the request fails, or the response is not the expected JSON.
pub async fn get<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T> {
    let stream = Stream::open(socket, path).await?;
    let text = stream.body.collect().await?.to_bytes();
    serde_json::from_slice(&text).context("unexpected response from the agent; is it another version?")
}

/// Sends a POST request with a JSON body and decodes the JSON response.
///
/// # Errors
/// Returns an error if no agent is listening, the agent rejects the request, or the response is not the expected JSON.
pub async fn post<T: DeserializeOwned>(socket: &Path, path: &str, what: &impl Serialize) -> Result<T> {
    let request = Request::post(path).header(HOST, "portolan").header(CONTENT_TYPE, "application/json");
    let stream = Stream::ask(socket, request.body(Full::from(serde_json::to_vec(what)?))?).await?;
    let text = stream.body.collect().await?.to_bytes();
    serde_json::from_slice(&text).context("unexpected response from the agent; is it another version?")
}
