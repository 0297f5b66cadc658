//! Run time and memory of the subcommands that read a configuration directory.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use portolan_tests::{Agent, Directory, binary};
use serde::Serialize;

use crate::{progress, served::write_mesh};

/// One subcommand, and its cost.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Verb {
    pub(crate) verb: String,
    pub(crate) services: u32,
    pub(crate) seconds: f64,
    /// Peak resident memory.
    pub(crate) mib: f64,
}

/// Runs `plan` and `explain` on a mesh of `services` Services with ten endpoints each.
pub(crate) fn run(services: u32) -> Result<Vec<Verb>> {
    let directory = Directory::new()?;
    write_mesh(&directory, services)?;
    let config = directory.path().display().to_string();
    let place = ["--config", &config, "--cluster", "c1", "--node", "node-0"];
    let one = |verb: &[&str]| {
        progress(&format!("portolan {}, {services} services", verb.join(" ")));
        let mut command = Command::new(binary("portolan")?);
        let began = Instant::now();
        let mut child = command.args(verb).args(place).stdout(Stdio::null()).spawn()?;
        let mib = peak(&mut child)?;
        Ok(Verb { verb: verb.join(" "), services, seconds: began.elapsed().as_secs_f64(), mib })
    };
    let verbs: [&[&str]; 3] =
        [&["plan", "-o", "json"], &["plan", "--service", "default/s-7"], &["explain", "default/s-7"]];
    verbs.into_iter().map(one).collect()
}

/// Waits for a process, and returns its peak memory in MiB.
///
/// The kernel removes the process's own peak from /proc when it exits, so this polls and keeps the last value.
fn peak(child: &mut Child) -> Result<f64> {
    let mut peak = 0.0_f64;
    loop {
        peak = peak.max(memory(child.id(), "VmHWM:").unwrap_or_default());
        if let Some(status) = child.try_wait()? {
            ensure!(status.success(), "the subcommand failed: {status}");
            return Ok(peak);
        }
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// Returns a field of `/proc/PID/status` such as `VmHWM:` in MiB, or `None` if the process has exited.
pub(crate) fn memory(process: u32, line: &str) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let value = status.lines().find_map(|own| own.strip_prefix(line))?;
    Some(value.split_whitespace().next()?.parse::<f64>().ok()? / 1024.0)
}

/// Returns the anonymous memory of an agent and its helper process, in MiB.
pub(crate) fn agent_memory(agent: &Agent) -> Result<f64> {
    let own = |process| memory(process, "RssAnon:").context("the agent has exited");
    Ok(own(agent.process.id())? + own(agent.helper()?)?)
}
