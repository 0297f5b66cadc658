//! Sidecar proxies: they run in the client's namespace, and the client dials them on loopback.

use std::{
    fmt::Write as _,
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use portolan_tests::{Directory, Namespace, Process, ProcessContext, wait_until};
use serde_json::{Value, json};

use crate::world::{ENDPOINT_PORT, ENDPOINTS};

/// Consecutive failures that eject an endpoint, in Envoy's configuration and in the rule for Portolan.
pub(crate) const FAILURES: u32 = 3;
/// Timeout of an unanswered connect, in both as well.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_millis(250);

/// A running proxy, with the directory of its configuration and log.
pub(crate) struct Proxy {
    pub(crate) process: Process,
    _files: Directory,
}

/// First port of HAProxy; the second one follows it.
pub(crate) const HAPROXY: u16 = 15_100;
/// First port of Envoy; the second one follows it.
pub(crate) const ENVOY: u16 = 15_200;

/// Starts HAProxy with one thread, which forwards its two ports to the echo and sink ports of the server.
pub(crate) fn haproxy(namespace: &Namespace) -> Result<Proxy> {
    let mut config = String::from(
        "global\n  nbthread 1\n  maxconn 4000\ndefaults\n  mode tcp\n  timeout connect 1s\n  timeout client 60s\n  timeout server 60s\n",
    );
    for port in 0..2 {
        writeln!(config, "listen p{port}\n  bind 127.0.0.1:{}\n  balance roundrobin", HAPROXY + port)?;
        for (i, endpoint) in ENDPOINTS.iter().enumerate() {
            let address = std::net::Ipv4Addr::from(*endpoint);
            writeln!(config, "  server s{i} {address}:{}", ENDPOINT_PORT + port)?;
        }
    }
    let path = format!("{}:/usr/sbin", std::env::var("PATH").unwrap_or_default());
    let found = std::env::split_paths(&path).map(|folder| folder.join("haproxy")).find(|file| file.is_file());
    let program = found.context("haproxy is not installed (Debian package haproxy)")?;
    start(namespace, &program, "haproxy.cfg", &config, HAPROXY, &|file| vec!["-db".into(), "-f".into(), file.into()])
}

/// Starts Envoy with one worker, which forwards its two ports to the echo and sink ports of these endpoints.
pub(crate) fn envoy(namespace: &Namespace, program: &Path, endpoints: &[[u8; 4]]) -> Result<Proxy> {
    let cluster = |port: u16| -> Value {
        let address = |endpoint: &[u8; 4], port: u16| {
            json!({"endpoint": {"address": {"socket_address": {
            "address": std::net::Ipv4Addr::from(*endpoint).to_string(), "port_value": port}}}})
        };
        let behind: Vec<Value> = endpoints.iter().map(|endpoint| address(endpoint, ENDPOINT_PORT + port)).collect();
        json!({
            "name": format!("p{port}"), "type": "STATIC", "lb_policy": "ROUND_ROBIN",
            "connect_timeout": format!("{}s", CONNECT_TIMEOUT.as_secs_f64()),
            "load_assignment": {"cluster_name": format!("p{port}"), "endpoints": [{"lb_endpoints": behind}]},
            "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
            "outlier_detection": {"consecutive_5xx": FAILURES, "interval": "10s", "base_ejection_time": "30s", "max_ejection_percent": 100},
        })
    };
    let listener = |port: u16| {
        json!({
            "name": format!("p{port}"), "address": {"socket_address": {"address": "127.0.0.1", "port_value": ENVOY + port}},
            "filter_chains": [{"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": format!("p{port}"), "cluster": format!("p{port}")}}]}],
        })
    };
    let config =
        json!({"static_resources": {"listeners": [listener(0), listener(1)], "clusters": [cluster(0), cluster(1)]}});
    let arguments = |file: &Path| {
        let mut all: Vec<std::ffi::OsString> = vec!["-c".into(), file.into()];
        all.extend(["--concurrency", "1", "--disable-hot-restart", "-l", "error"].map(Into::into));
        all
    };
    start(namespace, program, "envoy.json", &config.to_string(), ENVOY, &arguments)
}

fn start(
    namespace: &Namespace,
    program: &Path,
    file: &str,
    config: &str,
    port: u16,
    arguments: &dyn Fn(&Path) -> Vec<std::ffi::OsString>,
) -> Result<Proxy> {
    let files = Directory::new()?;
    let path: PathBuf = files.scratch(file);
    fs::write(&path, config)?;
    let mut command = Command::new(program);
    command.args(arguments(&path)).stdout(Stdio::null()).stderr(fs::File::create(files.scratch("log"))?);
    let mut process = Process::spawn(command, ProcessContext { namespace: Some(namespace), cgroup: None })?;
    wait_until(&format!("{} to listen", program.display()), Duration::from_secs(30), || {
        let log = || fs::read_to_string(files.scratch("log")).unwrap_or_default();
        ensure!(process.child().try_wait()?.is_none(), "the proxy exited: {}", log());
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        namespace.enter(|| Ok(TcpStream::connect(address).map(drop)?))
    })?;
    Ok(Proxy { process, _files: files })
}
