//! The errors of the agent, outside of its command line.

use std::{fmt, io, path::PathBuf};

/// Why a part of the agent failed.
///
/// `{}` prints the outermost context, `{:#}` the whole chain of causes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The data path failed.
    #[error(transparent)]
    Datapath(#[from] portolan_datapath::Error),
    /// A system call failed, or a file could not be used.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The state file could not be read.
    #[error(transparent)]
    StateFile(#[from] StateFileError),
    /// A client of an API server could not be built, or it refused a request.
    #[error(transparent)]
    Kubernetes(#[from] kube::Error),
    /// The configuration directory could not be watched.
    #[error(transparent)]
    Watch(#[from] notify::Error),
    /// A request over HTTP failed.
    #[error(transparent)]
    Http(#[from] hyper::Error),
    /// A request could not be built.
    #[error(transparent)]
    Request(#[from] http::Error),
    /// A response is not what this version expects.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// A task of the agent failed or was canceled.
    #[error(transparent)]
    Task(#[from] tokio::task::JoinError),
    /// Something took longer than it may.
    #[error(transparent)]
    Timeout(#[from] tokio::time::error::Elapsed),
    /// Something is not in the state that the operation needs; the message says what, and what to do.
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

/// Why a state file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum StateFileError {
    /// The file exists, but the system does not let it be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The file is damaged, or written by another version.
    #[error("persisted state unreadable, moved to {moved_to}: {reason}")]
    Invalid {
        /// Where its content was moved.
        moved_to: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl Error {
    /// Reports whether the machine lacks something that Portolan needs, at any depth of the chain.
    pub fn is_unsupported(&self) -> bool {
        match self {
            Self::Datapath(error) => error.is_unsupported(),
            Self::Context { source, .. } => source.is_unsupported(),
            _ => false,
        }
    }
}

fn fmt_context(context: &str, source: &Error, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    f.write_str(context)?;
    if f.alternate() { write!(f, ": {source:#}") } else { Ok(()) }
}

/// The result of the agent's operations.
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
