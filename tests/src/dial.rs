//! A client in a cgroup of its own: a process that dials what the test tells it, and says what it saw. A thread of the test could
//! not be one, for a process belongs to its cgroup as a whole.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    process::{ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{Place, Process, binary};

/// What to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Task {
    /// Connect, read the greeting to its end, close; so many times, each with a socket of its own.
    Dial {
        /// Where to.
        to: SocketAddr,
        /// How often.
        times: u32,
        /// With an IPv6 socket and the v4-mapped form of an IPv4 address.
        mapped: bool,
        /// With a non-blocking socket.
        nonblocking: bool,
        /// Bytes to send once connected.
        send: usize,
    },
    /// Connect, dissolve the connection with AF_UNSPEC, and connect the same socket elsewhere.
    Redial {
        /// First.
        to: SocketAddr,
        /// Then.
        then: SocketAddr,
    },
    /// Begin to connect, and close before there is an answer.
    GiveUp {
        /// Where to.
        to: SocketAddr,
    },
    /// Dial again and again until told to stop; the reply counts.
    Load {
        /// Where to.
        to: SocketAddr,
    },
    /// Stop the load.
    Stop,
    /// Connect so many times, and keep the connections.
    Hold {
        /// Where to.
        to: SocketAddr,
        /// How often.
        times: u32,
    },
    /// Connect a UDP socket, and keep it.
    HoldDatagram {
        /// Where to.
        to: SocketAddr,
        /// With an IPv6 socket and the v4-mapped form of an IPv4 address.
        mapped: bool,
        /// Where it is connected to after that.
        then: Option<SocketAddr>,
    },
    /// Be another user from now on.
    Become {
        /// Which one.
        uid: u32,
    },
    /// What has become of what was kept: no error while it is open, ENOTCONN where the peer has closed it, the error where it was ended.
    Held,
    /// Close what was kept.
    Release,
    /// Send datagrams, and say who answered each.
    Datagrams {
        /// Where to.
        to: SocketAddr,
        /// How many.
        times: u32,
        /// From which sockets.
        from: Sender,
        /// With IPv6 sockets and the v4-mapped form of an IPv4 address.
        mapped: bool,
    },
    /// Send datagrams from one unconnected socket to several addresses in turn, as often as said, and say who answered each.
    DatagramsAround {
        /// Where to.
        to: Vec<SocketAddr>,
        /// How often.
        times: u32,
    },
    /// Connect a UDP socket, dissolve that with AF_UNSPEC, and send a datagram elsewhere from the same socket.
    Reuse {
        /// First.
        to: SocketAddr,
        /// Then.
        then: SocketAddr,
    },
    /// Connect in a way of its own; the server's greeting is read where there is a connection.
    Dialled {
        /// Where to.
        to: SocketAddr,
        /// Which way.
        way: Way,
    },
    /// Report SO_KEEPALIVE, TCP_KEEPIDLE, TCP_KEEPINTVL and TCP_KEEPCNT of a connection, when the application has set the first to `own`.
    Keepalive {
        /// Where to.
        to: SocketAddr,
        /// What the application sets.
        own: bool,
    },
    /// Report TCP_USER_TIMEOUT (milliseconds) as the application sees it, when set to `own` before the connect.
    UserTimeout {
        /// Where to.
        to: SocketAddr,
        /// What the application sets; 0 for nothing.
        own: u32,
    },
}

/// Sockets that datagrams are sent from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sender {
    /// A connected one for each.
    Connected,
    /// A connected one for each, which names the address once more with each datagram (sendto).
    ConnectedTo,
    /// An unconnected one for each.
    Fresh,
    /// One unconnected one for all.
    Same,
    /// One unconnected one, the same for all tasks of the client; its port is the reply's value.
    Kept,
    /// The same, connected with the first task; it names the address once more with each datagram.
    KeptConnected,
    /// One unconnected one, and one system call for all (sendmmsg).
    Batch,
}

/// Ways to connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Way {
    /// With data in the SYN: sendto() with MSG_FASTOPEN.
    FastOpen,
    /// With TCP_FASTOPEN_CONNECT: connect() sends nothing, the first write does.
    FastOpenConnect,
    /// From an address that the socket was bound to before.
    Bound(SocketAddr),
    /// A Multipath TCP socket.
    Multipath,
    /// An SCTP socket.
    Sctp,
}

/// One connection as the client saw it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// What `getpeername` said.
    pub peer: Option<SocketAddr>,
    /// What the server said.
    pub greeting: String,
    /// The error of the connect; 0 for none.
    pub errno: i32,
}

/// What was seen.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Reply {
    /// Each connection.
    pub seen: Vec<Seen>,
    /// Connections of a load that went well.
    pub good: u64,
    /// Connections of a load that failed.
    pub bad: u64,
    /// A figure that was asked for.
    pub value: u32,
    /// Figures that were asked for.
    pub values: Vec<u32>,
}

impl Reply {
    /// The greetings, in order.
    pub fn greetings(&self) -> Vec<&str> {
        self.seen.iter().map(|seen| seen.greeting.as_str()).collect()
    }

    /// The errors, in order.
    pub fn errnos(&self) -> Vec<i32> {
        self.seen.iter().map(|seen| seen.errno).collect()
    }

    /// How many connections were greeted with this.
    pub fn count(&self, greeting: &str) -> usize {
        self.seen.iter().filter(|seen| seen.greeting == greeting).count()
    }
}

/// A running client.
#[derive(Debug)]
pub struct Dialler {
    tasks: ChildStdin,
    replies: BufReader<ChildStdout>,
    _process: Process,
}

impl Dialler {
    /// Starts one.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(place: Place<'_>) -> Result<Self> {
        let mut command = Command::new(binary("dial")?);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::spawn(command, place)?;
        let tasks = process.child().stdin.take().context("no stdin")?;
        let replies = BufReader::new(process.child().stdout.take().context("no stdout")?);
        Ok(Self { tasks, replies, _process: process })
    }

    /// Has it do something, and waits for what it saw.
    ///
    /// # Errors
    /// It has ended.
    pub fn run(&mut self, task: &Task) -> Result<Reply> {
        self.begin(task)?;
        let mut line = String::new();
        ensure!(self.replies.read_line(&mut line)? > 0, "the client has ended");
        Ok(serde_json::from_str(&line)?)
    }

    /// Begins a load; [`Task::Stop`] ends it.
    ///
    /// # Errors
    /// It has ended.
    pub fn begin(&mut self, task: &Task) -> Result<()> {
        writeln!(self.tasks, "{}", serde_json::to_string(task)?)?;
        Ok(())
    }

    /// Dials so many times.
    ///
    /// # Errors
    /// It has ended.
    pub fn dial(&mut self, to: &str, times: u32) -> Result<Reply> {
        self.run(&Task::Dial { to: to.parse()?, times, mapped: false, nonblocking: false, send: 0 })
    }
}
