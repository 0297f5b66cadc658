//! Error types that callers match on.

/// The machine lacks something that Portolan requires.
///
/// The message says what is missing and how to provide it.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unsupported(pub String);
