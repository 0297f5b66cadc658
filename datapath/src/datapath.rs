//! The node's data path: loads the programs, opens the maps, and owns the hooks.

use std::{fmt, os::fd::OwnedFd, path::PathBuf};

use aya::{Ebpf, EbpfLoader};
use portolan_common::{ClientUse, Connection, FrontendHash, SCHEMA_VERSION};
use portolan_core::table::{PinnedState, Sizes};

use crate::{
    error::{Context as _, Result, bail, ensure},
    helper::Helper,
    hooks::Hooks,
    inspect,
    map_specs::{self, Entries},
    maps::{self, Maps},
    opt_out_map::OptOutMap,
    outcomes::{EventStream, Logs},
    pins::{self, Pins, Set},
    preflight::Environment,
    programs::object,
    rcu::{self, GracePeriods, barrier},
    terminator::Terminator,
};

/// Debug logging by the BPF programs. Each line adds latency to connects, which are the hot path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ProgramLog {
    /// No logging, at no cost.
    #[default]
    Off,
    /// Logs each connect and each outcome.
    Debug,
}

impl ProgramLog {
    /// Returns the numeric log level of aya, where 0 is off.
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

/// Options of [`Datapath::open`].
#[derive(Clone, Debug)]
pub struct Options {
    /// The cgroup whose processes are served; `None` means the cgroup v2 root.
    pub cgroup: Option<PathBuf>,
    /// Directory for the pins, on a bpffs.
    pub bpffs: PathBuf,
    /// Map sizes. Pinned maps of other sizes are replaced by a new set.
    pub sizes: Sizes,
    /// Debug logging by the programs.
    pub log: ProgramLog,
    /// Path of this executable, which is started again as the helper.
    pub program: PathBuf,
}

/// The loaded data path: programs, maps, hooks, and the helper process.
pub struct Datapath {
    /// The maps that the agent reads and writes.
    pub maps: Maps,
    /// The stream of connection outcomes.
    pub events: EventStream,
    /// The debug log of the programs; `None` with [`ProgramLog::Off`].
    pub logs: Option<Logs>,
    /// Reports when no program can still read replaced map entries.
    pub grace: GracePeriods,
    /// Terminates connections to removed endpoints and connections that exceed the limits of their pool.
    pub terminator: Terminator,
    /// Cgroups that Portolan excludes; `None` once the opt-out enforcer has taken it.
    pub opted_out: Option<OptOutMap>,
    /// The helper process, which keeps the privileges that the agent drops.
    pub helper: Helper,
    hooks: Hooks,
    bpf: Ebpf,
    pins: Pins,
    set: Set,
    sizes: Sizes,
    /// The set that stays in effect until this one is attached; `None` once it is, or if the current set was reused.
    prior: Option<Set>,
    // Held for the lifetime of the agent, so that no second one writes to the same maps or serves the same cgroup.
    _locks: [OwnedFd; 2],
}

impl Datapath {
    /// Loads the programs and opens the maps, without attaching anything.
    ///
    /// Adopts the pinned maps of a previous agent, or creates a new set if their schema or sizes differ.
    /// The programs of the previous agent keep serving until [`Self::attach`].
    /// Also returns what the maps contain.
    ///
    /// # Errors
    /// Returns [`Unsupported`](crate::Unsupported) if the machine lacks a requirement.
    /// Otherwise returns an error if another agent is running or the kernel rejects a map or program.
    pub fn open(options: &Options) -> Result<(Self, PinnedState)> {
        // First, so that an agent without programs leaves nothing behind.
        let object = object()?;
        let environment = Environment::check(options.cgroup.as_deref(), &options.bpffs)?;
        let pins = Pins::new(&options.bpffs);
        let locks = [pins.prepare()?, pins::own_cgroup(&environment.cgroup)?];
        if inspect::other_portolan(&environment.cgroup, &pins).context("cannot list programs on the cgroup")? {
            bail!(
                "programs of another Portolan instance, not pinned in {}, serve the cgroup {}; set --bpffs to its directory, or run: portolan cleanup --bpffs DIRECTORY",
                options.bpffs.display(),
                environment.cgroup.display()
            );
        }
        let current = pins.current();
        let reusable = current.filter(|set| set.schema == SCHEMA_VERSION && maps::fits(&pins, *set, options.sizes));
        // Leftovers of starts that failed before they attached.
        pins.remove_sets_but(current.as_slice())?;
        let set = reusable.map_or_else(|| pins.new_set(), Ok)?;

        let mut loader = EbpfLoader::new();
        let level = options.log.level();
        loader.override_global("SK_ERR_OFFSET", &environment.offsets.error, true);
        let (shift, share) =
            (Connection::shift(options.sizes.connections), options.sizes.connections / ClientUse::SHARE);
        loader.override_global("CONNECTION_SHIFT", &shift, true);
        // Whoever chooses the addresses of Services does not know where they end up.
        let (hash, frontend_shift) = (FrontendHash::of_set(set.id), options.sizes.frontend_shift());
        loader.override_global("FRONTEND_SEED", &hash.seed, true);
        loader.override_global("FRONTEND_MULTIPLIERS", &hash.multipliers, true);
        loader.override_global("FRONTEND_SHIFT", &frontend_shift, true);
        loader.override_global("CONNECTION_SHARE", &share, true);
        loader.override_global("CLIENT_LEVEL", &environment.client_level, true);
        loader.override_global("TCP_WRITE_SEQ_OFFSET", &environment.offsets.written, true);
        loader.override_global("TICK_NS", &environment.tick_ns, true);
        loader.override_global("SET", &set.id, true);
        loader.override_global(aya_log::LEVEL, &level, true);
        for spec in &map_specs::MAPS {
            if let Entries::Setting(entries) = spec.entries {
                loader.map_max_entries(spec.name, entries(&options.sizes));
            }
            loader.map_pin_path(spec.name, pins.map_pin(set, spec, &options.sizes));
        }
        let mut bpf = loader.load(object).context("kernel rejected the BPF maps")?;
        let mut hooks = Hooks::load(&mut bpf, environment.cgroup, pins.clone())?;
        let logs = match options.log {
            ProgramLog::Off => None,
            ProgramLog::Debug => Some(Logs::open(&mut bpf)?),
        };
        rcu::prepare();
        // The previous agent may have freed entries just before it exited.
        barrier();
        let (maps, pinned) = Maps::open(&mut bpf, options.sizes, hash)?;
        let events = EventStream::open(&mut bpf)?;
        let opted_out = Some(OptOutMap::open(&mut bpf)?);
        let prior = current.filter(|current| *current != set);
        let grace = GracePeriods::start()?;
        let (helper, sweep_channel) = hooks.start_helper(&mut bpf, &options.program, (set, &options.sizes))?;
        let terminator = Terminator::start(&pins, set, &options.sizes, sweep_channel)?;
        Ok((
            Self {
                maps,
                events,
                logs,
                grace,
                terminator,
                opted_out,
                helper,
                hooks,
                bpf,
                pins,
                set,
                sizes: options.sizes,
                prior,
                _locks: locks,
            },
            pinned,
        ))
    }

