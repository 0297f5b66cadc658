//! `cargo xtask check`: the parts that need neither root nor the eBPF toolchain.

use std::{collections::BTreeSet, time::Instant};

use anyhow::{Result, ensure};

use crate::command::{cargo, cargo_target, output, run as run_command};

/// Packages whose tests run without root.
const PACKAGES: [&str; 6] =
    ["portolan-core", "portolan-common", "portolan-datapath", "portolan", "portolan-bench", "xtask"];

/// Crates that the pure core must not depend on, directly or through others: runtimes, I/O, the kernel.
const IMPURE: [&str; 9] = ["tokio", "aya", "kube", "hyper", "rustix", "nix", "mio", "socket2", "notify"];

/// Runs every part, and prints how long each took.
pub(crate) fn run() -> Result<()> {
    part("format", format)?;
    part("dependencies", pure_core)?;
    part("lint", lint)?;
    part("docs", docs)?;
    part("unit", unit)
}

/// Runs one part of a check, and prints how long it took.
pub(crate) fn part(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    println!("==> {name}");
    let began = Instant::now();
    work().map_err(|error| error.context(format!("{name} failed")))?;
    println!("==> {name}: passed in {:.0} s", began.elapsed().as_secs_f64());
    Ok(())
}

pub(crate) fn format() -> Result<()> {
    run_command(&mut cargo(&["fmt", "--all", "--check"]))
}

/// Lints all crates. The eBPF programs are compiled for this machine and not linked, so this needs no eBPF toolchain.
pub(crate) fn lint() -> Result<()> {
    run_command(&mut cargo(&["clippy", "--quiet", "--all-targets", "--", "--deny", "warnings"]))?;
    let mut programs = cargo(&["clippy", "--quiet", "--package", "portolan-ebpf", "--target-dir"]);
    programs.arg(cargo_target().join("ebpf-lint")).args(["--", "--deny", "warnings"]);
    // The programs need unstable features, which this enables on a stable compiler, and cannot unwind.
    run_command(programs.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", "-Cpanic=abort"))
}

/// Builds the documentation of every crate but the eBPF programs, with warnings as errors.
pub(crate) fn docs() -> Result<()> {
    let mut doc = cargo(&["doc", "--quiet", "--no-deps", "--workspace", "--exclude", "portolan-ebpf"]);
    run_command(doc.env("RUSTDOCFLAGS", "--deny warnings"))
}

/// Fails if the core depends on a crate that does I/O.
pub(crate) fn pure_core() -> Result<()> {
    let tree = output(&mut cargo(&[
        "tree",
        "--quiet",
        "--package",
        "portolan-core",
        "--edges",
        "normal,build",
        "--prefix",
        "none",
    ]))?;
    let crates: BTreeSet<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
    ensure!(crates.contains("serde"), "cargo tree lists no dependencies of portolan-core: {tree}");
    let impure: Vec<&str> = IMPURE.into_iter().filter(|name| crates.contains(name)).collect();
    ensure!(impure.is_empty(), "portolan-core depends on {}: it must stay free of I/O", impure.join(", "));
    println!("portolan-core has {} dependencies, none of {}", crates.len() - 1, IMPURE.join(", "));
    Ok(())
}

/// Runs unit tests, property tests, test vectors, and the tests of language and documents.
pub(crate) fn unit() -> Result<()> {
    let mut arguments = vec!["test", "--quiet"];
    for package in PACKAGES {
        arguments.extend(["--package", package]);
    }
    run_command(&mut cargo(&arguments))
}
