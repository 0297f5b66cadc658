//! The hooks: attached as pinned links, which outlive the agent, and exchanged in place at the next start.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::{
    Ebpf,
    programs::{Program, ProgramFd},
};

use crate::{
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
    /// Who attaches the program that sees packets.
    helper: Option<Helper>,
}

impl Hooks {
    /// Has the kernel check the programs.
    pub(crate) fn load(bpf: &mut Ebpf, cgroup: PathBuf, pins: Pins) -> Result<Self> {
        for name in PROGRAMS.iter().chain([&HTTP_INGRESS]).map(|program| program.name) {
            let loaded = match bpf.program_mut(name) {
                Some(Program::CgroupSkb(program)) => program.load(),
                Some(Program::CgroupSockAddr(program)) => program.load(),
                Some(Program::SockOps(program)) => program.load(),
                _ => bail!("BPF object is missing program {name}"),
            };
            loaded.with_context(|| format!("kernel rejected program {name}"))?;
        }
        let cgroup_id = fs::metadata(&cgroup).with_context(|| format!("cannot read {}", cgroup.display()))?.ino();
        Ok(Self { cgroup, cgroup_id, pins, links: Vec::new(), helper: None })
    }

    /// Starts the helper, from this program; and the way on which it takes orders to close.
    pub(crate) fn start_helper(
        &mut self,
        bpf: &mut Ebpf,
        program: &Path,
        set: Set,
    ) -> Result<(Helper, std::os::unix::net::UnixStream)> {
        let packets = bpf.program_mut(HTTP_INGRESS.name).context("BPF object is missing program received")?;
        let started = Helper::start(program, &self.pins, set, &self.cgroup, fd(packets)?.as_fd())?;
        self.helper = Some(started.0.clone());
        Ok(started)
    }

    /// Attaches the programs, or puts them in the place of those that are there. Whoever is ended on the way leaves programs of two sets of maps.
    /// Then it must be the later `connect` beside the earlier `sock_ops`: connections that nobody counts, in place of a limit that was
    /// reached and stays so for good.
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
        let program = bpf.program_mut(name).ok_or_else(|| anyhow!("no such program"))?;
        if pin.exists() {
            let pinned = sys::open(&pin).with_context(|| format!("cannot open {}", pin.display()))?;
            match sys::cgroup_id(&pinned)? {
                id if id == self.cgroup_id => {
                    sys::update(&pinned, fd(program)?.as_fd()).context("the link does not take the new program")?;
                    return Ok(pinned);
                }
                0 => tracing::warn!("{name} had been detached from its cgroup; it is attached anew"),
                id => tracing::warn!(
                    "{name} was attached to cgroup {id}, which is not {}; it is moved there",
                    self.cgroup.display()
                ),
            }
            // With its pin, the link goes.
            fs::remove_file(&pin).with_context(|| format!("cannot remove {}", pin.display()))?;
        }
        match PROGRAMS.iter().find(|program| program.name == name) {
            Some(program_spec) => {
                let link = sys::attach(File::open(&self.cgroup)?, fd(program)?, program_spec.attach_type)?;
                sys::pin(&link, &pin).with_context(|| format!("cannot pin {}", pin.display()))?;
                Ok(link)
            }
            // The kernel lets nobody else do it.
            None => {
                self.helper.as_ref().context("there is no helper")?.attach_packets()?;
                sys::open(&pin).with_context(|| format!("cannot open {}", pin.display()))
            }
        }
    }

    /// Attaches the program that sees packets, or takes it off; whether it was not so before.
    pub(crate) fn set_http_sniffing(&mut self, bpf: &mut Ebpf, wanted: bool) -> Result<bool> {
        let name = HTTP_INGRESS.name;
        let attached = self.links.iter().position(|(own, _)| *own == name);
        let pin = self.pins.link(name);
        if wanted {
            if attached.is_some() {
                return Ok(false);
            }
            let link = self
                .attach_one(bpf, name)
                .with_context(|| format!("cannot attach {name} to {}", self.cgroup.display()))?;
            self.links.push((name, link));
            return Ok(true);
        }
        if let Some(place) = attached {
            self.links.remove(place);
        }
        match fs::remove_file(&pin) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(attached.is_some()),
            // A former agent's, which wanted it.
            Ok(()) => Ok(true),
            Err(error) => Err(error).with_context(|| format!("cannot remove {}", pin.display())),
        }
    }

    /// Whether every program is where it should be; if not, which one is not, and why.
    pub(crate) fn check(&self) -> Result<()> {
        if self.links.len() < PROGRAMS.len() {
            bail!("the programs are not attached yet");
        }
        self.check_cgroup()?;
        self.links.iter().try_for_each(|(name, link)| self.check_one(name, link))
    }

    fn check_cgroup(&self) -> Result<()> {
        let now =
            fs::metadata(&self.cgroup).with_context(|| format!("the cgroup {} is gone", self.cgroup.display()))?.ino();
        ensure!(now == self.cgroup_id, "the cgroup {} is another one now", self.cgroup.display());
        Ok(())
    }

    fn check_one(&self, name: &str, link: &OwnedFd) -> Result<()> {
        match sys::cgroup_id(link)? {
            id if id == self.cgroup_id => {}
            0 => bail!("{name} has been detached from {}", self.cgroup.display()),
            id => bail!("{name} is attached to cgroup {id}, not to {}", self.cgroup.display()),
        }
        ensure!(self.pins.link(name).exists(), "{name} is not pinned any more, and would end with the agent");
        Ok(())
    }

    /// Puts every program back that is not where it should be, and tells what was wrong with it.
    pub(crate) fn repair(&mut self, bpf: &mut Ebpf) -> Result<Vec<String>> {
        let mut repaired = Vec::new();
        if self.links.len() < PROGRAMS.len() {
            return Ok(repaired);
        }
        if let Err(error) = self.check_cgroup() {
            // It was removed, and made anew: its pods are below the new one.
            let now = fs::metadata(&self.cgroup).with_context(|| format!("{error:#}"))?.ino();
            repaired.push(format!("{error:#}"));
            self.cgroup_id = now;
        }
        for i in 0..self.links.len() {
            let (name, link) = &self.links[i];
            let Err(error) = self.check_one(name, link) else { continue };
            let name = *name;
            self.pins.make_folders()?;
            // Where only the pin is gone, the link stays: no connection goes without it.
            let pin = self.pins.link(name);
            if sys::cgroup_id(link).is_ok_and(|id| id == self.cgroup_id) {
                sys::pin(link, &pin)
                    .with_context(|| format!("{error:#}, and cannot be pinned at {}", pin.display()))?;
                repaired.push(format!("{error:#}"));
                continue;
            }
            let link = self
                .attach_one(bpf, name)
                .with_context(|| format!("{error:#}, and cannot be attached to {}", self.cgroup.display()))?;
            repaired.push(format!("{error:#}"));
            self.links[i] = (name, link);
        }
        Ok(repaired)
    }

    pub(crate) fn cgroup(&self) -> &Path {
        &self.cgroup
    }
}

/// The descriptor of a program that was loaded.
fn fd(program: &Program) -> Result<&ProgramFd> {
    Ok(match program {
        Program::CgroupSkb(program) => program.fd()?,
        Program::CgroupSockAddr(program) => program.fd()?,
        Program::SockOps(program) => program.fd()?,
        _ => bail!("not a program of this kind"),
    })
}
