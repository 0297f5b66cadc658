//! Findings about objects, as Kubernetes Events on them.
//!
//! Every agent finds the same in the same objects. An Event has a name that says what it is about, so that of all agents the first one makes it, and
//! the others are told that it is there.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::{Duration, SystemTime},
};

use kube::{
    Api, Client,
    api::{ListParams, PostParams},
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use portolan_core::model::{Finding, NamespacedName};
use serde_json::json;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use super::resources::{PODS, RESOURCES, Resource};

/// Events of one agent follow each other no faster than this.
const PACE: Duration = Duration::from_secs(1);
/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(10);
/// Kubernetes takes no longer text, in bytes.
const MOST: usize = 1_000;

/// Who tells.
pub(super) struct EventRecorder {
    pub(super) client: Client,
    pub(super) cluster: String,
    pub(super) node: String,
}

impl EventRecorder {
    /// Tells of what comes, one after the other.
    pub(super) async fn run(self, mut findings: mpsc::Receiver<Finding>) {
        while let Some(finding) = findings.recv().await {
            if !finding.cluster.is_empty() && finding.cluster != self.cluster {
                continue;
            }
            let Some((resource, name)) = subject(&finding) else { continue };
            match timeout(ANSWER, self.tell(&finding, resource, &name)).await {
                Ok(Ok(())) => {}
                // Another agent was first.
                Ok(Err(kube::Error::Api(status))) if status.code == 409 => {}
                Err(_) => tracing::debug!("no Event for {}: no answer", finding.object),
                Ok(Err(error)) => tracing::debug!("no Event for {}: {error}", finding.object),
            }
            sleep(PACE).await;
        }
    }

    async fn tell(&self, finding: &Finding, resource: &Resource, name: &NamespacedName) -> kube::Result<()> {
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
        // It is gone by now.
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
            // Microseconds: Kubernetes takes no other form.
            "eventTime": humantime::format_rfc3339_micros(SystemTime::now()).to_string(),
            "type": "Warning", "action": "Read", "reason": finding.code.to_string(),
            "note": text[..text.floor_char_boundary(MOST)],
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

/// The object that a finding is about, where it is one that is read of the API.
fn subject(finding: &Finding) -> Option<(&'static Resource, NamespacedName)> {
    let (kind, name) = finding.object.split_once(' ')?;
    let resource = RESOURCES.iter().chain([&PODS]).find(|it| it.kind.is_some_and(|own| own.to_string() == kind))?;
    let name = name.parse().unwrap_or_else(|_| NamespacedName::new("", name));
    Some((resource, name))
}
