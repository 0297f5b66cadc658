//! The state that all decoders share: the options, the identity of the object, and its findings.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::IpAddr,
    str::FromStr,
};

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::model::{Code, Finding, NamespacedName, ObjectRef, Scope, Subnet};

/// Options for decoding objects.
#[derive(Clone, Copy, Debug, Default)]
pub struct DecodeOptions {
    /// Accepts endpoints and Service addresses in loopback and link-local ranges.
    pub allow_loopback: bool,
    /// The allowed endpoint ranges by cluster. A cluster that is not listed may use any address.
    pub ranges: &'static [ClusterRanges],
}

/// The address ranges that the endpoints of a cluster may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterRanges {
    /// The ID of the cluster.
    pub cluster: String,
    /// The allowed CIDR ranges; at least one.
    pub ranges: Vec<Subnet>,
}

impl FromStr for ClusterRanges {
    type Err = String;

    /// Parses `CLUSTER=CIDR[,CIDR…]`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (cluster, ranges) = text.split_once('=').ok_or("not of the form CLUSTER=CIDR[,CIDR…]")?;
        let range = |text: &str| text.parse().map_err(|_| format!("{text:?} is not a CIDR range"));
        let ranges = ranges.split(',').map(range).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { cluster: cluster.to_owned(), ranges })
    }
}

impl DecodeOptions {
    /// Returns whether an object of this scope may contain an endpoint with this address.
    pub(super) fn is_in_range(self, scope: &Scope, address: IpAddr) -> bool {
        let of = |ranges: &&ClusterRanges| matches!(scope, Scope::Cluster(id) if *id == ranges.cluster);
        let mut own = self.ranges.iter().filter(of).peekable();
        own.peek().is_none() || own.any(|own| own.ranges.iter().any(|range| range.contains(address)))
    }
}

/// Returns a hash of the text, to detect changes.
pub fn fingerprint(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// The reason why an object or a part of it is invalid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Invalid {
    /// The path of the field.
    pub(super) field: String,
    /// What is wrong, and how to fix it.
    pub(super) message: String,
}

/// The state that all decoders share.
pub(super) struct Context<'a> {
    pub(super) reader: DecodeOptions,
    pub(super) scope: &'a Scope,
    pub(super) name: NamespacedName,
    pub(super) object: ObjectRef,
    pub(super) findings: &'a mut Vec<Finding>,
}

impl Context<'_> {
    /// Adds a finding about a field of the object.
    pub(super) fn finding(&mut self, code: Code, field: impl Into<String>, message: impl Into<String>) {
        self.findings.push(Finding::new(code, &self.object, message).at(field));
    }

    /// Reports that a part of the object is invalid and ignored.
    pub(super) fn invalid_part(&mut self, broken: Invalid) {
        self.finding(Code::InvalidPart, broken.field, broken.message);
    }

    /// Parses a boolean annotation. An absent or invalid one is false; an invalid one is also a finding.
    pub(super) fn bool_annotation(&mut self, value: &Value, annotation: &str) -> bool {
        let field = format!("metadata.annotations[\"{annotation}\"]");
        let set = value.pointer("/metadata/annotations").and_then(|map| map.get(annotation));
        match set.map(|set| (set, set.as_str())) {
            None | Some((_, Some("false"))) => false,
            Some((_, Some("true"))) => true,
            Some((other, _)) => {
                let message =
                    format!("{other} is not valid; use \"true\" or \"false\", in quotes. The annotation is ignored");
                self.finding(Code::UnknownAnnotation, field, message);
                false
            }
        }
    }

    /// Returns whether `exportTo` includes all namespaces.
    /// A node applies one policy to all of its pods, so an object with a narrower scope is ignored and reported.
    pub(super) fn exported_to_all(&mut self, export_to: &[String]) -> bool {
        let all = export_to.is_empty() || export_to.iter().any(|to| to == "*");
        if !all {
            let message = format!(
                "{export_to:?}: the policy of a node cannot depend on the namespace of the client, \
                 so the object is ignored; export it to \"*\""
            );
            self.finding(Code::ScopeNotEnforceable, "spec.exportTo", message);
        }
        all
    }

    /// Deserializes a value; an error contains the path of the field.
    pub(super) fn typed<T: DeserializeOwned>(&self, at: &str, value: Value) -> Result<T, Invalid> {
        serde_path_to_error::deserialize(value).map_err(|error| {
            let path = error.path().to_string();
            invalid(join(at, &path), error.into_inner().to_string())
        })
    }

    /// Deserializes a value into a type that has the supported fields only.
    /// Reports every other field as a finding unless `silent` returns true for its path.
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
            self.finding(Code::FieldIgnored, join(at, path), "is not supported and has no effect");
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
