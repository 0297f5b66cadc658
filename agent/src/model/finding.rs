//! What is wrong with an object, or not honoured in it.

use serde::{Deserialize, Serialize};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something does not work as its author meant it.
    Error,
    /// It works, but not everything that was written counts.
    Warning,
}

/// One thing that a person should know about an object. Nothing is left out in silence.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// `Kind namespace/name`, or the file where no object could be read.
    pub object: String,
    /// What is wrong, with the field, and the way out.
    pub message: String,
    /// The file (or other source) that the object came from; empty where it has none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
}

impl Finding {
    /// Something that does not work.
    pub fn error(object: impl ToString, message: impl Into<String>) -> Self {
        Self { severity: Severity::Error, object: object.to_string(), message: message.into(), source: String::new() }
    }

    /// Something that is not honoured.
    pub fn warning(object: impl ToString, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(object, message) }
    }

    /// The same finding, with the place that its object came from.
    #[must_use]
    pub fn from_source(mut self, source: &str) -> Self {
        if self.source.is_empty() {
            source.clone_into(&mut self.source);
        }
        self
    }
}
