//! The agent in a container, set up from `deploy/` as a node's runtime does: capabilities, seccomp, a read-only root
//! filesystem, the node's PID namespace.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{Agent, Directory, TestBed, binary, unique};

/// Seccomp profile of Debian's container tools. The default profiles of the runtimes come from the same list.
const PROFILE: &str = "/usr/share/containers/seccomp.json";
/// Paths that runtimes hide from containers. They mount those in [`READ_ONLY`] read-only.
const MASKED: [&str; 8] = [
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
const READ_ONLY: [&str; 6] = ["/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// A running container, deleted when the value is dropped.
#[derive(Debug)]
pub struct Container {
    /// The agent in the container. Its `process` is the runtime's (`runc run`); see [`Self::process`].
    pub agent: Agent,
    id: String,
    state: PathBuf,
    _files: Directory,
}

impl Container {
    /// Starts a container on a node, and waits until the agent is ready.
    ///
    /// `of` is the container in the DaemonSet's pod template.
    /// `account` is the directory of a service account for the API server at `server`.
    ///
    /// # Errors
    /// Returns an error if `of` is invalid, the runtime fails, or the agent does not become ready.
    pub fn start(bed: &TestBed, of: &Value, account: &Path, server: SocketAddr) -> Result<Self> {
        let files = Directory::new()?;
        let (id, state) = (unique("container"), files.scratch("state"));
        let mut mounts = vec![
            json!({"destination": "/proc", "type": "proc", "source": "proc"}),
            json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}),
            bind(Path::new("/sys"), "/sys", "ro"),
        ];
        for mount in array(&of["volumeMounts"]) {
            let (name, path) = (text(&mount["name"])?, text(&mount["mountPath"])?);
            let source = match name {
                "bpffs" => PathBuf::from("/sys/fs/bpf"),
                "cgroup" => bed.cgroup.path().to_owned(),
                _ => files.scratch(name),
            };
            fs::create_dir_all(&source)?;
            mounts.push(bind(&source, path, "rw"));
        }
        mounts.push(bind(account, "/var/run/secrets/kubernetes.io/serviceaccount", "ro"));
        let root = files.scratch("root");
        fill(&root, &mounts)?;

        let own = [
            ("PORTOLAN_CLUSTER", "c1".to_owned()),
            ("PORTOLAN_NODE", "n1".to_owned()),
            ("PORTOLAN_BPFFS", bed.pins().display().to_string()),
            ("KUBERNETES_SERVICE_HOST", server.ip().to_string()),
            ("KUBERNETES_SERVICE_PORT", server.port().to_string()),
        ];
        let named = array(&of["env"]).filter(|it| own.iter().all(|(name, _)| it["name"] != *name));
        let named = named.map(|it| Ok(format!("{}={}", text(&it["name"])?, text(&it["value"])?)));
        let mut environment = named.collect::<Result<Vec<String>>>()?;
        environment.extend(own.iter().map(|(name, value)| format!("{name}={value}")));
        let mut arguments = vec!["/portolan"];
        arguments.extend(array(&of["args"]).map(text).collect::<Result<Vec<_>>>()?);

        let security = &of["securityContext"];
        ensure!(security["seccompProfile"]["type"] == "RuntimeDefault" && security["privileged"] == false);
        let capabilities = array(&security["capabilities"]["add"]).map(|name| Ok(format!("CAP_{}", text(name)?)));
        let capabilities = capabilities.collect::<Result<Vec<String>>>()?;
        let config = json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": security["runAsUser"], "gid": 0}, "cwd": "/", "env": environment,
                "args": arguments,
                "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
                "noNewPrivileges": security["allowPrivilegeEscalation"] == false,
            },
            "root": {"path": root, "readonly": security["readOnlyRootFilesystem"]},
            "mounts": mounts,
            "linux": {
                "cgroupsPath": format!("/{id}"),
                // The network and PID namespaces are the node's.
                "namespaces": [
                    {"type": "mount"}, {"type": "ipc"}, {"type": "uts"},
                    {"type": "network", "path": format!("/run/netns/{}", bed.namespace.name())}],
                "maskedPaths": MASKED, "readonlyPaths": READ_ONLY, "seccomp": seccomp(&capabilities)?,
            },
        });
        fs::write(files.scratch("config.json"), config.to_string())?;
        let bundle = files.scratch("config.json").parent().context("no parent directory")?.to_owned();
        let mut command = Command::new("runc");
        command.arg("--root").arg(&state).args(["run", "--bundle"]).arg(bundle).arg(&id);
        let agent = bed.spawn_at(command, files.scratch("run").join("admin.sock"))?;
        let mut container = Self { agent, id, state, _files: files };
        container.agent.wait_ready()?;
        Ok(container)
    }

    /// Returns the process ID of the agent in the container.
    ///
    /// # Errors
    /// Returns an error if the runtime does not report one.
    pub fn process(&self) -> Result<u32> {
        let output = Command::new("runc").arg("--root").arg(&self.state).args(["state", &self.id]).output()?;
        let state: Value = serde_json::from_slice(&output.stdout)?;
        Ok(u32::try_from(state["pid"].as_u64().context("no pid")?)?)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let ended = Command::new("runc").arg("--root").arg(&self.state).args(["delete", "--force", &self.id]).status();
        if !ended.as_ref().is_ok_and(std::process::ExitStatus::success) {
            eprintln!("cannot delete container {}: {ended:?}", self.id);
        }
    }
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> Result<&str> {
    value.as_str().with_context(|| format!("{value} is not a string"))
}

