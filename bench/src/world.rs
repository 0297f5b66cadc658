//! The environment of the arms: one network namespace with the server, and one with a client per measured table.
//! All of them are on this machine.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    process::{ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result};
use portolan_bench::task::{Measurement, Task};
use portolan_tests::{Cgroup, Namespace, Process, ProcessContext, binary, link, unique};
use rustix::thread::{CpuSet, Pid, sched_setaffinity};

/// Addresses of the server. Each listens on three ports from [`ENDPOINT_PORT`] on, in the order of [`Port`].
pub(crate) const ENDPOINTS: [[u8; 4]; 10] = {
    let mut all = [[10, 0, 0, 1]; 10];
    let mut i = 0;
    while i < all.len() {
        all[i][3] = i as u8 + 1;
        i += 1;
    }
    all
};
pub(crate) const ENDPOINT_PORT: u16 = 9080;
/// Cluster IP of the Service that clients dial.
/// Its ports from [`SERVICE_PORT`] on map to those of the endpoints; UDP port 53 maps to the echo port.
pub(crate) const SERVICE: [u8; 4] = [172, 16, 0, 10];
pub(crate) const SERVICE_PORT: u16 = 80;

/// A port of the server or of the Service, as an offset from its first port.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Port {
    /// Echoes what it receives.
    Echo = 0,
    /// Discards what it receives, and acknowledges each MiB.
    Sink = 1,
    /// Leaves connections in the listen queue until [`Task::Empty`].
    Quiet = 2,
}

/// The server's namespace, and the links from it to the clients' namespaces.
pub(crate) struct World {
    pub(crate) namespace: Namespace,
    links: std::cell::Cell<u8>,
}

impl World {
    pub(crate) fn new() -> Result<Self> {
        let namespace = Namespace::new(unique("server"))?;
        Ok(Self { namespace, links: 0.into() })
    }

    /// Links a client's namespace to the server's, with routes to nothing else.
    pub(crate) fn connect(&self, client: &Namespace) -> Result<()> {
        let number = self.links.get() + 1;
        self.links.set(number);
        let (near, far) = (format!("192.168.{number}.1/30"), format!("192.168.{number}.2/30"));
        link((client, "eth0", &near), (&self.namespace, &format!("to{number}"), &far))?;
        let via = format!("192.168.{number}.2");
        client.ip(&["route", "add", "10.0.0.0/8", "via", &via])?;
        // DNAT needs a route to the Service address: the kernel routes before it rewrites.
        client.ip(&["route", "add", "172.16.0.0/12", "via", &via])
    }

    /// Starts a server on these addresses, which it adds to the namespace.
    /// If `answer` is set, the echo port answers with that byte instead of the received one.
    pub(crate) fn serve(&self, addresses: &[[u8; 4]], answer: Option<u8>) -> Result<Worker> {
        let mut arguments = vec!["server".to_owned(), last_cpu().to_string()];
        arguments.extend(answer.into_iter().flat_map(|byte| ["--answer".to_owned(), byte.to_string()]));
        for address in addresses {
            self.namespace.add_address(&format!("{}/32", std::net::Ipv4Addr::from(*address)))?;
            arguments.push(SocketAddr::from((*address, ENDPOINT_PORT)).to_string());
        }
        let mut server = Worker::start(&arguments, ProcessContext { namespace: Some(&self.namespace), cgroup: None })?;
        // A reply means that the server listens.
        server.ask(&Task::Empty)?;
        Ok(server)
    }

    /// Starts a server for all addresses below 10.0.0.0/8, at three consecutive ports from this one.
    pub(crate) fn serve_in_turn(&self, first: u16) -> Result<Worker> {
        self.namespace.ip(&["route", "add", "local", "10.0.0.0/8", "dev", "lo"])?;
        serve_on(&self.namespace, SocketAddr::from(([0, 0, 0, 0], first)))
    }
}

