//! Doors to the running agent: the admin socket (root only, for `get`, `events` and orders by hand) and the HTTP address for
//! metrics and probes, which only reads.

mod client;
mod server;

pub use client::{Stream, get, post};
pub use server::{AdminState, bind_admin, serve_admin, serve_metrics};
