//! Records findings about objects as Kubernetes Events.
//!
//! Every agent has the same findings about the same objects.
//! The name of an Event is a hash of its content, so the first agent creates it and the others get a conflict (409).

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::{Duration, SystemTime},
};

use kube::{
    Api, Client,
    api::{ListParams, PostParams},
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use portolan_core::model::{Finding, Kind, NamespacedName};
use serde_json::json;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use super::resources::{PODS, RESOURCES, Resource};

/// Minimum interval between Events of one agent.
const PACE: Duration = Duration::from_secs(1);
/// Timeout for recording one Event.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum length of an Event's note in bytes. Kubernetes rejects more than 1024.
const MAX_NOTE_BYTES: usize = 1_000;

/// Creates Events in the local cluster, on behalf of this node.
pub(super) struct EventRecorder {
    pub(super) client: Client,
    pub(super) cluster: String,
    pub(super) node: String,
}

impl EventRecorder {
    /// Records the received findings as Events, one at a time. Best effort: a failure is only logged.
    pub(super) async fn run(self, mut findings: mpsc::Receiver<Finding>) {
        while let Some(finding) = findings.recv().await {
            if !finding.cluster.is_empty() && finding.cluster != self.cluster {
                continue;
            }
            let Some((resource, name)) = subject(&finding) else { continue };
            match timeout(REQUEST_TIMEOUT, self.record(&finding, resource, &name)).await {
                Ok(Ok(())) => {}
                // Another agent has already created this Event.
                Ok(Err(kube::Error::Api(status))) if status.code == 409 => {}
                Err(_) => tracing::debug!("cannot record Event for {}: request timed out", finding.object),
                Ok(Err(error)) => tracing::debug!("cannot record Event for {}: {error}", finding.object),
            }
            sleep(PACE).await;
        }
    }

    async fn record(&self, finding: &Finding, resource: &Resource, name: &NamespacedName) -> kube::Result<()> {
        let named = ListParams::default().fields(&format!("metadata.name={}", name.name));
        let mut version = 0;
        let (found, kind) = loop {
            let (mut api, kind) = resource.api(self.client.clone(), version);
            if !name.namespace.is_empty() {
                api = Api::namespaced_with(self.client.clone(), &name.namespace, &kind);
            }
            version += 1;
            match api.list_metadata(&named).await {
                Err(kube::Error::Api(status)) if status.code == 404 && version < resource.versions.len() => {}
                found => break (found?, kind),
            }
        };
        // The object was deleted meanwhile.
        let Some(object) = found.items.into_iter().next() else { return Ok(()) };
        let namespace = if name.namespace.is_empty() { "default" } else { &name.namespace };
        let text = if finding.field.is_empty() {
            finding.message.clone()
        } else {
            format!("{}: {}", finding.field, finding.message)
        };
        let mut hasher = DefaultHasher::new();
        (finding.code, &finding.object, &text, &object.metadata.uid).hash(&mut hasher);
        let event = json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event",
            "metadata": {"name": format!("portolan.{:016x}", hasher.finish()), "namespace": namespace},
            // A MicroTime: Kubernetes requires exactly six fractional digits.
            "eventTime": humantime::format_rfc3339_micros(SystemTime::now()).to_string(),
            "type": "Warning", "action": "Read", "reason": finding.code.to_string(),
            "note": text[..text.floor_char_boundary(MAX_NOTE_BYTES)],
            "reportingController": "portolan.io/agent", "reportingInstance": if self.node.is_empty() { &self.cluster } else { &self.node },
            "regarding": {"apiVersion": kind.api_version, "kind": kind.kind, "name": name.name, "namespace": object.metadata.namespace,
                "uid": object.metadata.uid},
        });
        let events =
            ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("events.k8s.io", "v1", "Event"), "events");
        let event: DynamicObject = serde_json::from_value(event).map_err(kube::Error::SerdeError)?;
        Api::<DynamicObject>::namespaced_with(self.client.clone(), namespace, &events)
            .create(&PostParams::default(), &event)
            .await
            .map(drop)
    }
}

/// Returns the resource and name of the object that a finding is about; `None` if it was not read from the API.
fn subject(finding: &Finding) -> Option<(&'static Resource, NamespacedName)> {
    let kind = Kind::of(&finding.object)?;
    let resource = RESOURCES.iter().chain([&PODS]).find(|resource| resource.kind == Some(kind))?;
    Some((resource, finding.object.namespaced_name()))
}
