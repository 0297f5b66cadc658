//! A node: a network namespace, a cgroup, servers, and the agent that serves it.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
    thread,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    Cgroup, Dialer, Directory, Namespace, Process, ProcessContext,
    agent::{Agent, METRICS, READY},
    binary, cleanup,
    steps::{Steps, Watch},
    unique, wait_until,
};

/// A node: a network namespace, a cgroup for its pods, and a bpffs directory for pins.
/// All of them are removed when the value is dropped.
#[derive(Debug)]
pub struct TestBed {
    /// The network namespace of the agent and of pods without their own.
    pub namespace: Namespace,
    /// The parent cgroup of the node's pods, to which the agent attaches its programs.
    pub cgroup: Cgroup,
    pins: PathBuf,
    files: Directory,
}

impl TestBed {
    /// Creates a node.
    ///
    /// # Errors
    /// Returns an error if the namespace, the cgroup, or a directory cannot be created. Root is required.
    pub fn new() -> Result<Self> {
        Self::named("node")
    }

    /// Creates a node with `what` in its name, which makes it easy to find with `ip netns`.
    ///
    /// # Errors
    /// Returns an error if the namespace, the cgroup, or a directory cannot be created. Root is required.
    pub fn named(what: &str) -> Result<Self> {
        cleanup::sweep_dead_runs();
        let name = unique(what);
        Ok(Self {
            namespace: Namespace::new(name.clone())?,
            cgroup: Cgroup::new(&name)?,
            pins: PathBuf::from("/sys/fs/bpf").join(&name),
            files: Directory::new()?,
        })
    }

