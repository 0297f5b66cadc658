//! What is read of an API server: these resources, with these verbs, and nothing else. `deploy/` grants exactly this.

use kube::{
    Api, Client,
    core::{ApiResource, GroupVersionKind},
};
use portolan_core::{decode::MESH_NAMESPACE, model::Kind};

use super::raw_object::Raw;

/// A kind of objects.
#[derive(Debug)]
pub(super) struct Resource {
    /// What they become; `None`: no objects of Portolan's.
    pub(super) kind: Option<Kind>,
    group: &'static str,
    /// Versions of the API, the one that is tried first first. What is read is the same in all of them.
    pub(super) versions: &'static [&'static str],
    pub(super) plural: &'static str,
    /// Only in this namespace.
    namespace: Option<&'static str>,
    /// Only those.
    pub(super) fields: Option<&'static str>,
    /// What it is read for, where something else is read of the same resource.
    purpose: Option<&'static str>,
    /// Whether labels and names are enough.
    pub(super) metadata_only: bool,
    /// Whether it is read of other clusters too: those add endpoints to services that are here, and decide nothing.
    pub(super) of_all: bool,
}

const fn core(kind: Kind, plural: &'static str) -> Resource {
    Resource {
        kind: Some(kind),
        group: "",
        versions: &["v1"],
        plural,
        namespace: None,
        fields: None,
        purpose: None,
        metadata_only: false,
        of_all: true,
    }
}

const fn istio(kind: Kind, plural: &'static str) -> Resource {
    let versions = &["v1", "v1beta1", "v1alpha3"];
    Resource { group: "networking.istio.io", versions, of_all: false, ..core(kind, plural) }
}

/// Everything but pods.
pub(super) static RESOURCES: [Resource; 9] = [
    core(Kind::Service, "services"),
    Resource { group: "discovery.k8s.io", ..core(Kind::EndpointSlice, "endpointslices") },
    Resource { metadata_only: true, ..core(Kind::Node, "nodes") },
    // Of namespaces, only the label of Istio's own says something: the network of the cluster.
    Resource { metadata_only: true, fields: Some("metadata.name=istio-system"), ..core(Kind::Namespace, "namespaces") },
    Resource {
        namespace: Some(MESH_NAMESPACE),
        fields: Some("metadata.name=istio"),
        of_all: false,
        ..core(Kind::MeshConfig, "configmaps")
    },
    istio(Kind::DestinationRule, "destinationrules"),
    istio(Kind::VirtualService, "virtualservices"),
    istio(Kind::ServiceEntry, "serviceentries"),
    istio(Kind::WorkloadEntry, "workloadentries"),
];

/// Pods, while a rule asks for their labels.
pub(super) static PODS: Resource = Resource { metadata_only: true, ..core(Kind::Pod, "pods") };

/// Pods of this node: some of them may be left alone.
pub(super) static OWN_PODS: Resource =
    Resource { purpose: Some("opt-out"), metadata_only: true, of_all: false, ..core(Kind::Pod, "pods") };

/// Namespaces whose pods may be left alone.
pub(super) static LABELLED_NAMESPACES: Resource =
    Resource { purpose: Some("opt-out"), metadata_only: true, of_all: false, ..core(Kind::Namespace, "namespaces") };

/// Secrets of Istio's that name other clusters.
pub(super) static SECRETS: Resource =
    Resource { namespace: Some(MESH_NAMESPACE), of_all: false, kind: None, ..core(Kind::MeshConfig, "secrets") };

impl Resource {
    /// `plural.group`, as `kubectl` has it, and what it is read for.
    pub(super) fn name(&self) -> String {
        let name =
            if self.group.is_empty() { self.plural.to_owned() } else { format!("{}.{}", self.plural, self.group) };
        self.purpose.map_or_else(|| name.clone(), |purpose| format!("{name} ({purpose})"))
    }

    /// The API of it, in one of its versions.
    pub(super) fn api(&self, client: Client, version: usize) -> (Api<Raw>, ApiResource) {
        let version = self.versions[version % self.versions.len()];
        let kind = self.kind.map_or_else(|| "Secret".to_owned(), |kind| kind.to_string());
        let kind = GroupVersionKind::gvk(self.group, version, &kind);
        let resource = ApiResource::from_gvk_with_plural(&kind, self.plural);
        let api = match self.namespace {
            Some(namespace) => Api::namespaced_with(client, namespace, &resource),
            None => Api::all_with(client, &resource),
        };
        (api, resource)
    }
}
