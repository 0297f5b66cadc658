//! The hooks: attached as pinned links that outlive the agent, and updated in place when the next agent starts.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{Program, ProgramFd},
};

use portolan_core::table::Sizes;

use crate::{
    error::{Context as _, Result, bail, ensure},
    helper::Helper,
    pins::{Pins, Set},
    programs::{HTTP_INGRESS, PROGRAMS},
    sys,
};

pub(crate) struct Hooks {
    cgroup: PathBuf,
    cgroup_id: u64,
    pins: Pins,
    links: Vec<(&'static str, OwnedFd)>,
    /// The kernel's ids of the loaded programs, by name.
    programs: BTreeMap<&'static str, u32>,
    /// Attaches the packet program, which needs CAP_NET_ADMIN; `None` before [`Self::start_helper`].
    helper: Option<Helper>,
}

impl Hooks {
    /// Loads all programs into the kernel, which verifies them. Attaches nothing.
    pub(crate) fn load(bpf: &mut Ebpf, cgroup: PathBuf, pins: Pins) -> Result<Self> {
        let mut programs = BTreeMap::new();
        for name in PROGRAMS.iter().chain([&HTTP_INGRESS]).map(|program| program.name) {
            let loaded = match bpf.program_mut(name) {
                Some(Program::CgroupSkb(program)) => program.load(),
                Some(Program::CgroupSock(program)) => program.load(),
                Some(Program::CgroupSockAddr(program)) => program.load(),
                Some(Program::SockOps(program)) => program.load(),
                _ => bail!("BPF object is missing program {name}"),
            };
            loaded.with_context(|| format!("kernel rejected program {name}"))?;
            let program = bpf.program(name).context("BPF object does not contain this program")?;
            programs.insert(name, program.info()?.id());
        }
        let cgroup_id = fs::metadata(&cgroup).with_context(|| format!("cannot read {}", cgroup.display()))?.ino();
        Ok(Self { cgroup, cgroup_id, pins, links: Vec::new(), programs, helper: None })
    }

    /// Starts the helper from the executable `program`. Also returns the socket for its sweep requests.
    pub(crate) fn start_helper(
        &mut self,
        bpf: &mut Ebpf,
        program: &Path,
        set: (Set, &Sizes),
    ) -> Result<(Helper, std::os::unix::net::UnixStream)> {
        let packets = bpf.program_mut(HTTP_INGRESS.name).context("BPF object is missing program received")?;
        let started = Helper::start(program, &self.pins, set, &self.cgroup, fd(packets)?.as_fd())?;
        self.helper = Some(started.0.clone());
        Ok(started)
    }

    /// Attaches missing programs, then replaces the linked ones in reverse order.
    ///
    /// An agent killed midway leaves programs of two map sets.
    /// In this order, the new `connect*` may run with the old `sock_ops`: their connections are not counted.
    /// The opposite mix would never see connections close, so a pool at its limit would refuse connections forever.
    pub(crate) fn attach(&mut self, bpf: &mut Ebpf) -> Result<()> {
        let names = PROGRAMS.map(|program| program.name);
        let (there, missing): (Vec<_>, Vec<_>) = names.into_iter().partition(|name| self.pins.link(name).exists());
        for name in missing.into_iter().chain(there.into_iter().rev()) {
            let link = self
                .attach_one(bpf, name)
                .with_context(|| format!("cannot attach {name} to {}", self.cgroup.display()))?;
            self.links.push((name, link));
        }
        Ok(())
    }

    fn attach_one(&self, bpf: &mut Ebpf, name: &str) -> Result<OwnedFd> {
        let pin = self.pins.link(name);
        let program = bpf.program_mut(name).context("BPF object does not contain this program")?;
        if pin.exists() {
            let pinned = sys::open(&pin).with_context(|| format!("cannot open {}", pin.display()))?;
            match sys::cgroup_id(&pinned)? {
                id if id == self.cgroup_id => {
                    sys::update(&pinned, fd(program)?.as_fd()).context("kernel rejected the program update")?;
                    return Ok(pinned);
                }
                0 => tracing::warn!("{name} was detached from its cgroup; reattaching it"),
                id => tracing::warn!(
                    "{name} was attached to cgroup {id} instead of {}; reattaching it",
                    self.cgroup.display()
                ),
            }
            // Removing the pin destroys the link.
            fs::remove_file(&pin).with_context(|| format!("cannot remove {}", pin.display()))?;
        }
        match PROGRAMS.iter().find(|program| program.name == name) {
            Some(program_spec) => {
                let link = sys::attach(File::open(&self.cgroup)?, fd(program)?, program_spec.attach_type)?;
                sys::pin(&link, &pin).with_context(|| format!("cannot pin {}", pin.display()))?;
                Ok(link)
            }
            // This attach type requires CAP_NET_ADMIN, which only the helper keeps.
            None => {
                self.helper.as_ref().context("the helper is not running")?.attach_packets()?;
                sys::open(&pin).with_context(|| format!("cannot open {}", pin.display()))
            }
        }
    }

