//! What the arms run in: a namespace with the server, one with a client for each table that is measured, all on this machine.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    process::{ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result};
use portolan_bench::task::{Measurement, Task};
use portolan_tests::{Cgroup, Namespace, Place, Process, binary, link, unique};

/// The endpoints that serve. Port by port: echo, sink, queue.
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
/// The service that is dialled. Port by port the same, and by UDP the echo.
pub(crate) const SERVICE: [u8; 4] = [172, 16, 0, 10];
pub(crate) const SERVICE_PORT: u16 = 80;

/// Which port of the server, or of the service, a task goes to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Port {
    /// What is sent comes back.
    Echo = 0,
    /// What is sent is counted.
    Sink = 1,
    /// Connections wait.
    Quiet = 2,
}

/// The server's namespace.
pub(crate) struct World {
    pub(crate) namespace: Namespace,
    links: std::cell::Cell<u8>,
}

impl World {
    pub(crate) fn new() -> Result<Self> {
        let namespace = Namespace::new(unique("server"))?;
        Ok(Self { namespace, links: 0.into() })
    }

    /// Gives a client's namespace a way to the server, and to no other place.
    pub(crate) fn connect(&self, client: &Namespace) -> Result<()> {
        let number = self.links.get() + 1;
        self.links.set(number);
        let (near, far) = (format!("192.168.{number}.1/30"), format!("192.168.{number}.2/30"));
        link((client, "eth0", &near), (&self.namespace, &format!("to{number}"), &far))?;
        let via = format!("192.168.{number}.2");
        client.ip(&["route", "add", "10.0.0.0/8", "via", &via])?;
        // For DNAT: an address is looked up before it is rewritten.
        client.ip(&["route", "add", "172.16.0.0/12", "via", &via])
    }

    /// A server at these addresses of this namespace.
    pub(crate) fn serve(&self, addresses: &[[u8; 4]], answer: Option<u8>) -> Result<Worker> {
        let mut arguments = vec!["server".to_owned(), last_cpu()];
        arguments.extend(answer.into_iter().flat_map(|byte| ["--answer".to_owned(), byte.to_string()]));
        for address in addresses {
            self.namespace.add_address(&format!("{}/32", std::net::Ipv4Addr::from(*address)))?;
            arguments.push(SocketAddr::from((*address, ENDPOINT_PORT)).to_string());
        }
        let mut server = Worker::start(&arguments, Place { namespace: Some(&self.namespace), cgroup: None })?;
        // It listens once it answers.
        server.ask(&Task::Empty)?;
        Ok(server)
    }
}

/// A client in a namespace, and in a cgroup where programs shall see it.
pub(crate) fn client(namespace: &Namespace, cgroup: Option<&Cgroup>) -> Result<Worker> {
    Worker::start(&["client".to_owned(), "0".to_owned()], Place { namespace: Some(namespace), cgroup })
}

/// The server's processor: another one than the client's, where there is one.
fn last_cpu() -> String {
    (std::thread::available_parallelism().map_or(1, usize::from) - 1).to_string()
}

/// A process of the benchmark: one line in, one line out.
pub(crate) struct Worker {
    tasks: ChildStdin,
    answers: BufReader<ChildStdout>,
    process: Process,
}

impl Worker {
    fn start(arguments: &[String], place: Place<'_>) -> Result<Self> {
        let mut command = Command::new(binary("bench-load")?);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::spawn(command, place)?;
        let tasks = process.child().stdin.take().context("no stdin")?;
        let answers = BufReader::new(process.child().stdout.take().context("no stdout")?);
        Ok(Self { tasks, answers, process })
    }

    /// Has it do something, and waits for what came of it.
    pub(crate) fn ask(&mut self, task: &Task) -> Result<Measurement> {
        self.begin(task)?;
        self.answer().with_context(|| format!("{task:?}"))
    }

    /// Has it do something.
    pub(crate) fn begin(&mut self, task: &Task) -> Result<()> {
        serde_json::to_writer(&mut self.tasks, task)?;
        Ok(writeln!(self.tasks)?)
    }

    /// What came of it.
    pub(crate) fn answer(&mut self) -> Result<Measurement> {
        let mut line = String::new();
        anyhow::ensure!(self.answers.read_line(&mut line)? > 0, "bench-load has ended");
        Ok(serde_json::from_str(&line)?)
    }

    /// Ends it.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }
}

/// Nanoseconds of processor time that a process has had, all its threads together.
pub(crate) fn spent(process: u32) -> Result<f64> {
    let mut all = 0.0;
    for task in std::fs::read_dir(format!("/proc/{process}/task"))?.flatten() {
        // Threads end while one looks.
        let text = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        all += text.split(' ').next().and_then(|spent| spent.parse::<f64>().ok()).unwrap_or_default();
    }
    Ok(all)
}
