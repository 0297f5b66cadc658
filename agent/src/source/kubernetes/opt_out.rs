//! Finds the pods of this node that opt out, by their own label or by that of their namespace.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

use portolan_core::model::{Code, Finding, ObjectRef};

use super::{list_watch::Sink, raw_object::Raw};
use crate::{
    opt_out::{AskedBy, ByUid, LABEL, OptOutRegistry, Pod},
    source::Sources,
};

/// The annotation that marks a mirror pod: the API object of a static pod, which the kubelet runs from a file.
const STATIC: &str = "kubernetes.io/config.mirror";

/// A pod or namespace that may have the opt-out label.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Labelled {
    namespace: String,
    name: String,
    uid: String,
    /// The value of the label, if present.
    says: Option<String>,
    /// Whether this is the mirror pod of a static pod.
    /// The kubelet names the cgroup of a static pod after an ID that the API reports but does not guarantee.
    is_static: bool,
}

impl Labelled {
    fn of(object: &Raw) -> Self {
        let (namespace, name) = object.parts();
        Self { namespace, name, uid: object.uid(), says: object.label(LABEL), is_static: object.has_annotation(STATIC) }
    }

    /// Returns the label's parsed value; `None` if the label is missing or invalid.
    fn asks(&self) -> Option<bool> {
        self.says.as_ref()?.parse().ok()
    }

    /// Returns the reason why the label has no effect, if it has none.
    fn trouble(&self) -> Option<String> {
        let says = self.says.as_ref()?;
        match self.asks() {
            None => Some(format!("has {says:?}, which is neither \"true\" nor \"false\"")),
            Some(true) if self.is_static => Some("is a static pod, which cannot opt out".to_owned()),
            Some(_) => None,
        }
    }
}

/// Labeled objects by `namespace/name`.
type All = BTreeMap<String, Labelled>;

/// The current lists; each is `None` until it has been read once.
#[derive(Debug, Default)]
struct Known {
    pods: Option<All>,
    namespaces: Option<All>,
}

impl Known {
    /// Returns the pods to exclude, and descriptions of labels that have no effect.
    ///
    /// Returns `None` until both lists are known, because a namespace's label applies to its pods.
    fn wanted(&self) -> Option<(ByUid, Vec<String>)> {
        let (pods, namespaces) = (self.pods.as_ref()?, self.namespaces.as_ref()?);
        let by_name: BTreeMap<&str, &Labelled> =
            namespaces.values().map(|namespace| (namespace.name.as_str(), namespace)).collect();
        let asked_by = |pod: &Labelled| {
            let namespace_asks = || by_name.get(pod.namespace.as_str()).and_then(|namespace| namespace.asks());
            match pod.asks() {
                Some(asks) => asks.then_some(AskedBy::Pod),
                None => namespace_asks().unwrap_or_default().then_some(AskedBy::Namespace),
            }
        };
        let wanted = pods.values().filter(|pod| !pod.is_static).filter_map(|pod| {
            let (namespace, name) = (pod.namespace.clone(), pod.name.clone());
            let asked_by = asked_by(pod)?;
            Some((pod.uid.clone(), Pod { namespace, name, asked_by, cgroups: Vec::new() }))
        });
        let invalid = namespaces
            .values()
            .map(|namespace| ("Namespace ", namespace))
            .chain(pods.values().map(|pod| ("Pod ", pod)));
        let invalid = invalid.filter_map(|(kind, it)| {
            let namespace = if it.namespace.is_empty() { String::new() } else { format!("{}/", it.namespace) };
            Some(format!("{kind}{namespace}{} {}", it.name, it.trouble()?))
        });
        Some((wanted.collect(), invalid.collect()))
    }
}

/// Combines the lists of pods and namespaces and publishes the resulting opt-outs.
#[derive(Clone)]
pub(super) struct Lists {
    known: Arc<Mutex<Known>>,
    registry: Arc<OptOutRegistry>,
    sources: Arc<Sources>,
}

