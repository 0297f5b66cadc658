//! Runs one probe of one endpoint: TCP connect, HTTP/1 request, or gRPC health check.

use std::{
    io::{self, ErrorKind},
    net::SocketAddr,
};

use axum::body::Bytes;
use http_body_util::Empty;
use hyper::{Request, StatusCode, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use portolan_core::model::{Probe, ProbeKind};
use tokio::{net::TcpStream, task::JoinSet, time::timeout};
use tonic::transport::Channel;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tower::service_fn;

/// What a probe says about an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeResult {
    /// The endpoint passed.
    Success,
    /// The endpoint failed, for this reason.
    Failing(String),
    /// The agent could not probe, for this reason. The result says nothing about the endpoint.
    Unknown(String),
}

/// Probes an endpoint. The eBPF programs do not rewrite the connection, because an endpoint is not a Service address.
pub async fn check(endpoint: SocketAddr, probe: &Probe) -> ProbeResult {
    let address = probe.dialed(endpoint);
    let attempt = async {
        match &probe.kind {
            ProbeKind::Tcp => connect(address).await.map(drop),
            ProbeKind::Http { path, headers } => http(address, path, headers).await,
            ProbeKind::Grpc { service } => grpc(address, service).await,
        }
    };
    match timeout(probe.timeout, attempt).await {
        Ok(Ok(())) => ProbeResult::Success,
        Ok(Err(verdict)) => verdict,
        Err(_) => ProbeResult::Failing(format!("no answer within {}", humantime::format_duration(probe.timeout))),
    }
}

async fn connect(address: SocketAddr) -> Result<TcpStream, ProbeResult> {
    TcpStream::connect(address).await.map_err(|error| refused(&error))
}

/// Classifies a failed connect. A local cause (no route, no file descriptor, no permission) says nothing about the
/// endpoint.
fn refused(error: &io::Error) -> ProbeResult {
    let is_remote =
        matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset | ErrorKind::TimedOut);
    if is_remote { ProbeResult::Failing(error.to_string()) } else { ProbeResult::Unknown(error.to_string()) }
}

fn failing(error: impl std::fmt::Display) -> ProbeResult {
    ProbeResult::Failing(error.to_string())
}

/// Sends an HTTP/1 request. As in the kubelet, any status from 200 to 399 is a success. Does not follow redirects.
async fn http(address: SocketAddr, path: &str, headers: &[(String, String)]) -> Result<(), ProbeResult> {
    let stream = connect(address).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(failing)?;
    let mut request =
        Request::get(path).header(header::USER_AGENT, concat!("portolan-probe/", env!("CARGO_PKG_VERSION")));
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
        request = request.header(header::HOST, address.to_string());
    }
    for (name, value) in headers {
        request = request.header(name, value);
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(|error| ProbeResult::Unknown(error.to_string()))?;
    // Drives the connection during the request, and is aborted on drop.
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let status = sender.send_request(request).await.map_err(failing)?.status();
    let success = status >= StatusCode::OK && status < StatusCode::BAD_REQUEST;
    if success { Ok(()) } else { Err(ProbeResult::Failing(format!("status {}", status.as_u16()))) }
}

/// Queries the standard gRPC health service (`grpc.health.v1.Health/Check`).
async fn grpc(address: SocketAddr, service: &str) -> Result<(), ProbeResult> {
    // tonic does not expose why a connect failed.
    // Connect here, and pass it the connection.
    let mut stream = Some(TokioIo::new(connect(address).await?));
    let once = service_fn(move |_| {
        let stream = stream.take().ok_or_else(|| io::Error::other("the connection is closed"));
        async { stream }
    });
    let channel = Channel::from_shared(format!("http://{address}")).map_err(failing)?;
    let channel = channel.connect_with_connector(once).await.map_err(failing)?;
    let request = HealthCheckRequest { service: service.to_owned() };
    let answer = HealthClient::new(channel).check(request).await;
    let status =
        answer.map_err(|status| ProbeResult::Failing(format!("gRPC: {}", status.code())))?.into_inner().status();
    if status == ServingStatus::Serving { Ok(()) } else { Err(ProbeResult::Failing(status.as_str_name().to_owned())) }
}
