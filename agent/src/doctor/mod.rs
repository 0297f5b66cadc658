//! Evaluates the facts about a machine for `portolan doctor`: checks, their results, and remedies. Pure: no I/O.

use portolan_core::table::Sizes;
use portolan_datapath::{Facts, MapFacts, ProgramFacts};
use serde::{Deserialize, Serialize};

/// Oldest kernel version that Portolan is tested on.
const MIN_KERNEL: (u32, u32) = (6, 1);
/// First kernel version that does not write the rewritten address back into the callers inside the kernel (NFS, SMB,
/// Ceph).
const KERNEL_CLIENTS: (u32, u32) = (6, 6);
/// Fill level of a map from which it is reported, in percent.
const NEARLY_FULL: u64 = 90;

/// Result of a check, by increasing severity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The check passed.
    Ok,
    /// Informational: not a problem in itself.
    Note,
    /// A feature is impaired, or a problem is likely.
    Warning,
    /// Portolan cannot work.
    Error,
}

/// One check and its result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// Name of the check, such as `kernel` or `map frontends`.
    pub check: String,
    /// Result of the check.
    pub state: State,
    /// Observation, for people.
    pub says: String,
    /// What to do about the result; empty if nothing needs to be done.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

/// Output of `portolan doctor`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Diagnosis {
    /// Checks, in the order in which they ran.
    pub checks: Vec<Check>,
    /// Portolan's eBPF programs; empty without root.
    pub programs: Vec<Program>,
    /// Fill levels of the pinned maps; empty without root.
    pub maps: Vec<MapFacts>,
}

/// One of Portolan's eBPF programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Program {
    /// Name of the program, such as `connect4`.
    pub name: String,
    /// Instructions that the verifier processed; `None` if the kernel does not report it.
    pub verified_instructions: Option<u32>,
    /// Size of the translated program in bytes; `None` if the kernel does not report it.
    pub bytes: Option<u32>,
    /// Whether the program is attached to the cgroup given by `--cgroup`.
    pub attached: bool,
}

impl Diagnosis {
    /// Returns whether a problem keeps Portolan from working.
    pub fn has_errors(&self) -> bool {
        self.checks.iter().any(|check| check.state == State::Error)
    }
}

/// Evaluates all checks. `agent` is the readiness of the running agent; `None` means that no agent responds.
pub fn diagnose(facts: &Facts, agent: Option<Result<(), String>>) -> Diagnosis {
    let mut checks = Checks::default();
    kernel(&mut checks, facts);
    machine(&mut checks, facts);
    if !facts.is_root {
        // Without root, pins, programs and maps cannot be inspected.
        return Diagnosis { checks: checks.0, programs: Vec::new(), maps: Vec::new() };
    }
    sockets(&mut checks, facts);
    programs(&mut checks, facts);
    other_programs(&mut checks, facts);
    running(&mut checks, facts, agent);
    sizes(&mut checks, facts);
    let cgroup = facts.cgroup.as_ref().map_or(0, |(_, id)| *id);
    let programs = facts.programs.iter().map(|program| Program {
        name: program.name.clone(),
        verified_instructions: program.verified,
        bytes: program.bytes,
        attached: program.cgroup.is_some_and(|own| own == cgroup && own != 0),
    });
    Diagnosis { checks: checks.0, programs: programs.collect(), maps: facts.maps.clone() }
}

#[derive(Default)]
struct Checks(Vec<Check>);

impl Checks {
    fn add(&mut self, check: &str, state: State, says: impl Into<String>, remedy: &str) {
        self.0.push(Check { check: check.to_owned(), state, says: says.into(), remedy: remedy.to_owned() });
    }

    fn ok(&mut self, check: &str, says: impl Into<String>) {
        self.add(check, State::Ok, says, "");
    }
}