    /// Attaches or detaches the packet program. Returns whether that changed anything.
    pub(crate) fn set_http_sniffing(&mut self, bpf: &mut Ebpf, enabled: bool) -> Result<bool> {
        let name = HTTP_INGRESS.name;
        let attached = self.links.iter().position(|(own, _)| *own == name);
        let pin = self.pins.link(name);
        if enabled {
            if attached.is_some() {
                return Ok(false);
            }
            let link = self
                .attach_one(bpf, name)
                .with_context(|| format!("cannot attach {name} to {}", self.cgroup.display()))?;
            self.links.push((name, link));
            return Ok(true);
        }
        if let Some(index) = attached {
            self.links.remove(index);
        }
        match fs::remove_file(&pin) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(attached.is_some()),
            // Left by a previous agent that needed the program.
            Ok(()) => Ok(true),
            Err(error) => Err(error).with_context(|| format!("cannot remove {}", pin.display())),
        }
    }

    /// Returns an error for the first program that is not attached to the cgroup or not pinned.
    pub(crate) fn check(&self) -> Result<()> {
        if self.links.len() < PROGRAMS.len() {
            bail!("programs are not attached yet");
        }
        self.check_cgroup()?;
        self.links.iter().try_for_each(|(name, link)| self.check_one(name, link))
    }

    fn check_cgroup(&self) -> Result<()> {
        let now =
            fs::metadata(&self.cgroup).with_context(|| format!("cgroup {} was removed", self.cgroup.display()))?.ino();
        ensure!(now == self.cgroup_id, "cgroup {} was removed and recreated", self.cgroup.display());
        Ok(())
    }

    fn check_one(&self, name: &str, link: &OwnedFd) -> Result<()> {
        let info = sys::info(link)?;
        match info.cgroup {
            id if id == self.cgroup_id => {}
            0 => bail!("{name} is detached from {}", self.cgroup.display()),
            id => bail!("{name} is attached to cgroup {id} instead of {}", self.cgroup.display()),
        }
        if let Some(own) = self.programs.get(name) {
            ensure!(info.program == *own, "{name} was replaced by program {} in its link", info.program);
        }
        ensure!(self.pins.link(name).exists(), "{name} is no longer pinned and would be detached when the agent exits");
        Ok(())
    }

    /// Reattaches every program that [`Self::check`] would report. Returns one description per problem fixed.
    pub(crate) fn repair(&mut self, bpf: &mut Ebpf) -> Result<Vec<String>> {
        let mut repaired = Vec::new();
        if self.links.len() < PROGRAMS.len() {
            return Ok(repaired);
        }
        if let Err(error) = self.check_cgroup() {
            // The cgroup was recreated, and its pods are below the new one.
            let now = fs::metadata(&self.cgroup).with_context(|| format!("{error:#}"))?.ino();
            repaired.push(format!("{error:#}"));
            self.cgroup_id = now;
        }
        for i in 0..self.links.len() {
            let (name, link) = &self.links[i];
            let Err(error) = self.check_one(name, link) else { continue };
            let name = *name;
            self.pins.make_folders()?;
            // If only the pin is missing, pin the live link again, so that no connection bypasses Portolan.
            let pin = self.pins.link(name);
            let is_own = |info: sys::LinkInfo| {
                info.cgroup == self.cgroup_id && self.programs.get(name).is_none_or(|own| info.program == *own)
            };
            if !pin.exists() && sys::info(link).is_ok_and(is_own) {
                sys::pin(link, &pin)
                    .with_context(|| format!("{error:#}; cannot pin its link again at {}", pin.display()))?;
                repaired.push(format!("{error:#}"));
                continue;
            }
            let link = self
                .attach_one(bpf, name)
                .with_context(|| format!("{error:#}; cannot attach it to {}", self.cgroup.display()))?;
            repaired.push(format!("{error:#}"));
            self.links[i] = (name, link);
        }
        Ok(repaired)
    }

    pub(crate) fn cgroup(&self) -> &Path {
        &self.cgroup
    }
}

/// Returns the descriptor of a loaded program.
fn fd(program: &Program) -> Result<&ProgramFd> {
    Ok(match program {
        Program::CgroupSkb(program) => program.fd()?,
        Program::CgroupSock(program) => program.fd()?,
        Program::CgroupSockAddr(program) => program.fd()?,
        Program::SockOps(program) => program.fd()?,
        _ => bail!("unexpected program type"),
    })
}
