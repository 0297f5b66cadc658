//! The agent: reads objects from files or API servers, drives the core, and writes to the data path.

pub mod admin;
pub mod cli;
pub mod controller;
pub mod doctor;
pub mod metrics;
pub mod opt_out;
pub mod probe;
pub mod source;
