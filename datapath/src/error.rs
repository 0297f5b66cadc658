//! The errors of this crate.

/// The machine lacks something that Portolan needs.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unsupported(pub String);