    /// Attaches the programs, replacing those of a previous agent atomically one by one.
    /// Then makes this map set current and removes all others.
    ///
    /// # Errors
    /// Returns an error if the kernel rejects an attach or an update, or a pin cannot be changed.
    pub fn attach(&mut self) -> Result<()> {
        self.hooks.attach(&mut self.bpf)?;
        self.pins.make_current(self.set)?;
        self.prior = None;
        self.pins.remove_sets_but(&[self.set])?;
        self.pins.remove_unused_shared(self.set, &self.sizes)
    }

    /// Returns whether the programs of another map set keep serving until [`Self::attach`].
    pub fn replaces_another(&self) -> bool {
        self.prior.is_some()
    }

    /// Attaches or detaches the program that reads HTTP/1 response status from packets.
    /// Returns whether that changed anything.
    ///
    /// # Errors
    /// Returns an error if the program cannot be attached or its pin cannot be removed.
    pub fn watch_responses(&mut self, enabled: bool) -> Result<bool> {
        self.hooks.set_http_sniffing(&mut self.bpf, enabled)
    }

    /// Checks that every hook is attached to the served cgroup and pinned, and that the map set is current.
    ///
    /// # Errors
    /// Returns an error that describes the first problem found.
    pub fn check_hooks(&self) -> Result<()> {
        self.hooks.check()?;
        ensure!(
            self.pins.current() == Some(self.set),
            "the map set is no longer pinned, so the next agent cannot adopt it; restart the agent to create a new one"
        );
        Ok(())
    }

    /// Reattaches every hook that is not in place. Returns one description per problem fixed.
    ///
    /// # Errors
    /// Returns an error if a hook cannot be reattached or pinned.
    pub fn repair_hooks(&mut self) -> Result<Vec<String>> {
        self.hooks.repair(&mut self.bpf)
    }

    /// Returns the path of the served cgroup.
    pub fn cgroup(&self) -> &std::path::Path {
        self.hooks.cgroup()
    }
}
