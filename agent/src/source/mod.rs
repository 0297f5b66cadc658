//! Where objects come from. A source does the I/O and sends updates; what the objects mean is the core's.

pub mod file;
pub mod kubernetes;
mod status;

pub use status::{SourceReport, Sources, SourcesReport, Status, Trouble};
