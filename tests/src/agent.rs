//! A node with an agent: everything that a test of the agent needs.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{
    Cgroup, Dialler, Directory, Namespace, Place, Process, binary, patience,
    steps::{Steps, Watch},
    sweep, unique, wait_until,
};

/// How long an agent may take to be ready: generous, for machines under load.
const READY: Duration = Duration::from_secs(30);
/// Where agents serve metrics, each in its own namespace.
const METRICS: &str = "127.0.0.1:15920";

/// A node: a network namespace, a cgroup for its pods, a place for pins. Everything is gone with the value.
#[derive(Debug)]
pub struct Bed {
    /// Its network.
    pub namespace: Namespace,
    /// Its pods.
    pub cgroup: Cgroup,
    pins: PathBuf,
    files: Directory,
}

impl Bed {
    /// A new node.
    ///
    /// # Errors
    /// The machine does not let one be made; root is needed.
    pub fn new() -> Result<Self> {
        Self::named("node")
    }

    /// A new node, with a word in its name for people who look.
    ///
    /// # Errors
    /// The machine does not let one be made; root is needed.
    pub fn named(what: &str) -> Result<Self> {
        sweep::sweep_dead_runs();
        let name = unique(what);
        Ok(Self {
            namespace: Namespace::new(name.clone())?,
            cgroup: Cgroup::new(&name)?,
            pins: PathBuf::from("/sys/fs/bpf").join(&name),
            files: Directory::new()?,
        })
    }

