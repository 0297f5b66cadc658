//! Findings: problems in an object, and fields that have no effect.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::object_ref::ObjectRef;

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something does not work as its author intended.
    Error,
    /// The object works, but part of it has no effect.
    Warning,
}

macro_rules! codes {
    ($($name:ident = $number:literal, $severity:ident, $title:literal;)*) => {
        /// The kind of a finding.
        /// The numbers are stable because scripts filter by them.
        /// [`Code::help`] and `docs/reference/findings.md` explain each code.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u16)]
        pub enum Code {
            $(#[doc = $title] $name = $number,)*
        }

        impl Code {
            /// All codes, in numeric order.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// Returns the severity, which is the same for all findings with this code.
            pub const fn severity(self) -> Severity {
                match self {
                    $(Self::$name => Severity::$severity,)*
                }
            }

            /// Returns a short title.
            pub const fn title(self) -> &'static str {
                match self {
                    $(Self::$name => $title,)*
                }
            }
        }
    };
}

codes! {
    // Files and documents.
    Unreadable = 1, Error, "File or directory cannot be read";
    Syntax = 2, Error, "Invalid YAML";
    EmptyFile = 3, Warning, "File is empty or being written";
    Emptied = 4, Error, "File became empty";
    NotAnObject = 5, Error, "Document is not a Kubernetes object";
    UnusedKind = 6, Warning, "Unsupported kind";
    Misplaced = 7, Error, "Misplaced object";
    Repeated = 8, Warning, "Duplicate object in one file";
    InSeveralFiles = 9, Error, "Same object in several files";
    TooLarge = 10, Error, "File too large, or directory nested too deeply";
    // Objects.
    InvalidObject = 20, Error, "Invalid object";
    InvalidPart = 21, Error, "Invalid part of an object";
    FieldIgnored = 22, Warning, "Field has no effect";
    ScopeNotEnforceable = 23, Error, "Scope not enforceable per node";
    ForbiddenAddress = 24, Error, "Forbidden address";
    UnknownAnnotation = 25, Error, "Unknown or invalid portolan.io annotation";
    // Topology.
    UnknownNode = 30, Error, "Client node unknown";
    NoRegion = 31, Warning, "Node without a region";
    EndpointWithoutPlace = 32, Warning, "Endpoint without a known node";
    UnknownCluster = 33, Error, "Client cluster unknown";
    SettingsUnknown = 34, Error, "Mesh settings unknown";
    // Services.
    AddressTaken = 40, Error, "Two services have the same address";
    SliceWithoutService = 41, Warning, "EndpointSlice without a Service";
    ProtocolNotHandled = 42, Warning, "Port with an unsupported protocol";
    NoUsableEndpoint = 43, Warning, "No usable endpoint, connections are refused";
    NoAddress = 44, Warning, "ServiceEntry without address";
    ServiceWins = 45, Error, "ServiceEntry conflicts with a Service";
    ExternalAddresses = 46, Warning, "External IPs of a Service are ignored";
    // Istio rules.
    UnknownHost = 60, Warning, "Rule for an unknown host";
    ForeignHost = 61, Error, "Rule for a service in another namespace";
    SecondRule = 62, Warning, "Several rules for the same host";
    UnknownDestination = 63, Error, "Route to an unknown destination";
    UnknownSubset = 64, Error, "Route to an undefined subset";
    NeedsOutlierDetection = 65, Warning, "Failover without outlierDetection has no effect";
    EjectionLimitZero = 66, Warning, "Ejection limit rounds down to zero";
    PortPolicyDrops = 68, Warning, "Port-level settings drop settings of the host";
    NeedsHttp = 69, Warning, "Route requires HTTP inspection";
    NotTogether = 70, Warning, "Conflicting settings";
    // The agent.
    MapFull = 90, Error, "BPF map full";
    KernelWrite = 91, Error, "Kernel update failed";
    MapNearlyFull = 92, Warning, "BPF map nearly full";
    // Health.
    EjectionUnconfirmed = 100, Warning, "Ejection not confirmed, failures seen from a single pod";
    EjectionRefused = 101, Warning, "Failing endpoint not ejected, limit reached";
    NotHttp = 102, Warning, "Non-HTTP/1 traffic on an HTTP port";
    Override = 103, Warning, "Operator override in effect";
    PersistedStateUnreadable = 104, Warning, "Persisted state unreadable";
    ProbesBounded = 105, Warning, "Active probes exceed the rate limit";
    // API servers.
    SourceUnreachable = 110, Error, "API server unreachable";
    SourceForbidden = 111, Error, "API server denies access to a resource";
    RemoteCluster = 112, Error, "Unusable remote cluster Secret";
    ApiServerHeld = 113, Warning, "Endpoints of the API server retained";
    OptOutLabel = 114, Warning, "Opt-out label has no effect";
}

