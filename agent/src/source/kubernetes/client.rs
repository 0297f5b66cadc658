//! Clients for API servers.

use std::{
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::{Arc, RwLock},
    task::{Context, Poll},
    time::Duration,
};

use http::Uri;
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
};
use kube::{
    Client, Config,
    client::ConfigExt as _,
    config::{KubeConfigOptions, Kubeconfig},
};
use rustix::net::sockopt;
use tokio::net::TcpStream;
use tower::{BoxError, Service, ServiceBuilder};

use super::{body_limit::BodyLimit, list_watch::describe};
use crate::error::{Context as _, Error, Result, bail, ensure};

/// Timeout for establishing a connection.
const CONNECT: Duration = Duration::from_secs(5);

/// Idle time after which TCP keepalive probes a connection.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// TCP user timeout: a connection with data unacknowledged for this long is dead, and its requests fail.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(10);

/// The endpoints of the local API server, once they are known.
///
/// Dialing them directly avoids the Service address, and so the dependency on the BPF programs that this agent manages.
#[derive(Clone, Debug, Default)]
pub(super) struct DirectAddress(Arc<RwLock<Vec<SocketAddr>>>);

impl DirectAddress {
    pub(super) fn set(&self, addresses: Vec<SocketAddr>) {
        *self.0.write().unwrap_or_else(std::sync::PoisonError::into_inner) = addresses;
    }

    /// Returns all endpoints, rotated to start at a random one.
    fn addresses(&self) -> Vec<SocketAddr> {
        let mut addresses = self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        if !addresses.is_empty() {
            let first = rand::random_range(0..addresses.len());
            addresses.rotate_left(first);
        }
        addresses
    }
}

/// Creates the client for the local cluster from the kubeconfig, or else from the pod's service account.
///
/// # Errors
/// Returns an error if there is neither, or if the configuration is invalid.
pub(super) async fn own(kubeconfig: Option<&Path>, server: Option<&Uri>, direct: &DirectAddress) -> Result<Client> {
    // Some of these errors already include their causes. `describe` avoids repeating them.
    let described = |error: &dyn std::error::Error| Error::State(describe(error));
    let mut config = match kubeconfig {
        Some(path) => {
            let about = || format!("--kubeconfig {}", path.display());
            let file = Kubeconfig::read_from(path).map_err(|error| described(&error)).with_context(about)?;
            let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
            config.map_err(|error| described(&error)).with_context(about)?
        }
        None => Config::incluster().map_err(|error| described(&error)).context(
            "--kubernetes: not running in a pod with a service account; pass --kubeconfig to reach the API server",
        )?,
    };
    // An explicitly configured server is always used as given.
    let direct = if kubeconfig.is_none() && server.is_none() { direct.clone() } else { DirectAddress::default() };
    if let Some(server) = server {
        let host = config.cluster_url.host().map(|host| host.trim_matches(['[', ']']).to_owned());
        config.tls_server_name = config.tls_server_name.or(host);
        config.cluster_url = server.clone();
    }
    build(config, direct)
}

/// Creates the client for a remote cluster from the kubeconfig in a Secret.
///
/// # Errors
/// Returns an error if the kubeconfig is invalid, or requests what only the administrator of this node may configure:
/// programs to run, files to read, a proxy, or a server whose certificate is not verified.
pub(super) async fn of_secret(kubeconfig: &str) -> Result<Client> {
    // Omit the parse error: it quotes the surrounding text, which may contain a token.
    let Ok(file) = Kubeconfig::from_yaml(kubeconfig) else { bail!("not a valid kubeconfig") };
    let refuse = |what: &str| {
        bail!("it requests {what}, which is not allowed in a Secret; embed a token or certificates instead")
    };
    for own in file.auth_infos.iter().filter_map(|named| named.auth_info.as_ref()) {
        if own.exec.is_some() || own.auth_provider.is_some() {
            return refuse("a program to run (exec or auth-provider)");
        }
        if own.token_file.is_some() || own.client_certificate.is_some() || own.client_key.is_some() {
            return refuse("a file of this node (tokenFile, client-certificate or client-key)");
        }
    }
    for own in file.clusters.iter().filter_map(|named| named.cluster.as_ref()) {
        if own.certificate_authority.is_some() {
            return refuse("a file of this node (certificate-authority)");
        }
        if own.proxy_url.is_some() {
            return refuse("a proxy (proxy-url)");
        }
        if own.insecure_skip_tls_verify == Some(true) {
            return refuse("an unverified server (insecure-skip-tls-verify)");
        }
        let server = own.server.as_deref().unwrap_or_default();
        ensure!(server.starts_with("https://"), "its server {server:?} is not an https:// URL");
    }
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
    build(config.map_err(|error| Error::State(describe(&error)))?, DirectAddress::default())
}

fn build(config: Config, direct: DirectAddress) -> Result<Client> {
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_connect_timeout(Some(CONNECT));
    http.set_keepalive(Some(KEEPALIVE));
    http.set_tcp_user_timeout(Some(TCP_USER_TIMEOUT));
    let https = config.rustls_https_connector_with_connector(Dialer { http, direct })?;
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .layer(BodyLimit)
        .map_err(BoxError::from)
        .service(legacy::Client::builder(TokioExecutor::new()).build(https));
    Ok(Client::new(service, config.default_namespace))
}

/// A connector that dials the API server's endpoints if they are known, and falls back to the configured address.
#[derive(Clone)]
struct Dialer {
    http: HttpConnector,
    direct: DirectAddress,
}

impl Service<Uri> for Dialer {
    type Response = TokioIo<TcpStream>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.http.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (addresses, asked) = (self.direct.addresses(), self.http.call(uri));
        Box::pin(async move {
            for address in addresses {
                if let Ok(Ok(stream)) = tokio::time::timeout(CONNECT, TcpStream::connect(address)).await {
                    stream.set_nodelay(true)?;
                    sockopt::set_socket_keepalive(&stream, true)?;
                    sockopt::set_tcp_keepidle(&stream, KEEPALIVE)?;
                    sockopt::set_tcp_user_timeout(&stream, TCP_USER_TIMEOUT.as_millis() as u32)?;
                    return Ok(TokioIo::new(stream));
                }
            }
            Ok(asked.await?)
        })
    }
}
