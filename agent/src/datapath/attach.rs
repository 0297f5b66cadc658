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

use super::{Pins, helper::Helper, pins::Set, raw};

/// The programs, by the names of their functions, with the kernel's numbers of their hooks (`enum bpf_attach_type`), in the order in which
/// they are attached: where connections end is watched before any is sent anywhere.
pub(super) const PROGRAMS: [(&str, u32); 9] = [
    ("sock_ops", 3),
    ("getpeername4", 29),
    ("getpeername6", 30),
    ("recvmsg4", 19),
    ("recvmsg6", 20),
    ("sendmsg4", 14),
    ("sendmsg6", 15),
    ("connect4", 10),
    ("connect6", 11),
];

/// The one program that sees packets, and its hook: attached only while somebody wants it.
pub(super) const PACKETS: (&str, u32) = ("received", 0);

pub(super) struct Hooks {
    cgroup: PathBuf,
    cgroup_id: u64,
    pins: Pins,
    links: Vec<(&'static str, OwnedFd)>,
    /// Who attaches the program that sees packets.
    helper: Option<Helper>,
}

impl Hooks {
    /// Has the kernel check the programs.
    pub(super) fn load(bpf: &mut Ebpf, cgroup: PathBuf, pins: Pins) -> Result<Self> {
        for (name, _) in PROGRAMS.into_iter().chain([PACKETS]) {
            let loaded = match bpf.program_mut(name) {
                Some(Program::CgroupSkb(program)) => program.load(),
                Some(Program::CgroupSockAddr(program)) => program.load(),
                Some(Program::SockOps(program)) => program.load(),
                _ => bail!("the embedded object has no program {name}"),
            };
            loaded.with_context(|| format!("the kernel does not take the program {name}"))?;
        }
        let cgroup_id = fs::metadata(&cgroup).with_context(|| format!("cannot read {}", cgroup.display()))?.ino();
        Ok(Self { cgroup, cgroup_id, pins, links: Vec::new(), helper: None })
    }

    /// Starts the helper, from this program; and the way on which it takes orders to close.
    pub(super) fn start_helper(
        &mut self,
        bpf: &mut Ebpf,
        program: &Path,
        set: Set,
    ) -> Result<(Helper, std::os::unix::net::UnixStream)> {
        let packets = bpf.program_mut(PACKETS.0).context("the embedded object has no such program")?;
        let started = Helper::start(program, &self.pins, set, &self.cgroup, fd(packets)?.as_fd())?;
        self.helper = Some(started.0.clone());
        Ok(started)
    }

    /// Attaches the programs, or puts them in the place of those that are there. Whoever is ended on the way leaves programs of two sets of maps.
    /// Then it must be the later `connect` beside the earlier `sock_ops`: connections that nobody counts, in place of a limit that was
    /// reached and stays so for good.
    pub(super) fn attach(&mut self, bpf: &mut Ebpf) -> Result<()> {
        let names = PROGRAMS.map(|(name, _)| name);
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
            let pinned = raw::open(&pin).with_context(|| format!("cannot open {}", pin.display()))?;
            match raw::cgroup_id(&pinned)? {
                id if id == self.cgroup_id => {
                    raw::update(&pinned, fd(program)?.as_fd()).context("the link does not take the new program")?;
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
        match PROGRAMS.iter().find(|(own, _)| *own == name) {
            Some((_, attach_type)) => {
                let link = raw::attach(File::open(&self.cgroup)?, fd(program)?, *attach_type)?;
                raw::pin(&link, &pin).with_context(|| format!("cannot pin {}", pin.display()))?;
                Ok(link)
            }
            // The kernel lets nobody else do it.
            None => {
                self.helper.as_ref().context("there is no helper")?.attach_packets()?;
                raw::open(&pin).with_context(|| format!("cannot open {}", pin.display()))
            }
        }
    }

    /// Attaches the program that sees packets, or takes it off; whether it was not so before.
    pub(super) fn set_packets(&mut self, bpf: &mut Ebpf, wanted: bool) -> Result<bool> {
        let name = PACKETS.0;
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
    pub(super) fn check(&self) -> Result<()> {
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
        match raw::cgroup_id(link)? {
            id if id == self.cgroup_id => {}
            0 => bail!("{name} has been detached from {}", self.cgroup.display()),
            id => bail!("{name} is attached to cgroup {id}, not to {}", self.cgroup.display()),
        }
        ensure!(self.pins.link(name).exists(), "{name} is not pinned any more, and would end with the agent");
        Ok(())
    }

    /// Puts every program back that is not where it should be, and tells what was wrong with it.
    pub(super) fn mend(&mut self, bpf: &mut Ebpf) -> Result<Vec<String>> {
        let mut mended = Vec::new();
        if self.links.len() < PROGRAMS.len() {
            return Ok(mended);
        }
        if let Err(error) = self.check_cgroup() {
            // It was removed, and made anew: its pods are below the new one.
            let now = fs::metadata(&self.cgroup).with_context(|| format!("{error:#}"))?.ino();
            mended.push(format!("{error:#}"));
            self.cgroup_id = now;
        }
        for i in 0..self.links.len() {
            let (name, link) = &self.links[i];
            let Err(error) = self.check_one(name, link) else { continue };
            let name = *name;
            self.pins.make_folders()?;
            // Where only the pin is gone, the link stays: no connection goes without it.
            let pin = self.pins.link(name);
            if raw::cgroup_id(link).is_ok_and(|id| id == self.cgroup_id) {
                raw::pin(link, &pin)
                    .with_context(|| format!("{error:#}, and cannot be pinned at {}", pin.display()))?;
                mended.push(format!("{error:#}"));
                continue;
            }
            let link = self
                .attach_one(bpf, name)
                .with_context(|| format!("{error:#}, and cannot be attached to {}", self.cgroup.display()))?;
            mended.push(format!("{error:#}"));
            self.links[i] = (name, link);
        }
        Ok(mended)
    }

    pub(super) fn cgroup(&self) -> &Path {
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