    /// Where a pod of this node runs.
    pub fn place(&self) -> Place<'_> {
        Place { namespace: Some(&self.namespace), cgroup: Some(&self.cgroup) }
    }

    /// A client on this node.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn dialler(&self) -> Result<Dialler> {
        Dialler::start(self.place())
    }

    /// Where the agent pins.
    pub fn pins(&self) -> &PathBuf {
        &self.pins
    }

    /// The admin socket of this node's agent.
    pub fn admin(&self) -> PathBuf {
        self.files.scratch("admin.sock")
    }

    /// Where this node's agent keeps what outlives it.
    pub fn state(&self) -> PathBuf {
        self.files.scratch("state.json")
    }

    /// Starts this node's agent, and does not wait for it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(&self, directory: &Directory, cluster: &str, node: &str) -> Result<Agent> {
        self.start_with(directory, cluster, node, &[])
    }

    /// Starts this node's agent with further arguments, and does not wait for it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_with(&self, directory: &Directory, cluster: &str, node: &str, more: &[&str]) -> Result<Agent> {
        self.start_of("portolan", directory, cluster, node, more)
    }

    /// The same with an agent of another version: the name of its program.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_of(
        &self,
        program: &str,
        directory: &Directory,
        cluster: &str,
        node: &str,
        more: &[&str],
    ) -> Result<Agent> {
        let command = self.command(program, directory, cluster, node, more)?;
        self.spawn(command)
    }

    /// Starts this node's agent, which reads from an API server, and does not wait for it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_on_api(&self, kubeconfig: &Path, cluster: &str, node: &str, more: &[&str]) -> Result<Agent> {
        let mut command = Command::new(binary("portolan")?);
        command.args(["agent", "--kubernetes", "--kubeconfig"]).arg(kubeconfig);
        self.spawn(self.complete(command, cluster, node, more))
    }

    /// The same, and waits until it is ready.
    ///
    /// # Errors
    /// It does not become ready; its log is in the error.
    pub fn agent_on_api(&self, kubeconfig: &Path, cluster: &str, node: &str, more: &[&str]) -> Result<Agent> {
        let mut agent = self.start_on_api(kubeconfig, cluster, node, more)?;
        agent.wait_ready()?;
        Ok(agent)
    }

    /// Starts this node's agent as a pod that has an account and is told where the API server is, and waits until it is ready.
    ///
    /// # Errors
    /// It does not become ready; its log is in the error.
    pub fn agent_in_cluster(
        &self,
        account: &Path,
        server: SocketAddr,
        (cluster, node): (&str, &str),
        more: &[&str],
    ) -> Result<Agent> {
        // Where every pod has its account, for this one alone.
        const IN_POD: &str = "mount -t tmpfs none /run && mkdir -p /run/secrets/kubernetes.io && \
            ln -s \"$0\" /run/secrets/kubernetes.io/serviceaccount && exec \"$@\"";
        let mut inside = Command::new(binary("portolan")?);
        inside.args(["agent", "--kubernetes"]);
        let inside = self.complete(inside, cluster, node, more);
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", IN_POD]).arg(account);
        command.arg(inside.get_program()).args(inside.get_args());
        command.env("KUBERNETES_SERVICE_HOST", server.ip().to_string());
        command.env("KUBERNETES_SERVICE_PORT", server.port().to_string());
        let mut agent = self.spawn(command)?;
        agent.wait_ready()?;
        Ok(agent)
    }

    /// Starts this node's agent by another program, which confines it, and does not wait for it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_under(&self, program: &[&str], directory: &Directory, cluster: &str, node: &str) -> Result<Agent> {
        let inside = self.command("portolan", directory, cluster, node, &[])?;
        let mut command = Command::new(program[0]);
        command.args(&program[1..]).arg(inside.get_program()).args(inside.get_args());
        self.spawn(command)
    }

    /// Starts an agent that waits before each of its steps.
    ///
    /// # Errors
    /// It cannot be started, or the kernel does not let it be watched.
    pub fn start_watched(
        &self,
        program: &str,
        directory: &Directory,
        cluster: &str,
        node: &str,
    ) -> Result<(Agent, Steps)> {
        let mut command = self.command(program, directory, cluster, node, &[])?;
        let watch = Watch::before(&mut command)?;
        let agent = self.spawn(command)?;
        Ok((agent, watch.started()?))
    }

    fn command(
        &self,
        program: &str,
        directory: &Directory,
        cluster: &str,
        node: &str,
        more: &[&str],
    ) -> Result<Command> {
        let mut command = Command::new(binary(program)?);
        command.arg("agent").arg("--config").arg(directory.path());
        Ok(self.complete(command, cluster, node, more))
    }

    fn complete(&self, mut command: Command, cluster: &str, node: &str, more: &[&str]) -> Command {
        command.args(["--cluster", cluster, "--node", node]);
        // What is given in addition counts.
        let own = [
            ("--cgroup", self.cgroup.path().display().to_string()),
            ("--bpffs", self.pins.display().to_string()),
            ("--admin", self.admin().display().to_string()),
            ("--state", self.state().display().to_string()),
            ("--metrics", METRICS.to_owned()),
        ];
        let own = own.iter().filter(|(flag, _)| !more.contains(flag));
        command.args(own.flat_map(|(flag, value)| [*flag, value])).args(more);
        command
    }

    fn spawn(&self, command: Command) -> Result<Agent> {
        self.spawn_at(command, self.admin())
    }

    /// Starts an agent that answers at this socket.
    pub(crate) fn spawn_at(&self, mut command: Command, admin: PathBuf) -> Result<Agent> {
        let log = self.files.scratch("agent.log");
        // What a former agent of this node has logged is not this one's.
        let _ = fs::remove_file(&log);
        let out = File::options().create(true).append(true).open(&log)?;
        command.stderr(out.try_clone()?).stdout(out);
        // The agent runs on the node, outside the cgroup of the pods.
        let process = Process::spawn(command, Place { namespace: Some(&self.namespace), cgroup: None })?;
        Ok(Agent { process, admin, log, namespace: self.namespace.open()? })
    }

    /// Starts this node's agent, and waits until it is ready.
    ///
    /// # Errors
    /// It does not become ready; its log is in the error.
    pub fn agent(&self, directory: &Directory, cluster: &str, node: &str) -> Result<Agent> {
        let mut agent = self.start(directory, cluster, node)?;
        agent.wait_ready()?;
        Ok(agent)
    }

    /// Starts this node's agent with further arguments, and waits until it is ready.
    ///
    /// # Errors
    /// It does not become ready; its log is in the error.
    pub fn agent_with(&self, directory: &Directory, cluster: &str, node: &str, more: &[&str]) -> Result<Agent> {
        let mut agent = self.start_with(directory, cluster, node, more)?;
        agent.wait_ready()?;
        Ok(agent)
    }

    /// The same with an agent of another version.
    ///
    /// # Errors
    /// It does not become ready; its log is in the error.
    pub fn agent_of(
        &self,
        program: &str,
        directory: &Directory,
        cluster: &str,
        node: &str,
        more: &[&str],
    ) -> Result<Agent> {
        let mut agent = self.start_of(program, directory, cluster, node, more)?;
        agent.wait_ready()?;
        Ok(agent)
    }

    /// Runs `portolan` with these arguments.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn portolan(&self, arguments: &[&str]) -> Result<Output> {
        Ok(Command::new(binary("portolan")?).args(arguments).output()?)
    }

    /// A server that greets each connection with `greeting`, hears it out, and closes it. It runs as long as the test does.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn serve(&self, address: &str, greeting: &str) -> Result<()> {
        self.serve_in(&self.namespace, address, greeting)
    }

    /// The same in another namespace.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn serve_in(&self, namespace: &Namespace, address: &str, greeting: &str) -> Result<()> {
        Serving::start(namespace, address, greeting).map(drop)
    }

    /// The same, until it is told to stop.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn serve_until(&self, address: &str, greeting: &str) -> Result<Serving> {
        Serving::start(&self.namespace, address, greeting)
    }

    /// A server that answers each datagram with `greeting`. It runs as long as the test does.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn serve_datagrams(&self, address: &str, greeting: &str) -> Result<()> {
        self.serve_datagrams_in(&self.namespace, address, greeting)
    }

    /// The same in another namespace.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn serve_datagrams_in(&self, namespace: &Namespace, address: &str, greeting: &str) -> Result<()> {
        let address: SocketAddr = address.parse()?;
        let socket = namespace.enter(|| UdpSocket::bind(address).context("cannot listen"))?;
        let greeting = greeting.to_owned();
        thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                // A client that has gone away is no concern of the server's.
                let _ = socket.send_to(greeting.as_bytes(), from);
            }
        });
        Ok(())
    }

    /// Has `client` make one connection with a server on `address`, and returns once nobody listens there any more. Another test may start a
    /// process meanwhile, which holds the listener between its fork and its exec, so that closing it here is not the end of it.
    ///
    /// # Errors
    /// The address cannot be listened on, or `client` fails.
    pub fn serve_once<T>(&self, address: &str, client: impl FnOnce() -> Result<T>) -> Result<T> {
        let address: SocketAddr = address.parse()?;
        let listener = self.namespace.enter(|| TcpListener::bind(address).context("cannot listen"))?;
        let server = thread::spawn(move || listener.accept().map(drop));
        let served = client()?;
        server.join().expect("accepting does not panic")?;
        wait_until("the server to be gone", READY, || {
            let error = self.namespace.enter(|| Ok(TcpStream::connect(address).err()))?;
            ensure!(error.is_some_and(|error| error.kind() == ErrorKind::ConnectionRefused), "somebody listens");
            Ok(())
        })?;
        Ok(served)
    }
}

