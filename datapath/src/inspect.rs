//! Collects facts about the machine for `portolan doctor` and for agent startup. Callers judge them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    mem::offset_of,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use aya::{
    maps::{MapData, MapInfo},
    programs::{ProgramInfo, loaded_programs},
};
use portolan_common::{Frontend, Frontend4, Frontend6};
use portolan_core::table::Sizes;
use serde::{Deserialize, Serialize};

use crate::{
    btf,
    error::{Context as _, Result, Unsupported},
    map_specs::{self, MapSpec, Scope},
    mmap_array::MmapArray,
    pins::{self, Pins},
    preflight,
    programs::{self, AttachType, HTTP_INGRESS, PROGRAMS, ProgramSpec},
    sys,
    terminator::{self, accounting::ConnectionUsage},
};

/// The kernel truncates map names to this length, in bytes.
const MAX_MAP_NAME_LEN: usize = 15;

/// The state of one of Portolan's programs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProgramFacts {
    /// Name of the program, e.g. `connect4`.
    pub name: String,
    /// Instructions that the verifier processed; `None` if the program is not linked or the kernel does not say.
    pub verified: Option<u32>,
    /// Size of the translated program, in bytes; `None` as for `verified`.
    pub bytes: Option<u32>,
    /// Id of the cgroup that its pinned link is attached to; 0 if it is detached, `None` if there is no link.
    pub cgroup: Option<u64>,
    /// Whether it uses maps of another set than the current one.
    /// That happens if an agent was killed while it replaced the programs.
    pub of_another_set: bool,
}

/// The usage of one map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MapFacts {
    /// Name of the map, in lower case.
    pub name: String,
    /// Entries in use.
    pub used: u64,
    /// Capacity, in entries.
    pub size: u64,
}

/// Everything that [`inspect`] found out about the machine.
#[derive(Debug)]
pub struct Facts {
    /// Kernel release, as in `uname -r`.
    pub kernel: String,
    /// Whether this process runs as root, which loading programs requires.
    pub is_root: bool,
    /// Whether this binary contains the eBPF programs.
    pub embedded: Result<(), Unsupported>,
    /// Whether the kernel's BTF has the fields that the programs read; if not, why.
    pub btf: Result<(), Unsupported>,
    /// Path and id of the cgroup to serve.
    pub cgroup: Result<(PathBuf, u64), Unsupported>,
    /// Whether the pin directory is on a bpffs.
    pub bpffs: bool,
    /// Whether a running agent holds the lock on the pins.
    pub agent: bool,
    /// Schema of the pinned maps, if there are any.
    pub schema: Option<u32>,
    /// Portolan's programs, linked or not.
    pub programs: Vec<ProgramFacts>,
    /// Names of foreign programs on the same hooks, on the cgroup or its ancestors.
    /// Keyed by the name of Portolan's program for the hook.
    pub others: BTreeMap<String, Vec<String>>,
    /// Programs of others on the sock_ops hook of cgroups below Portolan's: path, and the names of the programs.
    /// They may disable the callbacks of connections in these cgroups.
    pub sock_ops_below: Vec<(PathBuf, Vec<String>)>,
    /// Pods whose connections have found their share of `CONNECTIONS` used up: the path of their cgroup, and how many did.
    pub over_share: Vec<(PathBuf, u64)>,
    /// Whether `sock_diag` can list and close sockets; if not, why.
    pub sockets: Result<(), String>,
    /// Network file systems whose client is the kernel: type and mount point.
    pub network_mounts: Vec<(String, String)>,
    /// Whether a kube-proxy process is running.
    pub kube_proxy: bool,
    /// Usage of the maps whose entries can be counted; empty if no map set is pinned.
    pub maps: Vec<MapFacts>,
}

/// Inspects the machine. Best effort: what cannot be read is left out.
pub fn inspect(cgroup: Option<&Path>, bpffs: &Path) -> Facts {
    let pins = Pins::new(bpffs);
    let cgroup = preflight::cgroup(cgroup).map(|path| {
        let id = std::fs::metadata(&path).map_or(0, |metadata| metadata.ino());
        (path, id)
    });
    let all: BTreeMap<u32, ProgramInfo> = loaded_programs().flatten().map(|info| (info.id(), info)).collect();
    let mut own = Vec::new();
    let set = current_set_map_ids(&pins);
    // The packet program is attached only while a rule needs it.
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
            let names = ids.into_iter().filter(|id| !own.contains(id)).map(|id| program_name(id, &all));
            let names: Vec<String> = names.collect();
            if !names.is_empty() {
                others.insert(name.to_owned(), names);
            }
        }
    }
    let (mut sock_ops_below, mut over_share) = (Vec::new(), Vec::new());
    let usage = usage(&pins).ok();
    if let Ok((path, _)) = &cgroup {
        each_below(path, 1, &mut |cgroup, depth| {
            let ids = File::open(cgroup).and_then(|folder| sys::programs_of(&folder, AttachType::SockOps, false));
            let names: Vec<String> = ids.unwrap_or_default().into_iter().map(|id| program_name(id, &all)).collect();
            if !names.is_empty() {
                sock_ops_below.push((cgroup.to_owned(), names));
            }
            // What is deeper belongs to the client above it.
            let id = fs::metadata(cgroup).map_or(0, |metadata| metadata.ino());
            let over =
                usage.as_ref().filter(|_| depth <= preflight::CLIENT_DEPTH).map(|usage| usage.over_share(id as u32));
            over_share.extend(over.filter(|over| *over > 0).map(|over| (cgroup.to_owned(), over)));
        });
    }
    let mounts = procfs::process::Process::myself().and_then(|process| process.mountinfo());
    let is_kernel_client = |kind: &str| kind.starts_with("nfs") || matches!(kind, "cifs" | "smb3" | "ceph");
    let network_mounts = mounts.into_iter().flatten().filter(|mount| is_kernel_client(&mount.fs_type));
    Facts {
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        is_root: rustix::process::geteuid().is_root(),
        embedded: programs::object().map(drop),
        btf: btf::offsets(Path::new("/sys/kernel/btf/vmlinux")).map(drop),
        cgroup,
        bpffs: bpffs.ancestors().find(|path| path.exists()).is_some_and(preflight::is_bpffs),
        agent: bpffs.exists() && matches!(pins::lock(bpffs), Ok(None)),
        schema: pins.current().map(|set| set.schema),
        programs,
        others,
        sock_ops_below,
        over_share,
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

/// Visits all cgroups below this one, with their depth.
fn each_below(cgroup: &Path, depth: u32, visit: &mut impl FnMut(&Path, u32)) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            visit(&entry.path(), depth);
            each_below(&entry.path(), depth + 1, visit);
        }
    }
}

