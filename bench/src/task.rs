//! The protocol between the benchmark and its load generator: one JSON object per line, tasks in, measurements out.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// A task for the load generator, which runs tasks one at a time on the CPU that it is pinned to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Task {
    /// Connects and closes, without sending.
    /// The server does not need to accept, so no wakeup falls into the timed part.
    Connect {
        /// Address to connect to.
        to: SocketAddr,
        /// Number of connections; at most the server's listen backlog (4,096).
        count: usize,
        /// Connections per second, started on schedule regardless of earlier ones (open loop).
        /// Each is timed from its scheduled start. `None`: one after another, each timed by itself.
        rate: Option<f64>,
    },
    /// Connects to each address in turn, and closes, as [`Self::Connect`] does.
    ConnectEach {
        /// Addresses to connect to.
        to: Vec<SocketAddr>,
        /// Which of them to begin with.
        first: usize,
        /// Number of connections; at most the server's listen backlog (4,096).
        count: usize,
    },
    /// Connects to an address that refuses each connection, and fails if one succeeds.
    Refused {
        /// Address to connect to.
        to: SocketAddr,
        /// Number of connects.
        count: usize,
    },
    /// Connects, and keeps the connections open until the process ends.
    Hold {
        /// Address to connect to.
        to: SocketAddr,
        /// Number of connections; at most the server's listen backlog (4,096).
        count: usize,
    },
    /// Connects a UDP socket, and closes it, without sending.
    ConnectDatagram {
        /// Address to connect to.
        to: SocketAddr,
        /// Number of sockets.
        count: usize,
    },
    /// Sends UDP datagrams of one byte from one unconnected socket, without waiting for replies.
    Send {
        /// Address to send to.
        to: SocketAddr,
        /// Number of datagrams.
        count: usize,
        /// Number of threads that share the socket; more than one run on all CPUs.
        threads: usize,
    },
    /// Per request: connects, sends one byte, reads one byte back, closes.
    Request {
        /// Address to connect to.
        to: SocketAddr,
        /// Number of requests.
        count: usize,
    },
    /// The same, to each address in turn.
    RequestEach {
        /// Addresses to connect to.
        to: Vec<SocketAddr>,
        /// Which of them to begin with.
        first: usize,
        /// Number of requests.
        count: usize,
    },
    /// On one connection: sends one byte and reads one byte back, repeatedly.
    RoundTrips {
        /// Address to connect to.
        to: SocketAddr,
        /// Number of round trips.
        count: usize,
    },
    /// On one connection: sends bulk data, and reads an acknowledgment after each MiB.
    Bulk {
        /// Address to connect to: the server's sink port.
        to: SocketAddr,
        /// Bytes to send; rounded down to whole MiB.
        bytes: usize,
    },
    /// Sends UDP datagrams of one byte, and waits for the reply to each.
    Datagrams {
        /// Address to send to.
        to: SocketAddr,
        /// Number of datagrams.
        count: usize,
        /// Whether each datagram has its own, connected socket; otherwise all share one unconnected socket.
        connected: bool,
    },
    /// Makes requests at a fixed rate from many threads (open loop), and records each in [`Measurement::watched`].
    Watch {
        /// Address to connect to.
        to: SocketAddr,
        /// Requests per second.
        rate: f64,
        /// Duration in seconds.
        seconds: f64,
        /// Number of threads, which bounds the number of requests in flight.
        threads: usize,
    },
    /// Server only: accepts and closes all connections that wait in the listen queues of the third ports.
    Empty,
    /// Reports the CPU time that the process has used so far, and does nothing else.
    Spent,
}

/// The result of a [`Task`].
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Measurement {
    /// Latency in nanoseconds at p50, p90, p99 and p99.9.
    pub percentiles: [f64; 4],
    /// Number of operations measured.
    pub count: usize,
    /// Wall-clock time of the whole task, in seconds.
    pub seconds: f64,
    /// CPU time of the process (user and system) in nanoseconds: used by this task, or in total for [`Task::Spent`].
    pub spent: f64,
    /// Every request of a [`Task::Watch`], sorted by start time; empty for other tasks.
    pub watched: Vec<Watched>,
}

/// One request of a [`Task::Watch`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Watched {
    /// Start time, in nanoseconds of `CLOCK_MONOTONIC`.
    pub began: u64,
    /// Duration in nanoseconds.
    pub took: u64,
    /// Delay of the actual start behind the scheduled start, in nanoseconds.
    pub late: u64,
    /// The byte that the server answered with, or `None` if the request failed.
    pub answer: Option<u8>,
}
