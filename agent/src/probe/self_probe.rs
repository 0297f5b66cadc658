//! The agent as its own client: it really connects through the programs, every few seconds, and readiness depends on what it sees.
//!
//! A process in the served cgroup (`client`) dials an address that is nobody's, which the maps send to this agent's own listener. What comes
//! back proves that the programs are attached, that the maps are in force, and that names and answers are put right. All of it stays on
//! loopback: were nothing rewritten, the connect would be refused there.

use std::{
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
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

pub use super::self_probe_client::run as run_client;

/// What the client dials: loopback, so that it stays on this machine, and an address there that nobody listens on.
pub const FRONTEND: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::new(127, 80, 84, 76), 15_921));
/// The hidden verb that the client is started with.
pub const VERB: &str = "self-probe";
/// Where it runs, in a cgroup that has no processes of its own.
pub const CGROUP: &str = "portolan-probe";
/// What the listener says to whom it accepts, and what datagrams carry.
pub(super) const GREETING: &[u8] = b"portolan\n";
/// Time between probes.
pub const INTERVAL: Duration = Duration::from_secs(3);
/// No answer takes longer on loopback, however busy the machine is.
const LIMIT: Duration = Duration::from_secs(10);

/// The listening side, and the way to the client.
#[derive(Debug)]
pub struct SelfProbe {
    cgroup: PathBuf,
    listener: TcpListener,
    datagrams: UdpSocket,
    endpoint: SocketAddr,
    wanted: Arc<Notify>,
}

/// What was seen: nothing wrong, or what.
pub type Seen = Result<(), String>;

impl SelfProbe {
    /// Listens, for clients in this cgroup.
    ///
    /// # Errors
    /// Loopback cannot be listened on.
    pub async fn new(cgroup: &Path) -> Result<Self> {
        let local = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
        let listener = TcpListener::bind(local).await.context("the self-probe cannot listen on loopback")?;
        let endpoint = listener.local_addr()?;
        let datagrams = UdpSocket::bind(endpoint).await.context("the self-probe cannot listen on loopback")?;
        Ok(Self { cgroup: cgroup.to_owned(), listener, datagrams, endpoint, wanted: Arc::new(Notify::new()) })
    }

    /// The agent's end of the probe.
    pub fn endpoint(&self) -> SocketAddr {
        self.endpoint
    }

    /// What the kernel has to hold for it.
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

    /// Asks for a probe now.
    pub fn wanted(&self) -> Arc<Notify> {
        Arc::clone(&self.wanted)
    }

    /// Answers, and probes whenever somebody asks for it and every few seconds from then on. What is seen goes to `seen`.
    pub async fn run(self, seen: mpsc::Sender<Seen>) {
        let Self { cgroup, listener, datagrams, wanted, .. } = self;
        let answer_streams = async {
            loop {
                if let Ok((mut stream, _)) = listener.accept().await {
                    // Who has gone away again sees no greeting, and says so.
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
    timeout(LIMIT, client.ask()).await.context("the self-probe does not answer")?
}

/// The process in the served cgroup; it ends with the agent, for it reads to the end of its input.
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
            command.spawn().with_context(|| format!("cannot start the self-probe in {}", cgroup.display()))?;
        let questions = process.stdin.take().context("no stdin")?;
        let answers = BufReader::new(process.stdout.take().context("no stdout")?).lines();
        Ok(Self { questions, answers, _process: process })
    }

    async fn ask(&mut self) -> Result<()> {
        self.questions.write_all(b"probe\n").await?;
        let answer = self.answers.next_line().await?.context("the self-probe has ended")?;
        ensure!(answer == "ok", "{answer}");
        Ok(())
    }
}