    /// Returns the place of a pod on this node that has no network namespace of its own.
    pub fn place(&self) -> ProcessContext<'_> {
        ProcessContext { namespace: Some(&self.namespace), cgroup: Some(&self.cgroup) }
    }

    /// Starts a client in a pod of this node.
    ///
    /// # Errors
    /// Returns an error if the client cannot be started.
    pub fn dialer(&self) -> Result<Dialer> {
        Dialer::start(self.place())
    }

    /// Returns the bpffs directory in which this node's agent pins its objects.
    pub fn pins(&self) -> &PathBuf {
        &self.pins
    }

    /// Returns the path of the agent's admin socket.
    pub fn admin(&self) -> PathBuf {
        self.files.scratch("admin.sock")
    }

    /// Returns the path of the agent's state file.
    pub fn state(&self) -> PathBuf {
        self.files.scratch("state.json")
    }

    /// Starts this node's agent without waiting for it.
    ///
    /// # Errors
    /// Returns an error if the agent cannot be started.
    pub fn start(&self, directory: &Directory, cluster: &str, node: &str) -> Result<Agent> {
        self.start_with(directory, cluster, node, &[])
    }

    /// Starts this node's agent with additional arguments, without waiting for it.
    ///
    /// # Errors
    /// Returns an error if the agent cannot be started.
    pub fn start_with(&self, directory: &Directory, cluster: &str, node: &str, more: &[&str]) -> Result<Agent> {
        self.start_of("portolan", directory, cluster, node, more)
    }

    /// Starts another version of the agent (`program` is the name of its binary), without waiting for it.
    ///
    /// # Errors
    /// Returns an error if the agent cannot be started.
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

    /// Starts this node's agent with an API server as its source, without waiting for it.
    ///
    /// # Errors
    /// Returns an error if the agent cannot be started.
    pub fn start_on_api(&self, kubeconfig: &Path, cluster: &str, node: &str, more: &[&str]) -> Result<Agent> {
        let mut command = Command::new(binary("portolan")?);
        command.args(["agent", "--kubernetes", "--kubeconfig"]).arg(kubeconfig);
        self.spawn(self.complete(command, cluster, node, more))
    }

    /// Starts this node's agent with an API server as its source, and waits until it is ready.
    ///
    /// # Errors
    /// Returns an error, with the agent's log, if it does not become ready.
    pub fn agent_on_api(&self, kubeconfig: &Path, cluster: &str, node: &str, more: &[&str]) -> Result<Agent> {
        let mut agent = self.start_on_api(kubeconfig, cluster, node, more)?;
        agent.wait_ready()?;
        Ok(agent)
    }

    /// Starts this node's agent as in a pod of a cluster, and waits until it is ready.
    ///
    /// It finds the service account at the usual path, and the API server's address in `KUBERNETES_SERVICE_*`.
    ///
    /// # Errors
    /// Returns an error, with the agent's log, if it does not become ready.
    pub fn agent_in_cluster(
        &self,
        account: &Path,
        server: SocketAddr,
        (cluster, node): (&str, &str),
        more: &[&str],
    ) -> Result<Agent> {
        // The service account at the usual path, in a private mount namespace.
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

    /// Starts this node's agent under a wrapper that confines it, without waiting for it.
    ///
    /// # Errors
    /// Returns an error if the agent cannot be started.
    pub fn start_under(&self, program: &[&str], directory: &Directory, cluster: &str, node: &str) -> Result<Agent> {
        let inside = self.command("portolan", directory, cluster, node, &[])?;
        let mut command = Command::new(program[0]);
        command.args(&program[1..]).arg(inside.get_program()).args(inside.get_args());
        self.spawn(command)
    }

    /// Starts an agent that pauses before each of its [`Steps`].
    ///
    /// # Errors
    /// Returns an error if the agent cannot be started, or if its system calls cannot be intercepted.
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
        // Additional arguments override the defaults.
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

    /// Starts an agent whose admin socket is at `admin`.
    pub(crate) fn spawn_at(&self, mut command: Command, admin: PathBuf) -> Result<Agent> {
        let log = self.files.scratch("agent.log");
        // Discard the log of the node's previous agent.
        let _ = fs::remove_file(&log);
        let out = File::options().create(true).append(true).open(&log)?;
        command.stderr(out.try_clone()?).stdout(out);
        // The agent runs on the node, outside the pods' cgroup.
        let process = Process::spawn(command, ProcessContext { namespace: Some(&self.namespace), cgroup: None })?;
        Ok(Agent { process, admin, log, namespace: self.namespace.open()? })
    }

    /// Starts this node's agent and waits until it is ready.
    ///
    /// # Errors
    /// Returns an error, with the agent's log, if it does not become ready.
    pub fn agent(&self, directory: &Directory, cluster: &str, node: &str) -> Result<Agent> {
        let mut agent = self.start(directory, cluster, node)?;
        agent.wait_ready()?;
        Ok(agent)
    }

    /// Starts this node's agent with additional arguments and waits until it is ready.
    ///
    /// # Errors
    /// Returns an error, with the agent's log, if it does not become ready.
    pub fn agent_with(&self, directory: &Directory, cluster: &str, node: &str, more: &[&str]) -> Result<Agent> {
        let mut agent = self.start_with(directory, cluster, node, more)?;
        agent.wait_ready()?;
        Ok(agent)
    }

    /// Starts another version of the agent (`program` is the name of its binary) and waits until it is ready.
    ///
    /// # Errors
    /// Returns an error, with the agent's log, if it does not become ready.
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

    /// Runs `portolan` with these arguments, outside the node's namespace and cgroup.
    ///
    /// # Errors
    /// Returns an error if `portolan` cannot be started. A nonzero exit status is not an error.
    pub fn portolan(&self, arguments: &[&str]) -> Result<Output> {
        Ok(Command::new(binary("portolan")?).args(arguments).output()?)
    }

    /// Starts a TCP server that sends `greeting` on each connection, reads to its end, and closes it.
    /// The server runs until the test process exits.
    ///
    /// # Errors
    /// Returns an error if the server cannot listen on the address.
    pub fn serve(&self, address: &str, greeting: &str) -> Result<()> {
        self.serve_in(&self.namespace, address, greeting)
    }

    /// Starts the server of [`Self::serve`] in another namespace.
    ///
    /// # Errors
    /// Returns an error if the server cannot listen on the address.
    pub fn serve_in(&self, namespace: &Namespace, address: &str, greeting: &str) -> Result<()> {
        Server::start(namespace, address, greeting).map(drop)
    }

    /// Starts the server of [`Self::serve`], and returns a handle that can stop it.
    ///
    /// # Errors
    /// Returns an error if the server cannot listen on the address.
    pub fn serve_until(&self, address: &str, greeting: &str) -> Result<Server> {
        Server::start(&self.namespace, address, greeting)
    }

    /// Starts a UDP server that answers each datagram with `greeting`. It runs until the test process exits.
    ///
    /// # Errors
    /// Returns an error if the server cannot listen on the address.
    pub fn serve_datagrams(&self, address: &str, greeting: &str) -> Result<()> {
        self.serve_datagrams_in(&self.namespace, address, greeting)
    }

    /// Starts the server of [`Self::serve_datagrams`] in another namespace.
    ///
    /// # Errors
    /// Returns an error if the server cannot listen on the address.
    pub fn serve_datagrams_in(&self, namespace: &Namespace, address: &str, greeting: &str) -> Result<()> {
        let address: SocketAddr = address.parse()?;
        let socket = namespace.enter(|| UdpSocket::bind(address).context("cannot listen"))?;
        let greeting = greeting.to_owned();
        thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                // The client may be gone already.
                let _ = socket.send_to(greeting.as_bytes(), from);
            }
        });
        Ok(())
    }

    /// Runs `client` against a server on `address` that accepts one connection, and returns once the port is closed.
    ///
    /// Closing the listener here is not sufficient.
    /// A process that another test starts meanwhile holds a copy of the listener between its fork and its exec.
    ///
    /// # Errors
    /// Returns an error if the server cannot listen on the address, or if `client` fails.
    pub fn serve_once<T>(&self, address: &str, client: impl FnOnce() -> Result<T>) -> Result<T> {
        let address: SocketAddr = address.parse()?;
        let listener = self.namespace.enter(|| TcpListener::bind(address).context("cannot listen"))?;
        let server = thread::spawn(move || listener.accept().map(drop));
        let served = client()?;
        server.join().expect("accepting does not panic")?;
        wait_until("the port to close", READY, || {
            let error = self.namespace.enter(|| Ok(TcpStream::connect(address).err()))?;
            ensure!(error.is_some_and(|error| error.kind() == ErrorKind::ConnectionRefused), "the port is still open");
            Ok(())
        })?;
        Ok(served)
    }
}

/// A server that greets its clients. It keeps running when the value is dropped.
#[derive(Debug)]
pub struct Server {
    listener: Arc<TcpListener>,
}

impl Server {
    fn start(namespace: &Namespace, address: &str, greeting: &str) -> Result<Self> {
        let address: SocketAddr = address.parse()?;
        let listener = Arc::new(namespace.enter(|| TcpListener::bind(address).context("cannot listen"))?);
        let (own, greeting) = (Arc::clone(&listener), greeting.to_owned());
        thread::spawn(move || {
            while let Ok((mut stream, _)) = own.accept() {
                // The client may be gone already.
                let greeted = stream.write_all(greeting.as_bytes());
                // A client that stays connected must not delay the others.
                let _ = stream.shutdown(Shutdown::Write);
                if greeted.is_ok() {
                    thread::spawn(move || stream.read_to_end(&mut Vec::new()));
                }
            }
        });
        Ok(Self { listener })
    }

    /// Stops listening, even if other processes hold copies of the socket.
    ///
    /// # Errors
    /// Returns an error if the kernel rejects the shutdown.
    pub fn stop(self) -> Result<()> {
        Ok(rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both)?)
    }
}

impl Drop for TestBed {
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
