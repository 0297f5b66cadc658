//! `portolan agent`

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
        Reconciler,
        state_file::{PersistedState, StateWriter},
    },
    opt_out,
    probe::{Prober, self_probe::SelfProbe},
    source::{Sources, file, kubernetes},
};

/// Serves the connections of this node.
///
/// Loads the eBPF programs, keeps their maps true to the objects, and ejects endpoints that fail. Maps and programs are pinned: when
/// the agent ends, for whatever reason, connections go on being served as they were, and the next one takes over. Only `portolan
/// cleanup` takes them off.
#[derive(Debug, Args)]
#[command(
    group = clap::ArgGroup::new("source").args(["config", "kubernetes"]).required(true),
    after_help = "Examples:\n  portolan agent --config /etc/portolan --cluster c1 --node $(hostname)\n  portolan agent --kubernetes --kubeconfig ~/.kube/config --cluster c1 --node $(hostname)"
)]
pub(super) struct AgentArgs {
    /// Directory with the objects: DIR/*.yaml for the mesh, DIR/<cluster-id>/**/*.yaml for each cluster; of root, or readable for all
    #[arg(long, value_name = "DIR", env = "PORTOLAN_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    reader: DecodeArgs,
    #[command(flatten)]
    kubernetes: KubernetesArgs,
    #[command(flatten)]
    place: PlaceArgs,
    /// Serve the processes below this cgroup [default: the cgroup v2 root]
    #[arg(long, value_name = "PATH", env = "PORTOLAN_CGROUP")]
    cgroup: Option<PathBuf>,
    #[command(flatten)]
    pins: PinsArgs,
    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    state: StateArgs,
    /// Address for /metrics, /healthz and /readyz
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:15920", env = "PORTOLAN_METRICS")]
    metrics: SocketAddr,
    /// Time between looks at the whole directory, for what the watch may have missed
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = humantime::parse_duration, env = "PORTOLAN_RESCAN")]
    rescan: Duration,
    /// What becomes of TCP connections to endpoints that are gone (connected UDP is closed)
    #[arg(long, value_enum, default_value_t, env = "PORTOLAN_GONE_CONNECTIONS")]
    gone_connections: RemovedEndpointTcp,
    /// Active probes (portolan.io/probe) in a second at the most; 0: none
    #[arg(long, value_name = "COUNT", default_value_t = 100, value_parser = clap::value_parser!(u32).range(..=10_000), env = "PORTOLAN_PROBES_PER_SECOND")]
    probes_per_second: u32,
    /// What to log: error, warn, info, debug, trace, or by module
    #[arg(long, value_name = "FILTER", default_value = "info", env = "PORTOLAN_LOG")]
    log: EnvFilter,
    /// Have the programs in the kernel log each connection, for debugging; it costs time on every connect
    #[arg(long, value_enum, default_value_t, env = "PORTOLAN_PROGRAM_LOG")]
    program_log: ProgramLog,
    #[command(flatten)]
    sizes: SizeArgs,
}

/// This program.
const SELF: &str = "/proc/self/exe";

/// Findings that wait to become Events: of more, the rest is in the log.
const FINDINGS: usize = 100;

/// Objects from API servers, in place of a directory.
#[derive(Debug, Args)]
#[command(next_help_heading = "Kubernetes")]
struct KubernetesArgs {
    /// Read the objects from the API server, in place of a directory
    #[arg(long, env = "PORTOLAN_KUBERNETES")]
    kubernetes: bool,
    /// How to reach the API server [default: as a pod does, by its service account]
    #[arg(long, value_name = "FILE", env = "PORTOLAN_KUBECONFIG", conflicts_with = "config")]
    kubeconfig: Option<PathBuf>,
    /// The API server's own address, in place of its Service's: then it is reached whatever becomes of that
    #[arg(long, value_name = "URL", env = "PORTOLAN_API_SERVER", conflicts_with = "config")]
    api_server: Option<http::Uri>,
    /// Whether endpoints of other clusters are read as well, of those that Secrets in istio-system name
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set, env = "PORTOLAN_OTHER_CLUSTERS")]
    other_clusters: bool,
    /// Write findings as Events on the objects that they are about, one a second at the most
    #[arg(long, env = "PORTOLAN_KUBERNETES_EVENTS", conflicts_with = "config")]
    kubernetes_events: bool,
    /// Time after which everything is read again as a whole, whatever the watches say
    #[arg(long, value_name = "DURATION", default_value = "30m", value_parser = a_second_or_more, env = "PORTOLAN_RESYNC", conflicts_with = "config")]
    resync: Duration,
    /// Time after which a watch begins anew; one that is silent for five seconds longer has stalled
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = a_second_or_more, env = "PORTOLAN_WATCH_TIMEOUT", conflicts_with = "config")]
    watch_timeout: Duration,
    /// Time for which the endpoints of another cluster are believed while its API server cannot be reached
    #[arg(long, value_name = "DURATION", default_value = "30m", value_parser = a_second_or_more, env = "PORTOLAN_REMOTE_GRACE", conflicts_with = "config")]
    remote_grace: Duration,
}

