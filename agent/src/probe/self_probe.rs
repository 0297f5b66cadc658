//! The self-probe: the agent connects through its own programs every few seconds, and readiness depends on the result.
//!
//! A client process in the served cgroup dials an otherwise unused address.
//! The programs rewrite that address to this agent's listener, over IPv4 and, if the machine has it, IPv6.
//! The response proves that the programs are attached, that the maps are active, and that peer addresses are translated
//! back. All traffic stays on loopback: without a rewrite, the connect would fail there.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use portolan_core::{
    model::Protocol,
    policy::{Schedule, Share, WeightedGroup},
    table::{FrontendSpec, Table, key},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    net::{TcpListener, UdpSocket},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::{Notify, mpsc},
    time::timeout,
};

use crate::error::{Context as _, Error, Result, ensure};

/// Address that the client dials: on loopback, so that traffic never leaves the machine, and without a listener.
pub const FRONTEND: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::new(127, 80, 84, 76), 15_921));
/// The same for IPv6, where loopback has one address only: an address of the range that routers discard (RFC 6666). The
/// client's sockets are bound to the loopback interface, which has no route there.
pub const FRONTEND6: SocketAddr =
    SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0x5054, 0x4c), 15_921, 0, 0));
/// The loopback interface.
pub(super) const LOOPBACK: &[u8] = b"lo";
/// Hidden subcommand that runs the client.
pub const VERB: &str = "self-probe";
/// Name of the child cgroup for the client, if the cgroup itself cannot hold processes.
pub const CGROUP: &str = "portolan-probe";
/// Bytes that the listener sends on each connection, and payload of the datagrams.
pub(super) const GREETING: &[u8] = b"portolan\n";
/// Time between self-probes.
pub const INTERVAL: Duration = Duration::from_secs(3);
/// Pause after an error of a listener, such as a lack of descriptors, that would otherwise be repeated at once.
const PAUSE: Duration = Duration::from_millis(100);
/// The client's question for IPv4 alone, and for both families.
pub(super) const QUESTIONS: [&str; 2] = ["probe 4", "probe 4 6"];
/// Timeout of one probe; generous, because all traffic is on loopback.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// Listener of the self-probe; starts and queries the client process.
#[derive(Debug)]
pub struct SelfProbe {
    cgroup: PathBuf,
    v4: Listener,
    /// `None` if the machine has no IPv6.
    v6: Option<Listener>,
    wanted: Arc<Notify>,
}

/// Sockets on loopback for both protocols, with the same port.
#[derive(Debug)]
struct Listener {
    streams: TcpListener,
    datagrams: UdpSocket,
    endpoint: SocketAddr,
}

/// Returns whether there is no IPv6 on this machine, as opposed to a lack of descriptors, for instance.
fn has_no_ipv6(error: &Error) -> bool {
    let Error::Context { source, .. } = error else { return false };
    matches!(source.as_ref(), Error::Io(error) if [libc::EADDRNOTAVAIL, libc::EAFNOSUPPORT].map(Some).contains(&error.raw_os_error()))
}

impl Listener {
    async fn bind(local: SocketAddr) -> Result<Self> {
        let streams = TcpListener::bind(local).await.context("cannot bind the TCP self-probe listener on loopback")?;
        let endpoint = streams.local_addr()?;
        let datagrams = UdpSocket::bind(endpoint).await.context("cannot bind the UDP self-probe socket on loopback")?;
        Ok(Self { streams, datagrams, endpoint })
    }

    /// Answers until the future is dropped.
    async fn serve(&self) {
        let answer_streams = async {
            loop {
                match self.streams.accept().await {
                    // If the client is gone, its probe has failed already.
                    Ok((mut stream, _)) => drop(stream.write_all(GREETING).await),
                    Err(_) => tokio::time::sleep(PAUSE).await,
                }
            }
        };
        let answer_datagrams = async {
            let mut buffer = [0; GREETING.len()];
            loop {
                match self.datagrams.recv_from(&mut buffer).await {
                    Ok((len, from)) => drop(self.datagrams.send_to(&buffer[..len], from).await),
                    Err(_) => tokio::time::sleep(PAUSE).await,
                }
            }
        };
        tokio::join!(answer_streams, answer_datagrams);
    }
}

/// Result of a self-probe; `Err` has the reason of the failure.
pub type Seen = Result<(), String>;

/// Asks a running self-probe to run at once.
#[derive(Clone, Debug)]
pub struct SelfProbeHandle(Arc<Notify>);

impl SelfProbeHandle {
    /// Runs the self-probe without waiting for its interval.
    pub fn run_now(&self) {
        self.0.notify_one();
    }
}