impl Lists {
    pub(super) fn new(registry: Arc<OptOutRegistry>, sources: Arc<Sources>) -> Self {
        Self { known: Arc::default(), registry, sources }
    }

    /// Returns the sink for the pods of this node.
    pub(super) fn pods(&self) -> ListSink {
        self.sink(|known| &mut known.pods)
    }

    /// Returns the sink for the namespaces that have the label.
    pub(super) fn namespaces(&self) -> ListSink {
        self.sink(|known| &mut known.namespaces)
    }

    fn sink(&self, place: fn(&mut Known) -> &mut Option<All>) -> ListSink {
        ListSink { all: All::new(), listed: HashSet::new(), complete: false, place, to: self.clone() }
    }

    fn publish(&self, known: &Known) {
        let Some((wanted, invalid)) = known.wanted() else { return };
        self.registry.want(wanted);
        let finding = (!invalid.is_empty())
            .then(|| Finding::new(Code::OptOutLabel, ObjectRef::global("Label", LABEL), invalid.join("; ")));
        self.sources.note("opt-out/labels", finding);
    }
}

/// The sink for one of the two lists.
pub(super) struct ListSink {
    all: All,
    listed: HashSet<String>,
    /// Whether a complete list has been received.
    complete: bool,
    place: fn(&mut Known) -> &mut Option<All>,
    to: Lists,
}

impl Sink for ListSink {
    fn init(&mut self) {
        self.listed.clear();
    }

    fn init_apply(&mut self, object: Raw) {
        self.listed.insert(object.name());
        self.apply(object);
    }

    fn init_done(&mut self) {
        let listed = std::mem::take(&mut self.listed);
        self.all.retain(|name, _| listed.contains(name));
        self.complete = true;
    }

    fn apply(&mut self, object: Raw) {
        self.all.insert(object.name(), Labelled::of(&object));
    }

    fn delete(&mut self, object: &Raw) {
        self.all.remove(&object.name());
    }

    /// Does nothing: the opt-outs that the previous agent applied stay in effect.
    fn unavailable(&mut self) {}

    fn len(&self) -> usize {
        self.all.len()
    }

    async fn flush(&mut self) -> bool {
        if self.complete {
            let mut known = self.to.known.lock().unwrap_or_else(PoisonError::into_inner);
            let place = (self.place)(&mut known);
            if place.as_ref() != Some(&self.all) {
                *place = Some(self.all.clone());
                self.to.publish(&known);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labelled(namespace: &str, name: &str, says: Option<&str>) -> (String, Labelled) {
        let it = Labelled {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: format!("u-{name}"),
            says: says.map(str::to_owned),
            is_static: name == "static",
        };
        (format!("{namespace}/{name}"), it)
    }

    #[test]
    fn pod_label_overrides_namespace_label() {
        let mut known = Known {
            pods: Some(All::from([
                labelled("out", "by-namespace", None),
                labelled("out", "not", Some("false")),
                labelled("out", "strange", Some("yes")),
                labelled("in", "by-label", Some("true")),
                labelled("in", "plain", None),
                labelled("in", "static", Some("true")),
                labelled("out", "static", None),
            ])),
            namespaces: None,
        };
        assert_eq!(known.wanted(), None);
        known.namespaces = Some(All::from([labelled("", "out", Some("true")), labelled("", "in", Some(""))]));
        let (wanted, invalid) = known.wanted().unwrap();
        let wanted: Vec<_> = wanted.values().map(|pod| (pod.name.as_str(), pod.asked_by)).collect();
        assert_eq!(
            wanted,
            [("by-label", AskedBy::Pod), ("by-namespace", AskedBy::Namespace), ("strange", AskedBy::Namespace)]
        );
        assert_eq!(
            invalid,
            [
                "Namespace in has \"\", which is neither \"true\" nor \"false\"",
                "Pod in/static is a static pod, which cannot opt out",
                "Pod out/strange has \"yes\", which is neither \"true\" nor \"false\"",
            ]
        );
    }
}
