//! The one place that knows aya and the kernel: loads the programs, writes the maps, reads what comes back.

mod attach;
mod btf;
mod environment;
mod events;
mod link;
mod maps;
mod pins;

use std::{fmt, path::PathBuf};

use anyhow::{Context as _, Result};
use aya::{Ebpf, EbpfLoader};

use self::{attach::Hooks, environment::Environment};
pub use self::{
    environment::Unsupported,
    events::{EventStream, Logs, Outcome},
    maps::{Counters, Maps},
    pins::{Pins, cleanup},
};
use crate::table::{Held, Sizes};

/// The programs, built by `build.rs`.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/portolan.bpf.o"));

/// How much the programs tell for debugging; each line costs time on the path of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ProgramLog {
    /// Nothing, at no cost.
    #[default]
    Off,
    /// Each connect and each outcome.
    Debug,
}

impl ProgramLog {
    /// aya's number for the level.
    fn level(self) -> u8 {
        match self {
            Self::Off => 0,
            Self::Debug => aya_log::Level::Debug as u8,
        }
    }
}

impl fmt::Display for ProgramLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Debug => "debug",
        })
    }
}

/// Where and how to load.
#[derive(Clone, Debug)]
pub struct Options {
    /// The cgroup whose processes are served; the cgroup v2 root where absent.
    pub cgroup: Option<PathBuf>,
    /// Folder of the pins, on a bpffs.
    pub bpffs: PathBuf,
    /// Sizes of the maps.
    pub sizes: Sizes,
    /// Debugging in the programs.
    pub log: ProgramLog,
}

/// The kernel's part: maps to write, hooks to attach.
pub struct Datapath {
    /// The maps.
    pub maps: Maps,
    /// Outcomes of connections.
    pub events: EventStream,
    /// What the programs tell for debugging, if they were asked to.
    pub logs: Option<Logs>,
    hooks: Hooks,
    bpf: Ebpf,
    // Held as long as the agent lives: no second one may write to the same maps.
    _lock: std::os::fd::OwnedFd,
}

impl Datapath {
    /// Loads the programs over the pinned maps, or over new ones. Nothing is attached yet: where a former agent's programs are, they
    /// go on.
    ///
    /// # Errors
    /// [`Unsupported`] where the machine lacks something; otherwise what the kernel said.
    pub fn open(options: &Options) -> Result<(Self, Held)> {
        let environment = Environment::check(options)?;
        let pins = Pins::new(&options.bpffs);
        let lock = pins.prepare()?;
        maps::check_pinned(&pins, options.sizes)?;

        let mut loader = EbpfLoader::new();
        let level = options.log.level();
        loader.override_global("SK_ERR_OFFSET", &environment.sk_err_offset, true);
        loader.override_global(aya_log::LEVEL, &level, true);
        for (name, entries) in maps::sizes(options.sizes) {
            loader.map_max_entries(name, entries);
        }
        for name in maps::PINNED {
            loader.map_pin_path(name, pins.map(name));
        }
        let mut bpf = loader.load(OBJECT).context("the kernel does not take Portolan's maps")?;
        let hooks = Hooks::load(&mut bpf, environment.cgroup, pins)?;
        let logs = match options.log {
            ProgramLog::Off => None,
            ProgramLog::Debug => Some(Logs::open(&mut bpf)?),
        };
        let (maps, held) = Maps::open(&mut bpf, options.sizes)?;
        let events = EventStream::open(&mut bpf)?;
        Ok((Self { maps, events, logs, hooks, bpf, _lock: lock }, held))
    }

    /// Attaches the programs, or puts them in the place of a former agent's, each in one step.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn attach(&mut self) -> Result<()> {
        self.hooks.attach(&mut self.bpf)
    }

    /// Whether every hook is attached to the cgroup that it should be on; if not, which one is not, and why.
    ///
    /// # Errors
    /// The first hook that is not in place.
    pub fn check_hooks(&self) -> Result<()> {
        self.hooks.check()
    }

    /// The cgroup that is served.
    pub fn cgroup(&self) -> &std::path::Path {
        self.hooks.cgroup()
    }
}
