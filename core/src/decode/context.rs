//! What every reader has at hand: the options, the object that is being read, and its findings.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::IpAddr,
    str::FromStr,
};

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::model::{Code, Finding, NamespacedName, Scope, Subnet};

/// How objects are read.
#[derive(Clone, Copy, Debug, Default)]
pub struct DecodeOptions {
    /// Accept endpoints and Service addresses in loopback and link-local ranges.
    pub allow_loopback: bool,
    /// Where the endpoints of a cluster may be; anywhere, for one that is not named.
    pub ranges: &'static [ClusterRanges],
}

/// The ranges of addresses that a cluster has for its endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterRanges {
    /// Its id.
    pub cluster: String,
    /// The ranges.
    pub ranges: Vec<Subnet>,
}

impl FromStr for ClusterRanges {
    type Err = String;

    /// `CLUSTER=CIDR[,CIDR…]`
    fn from_str(text: &str) -> Result<Self, String> {
        let (cluster, ranges) = text.split_once('=').ok_or("not CLUSTER=CIDR[,CIDR…]")?;
        let range = |text: &str| text.parse().map_err(|_| format!("{text:?} is no range of addresses"));
        let ranges = ranges.split(',').map(range).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { cluster: cluster.to_owned(), ranges })
    }
}

impl DecodeOptions {
    /// Whether an object of this scope may name an endpoint there.
    pub(super) fn is_in_range(self, scope: &Scope, address: IpAddr) -> bool {
        let of = |ranges: &&ClusterRanges| matches!(scope, Scope::Cluster(id) if *id == ranges.cluster);
        let mut own = self.ranges.iter().filter(of).peekable();
        own.peek().is_none() || own.any(|own| own.ranges.iter().any(|range| range.contains(address)))
    }
}

/// Tells texts apart.
pub fn fingerprint(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// Why an object cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Invalid {
    /// The field.
    pub(super) field: String,
    /// What is wrong with it.
    pub(super) message: String,
}

/// What the readers of the kinds have at hand.
pub(super) struct Context<'a> {
    pub(super) reader: DecodeOptions,
    pub(super) scope: &'a Scope,
    pub(super) name: NamespacedName,
    pub(super) object: String,
    pub(super) findings: &'a mut Vec<Finding>,
}

impl Context<'_> {
    /// Something that people should know of a field of the object.
    pub(super) fn finding(&mut self, code: Code, field: impl Into<String>, message: impl Into<String>) {
        self.findings.push(Finding::new(code, &self.object, message).at(field));
    }

    /// A part cannot be used; the rest is.
    pub(super) fn invalid_part(&mut self, broken: Invalid) {
        self.finding(Code::InvalidPart, broken.field, broken.message);
    }

    /// The switch that an annotation is, which is off where it is absent.
    pub(super) fn bool_annotation(&mut self, value: &Value, annotation: &str) -> bool {
        let field = format!("metadata.annotations[\"{annotation}\"]");
        let set = value.pointer("/metadata/annotations").and_then(|map| map.get(annotation));
        match set.map(|set| (set, set.as_str())) {
            None | Some((_, Some("false"))) => false,
            Some((_, Some("true"))) => true,
            Some((other, _)) => {
                let message = format!("{other} is neither \"true\" nor \"false\", in quotes: it stays off");
                self.finding(Code::UnknownAnnotation, field, message);
                false
            }
        }
    }

    /// Whether clients of all namespaces are meant. A node serves all of them alike, so an object for some of them only is left out.
    pub(super) fn exported_to_all(&mut self, export_to: &[String]) -> bool {
        let all = export_to.is_empty() || export_to.iter().any(|to| to == "*");
        if !all {
            let message = format!(
                "{export_to:?}: a node cannot tell clients of one namespace from those of another, so the object is left out; \
                 export it to \"*\""
            );
            self.finding(Code::LeftOut, "spec.exportTo", message);
        }
        all
    }

    /// Into a type, with the path of the field in the error.
    pub(super) fn typed<T: DeserializeOwned>(&self, at: &str, value: Value) -> Result<T, Invalid> {
        serde_path_to_error::deserialize(value).map_err(|error| {
            let path = error.path().to_string();
            invalid(join(at, &path), error.into_inner().to_string())
        })
    }

    /// Into a type that holds the honoured fields only: each other field becomes a finding, but for those
    /// that `silent` knows.
    pub(super) fn deserialize_reporting_ignored<T: DeserializeOwned>(
        &mut self,
        at: &str,
        value: Value,
        silent: impl Fn(&str) -> bool,
    ) -> Result<T, Invalid> {
        let mut ignored = Vec::new();
        let mut track = serde_path_to_error::Track::new();
        let tracked = serde_path_to_error::Deserializer::new(value, &mut track);
        let typed = serde_ignored::deserialize(tracked, |path| ignored.push(path.to_string().replace(".?", "")));
        let typed = typed.map_err(|error| invalid(join(at, &track.path().to_string()), error.to_string()))?;
        for path in ignored.iter().filter(|path| !silent(path)) {
            self.finding(Code::NotHonoured, join(at, path), "is not honoured");
        }
        Ok(typed)
    }
}

fn join(at: &str, path: &str) -> String {
    match (at, path) {
        (at, ".") => at.to_owned(),
        ("", path) => path.to_owned(),
        (at, path) => format!("{at}.{path}"),
    }
}

pub(super) fn invalid(field: impl Into<String>, message: impl Into<String>) -> Invalid {
    Invalid { field: field.into(), message: message.into() }
}
