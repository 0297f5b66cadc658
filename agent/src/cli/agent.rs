//! The `portolan agent` subcommand.

use std::{io::IsTerminal as _, net::SocketAddr, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use clap::Args;
use portolan_core::{decode::DecodeOptions, table::Sizes};
use portolan_datapath::{Datapath, HelperArgs, Options, ProgramLog, RemovedEndpointTcp, capabilities, serve_helper};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tracing_subscriber::EnvFilter;

use super::{AdminArgs, DecodeArgs, PinsArgs, PlaceArgs, StateArgs};
use crate::{
    admin::{self, AdminState},
    controller::{
        self, Controller,
        state_file::{PersistedState, StateWriter},
    },
    error::Error,
    opt_out,
    probe::{Prober, self_probe::SelfProbe},
    source::{Sources, file, kubernetes},
};

/// Run the node agent.
///
/// Loads the eBPF programs, keeps their maps in sync with the objects, and ejects failing endpoints.
/// Maps and programs are pinned: when the agent exits, for whatever reason, the kernel keeps using the last published
/// state, and the next agent adopts it. Only `portolan cleanup` removes them.
#[derive(Debug, Args)]
#[command(
    group = clap::ArgGroup::new("source").args(["config", "kubernetes"]).required(true),
    after_help = "Examples:\n  portolan agent --config /etc/portolan --cluster c1 --node $(hostname)\n  portolan agent --kubernetes --kubeconfig ~/.kube/config --cluster c1 --node $(hostname)"
)]
pub(super) struct AgentArgs {
    /// Directory with the objects: DIR/*.yaml for the mesh, DIR/<cluster-id>/**/*.yaml for each cluster; must belong to
    /// root or be world-readable
    #[arg(long, value_name = "DIR", env = "PORTOLAN_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    reader: DecodeArgs,
    #[command(flatten)]
    kubernetes: KubernetesArgs,
    #[command(flatten)]
    place: PlaceArgs,
    /// Handle connections of processes in this cgroup and below [default: the cgroup v2 root]
    #[arg(long, value_name = "PATH", env = "PORTOLAN_CGROUP")]
    cgroup: Option<PathBuf>,
    #[command(flatten)]
    pins: PinsArgs,
    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    state: StateArgs,
    /// Listen address for /metrics, /healthz and /readyz
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:15920", env = "PORTOLAN_METRICS")]
    metrics: SocketAddr,
    /// Interval between full rescans of the directory, for changes that the watch missed
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = humantime::parse_duration, env = "PORTOLAN_RESCAN")]
    rescan: Duration,
    /// What to do with TCP connections to removed endpoints (connected UDP sockets are always closed)
    #[arg(long, value_enum, default_value_t, env = "PORTOLAN_GONE_CONNECTIONS")]
    gone_connections: RemovedEndpointTcp,
    /// Maximum number of active probes (portolan.io/probe) per second; 0 disables them
    #[arg(long, value_name = "COUNT", default_value_t = 100, value_parser = clap::value_parser!(u32).range(..=10_000), env = "PORTOLAN_PROBES_PER_SECOND")]
    probes_per_second: u32,
    /// Log filter: error, warn, info, debug, trace, or per-module directives
    #[arg(long, value_name = "FILTER", default_value = "info", env = "PORTOLAN_LOG")]
    log: EnvFilter,
    /// Log each connection from the eBPF programs, for debugging; slows down every connect
    #[arg(long, value_enum, default_value_t, env = "PORTOLAN_PROGRAM_LOG")]
    program_log: ProgramLog,
    #[command(flatten)]
    sizes: SizeArgs,
}

/// Path of the running binary, which also serves as the helper.
const SELF: &str = "/proc/self/exe";

/// Capacity of the queue of findings to report as Kubernetes Events. Findings beyond it appear only in the log.
const FINDINGS: usize = 100;

/// Options for reading objects from API servers instead of a directory.
#[derive(Debug, Args)]
#[command(next_help_heading = "Kubernetes")]
struct KubernetesArgs {
    /// Read the objects from the API server instead of a directory
    #[arg(long, env = "PORTOLAN_KUBERNETES")]
    kubernetes: bool,
    /// Kubeconfig for the API server [default: the service account of the pod]
    #[arg(long, value_name = "FILE", env = "PORTOLAN_KUBECONFIG", conflicts_with = "config")]
    kubeconfig: Option<PathBuf>,
    /// Direct URL of the API server, used instead of its Service address: stays reachable if that Service breaks
    #[arg(long, value_name = "URL", env = "PORTOLAN_API_SERVER", conflicts_with = "config")]
    api_server: Option<http::Uri>,
    /// Also read endpoints of the remote clusters that Secrets in istio-system name
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set, env = "PORTOLAN_OTHER_CLUSTERS")]
    other_clusters: bool,
    /// Report findings as Kubernetes Events on the objects concerned, at most one per second
    #[arg(long, env = "PORTOLAN_KUBERNETES_EVENTS", conflicts_with = "config")]
    kubernetes_events: bool,
    /// Interval between full relists, regardless of the watches
    #[arg(long, value_name = "DURATION", default_value = "30m", value_parser = at_least_one_second, env = "PORTOLAN_RESYNC", conflicts_with = "config")]
    resync: Duration,
    /// Time after which a watch is restarted; a watch that stays silent for five seconds longer counts as stalled
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = at_least_one_second, env = "PORTOLAN_WATCH_TIMEOUT", conflicts_with = "config")]
    watch_timeout: Duration,
    /// How long to keep using the endpoints of a remote cluster while its API server is unreachable
    #[arg(long, value_name = "DURATION", default_value = "30m", value_parser = at_least_one_second, env = "PORTOLAN_REMOTE_GRACE", conflicts_with = "config")]
    remote_grace: Duration,
}

