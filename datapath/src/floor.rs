//! The least that a connect hook can do, for the benchmark; see `ebpf/src/bin/floor.rs`.

use std::{
    fs::File,
    net::SocketAddrV4,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap},
    programs::{CgroupSockAddr, Program},
};

use crate::{
    error::{Context as _, Result, bail},
    programs::AttachType,
    sys,
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/floor.bpf.o"));
const TCP: u64 = 6;

/// The program on a cgroup. It is detached when the value is dropped.
#[derive(Debug)]
pub struct Floor {
    bpf: Ebpf,
    _link: OwnedFd,
}

impl Floor {
    /// Attaches the program to a cgroup, with these TCP services and their endpoints.
    ///
    /// # Errors
    /// Returns an error if this crate was built without the eBPF toolchain, or if the kernel rejects the program or a map.
    pub fn attach(cgroup: &Path, services: &[(SocketAddrV4, SocketAddrV4)]) -> Result<Self> {
        if OBJECT.is_empty() {
            bail!("this binary was built without the eBPF programs");
        }
        let entries = u32::try_from(services.len().max(1)).unwrap_or(u32::MAX);
        let mut loader = EbpfLoader::new();
        loader.map_max_entries("FLOOR_SERVICES", entries).map_max_entries("FLOOR_ENDPOINTS", entries);
        let mut bpf = loader.load(OBJECT).context("kernel rejected the maps")?;
        let packed = |address: &SocketAddrV4| {
            u64::from(u32::from_ne_bytes(address.ip().octets())) | u64::from(address.port().to_be()) << 32
        };
        let mut keys = HashMap::<_, u64, u32>::try_from(bpf.map_mut("FLOOR_SERVICES").context("no map")?)?;
        for (index, (service, _)) in (0..).zip(services) {
            keys.insert(packed(service) | TCP << 48, index, 0)?;
        }
        let mut endpoints = Array::<_, u64>::try_from(bpf.map_mut("FLOOR_ENDPOINTS").context("no map")?)?;
        for (index, (_, endpoint)) in (0..).zip(services) {
            endpoints.set(index, packed(endpoint), 0)?;
        }
        let program = program(&mut bpf)?;
        program.load().context("kernel rejected the program")?;
        let link = sys::attach(File::open(cgroup)?, program.fd()?.as_fd(), AttachType::Inet4Connect)?;
        Ok(Self { bpf, _link: link })
    }

    /// Returns the total run time in nanoseconds and the number of runs, which the kernel counts only while its statistics
    /// are enabled.
    ///
    /// # Errors
    /// Returns an error if the kernel does not report them.
    pub fn counted(&mut self) -> Result<(u64, u64)> {
        let descriptor = program(&mut self.bpf)?.fd()?.as_fd().as_raw_fd();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}"))?;
        let field = |name: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
            line.trim().parse::<u64>().ok().with_context(|| format!("{name} is not a number"))
        };
        Ok((field("run_time_ns:")?, field("run_cnt:")?))
    }
}

fn program(bpf: &mut Ebpf) -> Result<&mut CgroupSockAddr> {
    match bpf.program_mut("floor4") {
        Some(Program::CgroupSockAddr(program)) => Ok(program),
        _ => bail!("the object has no program floor4"),
    }
}
