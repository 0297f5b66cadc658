//! The policy: derives each client's load balancing from the Istio and Kubernetes objects.

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