/// A server that greets; it goes on if the value is dropped.
#[derive(Debug)]
pub struct Serving {
    listener: Arc<TcpListener>,
}

impl Serving {
    fn start(namespace: &Namespace, address: &str, greeting: &str) -> Result<Self> {
        let address: SocketAddr = address.parse()?;
        let listener = Arc::new(namespace.enter(|| TcpListener::bind(address).context("cannot listen"))?);
        let (own, greeting) = (Arc::clone(&listener), greeting.to_owned());
        thread::spawn(move || {
            while let Ok((mut stream, _)) = own.accept() {
                // A client that has gone away is no concern of the server's.
                let greeted = stream.write_all(greeting.as_bytes());
                // Most have nothing to say, and are done with at once. Who stays does not keep the others waiting.
                let _ = stream.shutdown(Shutdown::Write);
                if greeted.is_ok() {
                    thread::spawn(move || stream.read_to_end(&mut Vec::new()));
                }
            }
        });
        Ok(Self { listener })
    }

    /// Nobody listens any more once this is done, whoever holds the socket as well.
    ///
    /// # Errors
    /// The kernel does not do it.
    pub fn stop(self) -> Result<()> {
        Ok(rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both)?)
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let cleaned = binary("portolan").and_then(|portolan| {
            let output = Command::new(portolan).arg("cleanup").arg("--bpffs").arg(&self.pins).output()?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        });
        if let Err(error) = cleaned {
            eprintln!("cannot remove {}: {error:#}", self.pins.display());
        }
    }
}

