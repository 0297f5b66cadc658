//! Installs missing Debian packages.

use std::{fs, io::Write as _, os::unix::fs::OpenOptionsExt as _, path::Path, process::Command};

use anyhow::{Result, bail};

use crate::command::{find, run};

/// Programs that the demo, the tests and the benchmark run, with their packages.
pub(crate) const BENCH: [(&str, &str); 4] =
    [("ip", "iproute2"), ("bpftool", "bpftool"), ("nginx", "nginx-light"), ("curl", "curl")];

/// Clients and servers that tests run through Service addresses, with their packages.
pub(crate) const CLIENTS: [(&str, &str); 10] = [
    ("javac", "default-jdk-headless"),
    ("python3", "python3"),
    ("redis-server", "redis-server"),
    ("redis-cli", "redis-tools"),
    ("psql", "postgresql-client"),
    ("postgres", "postgresql"),
    ("dig", "bind9-dnsutils"),
    ("dnsmasq", "dnsmasq-base"),
    ("wrk", "wrk"),
    ("nft", "nftables"),
];

/// What tests need to run containers, with packages. The second entry is a seccomp profile, found by its path.
pub(crate) const CONTAINERS: [(&str, &str); 2] =
    [("runc", "runc"), ("/usr/share/containers/seccomp.json", "golang-github-containers-common")];

/// Alternatives that the benchmark compares with, with their packages. Python is needed to install Envoy.
pub(crate) const PEERS: [(&str, &str); 4] =
    [("nft", "nftables"), ("iptables-legacy-restore", "iptables"), ("haproxy", "haproxy"), ("python3", "python3")];

/// Programs that are needed to boot another kernel, with their packages.
pub(crate) const VM: [(&str, &str); 7] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("cpio", "cpio"),
    ("strip", "binutils"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
    ("dpkg", "dpkg"),
];

/// Installs the packages of those programs that are missing.
pub(crate) fn ensure_programs(programs: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&str> =
        programs.iter().filter(|(program, _)| find(program).is_none()).map(|(_, package)| *package).collect();
    install(&missing)
}

/// Installs packages.
///
/// # Errors
/// Returns an error with the manual command if apt-get or root is missing, or if the installation fails.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let manual = format!("apt-get install --no-install-recommends {}", packages.join(" "));
    if find("apt-get").is_none() || !rustix::process::geteuid().is_root() {
        bail!(
            "cannot install missing packages without apt-get and root; install them manually (Debian names): {manual}"
        );
    }
    eprintln!("installing: {}", packages.join(" "));
    let _quiet = NoServices::begin()?;
    run(&mut apt(&["update", "-qq"]))?;
    let mut install = apt(&["install", "-qq", "--no-install-recommends"]);
    run(install.args(packages))
        .map_err(|error| error.context(format!("cannot install packages; to do so manually: {manual}")))
}

fn apt(arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.arg("-y").args(arguments).env("DEBIAN_FRONTEND", "noninteractive").stdout(std::process::Stdio::null());
    command
}

/// Keeps packages from starting their services at installation, with a `policy-rc.d` that is removed on drop.
struct NoServices {
    made: bool,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";

impl NoServices {
    fn begin() -> Result<Self> {
        let made = !Path::new(POLICY).exists();
        if made {
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(POLICY)?;
            file.write_all(b"#!/bin/sh\nexit 101\n")?;
        }
        Ok(Self { made })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.made {
            // Best effort: it may already be gone.
            let _ = fs::remove_file(POLICY);
        }
    }
}
