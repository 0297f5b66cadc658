//! The policy: what Istio's and Kubernetes' objects mean for a client in one place of the world.
//!
//! Pure: no I/O, no clock. The same snapshot, client and observations give the same verdict, whatever the order in
//! which things became known. One path leads through the files, in this order:
//!
//! | step | file |
//! |---|---|
//! | which services are concerned by a change | `compile` |
//! | which rules are for a host | `rules` |
//! | whether it is kept in its cluster | `cluster_local` |
//! | which endpoints there are | `endpoints` |
//! | their priority, or the weight of their locality | `locality` |
//! | the load of each priority | `load` |
//! | what new endpoints get | `warmup` |
//! | the share of each group of endpoints | `spread`, for one `pool` |
//! | the order of turns | `schedule`; where a client's hash decides, `maglev` |

pub mod client;
mod cluster_local;
mod compiler;
mod context;
mod diagnose;
mod endpoints;
mod levels;
mod load_split;
mod locality;
mod maglev;
mod pool;
mod priority_load;
mod rule_index;
mod schedule;
mod service_view;
mod share;
mod types;
mod warmup;

pub use self::{
    cluster_local::cluster_local,
    compiler::{Compiler, ServiceChange, assign, explain, service_named},
    load_split::effective_weights,
    locality::{Labelled, distribute_weights, effective_setting, failover_levels, label_levels, levels},
    priority_load::{Level, Loads, OVERPROVISIONING_FACTOR, loads},
    rule_index::RuleIndex,
    schedule::{Run, Schedule, ScheduleSlot, WeightedGroup, edf_order},
    share::{Group, Share},
    types::{
        Assignment, Client, Endpoint, EndpointHealth, Excluded, HealthView, LocalityMode, LocalityShare, PolicyOutput,
        Pool, PoolKey, Priority, Route, SettingSource,
    },
    warmup::warmup_factor,
};
