//! Error types that callers match on.

use std::{fmt, io};

/// The machine lacks something that Portolan needs, for instance root, cgroup v2 or BTF.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unsupported(pub String);

/// Why the data path failed.
///
/// `{}` prints the outermost context, `{:#}` the whole chain of causes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The machine lacks something; the agent ends with exit status 2.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// A system call failed, or a file could not be used.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The kernel refused an operation on a map, or a map is not of the expected type.
    #[error(transparent)]
    Map(#[from] aya::maps::MapError),
    /// The kernel refused a program.
    #[error(transparent)]
    Program(#[from] aya::programs::ProgramError),
    /// The kernel refused the object, or it could not be parsed.
    #[error(transparent)]
    Load(#[from] aya::EbpfError),
    /// A message between the agent and its helper could not be encoded or decoded.
    #[error(transparent)]
    Wire(#[from] postcard::Error),
    /// Something is not in the state that the operation needs.
    #[error("{0}")]
    State(String),
    /// What was being done when another error happened.
    #[error(fmt = fmt_context)]
    Context {
        /// The operation, and on what.
        context: String,
        /// Why it failed.
        #[source]
        source: Box<Error>,
    },
}

impl Error {
    /// Reports whether the machine lacks something that Portolan needs, at any depth of the chain.
    pub fn is_unsupported(&self) -> bool {
        match self {
            Self::Unsupported(_) => true,
            Self::Context { source, .. } => source.is_unsupported(),
            _ => false,
        }
    }
}

impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Io(errno.into())
    }
}

fn fmt_context(context: &str, source: &Error, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    f.write_str(context)?;
    if f.alternate() { write!(f, ": {source:#}") } else { Ok(()) }
}

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Says what was being done when an error happened.
pub(crate) trait Context<T> {
    /// Wraps an error in `context`; turns `None` into an error.
    fn context(self, context: impl Into<String>) -> Result<T>;

    /// Does the same as [`Self::context`], and formats only on failure.
    fn with_context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for Result<T, E> {
    fn context(self, context: impl Into<String>) -> Result<T> {
        self.with_context(|| context)
    }

    fn with_context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|error| Error::Context { context: context().into(), source: Box::new(error.into()) })
    }
}

impl<T> Context<T> for Option<T> {
    fn context(self, context: impl Into<String>) -> Result<T> {
        self.with_context(|| context)
    }

    fn with_context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.ok_or_else(|| Error::State(context().into()))
    }
}

/// Returns [`Error::State`] with a formatted message.
macro_rules! bail {
    ($($message:tt)*) => { return Err($crate::error::Error::State(format!($($message)*))) };
}

/// Returns [`Error::State`] with a formatted message unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($message:tt)*) => { if !$condition { $crate::error::bail!($($message)*) } };
}

pub(crate) use {bail, ensure};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alternate_format_prints_the_chain_of_causes() {
        let missing: Result<(), _> = Err(Unsupported("no BTF".to_owned()));
        let error = missing.context("cannot check the kernel").context("cannot start").unwrap_err();
        assert_eq!(error.to_string(), "cannot start");
        assert_eq!(format!("{error:#}"), "cannot start: cannot check the kernel: no BTF");
        assert!(error.is_unsupported());
    }
}