/// Cause, effect and remedy of each code: a heading with the code, then a paragraph with one sentence per line.
const HELP: &str = include_str!("findings.md");

impl Code {
    /// Returns when the finding is reported, what stays in effect, and how to fix it: one sentence per line.
    pub fn help(self) -> &'static str {
        let heading = format!("## {self}\n");
        let section = HELP.split_once(&heading).map_or("", |(_, rest)| rest);
        section.split("\n## ").next().unwrap_or_default().trim()
    }
}

impl FromStr for Code {
    type Err = String;

    /// Parses `PTL0020`, also in lower case or without the prefix.
    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.trim_start_matches(['P', 'T', 'L', 'p', 't', 'l']);
        let number: u16 = digits.parse().map_err(|_| format!("{text:?} is not a finding code such as PTL0020"))?;
        let known = Self::ALL.iter().find(|code| **code as u16 == number).copied();
        known.ok_or_else(|| format!("{text} is not a finding code of this version"))
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PTL{:04}", *self as u16)
    }
}

impl Serialize for Code {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Code {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let known = Self::ALL.iter().find(|code| code.to_string() == text).copied();
        known.ok_or_else(|| serde::de::Error::custom(format!("{text:?} is not a finding code known to this version")))
    }
}

/// A problem in an object, or a part of it that has no effect.
/// Portolan reports everything that it ignores.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Finding {
    /// The severity, which follows from `code`.
    pub severity: Severity,
    /// The kind of finding, serialized as `PTLnnnn`.
    pub code: Code,
    /// `Kind namespace/name`, or the file if no object could be decoded.
    pub object: ObjectRef,
    /// The path of the field in the object, such as `spec.host`; empty if the finding is about the whole object.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub field: String,
    /// What is wrong, and how to fix it.
    pub message: String,
    /// The cluster of the object; empty for the client's own cluster.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cluster: String,
    /// The file or other source of the object; empty if unknown.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// The position of the field in the file; `None` if it is unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<Position>,
}

/// A position in a file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position {
    /// The line, from 1.
    pub line: usize,
    /// The column in characters, from 1.
    pub column: usize,
    /// The text of the line, cut off after 200 characters.
    pub text: String,
}

impl Finding {
    /// Creates a finding about a whole object, with the severity of the code.
    pub fn new(code: Code, object: impl Into<ObjectRef>, message: impl Into<String>) -> Self {
        Self {
            severity: code.severity(),
            code,
            object: object.into(),
            field: String::new(),
            message: message.into(),
            cluster: String::new(),
            source: String::new(),
            position: None,
        }
    }

    /// Sets the field that the finding is about.
    #[must_use]
    pub fn at(mut self, field: impl Into<String>) -> Self {
        self.field = field.into();
        self
    }

    /// Sets the cluster of the object.
    #[must_use]
    pub fn in_cluster(mut self, cluster: &str) -> Self {
        cluster.clone_into(&mut self.cluster);
        self
    }

    /// Sets the source of the object unless it is already known.
    #[must_use]
    pub fn from_source(mut self, source: &str) -> Self {
        if self.source.is_empty() {
            source.clone_into(&mut self.source);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_help_that_ends_with_a_remedy() {
        for code in Code::ALL {
            let last = code.help().lines().last().unwrap_or_default();
            assert!(last.starts_with("Fix: ") || last == "No action is needed.", "{code}: {last:?}");
            assert_eq!(code.to_string().parse(), Ok(*code));
        }
        assert_eq!(HELP.matches("## PTL").count(), Code::ALL.len(), "help for a code that does not exist");
        assert!("PTL9999".parse::<Code>().is_err() && "x".parse::<Code>().is_err());
    }
}
