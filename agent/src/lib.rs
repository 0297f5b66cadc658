//! The node agent.
//!
//! It reads objects from files or API servers, drives `portolan-core`, and writes the result to the BPF data path.

pub mod admin;
pub mod cli;
pub mod controller;
pub mod doctor;
pub mod error;
pub mod kernel;
pub mod metrics;
pub mod opt_out;
pub mod probe;
pub mod source;
