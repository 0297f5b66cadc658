//! A pod with its own network namespace.

use std::process::{Command, Stdio};

use anyhow::Result;

use crate::{Dialer, Namespace, Process, ProcessContext, TestBed, link, unique};

/// A pod with its own network namespace, in the node's pod cgroup. It routes 10.0.0.0/8 through the node.
#[derive(Debug)]
pub struct Pod {
    /// A test client that runs in the pod.
    pub client: Dialer,
    /// The pod's network namespace.
    pub namespace: Namespace,
}

impl Pod {
    /// Creates a pod. `number` must be unique on the node: the pod's address is `192.168.{number}.1`.
    ///
    /// # Errors
    /// Returns an error if the namespace, its link, the route, or the client cannot be created.
    pub fn new(bed: &TestBed, number: u8) -> Result<Self> {
        let namespace = Namespace::new(unique("pod"))?;
        let (inside, outside) = (format!("192.168.{number}.1/30"), format!("192.168.{number}.2/30"));
        link((&namespace, "eth0", &inside), (&bed.namespace, &format!("pod{number}"), &outside))?;
        namespace.ip(&["route", "add", "10.0.0.0/8", "via", &format!("192.168.{number}.2")])?;
        let client = Dialer::start(ProcessContext { namespace: Some(&namespace), cgroup: Some(&bed.cgroup) })?;
        Ok(Self { client, namespace })
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
    pub fn start(&self, bed: &TestBed, program: &str, arguments: &[&str]) -> Result<Process> {
        let mut command = Command::new(program);
        command.args(arguments).stdout(Stdio::piped());
        Process::spawn(command, ProcessContext { namespace: Some(&self.namespace), cgroup: Some(&bed.cgroup) })
    }
}
