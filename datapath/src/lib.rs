//! The kernel side of the agent: loads and attaches the eBPF programs, writes their maps, and reads their events.
//!
//! This is the only crate that depends on aya.

mod btf;
pub mod capabilities;
mod datapath;
mod error;
#[cfg(feature = "floor")]
pub mod floor;
mod helper;
mod hooks;
mod inspect;
mod map_specs;
mod maps;
mod mmap_array;
mod netns;
mod opt_out_map;
mod outcomes;
mod pins;
mod preflight;
mod programs;
mod rcu;
mod sys;
mod terminator;
mod wire;

pub use self::{
    datapath::{Datapath, Options, ProgramLog},
    error::{Error, Result, Unsupported},
    helper::{Helper, HelperArgs, VERB as HELPER_VERB, serve as serve_helper},
    inspect::{Facts, MapFacts, ProgramFacts, inspect},
    maps::{Counters, Maps},
    opt_out_map::OptOutMap,
    outcomes::{EventStream, Logs, Outcome},
    pins::{Pins, cleanup, remove_locks},
    preflight::cgroup,
    rcu::{GracePeriods, MapBarrier, barrier},
    terminator::{
        ActiveEndpoints, Closed, IDLE, Lifetime, Reason, Reconciled, RemovedEndpointTcp, SweepReport, SweepRequest,
        Terminator,
    },
};
