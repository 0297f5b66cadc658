//! What is right and wrong with a machine, and what to do about it. Pure: facts in, verdicts out.

use portolan_datapath::{Facts, MapFacts, ProgramFacts};
use serde::{Deserialize, Serialize};

/// The oldest kernel that Portolan is tested on.
const OLDEST: (u32, u32) = (6, 1);
/// Before this one, the kernel wrote into the addresses of its own clients what a program put there.
const KERNEL_CLIENTS: (u32, u32) = (6, 6);
/// A map that is as full as this, in percent, should be larger.
const NEARLY_FULL: u64 = 90;

/// How it is with one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// Something to know; connections are served.
    Note,
    /// Something may go wrong.
    Warning,
    /// Portolan does not work so.
    Error,
}

/// The verdict on one thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// What was looked at.
    pub check: String,
    /// How it is.
    pub state: State,
    /// What was seen.
    pub says: String,
    /// What to do about it; empty where there is nothing to do.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

/// What a doctor says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Diagnosis {
    /// One verdict for each thing.
    pub checks: Vec<Check>,
    /// Portolan's programs in the kernel.
    pub programs: Vec<Program>,
    /// Use of the maps.
    pub maps: Vec<MapFacts>,
}

/// A program in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Program {
    /// Its name.
    pub name: String,
    /// Instructions that the verifier went through.
    pub verified_instructions: Option<u32>,
    /// Bytes of it.
    pub bytes: Option<u32>,
    /// Whether it is attached to the cgroup that is to be served.
    pub attached: bool,
}

impl Diagnosis {
    /// Whether something keeps Portolan from working.
    pub fn has_errors(&self) -> bool {
        self.checks.iter().any(|check| check.state == State::Error)
    }
}

