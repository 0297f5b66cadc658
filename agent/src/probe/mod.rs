//! Connections that the agent makes itself: active health checks, confirmations before an ejection, and the self-probe.

mod check;
pub mod confirm;
mod prober;
pub mod self_probe;
pub mod self_probe_client;

pub use self::{
    check::{ProbeResult, check},
    prober::{Counts, ProbeReport, Prober},
};
