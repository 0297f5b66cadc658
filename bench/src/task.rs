//! What the benchmark's client is asked to do, and what it answers: a line of JSON each.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// What to do, one after the other on one CPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Task {
    /// Connect and close. The server need not accept: nobody is woken while a connect is timed.
    Connect {
        /// Where to.
        to: SocketAddr,
        /// How often.
        count: usize,
        /// Begun at this rate, a second, whatever the ones before take; each is timed from when it should have begun. Absent: one after the other.
        rate: Option<f64>,
    },
    /// Connect, send a byte, have it back, close.
    Request {
        /// Where to.
        to: SocketAddr,
        /// How often.
        count: usize,
    },
    /// On one connection: send a byte, have it back.
    RoundTrips {
        /// Where to.
        to: SocketAddr,
        /// How often.
        count: usize,
    },
    /// On one connection: so many bytes.
    Bulk {
        /// Where to.
        to: SocketAddr,
        /// How many.
        bytes: usize,
    },
    /// From one socket: send a datagram, have it back.
    Datagrams {
        /// Where to.
        to: SocketAddr,
        /// How often.
        count: usize,
        /// Each from a socket of its own, which is connected.
        connected: bool,
    },
    /// Requests at a rate from many threads, each of which is told of.
    Watch {
        /// Where to.
        to: SocketAddr,
        /// A second.
        rate: f64,
        /// For how long.
        seconds: f64,
        /// As many may hang at once.
        threads: usize,
    },
    /// Server: take all connections that wait.
    Empty,
    /// Processor time so far.
    Spent,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Measurement {
    /// Nanoseconds of each: p50, p90, p99, p99.9.
    pub percentiles: [f64; 4],
    /// How many there were.
    pub count: usize,
    /// How long it took in all.
    pub seconds: f64,
    /// Processor time of this process, user and system, nanoseconds: for the task, or of `Spent` in all.
    pub spent: f64,
    /// What came of each request of a [`Task::Watch`].
    pub watched: Vec<Watched>,
}

/// One request that was watched.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Watched {
    /// When it began, nanoseconds of CLOCK_MONOTONIC.
    pub began: u64,
    /// How long it took, nanoseconds.
    pub took: u64,
    /// By how much it was begun too late, nanoseconds.
    pub late: u64,
    /// What the server answered; none: it failed.
    pub answer: Option<u8>,
}
