//! A description of the machine that the benchmark ran on.

use std::{fs, process::Command};

use serde::Serialize;

/// The machine's hardware, kernel and software versions.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) kernel: String,
    pub(crate) processor: String,
    pub(crate) processors: usize,
    pub(crate) memory_gib: f64,
    /// CPU vulnerabilities that affect the machine, with the state of their mitigations.
    pub(crate) mitigations: Vec<(String, String)>,
    /// Names and versions of the programs under test.
    pub(crate) versions: Vec<(String, String)>,
    /// One-minute load average before the first part.
    pub(crate) load: String,
}

impl Machine {
    pub(crate) fn look(envoy: Option<&std::path::Path>) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split(':').nth(1)).unwrap_or("unknown").trim().to_owned()
        };
        let kib = field(&read("/proc/meminfo"), "MemTotal");
        let kib: f64 = kib.split(' ').next().and_then(|kib| kib.parse().ok()).unwrap_or_default();
        let folder = "/sys/devices/system/cpu/vulnerabilities";
        let mut mitigations: Vec<(String, String)> = fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| {
                (
                    entry.file_name().to_string_lossy().into_owned(),
                    read(&entry.path().display().to_string()).trim().to_owned(),
                )
            })
            .filter(|(_, state)| state != "Not affected")
            .collect();
        mitigations.sort();
        let mut versions = vec![("portolan".to_owned(), env!("CARGO_PKG_VERSION").to_owned())];
        for (name, program, argument) in [
            ("nftables", "nft", "--version"),
            ("iptables", "iptables-legacy", "--version"),
            ("HAProxy", "haproxy", "-v"),
        ] {
            versions.extend(version(program, argument).map(|version| (name.to_owned(), version)));
        }
        let envoy_version = envoy.and_then(|program| version(&program.display().to_string(), "--version"));
        versions.extend(envoy_version.map(|version| ("Envoy".to_owned(), version)));
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            processor: field(&read("/proc/cpuinfo"), "model name"),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            memory_gib: kib / f64::from(1 << 20),
            mitigations,
            versions,
            load: read("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned(),
        }
    }
}

/// Returns the first word of a program's output that looks like a version.
fn version(program: &str, argument: &str) -> Option<String> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new("env").env("PATH", path).args([program, argument]).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = text.split(|c: char| c.is_whitespace() || c == '/').map(|word| word.trim_start_matches('v'));
    let is_version = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.');
    words.into_iter().find(is_version).map(str::to_owned)
}
