//! What the benchmark and its client share.

pub mod task;