fn at_least_one_second(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if time < Duration::from_secs(1) { Err("must be at least one second".to_owned()) } else { Ok(time) }
}

impl KubernetesArgs {
    fn options(&self, place: &PlaceArgs, reader: DecodeOptions) -> kubernetes::Options {
        kubernetes::Options {
            cluster: place.cluster.clone(),
            node: place.at.node.clone().unwrap_or_default(),
            kubeconfig: self.kubeconfig.clone(),
            server: self.api_server.clone(),
            others: self.other_clusters,
            resync: self.resync,
            watch_timeout: self.watch_timeout,
            remote_grace: self.remote_grace,
            reader,
        }
    }
}

/// Capacities of the BPF maps.
#[derive(Debug, Args)]
#[command(next_help_heading = "Map sizes (changing a size creates new maps, which replace the old ones in one step)")]
struct SizeArgs {
    /// Maximum number of frontends: pairs of Service address and port
    #[arg(long, value_name = "COUNT", default_value_t = Sizes::default().frontends, value_parser = size(), env = "PORTOLAN_MAX_FRONTENDS")]
    max_frontends: u32,
    /// Maximum number of endpoints
    #[arg(long, value_name = "COUNT", default_value_t = Sizes::default().backends, value_parser = clap::value_parser!(u32).range(1..=262_143), env = "PORTOLAN_MAX_BACKENDS")]
    max_backends: u32,
    /// Maximum number of slots of all schedules, of entries of all runs, and of turns of all lists of endpoints
    #[arg(long, value_name = "COUNT", default_value_t = Sizes::default().slots, value_parser = size(), env = "PORTOLAN_MAX_SLOTS")]
    max_slots: u32,
    /// Maximum number of client affinities (sessionAffinity); the least recently used one is evicted
    #[arg(long, value_name = "COUNT", default_value_t = Sizes::default().affinities, value_parser = size(), env = "PORTOLAN_MAX_AFFINITIES")]
    max_affinities: u32,
    /// Maximum number of sockets with their state in the fast map; others take longer to connect.
    /// Rounded up to a power of two, from 1024 to 16777216; another number makes open connections lose their state.
    /// Default: one for each 32 KiB of memory, thus 262144 with 8 GiB; each takes 128 bytes
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(i64::from(Sizes::CONNECTIONS.0)..=i64::from(Sizes::CONNECTIONS.1)), env = "PORTOLAN_MAX_CONNECTIONS")]
    max_connections: Option<u32>,
}

/// Parses the size of a map: 1 to 2^26 entries.
fn size() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=1 << 26)
}

/// Returns the default number of entries of `CONNECTIONS` on this machine.
fn default_connections() -> u32 {
    let system = rustix::system::sysinfo();
    Sizes::connections_for_memory((system.totalram as u64).saturating_mul(system.mem_unit.into()))
}

impl SizeArgs {
    fn sizes(&self) -> Sizes {
        Sizes {
            frontends: self.max_frontends,
            backends: self.max_backends,
            slots: self.max_slots,
            affinities: self.max_affinities,
            connections: self.max_connections.map_or_else(default_connections, u32::next_power_of_two),
        }
    }
}

/// Pins glibc's mmap threshold, so that freed large blocks go back to the system at once.
///
/// By default, glibc raises the threshold when such a block is freed, and keeps blocks of that size from then on.
/// Decoding the objects takes several times the memory of the result.
fn keep_heap_small() {
    // SAFETY: no other thread exists yet.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
    }
}

/// Aborts the process on any panic.
///
/// A partially working agent is worse than none: without one, the pinned programs keep serving, and the next agent
/// starts clean.
fn abort_on_panic() {
    let default_hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default_hook(panic);
        std::process::abort();
    }));
}