fn bind(source: &Path, destination: &str, how: &str) -> Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": ["rbind", how]})
}

/// Fills the root filesystem as an image does: the program, its shared libraries, and mount points.
fn fill(root: &Path, mounts: &[Value]) -> Result<()> {
    for mount in mounts {
        let destination = text(&mount["destination"])?.replace("/var/run/", "/run/");
        fs::create_dir_all(root.join(destination.trim_start_matches('/')))?;
    }
    std::os::unix::fs::symlink("/run", root.join("var/run"))?;
    let program = binary("portolan")?;
    fs::copy(&program, root.join("portolan"))?;
    let output = Command::new("ldd").arg(&program).output()?;
    for library in String::from_utf8(output.stdout)?.split_whitespace().filter(|word| word.starts_with('/')) {
        let to = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(to.parent().context("no parent directory")?)?;
        fs::copy(library, to)?;
    }
    Ok(())
}

/// Returns the seccomp profile of a container with these capabilities.
fn seccomp(capabilities: &[String]) -> Result<Value> {
    let profile: Value = serde_json::from_str(&fs::read_to_string(PROFILE).context(PROFILE)?)?;
    let (own, word) = match std::env::consts::ARCH {
        "x86_64" => ("SCMP_ARCH_X86_64", "amd64"),
        "aarch64" => ("SCMP_ARCH_AARCH64", "arm64"),
        other => bail!("no seccomp profile for {other}"),
    };
    let has = |value: &Value| value.as_str().is_some_and(|name| capabilities.iter().any(|own| own == name));
    let counts = |rule: &&Value| {
        let mut here = array(&rule["includes"]["arches"]).peekable();
        array(&rule["includes"]["caps"]).all(has)
            && !array(&rule["excludes"]["caps"]).any(has)
            && (here.peek().is_none() || here.any(|it| it == word))
            && !array(&rule["excludes"]["arches"]).any(|it| it == word)
    };
    let rules = array(&profile["syscalls"]).filter(counts).map(|rule| {
        let mut rule = rule.clone();
        if let Some(fields) = rule.as_object_mut() {
            fields.retain(|field, value| matches!(field.as_str(), "names" | "action" | "args") && !value.is_null());
        }
        rule
    });
    let rules: Vec<Value> = rules.collect();
    ensure!(profile["defaultAction"] == "SCMP_ACT_ERRNO" && rules.len() > 5, "{PROFILE} does not restrict syscalls");
    Ok(json!({"defaultAction": "SCMP_ACT_ERRNO", "architectures": [own], "syscalls": rules}))
}
