//! The load generator, from outside: servers that say who they are, and clients that check whom they reached.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    net::SocketAddr,
    path::Path,
    process::{ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::{Place, Process, binary};

/// What came of a load.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Connections that were served.
    pub good: u64,
    /// Those that were not.
    pub bad: u64,
    /// Those among the former that were served by another service.
    pub misrouted: u64,
    /// The first thing that went wrong.
    pub error: Option<String>,
    /// How long it took.
    pub seconds: f64,
}

impl Summary {
    /// Another one as well.
    pub fn add(&mut self, other: Self) {
        self.good += other.good;
        self.bad += other.bad;
        self.misrouted += other.misrouted;
        self.error = self.error.take().or(other.error);
    }

    /// Connections in a second.
    pub fn rate(&self) -> f64 {
        self.good as f64 / self.seconds
    }
}

/// One connection of a load, for the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Before it was dialled, nanoseconds of CLOCK_MONOTONIC.
    pub began: u64,
    /// After it was served.
    pub ended: u64,
    /// The service that was dialled.
    pub service: u8,
    /// The endpoint that served it.
    pub endpoint: u8,
}

impl Connection {
    const BYTES: usize = 18;

    /// Adds it to a record.
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

/// All connections of a record.
///
/// # Errors
/// It cannot be read.
pub fn read(path: &Path) -> Result<Vec<Connection>> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(bytes.chunks_exact(Connection::BYTES).filter_map(Connection::read).collect())
}

/// Servers that run as long as the value lives.
#[derive(Debug)]
pub struct Servers {
    _stdin: ChildStdin,
    _process: Process,
}

impl Servers {
    /// Serves these addresses, each with the numbers of its service and endpoint.
    ///
    /// # Errors
    /// One cannot be listened on.
    pub fn start(place: Place<'_>, addresses: &[(SocketAddr, u8, u8)]) -> Result<Self> {
        let mut command = Command::new(binary("storm")?);
        command.arg("serve").stdin(Stdio::piped()).stdout(Stdio::piped());
        command.args(addresses.iter().map(|(address, service, endpoint)| format!("{address}={service}/{endpoint}")));
        let mut process = Process::spawn(command, place)?;
        let stdin = process.child().stdin.take().context("no stdin")?;
        let mut line = String::new();
        BufReader::new(process.child().stdout.take().context("no stdout")?).read_line(&mut line)?;
        if line.trim() != "listening" {
            bail!("the servers have not started: they said {line:?}, and ended with {:?}", process.child().wait());
        }
        Ok(Self { _stdin: stdin, _process: process })
    }
}

/// A load that is under way.
#[derive(Debug)]
pub struct Load {
    stdin: Option<ChildStdin>,
    stdout: ChildStdout,
    process: Process,
}

impl Load {
    /// Dials the frontends in turn, the i-th of which must lead to service i, so many times in all.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(place: Place<'_>, frontends: &[SocketAddr], count: u64, record: Option<&Path>) -> Result<Self> {
        Self::start_with(place, frontends, count, record, 4)
    }

    /// The same with so many threads.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_with(
        place: Place<'_>,
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

    /// Whether it has made all its connections.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.process.child().try_wait()?.is_some())
    }

    /// Waits until it has made all its connections, and takes what came of it.
    ///
    /// # Errors
    /// It has failed.
    pub fn finish(mut self) -> Result<Summary> {
        let mut answer = String::new();
        self.stdout.read_to_string(&mut answer)?;
        serde_json::from_str(&answer).context("the load has failed")
    }

    /// Stops it, unless it has ended by itself, and takes what came of it.
    ///
    /// # Errors
    /// It has failed.
    pub fn stop(mut self) -> Result<Summary> {
        drop(self.stdin.take());
        let mut answer = String::new();
        self.stdout.read_to_string(&mut answer)?;
        serde_json::from_str(&answer).context("the load has failed")
    }
}
