//! A client in a cgroup: a process that runs the tasks that a test sends it, and reports the results.
//!
//! It cannot be a thread of the test, because a process belongs to its cgroup as a whole.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    process::{ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{Process, ProcessContext, binary};

/// A task for the client. Tasks and replies are lines of JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Task {
    /// Connects, reads the greeting to its end, and closes, each time with a new socket.
    Dial {
        /// Address to connect to.
        to: SocketAddr,
        /// Number of connections.
        times: u32,
        /// Whether to use an IPv6 socket and the v4-mapped form of an IPv4 address.
        mapped: bool,
        /// Whether the socket is non-blocking.
        nonblocking: bool,
        /// Number of bytes to send once connected.
        send: usize,
    },
    /// Connects, disconnects with AF_UNSPEC, and connects the same socket to another address.
    Redial {
        /// First address.
        to: SocketAddr,
        /// Second address.
        then: SocketAddr,
    },
    /// Starts to connect, and closes the socket before an answer arrives.
    GiveUp {
        /// Address to connect to.
        to: SocketAddr,
    },
    /// Dials repeatedly until [`Task::Stop`]. The reply has the counts `good` and `bad`.
    Load {
        /// Address to connect to.
        to: SocketAddr,
    },
    /// Stops the running [`Task::Load`], whose reply is the only one.
    Stop,
    /// Opens connections and keeps them.
    Hold {
        /// Address to connect to.
        to: SocketAddr,
        /// Number of connections.
        times: u32,
    },
    /// Connects sockets that are bound to 127.0.0.1, which the kernel refuses with EINVAL before it sends a SYN.
    /// The reply's `good` is the number of these errors, `bad` that of any other result.
    BoundToLoopback {
        /// Address to connect to.
        to: SocketAddr,
        /// Number of sockets.
        times: u32,
        /// Whether to keep the sockets.
        keep: bool,
    },
    /// Dials this often, each time with a greeting, and resets the connections. The reply has the counts `good` and
    /// `bad`.
    Repeat {
        /// Address to connect to.
        to: SocketAddr,
        /// Number of connections.
        times: u32,
    },
    /// Connects a UDP socket and keeps it.
    HoldDatagram {
        /// Address to connect to.
        to: SocketAddr,
        /// Whether to use an IPv6 socket and the v4-mapped form of an IPv4 address.
        mapped: bool,
        /// Address to reconnect the socket to; `None` to leave it as it is.
        then: Option<SocketAddr>,
    },
    /// Switches the client to another user for good.
    Become {
        /// User ID, also used as the group ID.
        uid: u32,
    },
    /// Reports the state of each kept socket in `errno`.
    ///
    /// This is 0 while the connection is open, ENOTCONN after the peer has closed it, and otherwise the socket's error.
    Held,
    /// Closes the kept sockets, except for those of [`Sender::Kept`] and [`Sender::KeptConnected`].
    Release,
    /// Sends datagrams, and reports the sender of each answer.
    Datagrams {
        /// Address to send to.
        to: SocketAddr,
        /// Number of datagrams.
        times: u32,
        /// Sockets to send from.
        from: Sender,
        /// Whether to use IPv6 sockets and the v4-mapped form of an IPv4 address.
        mapped: bool,
    },
    /// Sends datagrams from one unconnected socket to several addresses in turn, and reports the sender of each answer.
    DatagramsAround {
        /// Addresses to send to.
        to: Vec<SocketAddr>,
        /// Number of rounds over all addresses.
        times: u32,
    },
    /// Sends from a connected UDP socket, disconnects it with AF_UNSPEC, and sends to another address from it.
    Reuse {
        /// First address.
        to: SocketAddr,
        /// Second address.
        then: SocketAddr,
    },
    /// Connects in a special way, and reads the server's greeting if the connection succeeds.
    Dialed {
        /// Address to connect to.
        to: SocketAddr,
        /// How to connect.
        way: Way,
    },
    /// Connects, and reports SO_KEEPALIVE, TCP_KEEPIDLE, TCP_KEEPINTVL, and TCP_KEEPCNT in `values`.
    Keepalive {
        /// Address to connect to.
        to: SocketAddr,
        /// Value of SO_KEEPALIVE that the application sets before it connects.
        own: bool,
    },
    /// Connects, and reports TCP_USER_TIMEOUT (milliseconds) as the application sees it in `value`.
    UserTimeout {
        /// Address to connect to.
        to: SocketAddr,
        /// Milliseconds that the application sets before it connects; 0 to set nothing.
        own: u32,
    },
}

