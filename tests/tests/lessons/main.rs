//! Regression tests for failures of comparable projects, one or more for each lesson about the data path.
//! The number in the name of a test is the number of its lesson.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod kernel;
mod sockets;
mod state;
mod world;
