//! Common clients and servers, through Service addresses.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod http;

use std::{
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use portolan_tests::{
    Agent, Directory, Process, ProcessContext, TestBed,
    objects::{node, service, slice, udp_service, udp_slice},
    wait_until,
};
use serde_json::json;

const BOUND: Duration = Duration::from_secs(60);
const NOBODY: u32 = 65_534;

/// A node with one server behind a Service.
struct World {
    // Dropped before the node is.
    _server: Process,
    agent: Agent,
    directory: Directory,
    bed: TestBed,
}

impl World {
    /// Starts `server`, which listens on `10.0.0.1:<target>`, behind `172.16.0.10:<port>` over TCP and UDP.
    fn new(port: u16, target: u16, server: impl FnOnce(&Directory) -> Result<Command>) -> Result<Self> {
        let (bed, directory) = (TestBed::new()?, Directory::new()?);
        for address in ["10.0.0.1/32", "10.0.0.9/32"] {
            bed.namespace.add_address(address)?;
        }
        let endpoint = [("10.0.0.1", "n1", "")];
        directory.write(
            "c1/all.yaml",
            &[
                node("n1", "r1"),
                service("server", &["172.16.0.10"], port),
                slice("server", target, &endpoint),
                udp_service("datagrams", &["172.16.0.10"], port),
                udp_slice("datagrams", target, &endpoint),
            ],
        )?;
        let mut command = server(&directory)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let outside = ProcessContext { namespace: Some(&bed.namespace), cgroup: None };
        let server = Process::spawn(command, outside)?;
        let agent = bed.agent(&directory, "c1", "n1")?;
        Ok(Self { bed, directory, agent, _server: server })
    }

    /// Runs a client as a pod, and returns its output.
    /// Fails if the client fails, or runs for 30 seconds.
    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        // A client that hangs is an error.
        let mut command = Command::new("timeout");
        command
            .arg("30")
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut process = Process::spawn(command, self.bed.place())?;
        let (mut stdout, mut stderr) = (String::new(), String::new());
        process.child().stdout.take().context("no stdout")?.read_to_string(&mut stdout)?;
        process.child().stderr.take().context("no stderr")?.read_to_string(&mut stderr)?;
        let status = process.wait(BOUND)?;
        ensure!(status.success(), "{program} exited with {status}: {stdout}{stderr}");
        Ok(stdout.trim().to_owned())
    }

    /// Runs a client repeatedly until its output is as expected, because the server may not be up yet.
    fn until(&self, program: &str, arguments: &[&str], expected: &str) -> Result<()> {
        wait_until(&format!("{program} {}", arguments.join(" ")), BOUND, || {
            let said = self.run(program, arguments)?;
            ensure!(said == expected, "{said:?} is not {expected:?}");
            Ok(())
        })
    }
}

/// Returns a command for an nginx server with this `location /`.
fn nginx(directory: &Directory, listen: &str, location: &str) -> Result<Command> {
    nginx_with(directory, listen, "", location)
}

/// As [`nginx`], with more directives in the `http` block.
fn nginx_with(directory: &Directory, listen: &str, more: &str, location: &str) -> Result<Command> {
    let folder = directory.scratch(&format!("nginx-{}", listen.replace(':', "-")));
    fs::create_dir_all(&folder)?;
    let place = folder.display();
    let text = format!(
        "daemon off; master_process off; pid {place}/pid; error_log {place}/error.log; user root;\nevents {{}}\nhttp {{ access_log off;\n\
         client_body_temp_path {place}/a; proxy_temp_path {place}/b; fastcgi_temp_path {place}/c; uwsgi_temp_path {place}/d; scgi_temp_path {place}/e;\n\
         {more} server {{ listen {listen}; location / {{ {location} }} }} }}\n"
    );
    fs::write(folder.join("nginx.conf"), text)?;
    let mut command = Command::new("nginx");
    command.arg("-p").arg(&folder).arg("-c").arg(folder.join("nginx.conf"));
    Ok(command)
}

fn web() -> Result<World> {
    World::new(80, 8080, |directory| nginx(directory, "10.0.0.1:8080", "return 200 \"hello from $server_addr\\n\";"))
}

#[test]
fn curl_sees_the_dialed_address() -> Result<()> {
    let world = web()?;
    let format = "%{remote_ip}:%{remote_port}";
    for url in ["http://172.16.0.10/", "http://[::ffff:172.16.0.10]/"] {
        let peer = if url.contains("ffff") { "::ffff:172.16.0.10:80" } else { "172.16.0.10:80" };
        world.until("curl", &["-s", "-g", "-m", "5", "-w", format, url], &format!("hello from 10.0.0.1\n{peer}"))?;
    }
    Ok(())
}

#[test]
fn nginx_proxies_to_a_service() -> Result<()> {
    let world = web()?;
    let proxy = nginx(&world.directory, "10.0.0.9:8000", "proxy_pass http://172.16.0.10:80;")?;
    // Run as a pod, because its upstream connections are those of a pod.
    let _proxy = Process::spawn(proxy, world.bed.place())?;
    world.until("curl", &["-s", "-m", "5", "http://10.0.0.9:8000/"], "hello from 10.0.0.1")
}

