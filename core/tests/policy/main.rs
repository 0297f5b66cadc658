//! What objects mean, rule by rule: text in, shares and findings out.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(unreachable_pub, reason = "a test is a crate of its own")]

mod clusters;
#[path = "../common/mod.rs"]
mod common;
mod entries;
mod objects;
mod routes;
mod shares;
