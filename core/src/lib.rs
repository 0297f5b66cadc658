//! Portolan's pure core: from Kubernetes and Istio objects to what the kernel is to hold.
//!
//! ```text
//! text ──decode──▶ store ──Snapshot──▶ policy(health) ──▶ table ──▶ writes to BPF maps
//!                                        ▲                            (portolan-datapath)
//!                                      health ◀── outcomes of connections
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`model`] | the objects as plain types, findings about them |
//! | [`decode`] | YAML and JSON into the model; what is invalid or ignored becomes a finding |
//! | [`store`] | remembers what the sources reported; a [`store::Snapshot`] is the input of the policy |
//! | [`policy`] | which endpoint gets which share of a client's connections, and in which order |
//! | [`health`] | outlier detection, warmup, overrides by an operator |
//! | [`table`] | what the maps hold, and the writes that lead from one table to the next |
//! | [`report`] | what `plan`, `get` and `explain` show |
//!
//! [`plan()`] is the whole path as one function.
//!
//! **Invariant:** no clock, no file, no network, no thread, no kernel. Times are arguments. The crate has no dependency on
//! tokio, aya or kube (`cargo xtask check` verifies it), and builds on stable Rust without the eBPF toolchain.
#![forbid(unsafe_code)]

pub mod decode;
pub mod health;
pub mod model;
mod plan;
pub mod policy;
pub mod report;
pub mod store;
pub mod table;

pub use plan::{Document, plan, plan_for_client};
