//! One probe of one endpoint.

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

/// What came of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeResult {
    /// The endpoint is well.
    Well,
    /// It is not, and why.
    Failing(String),
    /// The agent could not ask, which says nothing of the endpoint.
    Unknown(String),
}

/// Probes an endpoint. It is not rewritten, for it goes to an endpoint and not to a Service.
pub async fn check(endpoint: SocketAddr, probe: &Probe) -> ProbeResult {
    let address = probe.dialled(endpoint);
    let asked = async {
        match &probe.kind {
            ProbeKind::Tcp => connect(address).await.map(drop),
            ProbeKind::Http { path, headers } => http(address, path, headers).await,
            ProbeKind::Grpc { service } => grpc(address, service).await,
        }
    };
    match timeout(probe.timeout, asked).await {
        Ok(Ok(())) => ProbeResult::Well,
        Ok(Err(verdict)) => verdict,
        Err(_) => ProbeResult::Failing(format!("no answer within {}", humantime::format_duration(probe.timeout))),
    }
}

async fn connect(address: SocketAddr) -> Result<TcpStream, ProbeResult> {
    TcpStream::connect(address).await.map_err(|error| refused(&error))
}

/// What this agent lacks (a route, a descriptor, a permission) says nothing of the endpoint.
fn refused(error: &io::Error) -> ProbeResult {
    let of_endpoint =
        matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset | ErrorKind::TimedOut);
    if of_endpoint { ProbeResult::Failing(error.to_string()) } else { ProbeResult::Unknown(error.to_string()) }
}

fn failing(error: impl std::fmt::Display) -> ProbeResult {
    ProbeResult::Failing(error.to_string())
}

/// As the kubelet judges it: any status from 200 to 399 is well. Redirects are not followed.
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
    // Does its work while the response is waited for, and ends with this.
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let status = sender.send_request(request).await.map_err(failing)?.status();
    let well = status >= StatusCode::OK && status < StatusCode::BAD_REQUEST;
    if well { Ok(()) } else { Err(ProbeResult::Failing(format!("status {}", status.as_u16()))) }
}

/// gRPC's own health service.
async fn grpc(address: SocketAddr, service: &str) -> Result<(), ProbeResult> {
    // Of what makes a connection fail, the library keeps no more than that it did: it is given one.
    let mut stream = Some(TokioIo::new(connect(address).await?));
    let once = service_fn(move |_| {
        let stream = stream.take().ok_or_else(|| io::Error::other("the connection has ended"));
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
