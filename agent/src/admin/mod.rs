//! Endpoints of the running agent: the admin socket, and the read-only HTTP address for metrics and probes.
//!
//! The admin socket is for root only. It serves queries, event streams, and manual overrides.

mod client;
mod server;

pub use client::{Stream, get, post};
pub use server::{AdminState, bind_admin, serve_admin, serve_metrics};
