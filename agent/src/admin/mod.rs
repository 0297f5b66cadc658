//! Doors to the running agent: the admin socket (root only, for `get` and `events`) and the HTTP address for metrics and probes.
//! Both only read.

mod client;
mod server;

pub use client::{Stream, get};
pub use server::{bind_admin, serve_admin, serve_metrics};
