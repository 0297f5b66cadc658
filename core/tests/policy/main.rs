//! Semantics of the objects, rule by rule: YAML in, shares and findings out.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
#![allow(clippy::disallowed_methods, reason = "a test gets its times and files from somewhere")]
#![allow(unreachable_pub, reason = "an integration test is a separate crate")]

mod clusters;
#[path = "../common/mod.rs"]
mod common;
mod entries;
mod objects;
mod routes;
mod shares;
