//! A pod with its own network namespace and cgroup.

use std::process::{Command, Stdio};

use anyhow::Result;

use crate::{Cgroup, Dialer, Namespace, Process, ProcessContext, TestBed, link, unique};

/// A pod with its own network namespace and cgroup. It routes 10.0.0.0/8 through the node.
#[derive(Debug)]
pub struct Pod {
    // Fields are dropped in this order: the client's process must have exited before its cgroup can be removed.
    /// A test client that runs in the pod.
    pub client: Dialer,
    /// The pod's network namespace.
    pub namespace: Namespace,
    /// The pod's cgroup.
    pub cgroup: Cgroup,
}

impl Pod {
    /// Creates a pod. `number` must be unique on the node: the pod's address is `192.168.{number}.1`.
    ///
    /// # Errors
    /// Returns an error if the namespace, its link, the route, the cgroup, or the client cannot be created.
    pub fn new(bed: &TestBed, number: u8) -> Result<Self> {
        let cgroup = bed.cgroup.make_inside(&format!("pod{number}"))?;
        let namespace = Namespace::new(unique("pod"))?;
        let (inside, outside) = (format!("192.168.{number}.1/30"), format!("192.168.{number}.2/30"));
        link((&namespace, "eth0", &inside), (&bed.namespace, &format!("pod{number}"), &outside))?;
        namespace.ip(&["route", "add", "10.0.0.0/8", "via", &format!("192.168.{number}.2")])?;
        let client = Dialer::start(ProcessContext { namespace: Some(&namespace), cgroup: Some(&cgroup) })?;
        Ok(Self { client, namespace, cgroup })
    }

    /// Makes the pod's own firewall reset all TCP connections to port 9080 of `address`.
    ///
    /// # Errors
    /// Returns an error if `nft` is missing or rejects the rule.
    pub fn rejects(&self, address: &str) -> Result<()> {
        let rule = format!("ip daddr {address} tcp dport 9080 reject with tcp reset");
        self.namespace
            .run("nft", &["add table ip own; add chain ip own out { type filter hook output priority 0; }"])?;
        self.namespace.run("nft", &[&format!("add rule ip own out {rule}")])
    }

    /// Starts a program in the pod, with stdout as a pipe.
    ///
    /// # Errors
    /// Returns an error if the program cannot be started.
    pub fn start(&self, program: &str, arguments: &[&str]) -> Result<Process> {
        let mut command = Command::new(program);
        command.args(arguments).stdout(Stdio::piped());
        Process::spawn(command, ProcessContext { namespace: Some(&self.namespace), cgroup: Some(&self.cgroup) })
    }
}
