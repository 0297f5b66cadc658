//! Sources of configuration objects: a directory of files, or Kubernetes API servers.
//!
//! A source performs the I/O and sends updates. The core crate decodes the objects and interprets them.

pub mod file;
pub mod kubernetes;
mod status;

pub use status::{SourceReport, Sources, SourcesReport, Status, Trouble};