/// The sockets that datagrams are sent from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sender {
    /// A connected socket for each datagram.
    Connected,
    /// A connected socket for each datagram, which passes the address to `sendto()` as well.
    ConnectedTo,
    /// An unconnected socket for each datagram.
    Fresh,
    /// One unconnected socket for all datagrams.
    Same,
    /// One unconnected socket, shared by all tasks of the client. Its port is the reply's `value`.
    Kept,
    /// As [`Self::Kept`], but the first task connects it. Each datagram passes the address to `sendto()` as well.
    KeptConnected,
    /// One unconnected socket, and one `sendmmsg()` for all datagrams.
    Batch,
}

/// A special way to connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Way {
    /// With data in the SYN: `sendto()` with MSG_FASTOPEN.
    FastOpen,
    /// With TCP_FASTOPEN_CONNECT: the first write sends the SYN, not `connect()`.
    FastOpenConnect,
    /// From a source address that the socket is bound to first.
    Bound(SocketAddr),
    /// With a Multipath TCP socket.
    Multipath,
    /// With an SCTP socket.
    Sctp,
}

/// The result of one connection or datagram, as the client saw it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Result of `getpeername()`, or the sender of the answering datagram; `None` if there is none.
    pub peer: Option<SocketAddr>,
    /// Data that the server sent, which may be empty.
    pub greeting: String,
    /// Error number of the first call that failed; 0 on success, -1 for an error without a number.
    pub errno: i32,
}

/// The reply to a task. Fields that the task does not use have their default values.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Reply {
    /// One entry for each connection or datagram, in order.
    pub seen: Vec<Seen>,
    /// Number of successful connections of a load.
    pub good: u64,
    /// Number of failed connections of a load.
    pub bad: u64,
    /// The number that the task reports, such as a port.
    pub value: u32,
    /// The numbers that [`Task::Keepalive`] reports.
    pub values: Vec<u32>,
}

impl Reply {
    /// Returns the greetings, in order.
    pub fn greetings(&self) -> Vec<&str> {
        self.seen.iter().map(|seen| seen.greeting.as_str()).collect()
    }

    /// Returns the error numbers, in order.
    pub fn errnos(&self) -> Vec<i32> {
        self.seen.iter().map(|seen| seen.errno).collect()
    }

    /// Counts a connection of a load, which is good if it got a greeting. Keeps the error number of the last one that was
    /// not.
    pub fn add(&mut self, seen: &Seen) {
        if seen.errno == 0 && !seen.greeting.is_empty() {
            self.good += 1;
        } else {
            self.bad += 1;
            self.value = seen.errno.unsigned_abs();
        }
    }

    /// Returns the number of connections that got this greeting.
    pub fn count(&self, greeting: &str) -> usize {
        self.seen.iter().filter(|seen| seen.greeting == greeting).count()
    }
}

/// A running client process, killed when the value is dropped.
#[derive(Debug)]
pub struct Dialer {
    tasks: ChildStdin,
    replies: BufReader<ChildStdout>,
    _process: Process,
}

impl Dialer {
    /// Starts a client in `place`.
    ///
    /// # Errors
    /// Returns an error if the client cannot be started.
    pub fn start(place: ProcessContext<'_>) -> Result<Self> {
        let mut command = Command::new(binary("dial")?);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::spawn(command, place)?;
        let tasks = process.child().stdin.take().context("no stdin")?;
        let replies = BufReader::new(process.child().stdout.take().context("no stdout")?);
        Ok(Self { tasks, replies, _process: process })
    }

    /// Sends a task, and waits for the reply.
    ///
    /// # Errors
    /// Returns an error if the client has exited.
    pub fn run(&mut self, task: &Task) -> Result<Reply> {
        self.begin(task)?;
        let mut line = String::new();
        ensure!(self.replies.read_line(&mut line)? > 0, "the client has exited");
        Ok(serde_json::from_str(&line)?)
    }

    /// Sends a task without waiting for the reply, for [`Task::Load`].
    ///
    /// # Errors
    /// Returns an error if the client has exited.
    pub fn begin(&mut self, task: &Task) -> Result<()> {
        writeln!(self.tasks, "{}", serde_json::to_string(task)?)?;
        Ok(())
    }

    /// Dials an address `times` times with [`Task::Dial`].
    ///
    /// # Errors
    /// Returns an error if `to` is not an address or if the client has exited.
    pub fn dial(&mut self, to: &str, times: u32) -> Result<Reply> {
        self.run(&Task::Dial { to: to.parse()?, times, mapped: false, nonblocking: false, send: 0 })
    }
}
