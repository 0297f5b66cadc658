//! Network namespaces: isolated nodes without a route to the outside.

use std::{fs::File, os::fd::AsFd as _, process::Command, thread};

use anyhow::{Context as _, Result, ensure};

/// A network namespace that is deleted when the value is dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Creates a namespace with loopback up and no other interface.
    ///
    /// # Errors
    /// Returns an error if `ip` is missing or fails.
    pub fn new(name: String) -> Result<Self> {
        ip(&["netns", "add", &name])?;
        let namespace = Self { name };
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Returns the namespace's name, as in `ip netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` in the namespace.
    ///
    /// # Errors
    /// Returns an error if `ip` fails.
    pub fn ip(&self, arguments: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.name], arguments].concat())
    }

    /// Runs a program in the namespace, and waits for it.
    ///
    /// # Errors
    /// Returns an error if the program cannot be started or fails.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<()> {
        ip(&[&["netns", "exec", &self.name, program], arguments].concat())
    }

    /// Adds an address to loopback.
    ///
    /// # Errors
    /// Returns an error if `ip` fails.
    pub fn add_address(&self, address: &str) -> Result<()> {
        let family_option: &[&str] = if address.contains(':') { &["nodad"] } else { &[] };
        self.ip(&[&["address", "add", address, "dev", "lo"], family_option].concat())
    }

    /// Silently drops all packets to an address, as a dead machine or a firewall does.
    ///
    /// # Errors
    /// Returns an error if `ip` fails.
    pub fn swallow(&self, address: &str) -> Result<()> {
        if self.ip(&["link", "show", "hole"]).is_err() {
            // Without ARP, frames have no valid destination address, and the other end drops them.
            self.ip(&["link", "add", "hole", "type", "veth", "peer", "name", "pit"])?;
            self.ip(&["link", "set", "hole", "arp", "off", "up"])?;
            self.ip(&["link", "set", "pit", "up"])?;
            self.ip(&["address", "add", "192.0.2.1/32", "dev", "hole"])?;
        }
        // The address may not belong to this namespace.
        let _ = self.ip(&["address", "delete", address, "dev", "lo"]);
        self.ip(&["route", "add", address, "dev", "hole"])
    }

    /// Undoes [`Self::swallow`]. The address belongs to this namespace again.
    ///
    /// # Errors
    /// Returns an error if `ip` fails.
    pub fn restore(&self, address: &str) -> Result<()> {
        self.ip(&["route", "delete", address, "dev", "hole"])?;
        self.add_address(address)
    }

    /// Opens the namespace's file, which can outlive its name.
    ///
    /// # Errors
    /// Returns an error if the namespace no longer exists.
    pub fn open(&self) -> Result<File> {
        let path = format!("/run/netns/{}", self.name);
        File::open(&path).with_context(|| format!("cannot open {path}"))
    }

    /// Runs `work` on a thread in the namespace.
    /// Sockets created there belong to the namespace wherever they are used.
    ///
    /// # Errors
    /// Returns an error if the thread cannot enter the namespace, or the error of `work`.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        enter(&self.open()?, work)
    }
}

/// Runs `work` on a thread in an open namespace; see [`Namespace::enter`].
pub(crate) fn enter<T: Send>(namespace: &File, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let inside = scope.spawn(move || {
            rustix::thread::move_into_link_name_space(
                namespace.as_fd(),
                Some(rustix::thread::LinkNameSpaceType::Network),
            )?;
            work()
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = ip(&["netns", "delete", &self.name]) {
            eprintln!("{error:#}");
        }
    }
}

/// Connects two namespaces with a veth pair. Each side is (namespace, interface, address with prefix length).
///
/// # Errors
/// Returns an error if `ip` fails.
pub fn link(left: (&Namespace, &str, &str), right: (&Namespace, &str, &str)) -> Result<()> {
    let peer = ["peer", "name", right.1, "netns", right.0.name()];
    left.0.ip(&[&["link", "add", left.1, "type", "veth"], &peer[..]].concat())?;
    for (namespace, interface, address) in [left, right] {
        namespace.ip(&["address", "add", address, "dev", interface])?;
        namespace.ip(&["link", "set", interface, "up"])?;
    }
    Ok(())
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output().context("cannot start `ip` (Debian: iproute2)")?;
    let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    ensure!(output.status.success(), "ip {}: {complaint}", arguments.join(" "));
    Ok(())
}