#[test]
fn python_socket_apis_see_the_dialed_address() -> Result<()> {
    let world = web()?;
    world.until("curl", &["-s", "-m", "5", "http://172.16.0.10/"], "hello from 10.0.0.1")?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/client.py");
    let said = world.run("python3", &[script, "172.16.0.10", "80"])?;
    let expected = json!({
        "socket": ["172.16.0.10", 80], "nonblocking": ["172.16.0.10", 80], "asyncio": ["172.16.0.10", 80],
        "http": "hello from 10.0.0.1", "v6": ["::ffff:172.16.0.10", 80],
    });
    let said: serde_json::Value = serde_json::from_str(&said)?;
    assert_eq!(said, expected);
    Ok(())
}

#[test]
fn java_sees_the_dialed_address_over_ipv4_and_mapped_sockets() -> Result<()> {
    let world = web()?;
    world.until("curl", &["-s", "-m", "5", "http://172.16.0.10/"], "hello from 10.0.0.1")?;
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/Client.java");
    for prefer_v4 in ["false", "true"] {
        let option = format!("-Djava.net.preferIPv4Stack={prefer_v4}");
        let said =
            world.run("java", &["-Xshare:auto", "-XX:TieredStopAtLevel=1", &option, source, "172.16.0.10", "80"])?;
        assert_eq!(said, "socket /172.16.0.10:80\nchannel /172.16.0.10:80\nhttp hello from 10.0.0.1", "{prefer_v4}");
    }
    Ok(())
}

#[test]
fn redis() -> Result<()> {
    let world = World::new(6379, 6380, |directory| {
        let mut command = Command::new("redis-server");
        command.args(["--bind", "10.0.0.1", "--port", "6380", "--save", "", "--protected-mode", "no", "--dir"]);
        command.arg(directory.scratch(""));
        Ok(command)
    })?;
    world.until("redis-cli", &["-h", "172.16.0.10", "ping"], "PONG")?;
    world.until("redis-cli", &["-h", "172.16.0.10", "set", "key", "value"], "OK")?;
    world.until("redis-cli", &["-h", "172.16.0.10", "get", "key"], "value")?;
    // The server side of the connection is the endpoint itself: there is no proxy in between.
    let clients = world.run("redis-cli", &["-h", "172.16.0.10", "client", "list"])?;
    ensure!(clients.contains("laddr=10.0.0.1:6380"), "{clients}");
    Ok(())
}

/// Returns the path of a PostgreSQL program in Debian's layout.
fn postgres(program: &str) -> Result<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").context("no PostgreSQL (Debian: postgresql)")?;
    let found = versions.flatten().map(|version| version.path().join("bin").join(program)).find(|path| path.exists());
    found.with_context(|| format!("no {program} (Debian: postgresql)"))
}

/// Returns a command that runs a program without root, as PostgreSQL requires.
fn unprivileged(program: &Path) -> Command {
    let (user, group) = (format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"));
    let mut command = Command::new("setpriv");
    command.args([user.as_str(), &group, "--clear-groups"]).arg(program).env("LC_ALL", "C.UTF-8");
    command
}

#[test]
fn psql() -> Result<()> {
    let world = World::new(5432, 5433, |directory| {
        let data = directory.scratch("postgres");
        fs::create_dir(&data)?;
        std::os::unix::fs::chown(&data, Some(NOBODY), Some(NOBODY))?;
        let mut initdb = unprivileged(&postgres("initdb")?);
        let output =
            initdb.args(["--auth", "trust", "--username", "postgres", "--no-sync", "-D"]).arg(&data).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::write(data.join("pg_hba.conf"), "host all all 0.0.0.0/0 trust\n")?;
        let mut server = unprivileged(&postgres("postgres")?);
        server.arg("-D").arg(&data).args(["-h", "10.0.0.1", "-p", "5433", "-k", "", "-F"]);
        Ok(server)
    })?;
    let query = "select inet_server_addr() || ' ' || inet_server_port()";
    world.until("psql", &["-h", "172.16.0.10", "-U", "postgres", "-Atc", query], "10.0.0.1/32 5433")
}

#[test]
fn dig_over_udp_and_tcp() -> Result<()> {
    let world = World::new(53, 5353, |_| {
        let mut command = Command::new("dnsmasq");
        command.args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root"]);
        command.args(["--listen-address=10.0.0.1", "--bind-interfaces", "--port=5353", "--pid-file="]);
        command.arg("--address=/web.test/10.9.9.9");
        Ok(command)
    })?;
    // dig rejects a response from an address that it has not queried.
    for way in ["+notcp", "+tcp"] {
        world.until("dig", &["+short", "+tries=1", "+time=2", way, "@172.16.0.10", "web.test"], "10.9.9.9")?;
    }
    let said = world.run("dig", &["+tries=1", "+time=2", "@172.16.0.10", "web.test"])?;
    ensure!(said.contains(";; SERVER: 172.16.0.10#53(172.16.0.10) (UDP)"), "{said}");
    Ok(())
}
