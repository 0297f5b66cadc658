//! Decoders for ServiceEntries and WorkloadEntries: services and endpoints outside the Kubernetes registry.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use serde::Deserialize;
use serde_json::Value;

use super::{
    context::{Context, Invalid, invalid},
    kubernetes::forbidden,
    locality_lb::null_as_default,
};
use crate::model::{
    Code, Labels, Locality, NamespacedName, Protocol, ServiceEntry, ServicePort, Subnet, Target, Workload,
    WorkloadEntry,
};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServiceEntrySpec {
    #[serde(default, deserialize_with = "null_as_default")]
    hosts: Vec<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    addresses: Vec<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    ports: Vec<PortSpec>,
    /// `MESH_INTERNAL` or `MESH_EXTERNAL`, which does not affect endpoint selection.
    #[serde(default, rename = "location")]
    _location: Option<String>,
    #[serde(default)]
    resolution: Option<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    endpoints: Vec<WorkloadSpec>,
    #[serde(default)]
    workload_selector: Option<SelectorSpec>,
    #[serde(default, deserialize_with = "null_as_default")]
    export_to: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PortSpec {
    number: u16,
    #[serde(default)]
    name: String,
    #[serde(default)]
    protocol: String,
    #[serde(default)]
    target_port: Option<u16>,
}

#[derive(Deserialize)]
struct SelectorSpec {
    #[serde(default, deserialize_with = "null_as_default")]
    labels: Labels,
}

#[derive(Deserialize)]
struct WorkloadSpec {
    #[serde(default)]
    address: String,
    #[serde(default, deserialize_with = "null_as_default")]
    ports: BTreeMap<String, u16>,
    #[serde(default, deserialize_with = "null_as_default")]
    labels: Labels,
    #[serde(default)]
    network: String,
    #[serde(default)]
    locality: String,
    #[serde(default)]
    weight: u32,
}

/// Returns whether the field is about identities for mutual TLS, which Portolan does not use.
fn is_identity(path: &str) -> bool {
    path.ends_with("serviceAccount") || path.starts_with("subjectAltNames")
}

pub(super) fn service_entry(context: &mut Context<'_>, mut value: Value) -> Result<Option<ServiceEntry>, Invalid> {
    let spec: ServiceEntrySpec = context.deserialize_reporting_ignored("spec", value["spec"].take(), is_identity)?;
    if !context.exported_to_all(&spec.export_to) {
        return Ok(None);
    }
    let resolution = spec.resolution.as_deref().unwrap_or("NONE");
    if resolution != "STATIC" {
        let why = match resolution {
            "NONE" => "connections keep their original destination",
            "DNS" | "DNS_ROUND_ROBIN" => "the kernel cannot resolve names",
            _ => return Err(invalid("spec.resolution", format!("{resolution:?} is not a valid resolution"))),
        };
        context.finding(
            Code::FieldIgnored,
            "spec.resolution",
            format!("{resolution} is not supported: {why}; the ServiceEntry is ignored"),
        );
        return Ok(None);
    }
    if spec.hosts.is_empty() || spec.hosts.iter().any(|host| host.is_empty() || host.contains('*')) {
        return Err(invalid("spec.hosts", "must contain full host names, without `*`"));
    }
    if spec.hosts.len() > 1 {
        let message = format!("only rules for the first host, {:?}, apply", spec.hosts[0]);
        context.finding(Code::FieldIgnored, "spec.hosts", message);
    }
    if spec.workload_selector.is_some() && !spec.endpoints.is_empty() {
        return Err(invalid(
            "spec.workloadSelector",
            "workloadSelector and endpoints are mutually exclusive; remove one of them",
        ));
    }
    if spec.workload_selector.is_some() {
        let message = "selects only WorkloadEntries; to select Pods, use a Service";
        context.finding(Code::FieldIgnored, "spec.workloadSelector", message);
    }
    let mut ports: Vec<ServicePort> = Vec::new();
    for (i, port) in spec.ports.into_iter().enumerate() {
        let port = service_port(&format!("spec.ports[{i}]"), port)?;
        if ports.iter().any(|other| other.port == port.port || other.name == port.name) {
            let message = format!("duplicate port number or name: {} {:?}", port.port, port.name);
            return Err(invalid(format!("spec.ports[{i}]"), message));
        }
        ports.push(port);
    }
    if ports.is_empty() {
        return Err(invalid("spec.ports", "is empty; add at least one port"));
    }
    let mut addresses = Vec::new();
    for (i, text) in spec.addresses.iter().enumerate() {
        match address(context, text) {
            Ok(address) => addresses.push(address),
            Err(message) => context.invalid_part(invalid(format!("spec.addresses[{i}]"), message)),
        }
    }
    if addresses.is_empty() {
        let message = "contains no usable address; the ServiceEntry can only be the destination of a route";
        context.finding(Code::NoAddress, "spec.addresses", message);
    }
    let mut endpoints = Vec::new();
    for (i, spec) in spec.endpoints.into_iter().enumerate() {
        match workload(context, &format!("spec.endpoints[{i}]"), spec) {
            Ok(endpoint) => endpoints.push(endpoint),
            Err(broken) => context.invalid_part(broken),
        }
    }
    Ok(Some(ServiceEntry {
        name: context.name.clone(),
        hosts: spec.hosts,
        addresses,
        ports,
        endpoints,
        selector: spec.workload_selector.map(|selector| selector.labels),
    }))
}

/// Parses a single address. A range is rejected, because a frontend is one address.
fn address(context: &Context<'_>, text: &str) -> Result<IpAddr, String> {
    let range: Subnet = text.parse()?;
    let address = range.single().ok_or_else(|| format!("{text:?} is a range; list single addresses"))?;
    match forbidden(context.reader, address) {
        Some(range) => Err(format!("{address} is {range}; not allowed")),
        None => Ok(address.to_canonical()),
    }
}

fn service_port(at: &str, spec: PortSpec) -> Result<ServicePort, Invalid> {
    if spec.number == 0 {
        return Err(invalid(format!("{at}.number"), "0 is not a valid port"));
    }
    let (protocol, http) = match spec.protocol.to_ascii_uppercase().as_str() {
        "UDP" => (Protocol::Udp, false),
        "HTTP" | "HTTP2" | "GRPC" | "GRPC-WEB" => (Protocol::Tcp, true),
        "" | "TCP" | "TLS" | "HTTPS" | "MONGO" | "MYSQL" | "REDIS" => (Protocol::Tcp, false),
        other => return Err(invalid(format!("{at}.protocol"), format!("{other:?} is not a supported protocol"))),
    };
    let target = Target::Number(spec.target_port.filter(|target| *target != 0).unwrap_or(spec.number));
    let http1 = spec.protocol.eq_ignore_ascii_case("http");
    Ok(ServicePort { name: spec.name, port: spec.number, protocol, target, http, http1 })
}

fn workload(context: &Context<'_>, at: &str, spec: WorkloadSpec) -> Result<Workload, Invalid> {
    let field = || format!("{at}.address");
    let text = &spec.address;
    let address: IpAddr = text.parse().map_err(|_| {
        invalid(field(), format!("{text:?} is not an IP address; host names and Unix sockets are not supported"))
    })?;
    if let Some(range) = forbidden(context.reader, address) {
        return Err(invalid(field(), format!("{address} is {range}; not allowed")));
    }
    let locality: Locality =
        spec.locality.parse().map_err(|message: String| invalid(format!("{at}.locality"), message))?;
    if let Some((name, _)) = spec.ports.iter().find(|(_, port)| **port == 0) {
        return Err(invalid(format!("{at}.ports[{name:?}]"), "0 is not a valid port"));
    }
    Ok(Workload {
        address: address.to_canonical(),
        ports: spec.ports,
        labels: spec.labels,
        network: spec.network,
        locality: Arc::new(locality),
        weight: spec.weight.max(1),
    })
}

pub(super) fn workload_entry(context: &mut Context<'_>, mut value: Value) -> Result<WorkloadEntry, Invalid> {
    let object_labels: Labels =
        context.typed::<Option<_>>("metadata.labels", value["metadata"]["labels"].take())?.unwrap_or_default();
    let spec: WorkloadSpec = context.deserialize_reporting_ignored("spec", value["spec"].take(), is_identity)?;
    let mut workload = workload(context, "spec", spec)?;
    // Labels in the spec take precedence over those of the object.
    for (key, value) in object_labels {
        workload.labels.entry(key).or_insert(value);
    }
    let name: NamespacedName = context.name.clone();
    Ok(WorkloadEntry { name, workload })
}
