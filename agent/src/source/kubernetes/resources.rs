//! The resources that are read from an API server. `deploy/` grants exactly the access that they need.

use kube::{
    Api, Client,
    core::{ApiResource, GroupVersionKind},
};
use portolan_core::{decode::MESH_NAMESPACE, model::Kind};

use super::raw_object::Raw;

/// A Kubernetes API resource, and which part of it is read.
#[derive(Debug)]
pub(super) struct Resource {
    /// The kind that objects are decoded as; `None` for Secrets, which do not go to the store.
    pub(super) kind: Option<Kind>,
    group: &'static str,
    /// API versions in the order in which they are tried. The fields that are read are the same in all of them.
    pub(super) versions: &'static [&'static str],
    pub(super) plural: &'static str,
    /// The only namespace that is read; `None` for all.
    namespace: Option<&'static str>,
    /// Field selector that limits which objects are read.
    pub(super) fields: Option<&'static str>,
    /// Suffix of the name, to tell this apart from another watch of the same resource.
    purpose: Option<&'static str>,
    /// Whether to read only the objects' metadata.
    pub(super) metadata_only: bool,
    /// Whether to read it from remote clusters too. These only add endpoints to local services and hold no policy.
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

/// The resources that are always watched. Excludes pods.
pub(super) static RESOURCES: [Resource; 9] = [
    core(Kind::Service, "services"),
    Resource { group: "discovery.k8s.io", ..core(Kind::EndpointSlice, "endpointslices") },
    Resource { metadata_only: true, ..core(Kind::Node, "nodes") },
    // Only the label of `istio-system` matters: it names the cluster's network.
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

/// Pods, watched while a rule needs their labels.
pub(super) static PODS: Resource = Resource { metadata_only: true, ..core(Kind::Pod, "pods") };

/// Pods of this node, to find those that opt out.
pub(super) static OWN_PODS: Resource =
    Resource { purpose: Some("opt-out"), metadata_only: true, of_all: false, ..core(Kind::Pod, "pods") };

/// Namespaces whose pods may opt out.
pub(super) static LABELLED_NAMESPACES: Resource =
    Resource { purpose: Some("opt-out"), metadata_only: true, of_all: false, ..core(Kind::Namespace, "namespaces") };

/// Istio's Secrets with the kubeconfigs of remote clusters.
pub(super) static SECRETS: Resource =
    Resource { namespace: Some(MESH_NAMESPACE), of_all: false, kind: None, ..core(Kind::MeshConfig, "secrets") };

impl Resource {
    /// Returns `plural.group`, as in `kubectl`, followed by the purpose in parentheses if there is one.
    pub(super) fn name(&self) -> String {
        let name =
            if self.group.is_empty() { self.plural.to_owned() } else { format!("{}.{}", self.plural, self.group) };
        self.purpose.map_or_else(|| name.clone(), |purpose| format!("{name} ({purpose})"))
    }

    /// Returns the API for this resource, in the version with this index (modulo their number).
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