/// A running agent; killed with the value.
#[derive(Debug)]
pub struct Agent {
    /// Its process.
    pub process: Process,
    admin: PathBuf,
    log: PathBuf,
    namespace: File,
}

impl Agent {
    /// Waits until it says that it is ready.
    ///
    /// # Errors
    /// It does not, or it ends.
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
            Ok(Err(status)) => bail!("the agent ended with {status}:\n{}", log()),
            Err(error) => Err(error.context(log())),
        }
    }

    /// Asks its HTTP address.
    ///
    /// # Errors
    /// It does not answer.
    pub fn http(&self, path: &str) -> Result<(u16, String)> {
        self.http_within(path, READY * patience())
    }

    /// The same, of an agent that may be held up: it answers within this time.
    ///
    /// # Errors
    /// It does not.
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

    /// Findings of a code: `object: message`.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn findings(&self, code: &str) -> Result<Vec<String>> {
        let report = self.get("services")?;
        let of = report["findings"].as_array().into_iter().flatten().filter(|finding| finding["code"] == code);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Ok(of.map(|finding| format!("{}: {}", text(&finding["object"]), text(&finding["message"]))).collect())
    }

    /// `portolan get WHAT -o json`
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn get(&self, what: &str) -> Result<Value> {
        let mut command = Command::new(binary("portolan")?);
        let output = command.args(["get", what, "-o", "json", "--admin"]).arg(&self.admin).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// What `portolan explain` says of a service (`namespace/name`).
    ///
    /// # Errors
    /// The agent does not answer, or has no such service.
    pub fn explain(&self, service: &str) -> Result<Value> {
        let mut command = Command::new(binary("portolan")?);
        let output = command.args(["explain", service, "-o", "json", "--admin"]).arg(&self.admin).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// The events so far, oldest first.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn events(&self) -> Result<Vec<Value>> {
        let mut command = Command::new(binary("portolan")?);
        let output = command.args(["events", "-o", "json", "--admin"]).arg(&self.admin).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout)?.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// The process that keeps its privileges.
    ///
    /// # Errors
    /// There is none.
    pub fn helper(&self) -> Result<u32> {
        helper_of(self.process.id())
    }

    /// What the agent has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// The process that keeps the privileges of an agent's process.
///
/// # Errors
/// There is none.
pub fn helper_of(agent: u32) -> Result<u32> {
    let own = format!("PPid:\t{agent}");
    let is_helper = |process: &u32| {
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let line = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        status.lines().any(|line| line == own) && line.split(|byte| *byte == 0).nth(1) == Some(b"helper")
    };
    let mut processes = fs::read_dir("/proc")?.flatten().filter_map(|it| it.file_name().to_str()?.parse().ok());
    processes.find(is_helper).context("no helper")
}
