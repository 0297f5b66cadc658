//! A pod of a node with a network of its own.

use std::process::{Command, Stdio};

use anyhow::Result;

use crate::{Bed, Dialler, Namespace, Place, Process, link, unique};

/// A pod with a network of its own, in the node's cgroup; it reaches what the node has in 10.0.0.0/8.
#[derive(Debug)]
pub struct Pod {
    /// A client in it.
    pub client: Dialler,
    /// Its network.
    pub namespace: Namespace,
}

impl Pod {
    /// A new one, of this number on the node.
    ///
    /// # Errors
    /// The machine does not let one be made.
    pub fn new(bed: &Bed, number: u8) -> Result<Self> {
        let namespace = Namespace::new(unique("pod"))?;
        let (inside, outside) = (format!("192.168.{number}.1/30"), format!("192.168.{number}.2/30"));
        link((&namespace, "eth0", &inside), (&bed.namespace, &format!("pod{number}"), &outside))?;
        namespace.ip(&["route", "add", "10.0.0.0/8", "via", &format!("192.168.{number}.2")])?;
        let client = Dialler::start(Place { namespace: Some(&namespace), cgroup: Some(&bed.cgroup) })?;
        Ok(Self { client, namespace })
    }

    /// Its own firewall resets all connections to an endpoint.
    ///
    /// # Errors
    /// There is no nft.
    pub fn rejects(&self, address: &str) -> Result<()> {
        let rule = format!("ip daddr {address} tcp dport 9080 reject with tcp reset");
        self.namespace
            .run("nft", &["add table ip own; add chain ip own out { type filter hook output priority 0; }"])?;
        self.namespace.run("nft", &[&format!("add rule ip own out {rule}")])
    }

    /// Starts a program in it, whose output is a pipe.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(&self, bed: &Bed, program: &str, arguments: &[&str]) -> Result<Process> {
        let mut command = Command::new(program);
        command.args(arguments).stdout(Stdio::piped());
        Process::spawn(command, Place { namespace: Some(&self.namespace), cgroup: Some(&bed.cgroup) })
    }
}