fn a_second_or_more(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if time < Duration::from_secs(1) { Err("less than a second".to_owned()) } else { Ok(time) }
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

/// How much fits into the kernel's maps.
#[derive(Debug, Args)]
#[command(
    next_help_heading = "Sizes of the maps (another size makes new ones, which take the place of the old ones in one step)"
)]
struct SizeArgs {
    /// Service addresses with a port
    #[arg(long, value_name = "COUNT", default_value_t = Sizes::default().frontends, value_parser = size(), env = "PORTOLAN_MAX_FRONTENDS")]
    max_frontends: u32,
    /// Endpoints
    #[arg(long, value_name = "COUNT", default_value_t = Sizes::default().backends, value_parser = clap::value_parser!(u32).range(1..=262_143), env = "PORTOLAN_MAX_BACKENDS")]
    max_backends: u32,
    /// Turns of all schedules, and entries of their runs
    #[arg(long, value_name = "COUNT", default_value_t = Sizes::default().slots, value_parser = size(), env = "PORTOLAN_MAX_SLOTS")]
    max_slots: u32,
    /// Clients that come back to their endpoint (sessionAffinity); the one that was away longest makes room
    #[arg(long, value_name = "COUNT", default_value_t = Sizes::default().affinities, value_parser = size(), env = "PORTOLAN_MAX_AFFINITIES")]
    max_affinities: u32,
}

/// Up to what a map of the kernel may have.
fn size() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=1 << 26)
}

impl SizeArgs {
    fn sizes(&self) -> Sizes {
        Sizes {
            frontends: self.max_frontends,
            backends: self.max_backends,
            slots: self.max_slots,
            affinities: self.max_affinities,
        }
    }
}

/// Has large blocks of memory come from the system, and go back there at once. glibc takes the first one that is freed as a sign to keep all of that size from then
/// on, and what reading the objects takes is several times what is kept of them.
fn keep_heap_small() {
    // SAFETY: no other thread is there yet.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
    }
}

/// An agent of which a part is gone is worse than none: the kernel goes on serving, and the next one begins anew.
fn end_on_panic() {
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        told(panic);
        std::process::abort();
    }));
}

pub(super) fn run(args: AgentArgs) -> Result<ExitCode> {
    let mut filter = args.log;
    // It logs whole answers that it cannot read, and there may be tokens in them.
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
    end_on_panic();
    // One thread works, one answers.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .on_thread_start(|| {
            if let Err(error) = capabilities::drop_capabilities() {
                panic!("a thread cannot give up its privileges: {error}");
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
    // Before anything is loaded, by a thread that has given up its privileges, as those have that read it later.
    if let Some(config) = args.config.clone() {
        runtime.block_on(runtime.spawn_blocking(move || file::check(&config)))??;
    }
    let place = args.place.at.place();
    let from_api = args.kubernetes.options(&args.place, reader);
    let ended = runtime.block_on(async {
        let link = if args.config.is_none() { Some(kubernetes::connect(&from_api).await?) } else { None };
        // A second agent hears first that it is one.
        let (mut datapath, held) = Datapath::open(&options)?;
        let probe = SelfProbe::new(datapath.cgroup()).await?;
        let admin_socket = admin::bind_admin(&args.admin.admin)?;
        let metrics_socket = TcpListener::bind(args.metrics)
            .await
            .with_context(|| format!("--metrics: cannot listen on {}", args.metrics))?;
        // All that needs privileges has been done; what may need them later is the helper's.
        capabilities::drop_capabilities().context("cannot give up privileges")?;
        let (questions, requests) = mpsc::channel(16);
        let (changes, updates) = mpsc::channel(256);
        let (teller, told) = args.kubernetes.kubernetes_events.then(|| mpsc::channel(FINDINGS)).unzip();
        let (sources, registry) = (Arc::new(Sources::default()), Arc::new(opt_out::OptOutRegistry::default()));
        let root = datapath.cgroup().to_owned();
        let kernel = datapath.opted_out.take().context("who is left alone is kept twice")?;
        let enforcer =
            opt_out::Enforcer { root, kernel, registry: Arc::clone(&registry), sources: Arc::clone(&sources) };
        let reconciler = Reconciler::new(
            args.place.cluster.clone(),
            place,
            (datapath, held),
            (probe, Prober::start(args.probes_per_second)),
            options.sizes,
            args.gone_connections,
            (PersistedState::read(&args.state.state), StateWriter::start(args.state.state)?),
        )
        .telling(teller);
        let asked = AdminState { questions, sources: Arc::clone(&sources), registry: Arc::clone(&registry) };
        let source = async {
            match (args.config, link) {
                (Some(config), _) => {
                    // Files know of no pods.
                    registry.want(opt_out::ByUid::new());
                    file::run(config, reader, args.rescan, sources, changes).await
                }
                (None, Some(link)) => kubernetes::run(from_api, link, sources, changes, told, registry).await,
                // The command line allows no such thing.
                (None, None) => anyhow::bail!("neither --config nor --kubernetes"),
            }
        };
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let ended = tokio::select! {
            ended = tokio::spawn(reconciler.run(updates, requests)) => ended?,
            // It ends well only where nobody listens any more, and who listened says why.
            Err(error) = source => Err(error),
            ended = tokio::spawn(enforcer.run()) => Ok(ended?),
            ended = admin::serve_admin(admin_socket, asked.clone()) => ended,
            ended = admin::serve_metrics(metrics_socket, asked) => ended,
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
        };
        let _ = std::fs::remove_file(&args.admin.admin);
        ended?;
        tracing::info!("ending; programs and maps stay in place and go on serving");
        Ok(ExitCode::SUCCESS)
    });
    // Somebody may still be waiting for a disk; nothing that is left has to be finished.
    runtime.shutdown_background();
    ended
}

/// Is the helper of an agent.
pub(super) fn run_helper(args: &HelperArgs) -> Result<ExitCode> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).with_target(false).init();
    end_on_panic();
    serve_helper(args)?;
    Ok(ExitCode::SUCCESS)
}
