//! What went wrong elsewhere, and does not here: a test for each lesson that is about the data path, named after its number.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod kernel;
mod sockets;
mod state;
mod world;
