//! Control of the load generator: servers that identify themselves, and clients that check which one they reached.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    net::SocketAddr,
    path::Path,
    process::{ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::{Process, ProcessContext, binary};

/// The result of a load.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Number of connections that a server answered.
    pub good: u64,
    /// Number of connections that failed.
    pub bad: u64,
    /// Number of connections among `good` that the wrong service answered.
    pub misrouted: u64,
    /// The first failure; `None` if there was none.
    pub error: Option<String>,
    /// Duration of the load, in seconds.
    pub seconds: f64,
}

impl Summary {
    /// Adds the counts of another result, and its error if there is none yet. Ignores its duration.
    pub fn add(&mut self, other: Self) {
        self.good += other.good;
        self.bad += other.bad;
        self.misrouted += other.misrouted;
        self.error = self.error.take().or(other.error);
    }

    /// Returns the number of answered connections per second.
    pub fn rate(&self) -> f64 {
        self.good as f64 / self.seconds
    }
}

/// An answered connection of a load, as stored in a record file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Time before the connect, in nanoseconds of CLOCK_MONOTONIC.
    pub began: u64,
    /// Time after the answer, on the same clock.
    pub ended: u64,
    /// Number of the service that was dialed.
    pub service: u8,
    /// Number of the endpoint that answered.
    pub endpoint: u8,
}

impl Connection {
    const BYTES: usize = 18;

    /// Appends its encoding to a record: 18 bytes, little-endian.
    pub fn write(&self, record: &mut Vec<u8>) {
        record.extend(self.began.to_le_bytes());
        record.extend(self.ended.to_le_bytes());
        record.extend([self.service, self.endpoint]);
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let number = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        Some(Self { began: number(0)?, ended: number(8)?, service: *bytes.get(16)?, endpoint: *bytes.get(17)? })
    }
}

/// Reads all connections of a record file.
///
/// # Errors
/// Returns an error if the file cannot be read.
pub fn read(path: &Path) -> Result<Vec<Connection>> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(bytes.chunks_exact(Connection::BYTES).filter_map(Connection::read).collect())
}

/// Servers that stop when the value is dropped.
#[derive(Debug)]
pub struct Servers {
    _stdin: ChildStdin,
    _process: Process,
}

impl Servers {
    /// Serves these addresses, each with the numbers of its service and its endpoint.
    ///
    /// # Errors
    /// Returns an error if the servers cannot be started or cannot listen on one of the addresses.
    pub fn start(place: ProcessContext<'_>, addresses: &[(SocketAddr, u8, u8)]) -> Result<Self> {
        let mut command = Command::new(binary("storm")?);
        command.arg("serve").stdin(Stdio::piped()).stdout(Stdio::piped());
        command.args(addresses.iter().map(|(address, service, endpoint)| format!("{address}={service}/{endpoint}")));
        let mut process = Process::spawn(command, place)?;
        let stdin = process.child().stdin.take().context("no stdin")?;
        let mut line = String::new();
        BufReader::new(process.child().stdout.take().context("no stdout")?).read_line(&mut line)?;
        if line.trim() != "listening" {
            bail!("the servers did not start: output {line:?}, exit status {:?}", process.child().wait());
        }
        Ok(Self { _stdin: stdin, _process: process })
    }
}

/// A running load.
#[derive(Debug)]
pub struct Load {
    stdin: Option<ChildStdin>,
    stdout: ChildStdout,
    process: Process,
}

impl Load {
    /// Dials the frontends in turn with four threads, `count` times in all. Frontend i must lead to service i.
    ///
    /// # Errors
    /// Returns an error if the load generator cannot be started.
    pub fn start(
        place: ProcessContext<'_>,
        frontends: &[SocketAddr],
        count: u64,
        record: Option<&Path>,
    ) -> Result<Self> {
        Self::start_with(place, frontends, count, record, 4)
    }

    /// Starts the same load as [`Self::start`] with a given number of threads.
    ///
    /// # Errors
    /// Returns an error if the load generator cannot be started.
    pub fn start_with(
        place: ProcessContext<'_>,
        frontends: &[SocketAddr],
        count: u64,
        record: Option<&Path>,
        threads: usize,
    ) -> Result<Self> {
        let mut command = Command::new(binary("storm")?);
        command.args(["load", "--threads", &threads.to_string(), "--count", &count.to_string()]);
        if let Some(record) = record {
            command.arg("--record").arg(record);
        }
        command.args(frontends.iter().map(SocketAddr::to_string)).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::spawn(command, place)?;
        let stdin = process.child().stdin.take();
        let stdout = process.child().stdout.take().context("no stdout")?;
        Ok(Self { stdin, stdout, process })
    }

    /// Returns whether the load has finished.
    ///
    /// # Errors
    /// Returns an error if the process status cannot be read.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.process.child().try_wait()?.is_some())
    }

    /// Waits until the load has finished, and returns its result.
    ///
    /// # Errors
    /// Returns an error if the load generator failed.
    pub fn finish(mut self) -> Result<Summary> {
        let mut answer = String::new();
        self.stdout.read_to_string(&mut answer)?;
        serde_json::from_str(&answer).context("the load generator failed")
    }

    /// Stops the load unless it has finished, and returns its result.
    ///
    /// # Errors
    /// Returns an error if the load generator failed.
    pub fn stop(mut self) -> Result<Summary> {
        drop(self.stdin.take());
        let mut answer = String::new();
        self.stdout.read_to_string(&mut answer)?;
        serde_json::from_str(&answer).context("the load generator failed")
    }
}