pub(super) fn run(args: AgentArgs) -> Result<ExitCode> {
    let mut filter = args.log;
    // kube_client logs whole responses that it cannot decode, and they may contain tokens.
    if !filter.to_string().contains("kube_client") {
        filter = filter.add_directive("kube_client=off".parse()?);
    }
    if args.program_log != ProgramLog::Off {
        filter = filter.add_directive("portolan=debug".parse()?);
    }
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    keep_heap_small();
    abort_on_panic();
    // One worker thread for the controller, one for requests.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .on_thread_start(|| {
            if let Err(error) = capabilities::drop_capabilities() {
                panic!("cannot drop the capabilities of a worker thread: {error}");
            }
        })
        .enable_all()
        .build()?;
    let options = Options {
        cgroup: args.cgroup,
        bpffs: args.pins.bpffs,
        sizes: args.sizes.sizes(),
        log: args.program_log,
        program: SELF.into(),
    };
    let reader = args.reader.reader();
    // Check access before loading anything, on a thread without capabilities, like the threads that read it later.
    if let Some(config) = args.config.clone() {
        runtime.block_on(runtime.spawn_blocking(move || file::check(&config)))??;
    }
    let place = args.place.at.place();
    let from_api = args.kubernetes.options(&args.place, reader);
    let ended = runtime.block_on(async {
        let link = if args.config.is_none() { Some(kubernetes::connect(&from_api).await?) } else { None };
        // Open the data path first: it takes the locks, so a second agent fails here.
        let (mut datapath, held) = Datapath::open(&options)?;
        let probe = SelfProbe::new(datapath.cgroup()).await?;
        let admin_socket = admin::bind_admin(&args.admin.admin)?;
        let metrics_socket = TcpListener::bind(args.metrics)
            .await
            .with_context(|| format!("--metrics: cannot listen on {}", args.metrics))?;
        // Privileged setup is complete. The helper does everything that needs privileges later.
        capabilities::drop_capabilities().context("cannot drop capabilities")?;
        let (questions, requests) = mpsc::channel(16);
        let (changes, updates) = mpsc::channel(256);
        let (finding_tx, finding_rx) = args.kubernetes.kubernetes_events.then(|| mpsc::channel(FINDINGS)).unzip();
        let (sources, registry) = (Arc::new(Sources::default()), Arc::new(opt_out::OptOutRegistry::default()));
        let root = datapath.cgroup().to_owned();
        let kernel = datapath.opted_out.take().context("the opt-out map has already been taken")?;
        let noted = Arc::clone(&sources);
        let report = Box::new(move |about: &str, finding| noted.note(about, finding));
        let enforcer = opt_out::Enforcer { root, kernel, registry: Arc::clone(&registry), report };
        let prober = Prober::start(args.probes_per_second);
        let persisted = PersistedState::read(&args.state.state);
        let state_writer = StateWriter::start(args.state.state)?;
        let settings = controller::Settings {
            cluster: args.place.cluster.clone(),
            location: place,
            sizes: options.sizes,
            removed_endpoint_tcp: args.gone_connections,
            probes_per_second: args.probes_per_second,
        };
        let start = controller::Start::of(held, persisted, &probe, &prober);
        let controller = Controller::new(controller::Now::read(), settings, datapath, start);
        let io = controller::Io::start(prober, probe, state_writer, finding_tx);
        let admin_state = AdminState { questions, sources: Arc::clone(&sources), registry: Arc::clone(&registry) };
        let source = async {
            match (args.config, link) {
                (Some(config), _) => {
                    // File sources contain no pods, so no pod is opted out.
                    registry.want(opt_out::ByUid::new());
                    file::run(config, reader, args.rescan, sources, changes).await
                }
                (None, Some(link)) => kubernetes::run(from_api, link, sources, changes, finding_rx, registry).await,
                // Unreachable: the argument group requires one of them.
                (None, None) => Err(Error::State("pass --config or --kubernetes".to_owned())),
            }
        };
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let ended = tokio::select! {
            ended = tokio::spawn(controller::run(controller, io, updates, requests)) => ended?,
            // The source returns `Ok` only when its receiver is gone; the controller then returns the reason.
            Err(error) = source => Err(error),
            ended = tokio::spawn(enforcer.run()) => Ok(ended?),
            ended = admin::serve_admin(admin_socket, admin_state.clone()) => ended,
            ended = admin::serve_metrics(metrics_socket, admin_state) => ended,
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
        };
        let _ = std::fs::remove_file(&args.admin.admin);
        ended?;
        tracing::info!("shutting down; pinned programs keep serving");
        Ok(ExitCode::SUCCESS)
    });
    // A blocking task may still wait for the disk. No remaining task has to finish.
    runtime.shutdown_background();
    ended
}

/// Runs the privileged helper process of an agent, until that agent exits.
pub(super) fn run_helper(args: &HelperArgs) -> Result<ExitCode> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).with_target(false).init();
    abort_on_panic();
    serve_helper(args)?;
    Ok(ExitCode::SUCCESS)
}