/// Parses the first two numbers of a kernel release, such as `6.12.1-cloud`.
fn version(kernel: &str) -> Option<(u32, u32)> {
    let mut numbers = kernel.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn kernel(checks: &mut Checks, facts: &Facts) {
    let kernel = &facts.kernel;
    match version(kernel) {
        Some(version) if version >= MIN_KERNEL => checks.ok("kernel", kernel),
        _ => checks.add(
            "kernel",
            State::Error,
            format!("{kernel} is older than {}.{}, the oldest tested version", MIN_KERNEL.0, MIN_KERNEL.1),
            "boot a newer kernel",
        ),
    }
    if facts.embedded.is_err() {
        let remedy = "build it with the eBPF toolchain: cargo xtask toolchain, then cargo build";
        checks.add("binary", State::Error, "it was built without the eBPF programs, so its agent cannot start", remedy);
    }
    match &facts.btf {
        Ok(()) => checks.ok("BTF", "available"),
        Err(error) => checks.add("BTF", State::Error, error.to_string(), "use a kernel with CONFIG_DEBUG_INFO_BTF"),
    }
    if facts.network_mounts.is_empty() && version(kernel).is_some_and(|version| version < KERNEL_CLIENTS) {
        checks.add(
            "kernel clients",
            State::Note,
            format!(
                "before {}.{}, an NFS, SMB or Ceph mount by Service address stays bound to its first endpoint",
                KERNEL_CLIENTS.0, KERNEL_CLIENTS.1
            ),
            "mount by the address of the server itself",
        );
    }
    for (kind, place) in &facts.network_mounts {
        if version(kernel).is_some_and(|version| version < KERNEL_CLIENTS) {
            checks.add(
                "kernel clients",
                State::Warning,
                format!(
                    "{place} is a {kind} mount: before {}.{}, a mount by Service address stays bound to one endpoint",
                    KERNEL_CLIENTS.0, KERNEL_CLIENTS.1
                ),
                "mount by the address of the server itself, or boot a newer kernel",
            );
        }
    }
}

fn machine(checks: &mut Checks, facts: &Facts) {
    if facts.is_root {
        checks.ok("rights", "root");
    } else {
        checks.add(
            "rights",
            State::Error,
            "not root: cannot load programs; skipped the checks of pinned programs, maps and the agent",
            "run as root",
        );
    }
    match &facts.cgroup {
        Ok((path, _)) => checks.ok("cgroup", path.display().to_string()),
        Err(error) => checks.add("cgroup", State::Error, error.to_string(), "pass a cgroup with --cgroup"),
    }
    if !facts.is_root {
        // The directory cannot be inspected without root.
    } else if facts.bpffs {
        checks.ok("bpffs", "mounted");
    } else {
        checks.add(
            "bpffs",
            State::Error,
            "the pin directory is not on a bpffs",
            "run: mount -t bpf bpf /sys/fs/bpf (the agent does this itself), or pass a directory with --bpffs",
        );
    }
}

fn sockets(checks: &mut Checks, facts: &Facts) {
    match &facts.sockets {
        Ok(()) => checks.ok("sock_diag", "sockets can be listed and destroyed"),
        Err(error) => checks.add(
            "sock_diag",
            State::Warning,
            format!("{error}: connections to removed endpoints, and idle or expired connections, are not closed"),
            "load the modules tcp_diag and udp_diag, or use a kernel with CONFIG_INET_DIAG_DESTROY",
        ),
    }
}

fn programs(checks: &mut Checks, facts: &Facts) {
    let cgroup = facts.cgroup.as_ref().map_or(0, |(_, id)| *id);
    let is = |test: fn(&ProgramFacts, u64) -> bool| {
        let names = facts.programs.iter().filter(|program| test(program, cgroup)).map(|program| program.name.as_str());
        names.collect::<Vec<_>>()
    };
    let missing = is(|program, _| program.cgroup.is_none());
    let detached = is(|program, _| program.cgroup == Some(0));
    let elsewhere = is(|program, cgroup| program.cgroup.is_some_and(|own| own != 0 && own != cgroup));
    if missing.len() == facts.programs.len() {
        checks.add("programs", State::Note, "no program is attached: connections bypass Portolan", "start an agent");
        return;
    }
    let remedy = "a running agent reattaches it within seconds; otherwise start one";
    for (names, what) in [
        (missing, "not attached"),
        (detached, "detached"),
        (elsewhere, "attached to another cgroup, or to a deleted one"),
    ] {
        if !names.is_empty() {
            checks.add("programs", State::Error, format!("{}: {what}", names.join(", ")), remedy);
        }
    }
    let mixed = is(|program, _| program.of_another_set);
    if !mixed.is_empty() {
        checks.add(
            "programs",
            State::Warning,
            format!(
                "{}: not using the current map set, because an agent was killed while replacing the programs; \
                 connections are handled, but counters, limits and outcomes of new ones are lost",
                mixed.join(", ")
            ),
            "start an agent",
        );
    }
    if checks.0.iter().all(|check| check.check != "programs") {
        checks.ok("programs", format!("all {} programs are attached", facts.programs.len()));
    }
}

fn other_programs(checks: &mut Checks, facts: &Facts) {
    let all = || facts.others.values().flatten();
    if all().any(|name| name.starts_with("cil_sock") || name.starts_with("cil_to")) {
        checks.add(
            "Cilium",
            State::Warning,
            "its socket load balancer handles the same connect() calls; the program that runs first wins",
            "set socketLB.enabled=false, or bpf-lb-sock=false, in Cilium",
        );
    }
    for (hook, names) in &facts.others {
        let says = format!("{}, attached to the same hook", names.join(", "));
        checks.add(&format!("other programs: {hook}"), State::Note, says, "");
    }
    for (cgroup, names) in &facts.sock_ops_below {
        let says = format!("{}, attached to the sock_ops hook of {}", names.join(", "), cgroup.display());
        let effect = "if it calls bpf_sock_ops_cb_flags_set, it must keep the flags that are set: otherwise failures and bytes of the connections in this cgroup are not seen";
        checks.add("other programs: sock_ops", State::Note, says, effect);
    }
    for (cgroup, connections) in &facts.over_share {
        let says = format!(
            "{connections} connections of {} found its share of the slots for connections used up, and took about a microsecond longer",
            cgroup.display()
        );
        let remedy =
            "if this pod is meant to have so many connections, start the agent with a larger --max-connections";
        checks.add("connections", State::Note, says, remedy);
    }
    if facts.kube_proxy {
        let says = "kube-proxy is running: it handles only the connections that bypass Portolan";
        checks.add("kube-proxy", State::Note, says, "");
    }
    if facts.others.is_empty() && !facts.kube_proxy {
        checks.ok("other programs", "no other program handles connect()");
    }
}

fn running(checks: &mut Checks, facts: &Facts, agent: Option<Result<(), String>>) {
    match (agent, facts.agent) {
        (Some(Ok(())), _) => checks.ok("agent", "running and ready: its self-probe connects through its own programs"),
        (Some(Err(why)), _) => {
            checks.add(
                "agent",
                State::Error,
                format!("running, but {}", why.trim()),
                "see its log, or: portolan get services",
            );
        }
        (None, true) => checks.add(
            "agent",
            State::Warning,
            "an agent is running, but its admin socket does not respond",
            "pass its socket with --admin",
        ),
        (None, false) => {
            let attached = facts.programs.iter().any(|program| program.cgroup.is_some_and(|cgroup| cgroup != 0));
            let what = if attached {
                "no agent is running: the last published state is in use"
            } else {
                "no agent is running"
            };
            checks.add("agent", State::Note, what, "start an agent");
        }
    }
    match facts.schema {
        Some(schema) if schema == portolan_common::SCHEMA_VERSION => checks.ok("maps", format!("schema v{schema}")),
        Some(schema) => checks.add(
            "maps",
            State::Note,
            format!(
                "schema v{schema}, from another version of Portolan (this version uses v{})",
                portolan_common::SCHEMA_VERSION
            ),
            "an agent of this version replaces them in one step",
        ),
        None => {}
    }
}

fn sizes(checks: &mut Checks, facts: &Facts) {
    for MapFacts { name, used, size } in &facts.maps {
        let says = format!("{used} of {size} entries");
        // This map is an LRU: it evicts entries itself.
        if used * 100 >= size * NEARLY_FULL && name != "affinity" {
            checks.add(
                &format!("map {name}"),
                State::Warning,
                says,
                &format!("start the agent with a larger {}", Sizes::option(name)),
            );
        } else {
            checks.ok(&format!("map {name}"), says);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, path::PathBuf};

    use super::*;
    use portolan_datapath::Unsupported;

    fn facts() -> Facts {
        let program = |name: &str| ProgramFacts {
            name: name.to_owned(),
            verified: Some(100),
            bytes: Some(800),
            cgroup: Some(7),
            of_another_set: false,
        };
        Facts {
            kernel: "6.12.1-cloud".to_owned(),
            is_root: true,
            embedded: Ok(()),
            btf: Ok(()),
            cgroup: Ok((PathBuf::from("/sys/fs/cgroup"), 7)),
            bpffs: true,
            agent: true,
            schema: Some(portolan_common::SCHEMA_VERSION),
            programs: vec![program("connect4"), program("sock_ops")],
            others: BTreeMap::new(),
            sock_ops_below: Vec::new(),
            over_share: Vec::new(),
            sockets: Ok(()),
            network_mounts: Vec::new(),
            kube_proxy: false,
            maps: vec![MapFacts { name: "frontends".to_owned(), used: 10, size: 100 }],
        }
    }

    fn states(facts: &Facts) -> Vec<(String, State)> {
        let checks = diagnose(facts, Some(Ok(()))).checks.into_iter();
        checks.filter(|check| check.state != State::Ok).map(|check| (check.check, check.state)).collect()
    }

    #[test]
    fn healthy_machine_passes_all_checks() {
        assert_eq!(states(&facts()), []);
    }

    #[test]
    fn lesson_07_kernel_client_mounts_are_a_warning_before_6_6() {
        let mounts = vec![("nfs4".to_owned(), "/data".to_owned())];
        let of = |kernel: &str| {
            let facts = Facts { kernel: kernel.to_owned(), network_mounts: mounts.clone(), ..facts() };
            states(&facts).into_iter().map(|(check, _)| check).collect::<Vec<_>>()
        };
        assert_eq!(of("6.1.0-50-amd64"), ["kernel clients"]);
        assert_eq!(of("6.5.13"), ["kernel clients"]);
        assert_eq!(of("6.6.0"), [""; 0]);
        assert_eq!(of("5.15.0"), ["kernel", "kernel clients"]);
        assert_eq!(of("nonsense"), ["kernel"]);
    }

    #[test]
    fn misplaced_programs_and_missing_features_are_reported() {
        let with = |cgroup| {
            let mut facts = facts();
            facts.programs[0].cgroup = cgroup;
            states(&facts)
        };
        for cgroup in [None, Some(0), Some(8)] {
            assert_eq!(with(cgroup), [("programs".to_owned(), State::Error)], "{cgroup:?}");
        }
        let unsupported = || Unsupported("no".to_owned());
        let broken = Facts { btf: Err(unsupported()), cgroup: Err(unsupported()), bpffs: false, ..facts() };
        assert_eq!(states(&broken).iter().filter(|(_, state)| *state == State::Error).count(), 4);
        let without_programs = Facts { embedded: Err(unsupported()), ..facts() };
        assert_eq!(states(&without_programs), [("binary".to_owned(), State::Error)]);
        let mut mixed = facts();
        mixed.programs[1].of_another_set = true;
        assert_eq!(states(&mixed), [("programs".to_owned(), State::Warning)]);
        // Without root, what cannot be inspected is not reported.
        assert_eq!(states(&Facts { is_root: false, bpffs: false, ..mixed }), [("rights".to_owned(), State::Error)]);
        let not_ready = diagnose(&facts(), Some(Err("not ready".to_owned())));
        assert!(not_ready.has_errors());
    }

    #[test]
    fn foreign_programs_and_full_maps_are_reported() {
        let others = BTreeMap::from([("connect4".to_owned(), vec!["cil_sock4_connect".to_owned()])]);
        let maps = vec![MapFacts { name: "frontends".to_owned(), used: 90, size: 100 }];
        let seen = states(&Facts { others, maps, kube_proxy: true, ..facts() });
        let names: Vec<&str> = seen.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["Cilium", "other programs: connect4", "kube-proxy", "map frontends"]);
    }
}
