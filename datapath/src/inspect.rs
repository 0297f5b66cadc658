//! What there is on this machine, for `portolan doctor` and for an agent that starts: facts, without verdicts.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::{
    maps::{MapData, MapInfo},
    programs::{ProgramInfo, loaded_programs},
};
use serde::{Deserialize, Serialize};

use crate::{
    btf,
    error::Unsupported,
    maps,
    pins::{self, Pins},
    preflight,
    programs::{HTTP_INGRESS, PROGRAMS, ProgramSpec},
    sys, terminator,
};

/// The kernel keeps so much of a map's name.
const LONGEST_NAME: usize = 15;

/// One of the programs that Portolan attaches.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProgramFacts {
    /// Its name.
    pub name: String,
    /// Instructions that the kernel's verifier went through.
    pub verified: Option<u32>,
    /// Bytes of it.
    pub bytes: Option<u32>,
    /// Id of the cgroup that its pinned link is attached to: 0 where it is detached, absent where there is no link.
    pub cgroup: Option<u64>,
    /// Whether it reads maps that are not of the current set: those of an agent that was ended while it exchanged the programs.
    pub of_another_set: bool,
}

/// How much of a map is in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MapFacts {
    /// Its name.
    pub name: String,
    /// Entries in use.
    pub used: u64,
    /// Entries that there are.
    pub size: u64,
}

/// All that is known of a machine.
#[derive(Debug)]
pub struct Facts {
    /// As `uname` says it.
    pub kernel: String,
    /// Whether this process may load programs.
    pub is_root: bool,
    /// Whether the kernel describes its types.
    pub btf: Result<(), Unsupported>,
    /// The cgroup to serve, and its id.
    pub cgroup: Result<(PathBuf, u64), Unsupported>,
    /// Whether the pins have a bpffs.
    pub bpffs: bool,
    /// Whether an agent is at work on the pins.
    pub agent: bool,
    /// Schema of the pinned maps, if there are any.
    pub schema: Option<u32>,
    /// Portolan's programs.
    pub programs: Vec<ProgramFacts>,
    /// Names of other programs for the same hooks, on the cgroup or above it, by hook.
    pub others: BTreeMap<String, Vec<String>>,
    /// Whether sockets can be listed and closed.
    pub sockets: Result<(), String>,
    /// Mounts whose client is the kernel itself: type and place.
    pub network_mounts: Vec<(String, String)>,
    /// Whether kube-proxy runs here.
    pub kube_proxy: bool,
    /// Maps whose use can be counted from outside.
    pub maps: Vec<MapFacts>,
}

