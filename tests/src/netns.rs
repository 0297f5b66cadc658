//! Network namespaces: a node of its own, without any way to the outside.

use std::{fs::File, os::fd::AsFd as _, process::Command, thread};

use anyhow::{Context as _, Result, ensure};

/// A namespace that is deleted with the value.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// A new one, with loopback up and nothing else.
    ///
    /// # Errors
    /// `ip` is missing or refuses.
    pub fn new(name: String) -> Result<Self> {
        ip(&["netns", "add", &name])?;
        let namespace = Self { name };
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Its name for `ip netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` inside.
    ///
    /// # Errors
    /// `ip` refuses.
    pub fn ip(&self, arguments: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.name], arguments].concat())
    }

    /// Runs any program inside.
    ///
    /// # Errors
    /// It cannot be started, or fails.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<()> {
        ip(&[&["netns", "exec", &self.name, program], arguments].concat())
    }

    /// Gives loopback another address.
    ///
    /// # Errors
    /// `ip` refuses.
    pub fn add_address(&self, address: &str) -> Result<()> {
        let family_option: &[&str] = if address.contains(':') { &["nodad"] } else { &[] };
        self.ip(&[&["address", "add", address, "dev", "lo"], family_option].concat())
    }

    /// Has everything to an address vanish without an answer, as a dead machine or a silent firewall does.
    ///
    /// # Errors
    /// `ip` refuses.
    pub fn swallow(&self, address: &str) -> Result<()> {
        if self.ip(&["link", "show", "hole"]).is_err() {
            // Frames that are addressed to nobody: the other end drops them.
            self.ip(&["link", "add", "hole", "type", "veth", "peer", "name", "pit"])?;
            self.ip(&["link", "set", "hole", "arp", "off", "up"])?;
            self.ip(&["link", "set", "pit", "up"])?;
            self.ip(&["address", "add", "192.0.2.1/32", "dev", "hole"])?;
        }
        // It may not have been an address of this namespace.
        let _ = self.ip(&["address", "delete", address, "dev", "lo"]);
        self.ip(&["route", "add", address, "dev", "hole"])
    }

    /// Takes [`Self::swallow`] back: the address is this namespace's own again.
    ///
    /// # Errors
    /// `ip` refuses.
    pub fn restore(&self, address: &str) -> Result<()> {
        self.ip(&["route", "delete", address, "dev", "hole"])?;
        self.add_address(address)
    }

    /// The namespace itself.
    ///
    /// # Errors
    /// It is gone.
    pub fn open(&self) -> Result<File> {
        let path = format!("/run/netns/{}", self.name);
        File::open(&path).with_context(|| format!("cannot open {path}"))
    }

    /// Does something on a thread inside: sockets made there belong to the namespace wherever they are used.
    ///
    /// # Errors
    /// The thread cannot get in, or what the work says.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        enter(&self.open()?, work)
    }
}

/// The same in a namespace that is held open.
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

/// Connects two namespaces by a pair of interfaces with these addresses (with their prefix lengths).
///
/// # Errors
/// `ip` refuses.
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
