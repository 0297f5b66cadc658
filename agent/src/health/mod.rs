//! Health from what really happens to connections.

mod outlier;

pub use outlier::{Detector, Ejection, Event, EventKind, Verdict};
