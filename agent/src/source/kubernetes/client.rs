//! Ways to an API server.

use std::{
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::{Arc, RwLock},
    task::{Context, Poll},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
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

/// How long to wait for a connection.
const CONNECT: Duration = Duration::from_secs(5);

/// A connection that has been silent for so long is asked whether it still stands.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// One that has not acknowledged anything for so long does not: what waits in it is asked for by another one.
const UNHEARD: Duration = Duration::from_secs(10);

/// The own API server's endpoints, once they are known: then its Service address is not needed to reach it, and so not the programs that this
/// agent keeps.
#[derive(Clone, Debug, Default)]
pub(super) struct DirectAddress(Arc<RwLock<Vec<SocketAddr>>>);

impl DirectAddress {
    pub(super) fn set(&self, addresses: Vec<SocketAddr>) {
        *self.0.write().unwrap_or_else(std::sync::PoisonError::into_inner) = addresses;
    }

    /// All of them, beginning with any.
    fn addresses(&self) -> Vec<SocketAddr> {
        let mut addresses = self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        if !addresses.is_empty() {
            let first = rand::random_range(0..addresses.len());
            addresses.rotate_left(first);
        }
        addresses
    }
}

/// The client of the cluster that the agent is in: as the kubeconfig says, or else as a pod's service account says.
///
/// # Errors
/// Nothing says how to reach it, or what does makes no sense.
pub(super) async fn own(kubeconfig: Option<&Path>, server: Option<&Uri>, direct: &DirectAddress) -> Result<Client> {
    // Their errors name their causes themselves.
    let told = |error: &dyn std::error::Error| anyhow::anyhow!("{}", describe(error));
    let mut config = match kubeconfig {
        Some(path) => {
            let about = || format!("--kubeconfig {}", path.display());
            let file = Kubeconfig::read_from(path).map_err(|error| told(&error)).with_context(about)?;
            let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
            config.map_err(|error| told(&error)).with_context(about)?
        }
        None => Config::incluster().map_err(|error| told(&error)).context(
            "--kubernetes: this is no pod with a service account; --kubeconfig says how else to reach the API server",
        )?,
    };
    // Whoever names a server means that one.
    let direct = if kubeconfig.is_none() && server.is_none() { direct.clone() } else { DirectAddress::default() };
    if let Some(server) = server {
        let host = config.cluster_url.host().map(|host| host.trim_matches(['[', ']']).to_owned());
        config.tls_server_name = config.tls_server_name.or(host);
        config.cluster_url = server.clone();
    }
    build(config, direct)
}

/// The client of another cluster, from a kubeconfig that somebody has put into a Secret.
///
/// # Errors
/// It makes no sense, or asks for what nobody but the owner of this node may ask for: programs to run, files to read.
pub(super) async fn of_secret(kubeconfig: &str) -> Result<Client> {
    // What is wrong with it would be shown with what is around it, and that may be a token.
    let Ok(file) = Kubeconfig::from_yaml(kubeconfig) else { bail!("is no kubeconfig") };
    let refuse = |what: &str| {
        bail!("asks for {what}, which is not done for what comes from a Secret: it may hold a token or certificates")
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
            return refuse("a server that nobody has vouched for (insecure-skip-tls-verify)");
        }
        let server = own.server.as_deref().unwrap_or_default();
        ensure!(server.starts_with("https://"), "its server is {server:?}, which is no https:// address");
    }
    build(Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?, DirectAddress::default())
}

fn build(config: Config, direct: DirectAddress) -> Result<Client> {
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_connect_timeout(Some(CONNECT));
    http.set_keepalive(Some(KEEPALIVE));
    http.set_tcp_user_timeout(Some(UNHEARD));
    let https = config.rustls_https_connector_with_connector(Dialler { http, direct })?;
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .layer(BodyLimit)
        .map_err(BoxError::from)
        .service(legacy::Client::builder(TokioExecutor::new()).build(https));
    Ok(Client::new(service, config.default_namespace))
}

/// Dials the server itself, where it is known, and else what the configuration says.
#[derive(Clone)]
struct Dialler {
    http: HttpConnector,
    direct: DirectAddress,
}

impl Service<Uri> for Dialler {
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
                    sockopt::set_tcp_user_timeout(&stream, UNHEARD.as_millis() as u32)?;
                    return Ok(TokioIo::new(stream));
                }
            }
            Ok(asked.await?)
        })
    }
}