/// Looks at the machine. What cannot be looked at is left out.
pub fn inspect(cgroup: Option<&Path>, bpffs: &Path) -> Facts {
    let pins = Pins::new(bpffs);
    let cgroup = preflight::cgroup(cgroup).map(|path| {
        let id = std::fs::metadata(&path).map_or(0, |metadata| metadata.ino());
        (path, id)
    });
    let all: BTreeMap<u32, ProgramInfo> = loaded_programs().flatten().map(|info| (info.id(), info)).collect();
    let mut own = Vec::new();
    let set = of_current_set(&pins);
    // The one that sees packets is there only while somebody wants it.
    let packets = pins.link(HTTP_INGRESS.name).exists().then_some(&HTTP_INGRESS);
    let programs = PROGRAMS
        .iter()
        .chain(packets)
        .map(|program_spec| {
            let name = program_spec.name;
            let link = sys::open(&pins.link(name)).and_then(sys::info).ok();
            let program = link.and_then(|link| all.get(&link.program));
            own.extend(link.map(|link| link.program));
            ProgramFacts {
                name: name.to_owned(),
                verified: program.and_then(ProgramInfo::verified_instruction_count),
                bytes: program.and_then(ProgramInfo::size_translated),
                cgroup: link.map(|link| link.cgroup),
                of_another_set: program.is_some_and(|program| is_of_another_set(program, &set)),
            }
        })
        .collect();
    let mut others = BTreeMap::new();
    if let Ok(folder) = cgroup.as_ref().map_err(|_| ()).and_then(|(path, _)| File::open(path).map_err(|_| ())) {
        for ProgramSpec { name, attach_type } in PROGRAMS {
            let ids = sys::programs_of(&folder, attach_type, true).unwrap_or_default();
            let names = ids.into_iter().filter(|id| !own.contains(id)).map(|id| {
                let name = all.get(&id).and_then(ProgramInfo::name_as_str).unwrap_or_default();
                if name.is_empty() { format!("program {id}") } else { name.to_owned() }
            });
            let names: Vec<String> = names.collect();
            if !names.is_empty() {
                others.insert(name.to_owned(), names);
            }
        }
    }
    let mounts = procfs::process::Process::myself().and_then(|process| process.mountinfo());
    let of_kernel = |kind: &str| kind.starts_with("nfs") || matches!(kind, "cifs" | "smb3" | "ceph");
    let network_mounts = mounts.into_iter().flatten().filter(|mount| of_kernel(&mount.fs_type));
    Facts {
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        is_root: rustix::process::geteuid().is_root(),
        btf: btf::offsets(Path::new("/sys/kernel/btf/vmlinux")).map(drop),
        cgroup,
        bpffs: bpffs.ancestors().find(|path| path.exists()).is_some_and(preflight::is_bpffs),
        agent: bpffs.exists() && matches!(pins::lock(bpffs), Ok(None)),
        schema: pins.current().map(|set| set.schema),
        programs,
        others,
        sockets: terminator::check(),
        network_mounts: network_mounts
            .map(|mount| (mount.fs_type.clone(), mount.mount_point.display().to_string()))
            .collect(),
        kube_proxy: procfs::process::all_processes()
            .into_iter()
            .flatten()
            .flatten()
            .any(|process| process.stat().is_ok_and(|stat| stat.comm == "kube-proxy")),
        maps: counted(&pins).unwrap_or_default(),
    }
}

/// Ids of the maps of the current set.
fn of_current_set(pins: &Pins) -> BTreeSet<u32> {
    let infos = maps::of_set().filter_map(|name| MapInfo::from_pin(pins.current_map(name)?).ok());
    infos.map(|info| info.id()).collect()
}

fn is_of_another_set(program: &ProgramInfo, current: &BTreeSet<u32>) -> bool {
    let ids = program.map_ids().ok().flatten().unwrap_or_default();
    ids.into_iter().filter(|id| !current.contains(id)).filter_map(|id| MapInfo::from_id(id).ok()).any(|map| {
        let name = map.name_as_str().unwrap_or_default().to_owned();
        maps::of_set().any(|own| own[..own.len().min(LONGEST_NAME)] == name)
    })
}

/// The maps whose entries can be counted from outside.
fn counted(pins: &Pins) -> Result<Vec<MapFacts>> {
    let mut facts = Vec::new();
    for name in maps::COUNTABLE {
        let pin = pins.current_map(name).context("nothing is pinned")?;
        let data = MapData::from_pin(&pin)?;
        let size = MapInfo::from_pin(&pin)?.max_entries().into();
        facts.push(MapFacts { name: name.to_lowercase(), used: sys::count_entries(data.fd(), size)?, size });
    }
    Ok(facts)
}

/// Whether programs of another Portolan serve this very cgroup: what both would do is not what either means.
pub(crate) fn other_portolan(cgroup: &Path, pins: &Pins) -> Result<bool> {
    let folder = File::open(cgroup).with_context(|| format!("cannot open {}", cgroup.display()))?;
    for ProgramSpec { name, attach_type } in PROGRAMS {
        let own = sys::open(&pins.link(name)).and_then(sys::info).map(|link| link.program).ok();
        let ids = sys::programs_of(&folder, attach_type, false)?;
        let others: Vec<u32> = ids.into_iter().filter(|id| Some(*id) != own).collect();
        if others.is_empty() {
            continue;
        }
        let is_ours = |info: &ProgramInfo| {
            let maps = info.map_ids().ok().flatten().unwrap_or_default();
            let has = |wanted: &str| {
                maps.iter().filter_map(|id| MapInfo::from_id(*id).ok()).any(|map| map.name_as_str() == Some(wanted))
            };
            info.name_as_str() == Some(name) && has(maps::SOCKETS)
        };
        if loaded_programs().flatten().any(|info| others.contains(&info.id()) && is_ours(&info)) {
            return Ok(true);
        }
    }
    Ok(false)
}
