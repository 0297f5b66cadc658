//! The data path of this node: programs, maps and hooks together.

use std::{fmt, os::fd::OwnedFd, path::PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{Ebpf, EbpfLoader};
use portolan_common::SCHEMA_VERSION;
use portolan_core::table::{PinnedState, Sizes};

use crate::{
    helper::Helper,
    hooks::Hooks,
    inspect,
    maps::{self, Maps},
    opt_out_map::OptOutMap,
    outcomes::{EventStream, Logs},
    pins::{self, Pins, Set},
    preflight::Environment,
    programs::object,
    rcu::{GracePeriods, barrier},
    terminator::Terminator,
};

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
    /// This program, to be started as the helper.
    pub program: PathBuf,
}

/// The kernel's part: maps to write, hooks to attach.
pub struct Datapath {
    /// The maps.
    pub maps: Maps,
    /// Outcomes of connections.
    pub events: EventStream,
    /// What the programs tell for debugging, if they were asked to.
    pub logs: Option<Logs>,
    /// When nobody reads any more what was in force a moment ago.
    pub grace: GracePeriods,
    /// The end of connections that shall not go on.
    pub closer: Terminator,
    /// Whom the programs leave alone; taken by who keeps it.
    pub opted_out: Option<OptOutMap>,
    /// What needs privileges that the agent gives up.
    pub helper: Helper,
    hooks: Hooks,
    bpf: Ebpf,
    pins: Pins,
    set: Set,
    /// The set that is in force until this one is.
    former: Option<Set>,
    // Held as long as the agent lives: no second one may write to the same maps, or serve the same cgroup.
    _locks: [OwnedFd; 2],
}

impl Datapath {
    /// Loads the programs over the maps of a former agent, or, where those are of another version or of other sizes, over new ones. Nothing is
    /// attached yet: where a former agent's programs are, they go on.
    ///
    /// # Errors
    /// [`Unsupported`] where the machine lacks something; otherwise what the kernel said.
    pub fn open(options: &Options) -> Result<(Self, PinnedState)> {
        let environment = Environment::check(options.cgroup.as_deref(), &options.bpffs)?;
        let pins = Pins::new(&options.bpffs);
        let locks = [pins.prepare()?, pins::own_cgroup(&environment.cgroup)?];
        if inspect::other_portolan(&environment.cgroup, &pins).context("cannot see who else serves the cgroup")? {
            bail!(
                "programs of another Portolan, pinned elsewhere than in {}, serve the cgroup {}; give that --bpffs, or run: portolan cleanup --bpffs FOLDER",
                options.bpffs.display(),
                environment.cgroup.display()
            );
        }
        let current = pins.current();
        let fitting = current.filter(|set| set.schema == SCHEMA_VERSION && maps::fits(&pins, *set, options.sizes));
        // What a start left that came to nothing.
        pins.remove_sets_but(current.as_slice())?;
        let set = fitting.map_or_else(|| pins.new_set(), Ok)?;

        let mut loader = EbpfLoader::new();
        let level = options.log.level();
        loader.override_global("SK_ERR_OFFSET", &environment.offsets.error, true);
        loader.override_global("SK_COOKIE_OFFSET", &environment.offsets.cookie, true);
        loader.override_global("TCP_WRITE_SEQ_OFFSET", &environment.offsets.written, true);
        loader.override_global("TICK_NS", &environment.tick_ns, true);
        loader.override_global("SET", &set.id, true);
        loader.override_global(aya_log::LEVEL, &level, true);
        for shape in maps::shapes(options.sizes) {
            loader.map_max_entries(shape.name, shape.entries);
            loader.map_pin_path(shape.name, pins.map(set, shape.name));
        }
        for name in maps::OF_FIXED_SIZE {
            loader.map_pin_path(name, pins.map(set, name));
        }
        for name in maps::OF_ALL_SETS {
            loader.map_pin_path(name, pins.socket_map(name));
        }
        let mut bpf = loader.load(object()?).context("the kernel does not take Portolan's maps")?;
        let mut hooks = Hooks::load(&mut bpf, environment.cgroup, pins.clone())?;
        let logs = match options.log {
            ProgramLog::Off => None,
            ProgramLog::Debug => Some(Logs::open(&mut bpf)?),
        };
        // A former agent may have freed something just before it ended.
        barrier();
        let (maps, held) = Maps::open(&mut bpf, options.sizes)?;
        let events = EventStream::open(&mut bpf)?;
        let opted_out = Some(OptOutMap::open(&mut bpf)?);
        let former = current.filter(|current| *current != set);
        let grace = GracePeriods::start()?;
        let (helper, orders) = hooks.start_helper(&mut bpf, &options.program, set)?;
        let closer = Terminator::start(&pins, set, orders)?;
        Ok((
            Self { maps, events, logs, grace, closer, opted_out, helper, hooks, bpf, pins, set, former, _locks: locks },
            held,
        ))
    }

    /// Attaches the programs, or puts them in the place of a former agent's, each in one step. Then what the former ones used goes.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn attach(&mut self) -> Result<()> {
        self.hooks.attach(&mut self.bpf)?;
        self.pins.make_current(self.set)?;
        self.former = None;
        self.pins.remove_sets_but(&[self.set])
    }

    /// Whether a former version's programs and maps are in force until these are attached.
    pub fn replaces_another(&self) -> bool {
        self.former.is_some()
    }

    /// Has the packets of responses looked at, or no longer; what was changed.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn watch_responses(&mut self, wanted: bool) -> Result<bool> {
        self.hooks.set_http_sniffing(&mut self.bpf, wanted)
    }

    /// Whether every hook is attached to the cgroup that it should be on; if not, which one is not, and why.
    ///
    /// # Errors
    /// The first hook that is not in place.
    pub fn check_hooks(&self) -> Result<()> {
        self.hooks.check()?;
        ensure!(
            self.pins.current() == Some(self.set),
            "the maps are not pinned any more, and the next agent will begin anew; start one soon"
        );
        Ok(())
    }

    /// Puts every hook back that is not in place; what was wrong with each.
    ///
    /// # Errors
    /// One cannot be put back.
    pub fn repair_hooks(&mut self) -> Result<Vec<String>> {
        self.hooks.repair(&mut self.bpf)
    }

    /// The cgroup that is served.
    pub fn cgroup(&self) -> &std::path::Path {
        self.hooks.cgroup()
    }
}
