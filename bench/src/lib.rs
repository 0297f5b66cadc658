//! Types that the benchmark and its load generator share.

pub mod task;
