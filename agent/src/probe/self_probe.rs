//! The self-probe: the agent connects through its own programs every few seconds, and readiness depends on the result.
//!
//! A client process in the served cgroup dials an otherwise unused address.
//! The programs rewrite that address to this agent's listener.
//! The response proves that the programs are attached, that the maps are active, and that peer addresses are translated
//! back. All traffic stays on loopback: without a rewrite, the connect would be refused there.

use std::{
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
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

use crate::error::{Context as _, Result, ensure};

/// Address that the client dials: on loopback, so that traffic never leaves the machine, and without a listener.
pub const FRONTEND: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::new(127, 80, 84, 76), 15_921));
/// Hidden subcommand that runs the client.
pub const VERB: &str = "self-probe";
/// Name of the child cgroup for the client, if the cgroup itself cannot hold processes.
pub const CGROUP: &str = "portolan-probe";
/// Bytes that the listener sends on each connection, and payload of the datagrams.
pub(super) const GREETING: &[u8] = b"portolan\n";
/// Time between self-probes.
pub const INTERVAL: Duration = Duration::from_secs(3);
/// Timeout of one probe; generous, because all traffic is on loopback.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// Listener of the self-probe; starts and queries the client process.
#[derive(Debug)]
pub struct SelfProbe {
    cgroup: PathBuf,
    listener: TcpListener,
    datagrams: UdpSocket,
    endpoint: SocketAddr,
    wanted: Arc<Notify>,
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
        let local = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
        let listener = TcpListener::bind(local).await.context("cannot bind the TCP self-probe listener on loopback")?;
        let endpoint = listener.local_addr()?;
        let datagrams = UdpSocket::bind(endpoint).await.context("cannot bind the UDP self-probe socket on loopback")?;
        Ok(Self { cgroup: cgroup.to_owned(), listener, datagrams, endpoint, wanted: Arc::new(Notify::new()) })
    }

    /// Returns the address of the listener, which is the endpoint behind [`FRONTEND`].
    pub fn endpoint(&self) -> SocketAddr {
        self.endpoint
    }

    /// Returns the frontends that the kernel must have for the self-probe: [`FRONTEND`], TCP and UDP.
    pub fn table(&self) -> Table {
        let members = vec![(self.endpoint, 1)];
        let entry = FrontendSpec {
            schedule: Arc::new(Schedule::new(vec![WeightedGroup::in_turn(Share::from(1), members)])),
            endpoints: Arc::new([self.endpoint]),
            pools: Arc::new([]),
            affinity: None,
            random: false,
        };
        let of = |protocol| (key(FRONTEND, protocol), entry.clone());
        Table { frontends: [Protocol::Tcp, Protocol::Udp].map(of).into() }
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
        let Self { cgroup, listener, datagrams, wanted, .. } = self;
        let answer_streams = async {
            loop {
                if let Ok((mut stream, _)) = listener.accept().await {
                    // If the client is gone, its probe has failed already.
                    let _ = stream.write_all(GREETING).await;
                }
            }
        };
        let answer_datagrams = async {
            let mut buffer = [0; GREETING.len()];
            loop {
                if let Ok((len, from)) = datagrams.recv_from(&mut buffer).await {
                    let _ = datagrams.send_to(&buffer[..len], from).await;
                }
            }
        };
        let probe = async {
            let mut client = None;
            wanted.notified().await;
            loop {
                let result = probe_once(&mut client, &cgroup).await;
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
            () = answer_streams => {}
            () = answer_datagrams => {}
            () = probe => {}
        }
    }
}

async fn probe_once(client: &mut Option<Client>, cgroup: &Path) -> Result<()> {
    let client = match client {
        Some(client) => client,
        None => client.insert(Client::start(cgroup)?),
    };
    timeout(PROBE_TIMEOUT, client.ask()).await.context("the self-probe client timed out")?
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

    async fn ask(&mut self) -> Result<()> {
        self.questions.write_all(b"probe\n").await?;
        let answer = self.answers.next_line().await?.context("the self-probe client has exited")?;
        ensure!(answer == "ok", "{answer}");
        Ok(())
    }
}
