//! The hooks: attached as pinned links, which outlive the agent, and exchanged in place at the next start.

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    Ebpf,
    programs::{CgroupAttachMode, Program, links::FdLink},
};

use super::{Pins, link};

/// The programs, by the names of their functions. Where connections end is watched before any is sent anywhere.
const PROGRAMS: [&str; 5] = ["sock_ops", "getpeername4", "getpeername6", "connect4", "connect6"];

pub(super) struct Hooks {
    cgroup: PathBuf,
    cgroup_id: u64,
    pins: Pins,
    links: Vec<(&'static str, OwnedFd)>,
}

impl Hooks {
    /// Has the kernel check the programs.
    pub(super) fn load(bpf: &mut Ebpf, cgroup: PathBuf, pins: Pins) -> Result<Self> {
        for name in PROGRAMS {
            let loaded = match bpf.program_mut(name) {
                Some(Program::CgroupSockAddr(program)) => program.load(),
                Some(Program::SockOps(program)) => program.load(),
                _ => bail!("the embedded object has no program {name}"),
            };
            loaded.with_context(|| format!("the kernel does not take the program {name}"))?;
        }
        let cgroup_id = fs::metadata(&cgroup).with_context(|| format!("cannot read {}", cgroup.display()))?.ino();
        Ok(Self { cgroup, cgroup_id, pins, links: Vec::new() })
    }

    pub(super) fn attach(&mut self, bpf: &mut Ebpf) -> Result<()> {
        for name in PROGRAMS {
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
            let pinned = link::open(&pin).with_context(|| format!("cannot open {}", pin.display()))?;
            match link::cgroup_id(&pinned)? {
                id if id == self.cgroup_id => {
                    let fd = match program {
                        Program::CgroupSockAddr(program) => program.fd()?,
                        Program::SockOps(program) => program.fd()?,
                        _ => bail!("not a program of this kind"),
                    };
                    link::update(&pinned, fd.as_fd()).context("the link does not take the new program")?;
                    return Ok(pinned);
                }
                // Its cgroup is gone, or somebody has detached it: it does nothing any more.
                0 => fs::remove_file(&pin).with_context(|| format!("cannot remove {}", pin.display()))?,
                _ => bail!(
                    "{} belongs to another cgroup; give that one with --cgroup, or run: portolan cleanup",
                    pin.display()
                ),
            }
        }
        let cgroup = File::open(&self.cgroup)?;
        let link: FdLink = match program {
            // aya's "single" makes a link, beside which the kernel lets others attach.
            Program::CgroupSockAddr(program) => {
                let id = program.attach(cgroup, CgroupAttachMode::Single)?;
                program.take_link(id)?.try_into()?
            }
            Program::SockOps(program) => {
                let id = program.attach(cgroup, CgroupAttachMode::Single)?;
                program.take_link(id)?.try_into()?
            }
            _ => bail!("not a program of this kind"),
        };
        link.pin(&pin).with_context(|| format!("cannot pin {}", pin.display()))?;
        link::open(&pin).with_context(|| format!("cannot open {}", pin.display()))
    }

    pub(super) fn check(&self) -> Result<()> {
        if self.links.len() < PROGRAMS.len() {
            bail!("the programs are not attached yet");
        }
        let now =
            fs::metadata(&self.cgroup).with_context(|| format!("the cgroup {} is gone", self.cgroup.display()))?.ino();
        if now != self.cgroup_id {
            bail!("the cgroup {} is another one now; restart the agent", self.cgroup.display());
        }
        for (name, link) in &self.links {
            match link::cgroup_id(link)? {
                id if id == self.cgroup_id => {}
                0 => bail!("{name} has been detached from {}", self.cgroup.display()),
                id => bail!("{name} is attached to cgroup {id}, not to {}", self.cgroup.display()),
            }
        }
        Ok(())
    }

    pub(super) fn cgroup(&self) -> &Path {
        &self.cgroup
    }
}
