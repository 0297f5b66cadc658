//! Readers of ServiceEntries and WorkloadEntries: services and endpoints that are described by hand.

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
    /// Inside the mesh or not: it makes no difference for the choice of an endpoint.
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

/// Identities are for mutual TLS, which is not Portolan's.
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
            "NONE" => "connections go where they were going, so there is nothing to choose",
            "DNS" | "DNS_ROUND_ROBIN" => "names cannot be dialled in the kernel",
            _ => return Err(invalid("spec.resolution", format!("{resolution:?} is no resolution"))),
        };
        context.finding(Code::NotHonoured, "spec.resolution", format!("{resolution}: {why}; it is not used"));
        return Ok(None);
    }
    if spec.hosts.is_empty() || spec.hosts.iter().any(|host| host.is_empty() || host.contains('*')) {
        return Err(invalid("spec.hosts", "needs a full host name, without `*`"));
    }
    if spec.hosts.len() > 1 {
        let message = format!("rules for {:?} are in force; those for the others are not", spec.hosts[0]);
        context.finding(Code::NotHonoured, "spec.hosts", message);
    }
    if spec.workload_selector.is_some() && !spec.endpoints.is_empty() {
        return Err(invalid("spec.workloadSelector", "excludes endpoints; keep one of them"));
    }
    if spec.workload_selector.is_some() {
        let message = "selects WorkloadEntries; Pods are not selected: give them a Service";
        context.finding(Code::NotHonoured, "spec.workloadSelector", message);
    }
    let mut ports: Vec<ServicePort> = Vec::new();
    for (i, port) in spec.ports.into_iter().enumerate() {
        let port = service_port(&format!("spec.ports[{i}]"), port)?;
        if ports.iter().any(|other| other.port == port.port || other.name == port.name) {
            let message = format!("{} {:?} has the number or the name of another port", port.port, port.name);
            return Err(invalid(format!("spec.ports[{i}]"), message));
        }
        ports.push(port);
    }
    if ports.is_empty() {
        return Err(invalid("spec.ports", "is empty: nothing can be dialled; give it a port"));
    }
    let mut addresses = Vec::new();
    for (i, text) in spec.addresses.iter().enumerate() {
        match address(context, text) {
            Ok(address) => addresses.push(address),
            Err(message) => context.invalid_part(invalid(format!("spec.addresses[{i}]"), message)),
        }
    }
    if addresses.is_empty() {
        let message = "has no address that could be dialled; routes of other services may lead here";
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

/// One address: a range has many, none of which could be told from the others.
fn address(context: &Context<'_>, text: &str) -> Result<IpAddr, String> {
    let range: Subnet = text.parse()?;
    let address = range.single().ok_or_else(|| format!("{text:?} is a range; name the addresses one by one"))?;
    match forbidden(context.reader, address) {
        Some(range) => Err(format!("{address} is {range}: refused")),
        None => Ok(address.to_canonical()),
    }
}

fn service_port(at: &str, spec: PortSpec) -> Result<ServicePort, Invalid> {
    if spec.number == 0 {
        return Err(invalid(format!("{at}.number"), "0 is no port"));
    }
    let (protocol, http) = match spec.protocol.to_ascii_uppercase().as_str() {
        "UDP" => (Protocol::Udp, false),
        "HTTP" | "HTTP2" | "GRPC" | "GRPC-WEB" => (Protocol::Tcp, true),
        "" | "TCP" | "TLS" | "HTTPS" | "MONGO" | "MYSQL" | "REDIS" => (Protocol::Tcp, false),
        other => return Err(invalid(format!("{at}.protocol"), format!("{other:?} is no protocol"))),
    };
    let target = Target::Number(spec.target_port.filter(|target| *target != 0).unwrap_or(spec.number));
    let http1 = spec.protocol.eq_ignore_ascii_case("http");
    Ok(ServicePort { name: spec.name, port: spec.number, protocol, target, http, http1 })
}

fn workload(context: &Context<'_>, at: &str, spec: WorkloadSpec) -> Result<Workload, Invalid> {
    let field = || format!("{at}.address");
    let text = &spec.address;
    let address: IpAddr = text
        .parse()
        .map_err(|_| invalid(field(), format!("{text:?} is no address; names and sockets are not dialled")))?;
    if let Some(range) = forbidden(context.reader, address) {
        return Err(invalid(field(), format!("{address} is {range}: refused")));
    }
    let locality: Locality =
        spec.locality.parse().map_err(|message: String| invalid(format!("{at}.locality"), message))?;
    if let Some((name, _)) = spec.ports.iter().find(|(_, port)| **port == 0) {
        return Err(invalid(format!("{at}.ports[{name:?}]"), "0 is no port"));
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
    let of_object: Labels =
        context.typed::<Option<_>>("metadata.labels", value["metadata"]["labels"].take())?.unwrap_or_default();
    let spec: WorkloadSpec = context.deserialize_reporting_ignored("spec", value["spec"].take(), is_identity)?;
    let mut workload = workload(context, "spec", spec)?;
    // Labels of the object count where the spec has none of that name.
    for (key, value) in of_object {
        workload.labels.entry(key).or_insert(value);
    }
    let name: NamespacedName = context.name.clone();
    Ok(WorkloadEntry { name, workload })
}