/// Returns the name of a program, or its id if it has none.
fn program_name(id: u32, programs: &BTreeMap<u32, ProgramInfo>) -> String {
    let name = programs.get(&id).and_then(ProgramInfo::name_as_str).unwrap_or_default();
    if name.is_empty() { format!("program {id}") } else { name.to_owned() }
}

/// Returns the ids, as the kernel numbers maps, of the set in use; empty if nothing is pinned.
fn current_set_map_ids(pins: &Pins) -> BTreeSet<u32> {
    let infos = map_specs::of_scope(Scope::Set).filter_map(|spec| MapInfo::from_pin(pins.current_map(spec.name)?).ok());
    infos.map(|info| info.id()).collect()
}

fn is_of_another_set(program: &ProgramInfo, current: &BTreeSet<u32>) -> bool {
    let ids = program.map_ids().ok().flatten().unwrap_or_default();
    ids.into_iter().filter(|id| !current.contains(id)).filter_map(|id| MapInfo::from_id(id).ok()).any(|map| {
        let name = map.name_as_str().unwrap_or_default().to_owned();
        map_specs::of_scope(Scope::Set).any(|own| own.name[..own.name.len().min(MAX_MAP_NAME_LEN)] == name)
    })
}

/// Returns the counts of the users of `CONNECTIONS`.
fn usage(pins: &Pins) -> Result<ConnectionUsage> {
    let set = pins.current().context("no map set is pinned")?;
    let sizes = pins.connections().context("no state of connections is pinned")?;
    ConnectionUsage::open(pins, set, &sizes)
}

fn connections(pins: &Pins) -> Result<MapFacts> {
    let (used, size, _) = usage(pins)?.read();
    Ok(MapFacts { name: map_specs::CONNECTIONS.name.to_lowercase(), used: used.into(), size: size.into() })
}

/// Returns the usage of the frontends of both families.
fn frontends(pins: &Pins) -> Result<MapFacts> {
    fn used<T: aya::Pod>(pins: &Pins, spec: &MapSpec, key: usize) -> Result<u64> {
        let pin = pins.current_map(spec.name).context("no map set is pinned")?;
        let lines = MmapArray::open::<T>(MapData::from_pin(&pin)?.fd(), MapInfo::from_pin(&pin)?.max_entries())?;
        let mut used = 0;
        for line in 0..lines.len() {
            let key = lines.word(line, key / 8)?.load(Ordering::SeqCst);
            used += u64::from(![Frontend::EMPTY, Frontend::REMOVED].contains(&key));
        }
        Ok(used)
    }
    let key = offset_of!(Frontend, key);
    let used = used::<Frontend4>(pins, &map_specs::FRONTENDS4, offset_of!(Frontend4, line) + key)?
        + used::<Frontend6>(pins, &map_specs::FRONTENDS6, offset_of!(Frontend6, line) + key)?;
    let overflow = pins.current_map(map_specs::FRONTEND_OVERFLOW.name).context("no map set is pinned")?;
    let size = Sizes::frontends_with_overflow(MapInfo::from_pin(overflow)?.max_entries() / 2);
    Ok(MapFacts { name: "frontends".to_owned(), used, size: size.into() })
}

/// Counts the entries of the maps that can be counted from user space.
fn counted(pins: &Pins) -> Result<Vec<MapFacts>> {
    let mut facts = vec![frontends(pins)?];
    for name in map_specs::MAPS.iter().filter(|spec| spec.countable).map(|spec| spec.name) {
        let pin = pins.current_map(name).context("no map set is pinned")?;
        let data = MapData::from_pin(&pin)?;
        let size = MapInfo::from_pin(&pin)?.max_entries().into();
        facts.push(MapFacts { name: name.to_lowercase(), used: sys::count_entries(data.fd(), size)?, size });
    }
    facts.extend(connections(pins).ok());
    Ok(facts)
}

/// Returns whether programs of another Portolan instance are attached to this cgroup.
/// Two instances would rewrite the same connections.
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
            let has = |map_name: &str| {
                maps.iter().filter_map(|id| MapInfo::from_id(*id).ok()).any(|map| map.name_as_str() == Some(map_name))
            };
            info.name_as_str() == Some(name) && has(map_specs::SOCKETS.name)
        };
        if loaded_programs().flatten().any(|info| others.contains(&info.id()) && is_ours(&info)) {
            return Ok(true);
        }
    }
    Ok(false)
}