/// Starts a server on an address, or on all of a namespace, at three consecutive ports from this one.
pub(crate) fn serve_on(namespace: &Namespace, first: SocketAddr) -> Result<Worker> {
    let address = first.to_string();
    let place = ProcessContext { namespace: Some(namespace), cgroup: None };
    let mut server = Worker::start(&["server".to_owned(), last_cpu().to_string(), address], place)?;
    server.ask(&Task::Empty)?;
    Ok(server)
}

/// Starts a client in a namespace, and in a cgroup if eBPF programs shall apply to it.
pub(crate) fn client(namespace: &Namespace, cgroup: Option<&Cgroup>) -> Result<Worker> {
    Worker::start(&["client".to_owned(), "0".to_owned()], ProcessContext { namespace: Some(namespace), cgroup })
}

/// Starts a client in a namespace and a cgroup, on this CPU, or on another one if there are not that many.
pub(crate) fn client_on(cpu: usize, namespace: &Namespace, cgroup: &Cgroup) -> Result<Worker> {
    let cpu = cpu % std::thread::available_parallelism().map_or(1, usize::from);
    let place = ProcessContext { namespace: Some(namespace), cgroup: Some(cgroup) };
    Worker::start(&["client".to_owned(), cpu.to_string()], place)
}

/// Returns the number of the server's CPU: the last one, so it differs from the client's unless there is only one.
pub(crate) fn last_cpu() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from) - 1
}

/// A `bench-load` process, with a pipe for tasks and one for measurements.
pub(crate) struct Worker {
    tasks: ChildStdin,
    answers: BufReader<ChildStdout>,
    process: Process,
}

impl Worker {
    fn start(arguments: &[String], place: ProcessContext<'_>) -> Result<Self> {
        let mut command = Command::new(binary("bench-load")?);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::spawn(command, place)?;
        let tasks = process.child().stdin.take().context("bench-load has no stdin pipe")?;
        let answers = BufReader::new(process.child().stdout.take().context("bench-load has no stdout pipe")?);
        Ok(Self { tasks, answers, process })
    }

    /// Runs a task to its end, and returns the measurement.
    pub(crate) fn ask(&mut self, task: &Task) -> Result<Measurement> {
        self.begin(task)?;
        self.answer().with_context(|| format!("{task:?}"))
    }

    /// Starts a task. [`Self::answer`] returns its measurement.
    pub(crate) fn begin(&mut self, task: &Task) -> Result<()> {
        serde_json::to_writer(&mut self.tasks, task)?;
        Ok(writeln!(self.tasks)?)
    }

    /// Waits for the measurement of the task that runs.
    pub(crate) fn answer(&mut self) -> Result<Measurement> {
        let mut line = String::new();
        anyhow::ensure!(self.answers.read_line(&mut line)? > 0, "bench-load exited without an answer");
        Ok(serde_json::from_str(&line)?)
    }

    /// Moves all threads of the process to a CPU, by its number.
    pub(crate) fn move_to(&mut self, cpu: usize) -> Result<()> {
        let mut cpus = CpuSet::new();
        cpus.set(cpu);
        for task in std::fs::read_dir(format!("/proc/{}/task", self.process.id()))?.flatten() {
            let id: Option<i32> = task.file_name().to_str().and_then(|name| name.parse().ok());
            let id = id.and_then(Pid::from_raw).context("not a thread id")?;
            sched_setaffinity(Some(id), &cpus).with_context(|| format!("cannot move a thread to CPU {cpu}"))?;
        }
        Ok(())
    }

    /// Kills the process.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }
}

/// Returns the CPU time that the live threads of a process have used, in nanoseconds.
pub(crate) fn spent(process: u32) -> Result<f64> {
    let mut all = 0.0;
    for task in std::fs::read_dir(format!("/proc/{process}/task"))?.flatten() {
        // A thread can exit between the directory listing and this read.
        let text = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        all += text.split(' ').next().and_then(|spent| spent.parse::<f64>().ok()).unwrap_or_default();
    }
    Ok(all)
}