impl SelfProbe {
    /// Binds the listeners on loopback, for a client in `cgroup`.
    ///
    /// # Errors
    /// Returns an error if a socket on loopback cannot be bound.
    pub async fn new(cgroup: &Path) -> Result<Self> {
        let v4 = Listener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await?;
        let v6 = match Listener::bind(SocketAddr::from((Ipv6Addr::LOCALHOST, 0))).await {
            Ok(listener) => Some(listener),
            Err(error) if has_no_ipv6(&error) => {
                tracing::info!("this machine has no IPv6, so the self-probe does without it");
                None
            }
            Err(error) => return Err(error),
        };
        Ok(Self { cgroup: cgroup.to_owned(), v4, v6, wanted: Arc::new(Notify::new()) })
    }

    /// Returns the address of the IPv4 listener, which is the endpoint behind [`FRONTEND`].
    pub fn endpoint(&self) -> SocketAddr {
        self.v4.endpoint
    }

    /// Returns the frontends that the kernel must have for the self-probe: [`FRONTEND`] and, if the machine has IPv6,
    /// [`FRONTEND6`], both for TCP and UDP.
    pub fn table(&self) -> Table {
        let entry = |endpoint: SocketAddr| FrontendSpec {
            schedule: Arc::new(Schedule::new(vec![WeightedGroup::in_turn(Share::from(1), vec![(endpoint, 1)])])),
            endpoints: Arc::new([endpoint]),
            pools: Arc::new([]),
            affinity: None,
            random: false,
        };
        let v6 = self.v6.as_ref().map(|listener| (FRONTEND6, listener.endpoint));
        let families = [(FRONTEND, self.v4.endpoint)].into_iter().chain(v6);
        let both = families.flat_map(|(frontend, endpoint)| {
            [Protocol::Tcp, Protocol::Udp].map(|protocol| (key(frontend, protocol), entry(endpoint)))
        });
        Table { frontends: both.collect() }
    }

    /// Starts to serve the listeners, and to probe: first when [`SelfProbeHandle::run_now`] asks for it, then every [`INTERVAL`].
    ///
    /// Must be called from within a Tokio runtime. Ends when the receiver is dropped.
    pub fn start(self) -> (SelfProbeHandle, mpsc::Receiver<Seen>) {
        let (seen, results) = mpsc::channel(1);
        let handle = SelfProbeHandle(Arc::clone(&self.wanted));
        tokio::spawn(self.run(seen));
        (handle, results)
    }

    async fn run(self, seen: mpsc::Sender<Seen>) {
        let Self { cgroup, v4, v6, wanted } = self;
        let serve_v6 = async {
            match &v6 {
                Some(v6) => v6.serve().await,
                None => std::future::pending().await,
            }
        };
        let question = QUESTIONS[usize::from(v6.is_some())];
        let probe = async {
            let mut client = None;
            wanted.notified().await;
            loop {
                let result = probe_once(&mut client, &cgroup, question).await;
                if result.is_err() {
                    client = None;
                }
                if seen.send(result.map_err(|error| format!("{error:#}"))).await.is_err() {
                    return;
                }
                let _ = timeout(INTERVAL, wanted.notified()).await;
            }
        };
        tokio::select! {
            () = v4.serve() => {}
            () = serve_v6 => {}
            () = probe => {}
        }
    }
}

async fn probe_once(client: &mut Option<Client>, cgroup: &Path, question: &str) -> Result<()> {
    let client = match client {
        Some(client) => client,
        None => client.insert(Client::start(cgroup)?),
    };
    timeout(PROBE_TIMEOUT, client.ask(question)).await.context("the self-probe client timed out")?
}

/// The client process. It exits with the agent, because its standard input then ends.
#[derive(Debug)]
struct Client {
    questions: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    _process: Child,
}

impl Client {
    fn start(cgroup: &Path) -> Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg(VERB).arg(cgroup).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut process =
            command.spawn().with_context(|| format!("cannot start the self-probe client in {}", cgroup.display()))?;
        let questions = process.stdin.take().context("the self-probe client has no stdin")?;
        let answers = BufReader::new(process.stdout.take().context("the self-probe client has no stdout")?).lines();
        Ok(Self { questions, answers, _process: process })
    }

    async fn ask(&mut self, question: &str) -> Result<()> {
        self.questions.write_all(format!("{question}\n").as_bytes()).await?;
        let answer = self.answers.next_line().await?.context("the self-probe client has exited")?;
        ensure!(answer == "ok", "{answer}");
        Ok(())
    }
}