/// Judges a machine. `agent` is what a running agent says of itself: what it is not ready for.
pub fn diagnose(facts: &Facts, agent: Option<Result<(), String>>) -> Diagnosis {
    let mut checks = Checks::default();
    kernel(&mut checks, facts);
    machine(&mut checks, facts);
    if !facts.is_root {
        // Nothing can be said of what cannot be seen.
        return Diagnosis { checks: checks.0, programs: Vec::new(), maps: Vec::new() };
    }
    sockets(&mut checks, facts);
    programs(&mut checks, facts);
    neighbours(&mut checks, facts);
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

/// The first two numbers of a kernel's version.
fn version(kernel: &str) -> Option<(u32, u32)> {
    let mut numbers = kernel.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn kernel(checks: &mut Checks, facts: &Facts) {
    let kernel = &facts.kernel;
    match version(kernel) {
        Some(version) if version >= OLDEST => checks.ok("kernel", kernel),
        _ => checks.add(
            "kernel",
            State::Error,
            format!("{kernel} is older than {}.{}, the oldest that Portolan is tested on", OLDEST.0, OLDEST.1),
            "boot a later kernel",
        ),
    }
    match &facts.btf {
        Ok(()) => checks.ok("BTF", "the kernel describes its types"),
        Err(error) => checks.add("BTF", State::Error, error.to_string(), "use a kernel with CONFIG_DEBUG_INFO_BTF"),
    }
    if facts.network_mounts.is_empty() && version(kernel).is_some_and(|version| version < KERNEL_CLIENTS) {
        checks.add(
            "kernel clients",
            State::Note,
            format!(
                "before {}.{} a mount of NFS, SMB or Ceph by a Service address keeps its endpoint for good",
                KERNEL_CLIENTS.0, KERNEL_CLIENTS.1
            ),
            "mount by the server's own address",
        );
    }
    for (kind, place) in &facts.network_mounts {
        if version(kernel).is_some_and(|version| version < KERNEL_CLIENTS) {
            checks.add(
                "kernel clients",
                State::Warning,
                format!("{place} is a mount of {kind}: before {}.{} the kernel keeps the endpoint in place of a Service address that it dials, for good", KERNEL_CLIENTS.0, KERNEL_CLIENTS.1),
                "mount by the server's own address, or boot a later kernel",
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
            "not root: programs cannot be loaded; those that are there, their maps and the agent were not looked at",
            "run as root",
        );
    }
    match &facts.cgroup {
        Ok((path, _)) => checks.ok("cgroup", path.display().to_string()),
        Err(error) => checks.add("cgroup", State::Error, error.to_string(), "give one with --cgroup"),
    }
    if !facts.is_root {
        // Nor can its folder be looked into.
    } else if facts.bpffs {
        checks.ok("bpffs", "mounted");
    } else {
        checks.add(
            "bpffs",
            State::Error,
            "the folder for the pins is on no bpffs",
            "mount -t bpf bpf /sys/fs/bpf (an agent does it by itself), or give a folder with --bpffs",
        );
    }
}

fn sockets(checks: &mut Checks, facts: &Facts) {
    match &facts.sockets {
        Ok(()) => checks.ok("sock_diag", "sockets can be listed and ended"),
        Err(error) => checks.add(
            "sock_diag",
            State::Warning,
            format!("{error}: connections to what is gone, idle or too old go on"),
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
        checks.add("programs", State::Note, "none is attached: connections are not served", "start an agent");
        return;
    }
    let remedy = "a running agent puts it back within seconds; otherwise start one";
    for (names, what) in [
        (missing, "not attached"),
        (detached, "detached"),
        (elsewhere, "attached to another cgroup, or to one that is gone"),
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
                "{}: of another set of maps than the current one; an agent was ended while it exchanged the programs. Connections are served; counts, limits and outcomes of new ones are not kept",
                mixed.join(", ")
            ),
            "start an agent",
        );
    }
    if checks.0.iter().all(|check| check.check != "programs") {
        checks.ok("programs", format!("all {} are attached", facts.programs.len()));
    }
}

fn neighbours(checks: &mut Checks, facts: &Facts) {
    let all = || facts.others.values().flatten();
    if all().any(|name| name.starts_with("cil_sock") || name.starts_with("cil_to")) {
        checks.add(
            "Cilium",
            State::Warning,
            "its socket load balancer handles the same connects; who comes first decides",
            "set socketLB.enabled=false, or bpf-lb-sock=false, in Cilium",
        );
    }
    for (hook, names) in &facts.others {
        let says = format!("{}, on the same hook", names.join(", "));
        checks.add(&format!("other programs: {hook}"), State::Note, says, "");
    }
    if facts.kube_proxy {
        let says = "kube-proxy runs here: it sees what Portolan leaves alone, and nothing else";
        checks.add("kube-proxy", State::Note, says, "");
    }
    if facts.others.is_empty() && !facts.kube_proxy {
        checks.ok("neighbours", "nobody else handles connects");
    }
}

fn running(checks: &mut Checks, facts: &Facts, agent: Option<Result<(), String>>) {
    match (agent, facts.agent) {
        (Some(Ok(())), _) => checks.ok("agent", "at work, and ready: it connects through its own programs"),
        (Some(Err(why)), _) => {
            checks.add(
                "agent",
                State::Error,
                format!("at work, and {}", why.trim()),
                "see its log, or: portolan get services",
            );
        }
        (None, true) => checks.add(
            "agent",
            State::Warning,
            "one is at work, and its admin socket does not answer",
            "give its socket with --admin",
        ),
        (None, false) => {
            let attached = facts.programs.iter().any(|program| program.cgroup.is_some_and(|cgroup| cgroup != 0));
            let what = if attached { "none is at work: what was published last is served" } else { "none is at work" };
            checks.add("agent", State::Note, what, "start one");
        }
    }
    match facts.schema {
        Some(schema) if schema == portolan_common::SCHEMA_VERSION => checks.ok("maps", format!("schema v{schema}")),
        Some(schema) => checks.add(
            "maps",
            State::Note,
            format!(
                "schema v{schema}, of another version of Portolan (this one has v{})",
                portolan_common::SCHEMA_VERSION
            ),
            "an agent of this version takes over in one step",
        ),
        None => {}
    }
}

fn sizes(checks: &mut Checks, facts: &Facts) {
    for MapFacts { name, used, size } in &facts.maps {
        let says = format!("{used} of {size} entries");
        // Affinities make room by themselves.
        if used * 100 >= size * NEARLY_FULL && name != "affinity" {
            checks.add(
                &format!("map {name}"),
                State::Warning,
                says,
                "start the agent with a larger size (portolan agent --help)",
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
            btf: Ok(()),
            cgroup: Ok((PathBuf::from("/sys/fs/cgroup"), 7)),
            bpffs: true,
            agent: true,
            schema: Some(portolan_common::SCHEMA_VERSION),
            programs: vec![program("connect4"), program("sock_ops")],
            others: BTreeMap::new(),
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
    fn a_healthy_machine_is_all_well() {
        assert_eq!(states(&facts()), []);
    }

    #[test]
    fn lesson_07_mounts_of_the_kernels_own_clients_are_a_warning_before_6_6() {
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
    fn what_is_not_in_its_place_is_an_error() {
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
        let mut mixed = facts();
        mixed.programs[1].of_another_set = true;
        assert_eq!(states(&mixed), [("programs".to_owned(), State::Warning)]);
        // Of what cannot be seen, nothing is said.
        assert_eq!(states(&Facts { is_root: false, bpffs: false, ..mixed }), [("rights".to_owned(), State::Error)]);
        let not_ready = diagnose(&facts(), Some(Err("not ready".to_owned())));
        assert!(not_ready.has_errors());
    }

    #[test]
    fn neighbours_and_full_maps_are_told() {
        let others = BTreeMap::from([("connect4".to_owned(), vec!["cil_sock4_connect".to_owned()])]);
        let maps = vec![MapFacts { name: "frontends".to_owned(), used: 90, size: 100 }];
        let seen = states(&Facts { others, maps, kube_proxy: true, ..facts() });
        let names: Vec<&str> = seen.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["Cilium", "other programs: connect4", "kube-proxy", "map frontends"]);
    }
}
