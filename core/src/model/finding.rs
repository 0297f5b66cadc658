//! What is wrong with an object, or not honoured in it.

use std::fmt;

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

macro_rules! codes {
    ($($name:ident = $number:literal, $severity:ident, $title:literal;)*) => {
        /// What kind of finding it is. The numbers are stable: people filter and search by them. `docs/findings.md` explains each.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u16)]
        pub enum Code {
            $(#[doc = $title] $name = $number,)*
        }

        impl Code {
            /// All codes, in order.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// How bad it is, the same for all findings of the kind.
            pub const fn severity(self) -> Severity {
                match self {
                    $(Self::$name => Severity::$severity,)*
                }
            }

            /// What it is, in a few words.
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
    Unreadable = 1, Error, "A file or folder cannot be read";
    Syntax = 2, Error, "A document is no YAML";
    EmptyFile = 3, Warning, "A file is empty or being written";
    Emptied = 4, Error, "A file lost everything it held";
    NotAnObject = 5, Error, "A document is no Kubernetes object";
    UnusedKind = 6, Warning, "Portolan does not use this kind";
    Misplaced = 7, Error, "An object is where it has no effect";
    Repeated = 8, Warning, "An object is in one file twice";
    InSeveralFiles = 9, Error, "An object is in several files";
    TooLarge = 10, Error, "A file is too large, or nested too deeply";
    // Objects.
    InvalidObject = 20, Error, "An object cannot be used";
    InvalidPart = 21, Error, "A part of an object cannot be used";
    NotHonoured = 22, Warning, "A field has no effect";
    LeftOut = 23, Error, "An object asks for what a node cannot decide";
    ForbiddenAddress = 24, Error, "An address in a range that nothing may be sent to";
    UnknownAnnotation = 25, Error, "A portolan.io annotation that means nothing";
    // Places.
    UnknownNode = 30, Error, "The node of the clients is not known";
    NoRegion = 31, Warning, "A node has no region";
    EndpointWithoutPlace = 32, Warning, "An endpoint is on no known node";
    UnknownCluster = 33, Error, "The cluster of the clients is not known";
    SettingsUnknown = 34, Error, "The mesh's settings are not known";
    // Services.
    AddressTaken = 40, Error, "Two services have the same address";
    SliceWithoutService = 41, Warning, "Endpoints of a service that is not there";
    ProtocolNotHandled = 42, Warning, "A port of a protocol that is not handled";
    NoUsableEndpoint = 43, Warning, "Connections are refused: nobody can take them";
    NoAddress = 44, Warning, "A ServiceEntry that nobody can dial";
    ServiceWins = 45, Error, "A ServiceEntry claims what belongs to a Service";
    ExternalAddresses = 46, Warning, "External addresses of a Service are ignored";
    // Rules.
    UnknownHost = 60, Warning, "A rule is for a host that no service has";
    ForeignHost = 61, Error, "A rule is for a service of another namespace";
    SecondRule = 62, Warning, "Two rules are for the same host";
    UnknownDestination = 63, Error, "A route leads to a host that no service has";
    UnknownSubset = 64, Error, "A route leads to a subset that no rule defines";
    NeedsOutlierDetection = 65, Warning, "Failover without outlierDetection has no effect";
    EjectionLimitZero = 66, Warning, "The limit on ejections allows none";
    PortPolicyDrops = 68, Warning, "The settings of a port drop those of its host";
    NeedsHttp = 69, Warning, "A route looks into requests";
    NotTogether = 70, Warning, "Two settings exclude each other";
    // The agent.
    MapFull = 90, Error, "A map of the kernel is full";
    KernelWrite = 91, Error, "The kernel did not take a change";
    MapNearlyFull = 92, Warning, "A map of the kernel is nearly full";
    // Health.
    NotConfirmed = 100, Warning, "An endpoint is not ejected, for only one pod says that it fails";
    EjectionRefused = 101, Warning, "An endpoint fails, and the limit keeps it";
    NotHttp = 102, Warning, "A port that is HTTP carries something else";
    Overrides = 103, Warning, "Endpoints get no connections because somebody ordered it";
    KeptUnreadable = 104, Warning, "What a former agent has left cannot be read";
    ProbesBounded = 105, Warning, "More active probes are asked for than the agent makes";
    // API servers.
    SourceUnreachable = 110, Error, "An API server cannot be read";
    SourceForbidden = 111, Error, "An API server does not let something be read";
    RemoteCluster = 112, Error, "Another cluster cannot be followed as a Secret says";
    ApiServerHeld = 113, Warning, "The API server's own endpoints are kept";
    OptOutLabel = 114, Warning, "A label that is to opt out has no effect";
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
        known.ok_or_else(|| serde::de::Error::custom(format!("{text:?} is no code of this version")))
    }
}

/// One thing that a person should know about an object. Nothing is left out in silence.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What kind of finding it is.
    pub code: Code,
    /// `Kind namespace/name`, or the file where no object could be read.
    pub object: String,
    /// The field in the object, as `spec.host`; empty where it is about the whole.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub field: String,
    /// What is wrong, and the way out.
    pub message: String,
    /// The cluster that the object is in, where it is not the client's own.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cluster: String,
    /// The file (or other source) that the object came from; empty where it has none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// Where in the file the field is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<Position>,
}

/// A place in a file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position {
    /// Its line, from 1.
    pub line: usize,
    /// Its column, from 1, in characters.
    pub column: usize,
    /// The line itself.
    pub text: String,
}

impl Finding {
    /// A finding about an object.
    pub fn new(code: Code, object: impl ToString, message: impl Into<String>) -> Self {
        Self {
            severity: code.severity(),
            code,
            object: object.to_string(),
            field: String::new(),
            message: message.into(),
            cluster: String::new(),
            source: String::new(),
            position: None,
        }
    }

    /// The same finding, about a field of the object.
    #[must_use]
    pub fn at(mut self, field: impl Into<String>) -> Self {
        self.field = field.into();
        self
    }

    /// The same finding, about an object of this cluster.
    #[must_use]
    pub fn in_cluster(mut self, cluster: &str) -> Self {
        cluster.clone_into(&mut self.cluster);
        self
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
