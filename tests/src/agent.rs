//! A running agent, as tests see it: its process, its sockets, its log.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::TcpStream,
    path::PathBuf,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{Process, binary, patience, wait_until};

/// How long an agent may take to become ready. This is generous, for machines under load.
pub(crate) const READY: Duration = Duration::from_secs(30);

/// Metrics address of all agents. Each has its own network namespace.
pub(crate) const METRICS: &str = "127.0.0.1:15920";

/// A running agent, killed when the value is dropped.
#[derive(Debug)]
pub struct Agent {
    /// The process that was started: the agent's, unless a wrapper runs it.
    pub process: Process,
    pub(crate) admin: PathBuf,
    pub(crate) log: PathBuf,
    pub(crate) namespace: File,
}

impl Agent {
    /// Waits until `/readyz` returns 200.
    ///
    /// # Errors
    /// Returns an error, with the agent's log, if the agent exits or does not become ready in time.
    pub fn wait_ready(&mut self) -> Result<()> {
        let ready = wait_until("the agent to be ready", READY, || {
            if let Some(status) = self.process.child().try_wait()? {
                return Ok(Err(status));
            }
            let (status, body) = self.http("/readyz")?;
            ensure!(status == 200, "{status}: {body}");
            Ok(Ok(()))
        });
        let log = || fs::read_to_string(&self.log).unwrap_or_default();
        match ready {
            Ok(Ok(())) => Ok(()),
            Ok(Err(status)) => bail!("the agent exited with {status}:\n{}", log()),
            Err(error) => Err(error.context(log())),
        }
    }

    /// Sends a GET request to the agent's metrics address, and returns the status and the body.
    ///
    /// # Errors
    /// Returns an error if the agent does not respond.
    pub fn http(&self, path: &str) -> Result<(u16, String)> {
        self.http_within(path, READY * patience())
    }

    /// Sends a GET request with its own read timeout, for an agent that may be blocked.
    ///
    /// # Errors
    /// Returns an error if the agent does not respond within `bound`.
    pub fn http_within(&self, path: &str, bound: Duration) -> Result<(u16, String)> {
        let namespace = self.namespace.try_clone()?;
        let request = format!("GET {path} HTTP/1.0\r\n\r\n");
        let answer = thread::scope(|scope| {
            let inside = scope.spawn(move || -> Result<String> {
                rustix::thread::move_into_link_name_space(
                    std::os::fd::AsFd::as_fd(&namespace),
                    Some(rustix::thread::LinkNameSpaceType::Network),
                )?;
                let mut stream = TcpStream::connect(METRICS)?;
                stream.set_read_timeout(Some(bound))?;
                stream.write_all(request.as_bytes())?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                Ok(answer)
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no status line")?;
        let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
        Ok((status, body.unwrap_or_default()))
    }

    /// Returns the findings with this code, each as `object: message`.
    ///
    /// # Errors
    /// Returns an error if the agent does not respond.
    pub fn findings(&self, code: &str) -> Result<Vec<String>> {
        let report = self.get("services")?;
        let of = report["findings"].as_array().into_iter().flatten().filter(|finding| finding["code"] == code);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Ok(of.map(|finding| format!("{}: {}", text(&finding["object"]), text(&finding["message"]))).collect())
    }

    /// Returns the report of `portolan get WHAT -o json`.
    ///
    /// # Errors
    /// Returns an error if the agent does not respond.
    pub fn get(&self, what: &str) -> Result<Value> {
        let mut command = Command::new(binary("portolan")?);
        let output = command.args(["get", what, "-o", "json", "--admin"]).arg(&self.admin).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Returns the report of `portolan explain` on a service (`namespace/name`).
    ///
    /// # Errors
    /// Returns an error if the agent does not respond or does not know the service.
    pub fn explain(&self, service: &str) -> Result<Value> {
        let mut command = Command::new(binary("portolan")?);
        let output = command.args(["explain", service, "-o", "json", "--admin"]).arg(&self.admin).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Returns the agent's events so far, oldest first.
    ///
    /// # Errors
    /// Returns an error if the agent does not respond.
    pub fn events(&self) -> Result<Vec<Value>> {
        let mut command = Command::new(binary("portolan")?);
        let output = command.args(["events", "-o", "json", "--admin"]).arg(&self.admin).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout)?.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// Returns the process ID of the agent's privileged helper.
    ///
    /// # Errors
    /// Returns an error if there is no helper.
    pub fn helper(&self) -> Result<u32> {
        helper_of(self.process.id())
    }

    /// Returns the agent's log so far; empty if it cannot be read.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// Returns the process ID of the privileged helper of the agent with this process ID.
///
/// # Errors
/// Returns an error if there is no helper.
pub fn helper_of(agent: u32) -> Result<u32> {
    let own = format!("PPid:\t{agent}");
    let is_helper = |process: &u32| {
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let line = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        status.lines().any(|line| line == own) && line.split(|byte| *byte == 0).nth(1) == Some(b"helper")
    };
    let mut processes = fs::read_dir("/proc")?.flatten().filter_map(|it| it.file_name().to_str()?.parse().ok());
    processes.find(is_helper).context("the agent has no helper process")
}
