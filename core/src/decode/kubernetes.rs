//! Decoders for the built-in Kubernetes kinds.

use std::{net::IpAddr, sync::Arc, time::Duration};

use k8s_openapi::{
    api::{
        core::v1::{Node as ApiNode, Service as ApiService, ServicePort as ApiPort, ServiceSpec},
        discovery::v1::{Endpoint as ApiEndpoint, EndpointSlice as ApiSlice},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use serde_json::Value;

use super::context::{Context, DecodeOptions, Invalid, invalid};
use crate::model::{
    Code, EndpointSlice, Hints, Labels, Locality, Namespace, NamespacedName, Node, Pod, Protocol, Service, ServicePort,
    SliceEndpoint, SlicePort, Target, TrafficDistribution,
};

const SERVICE_OF_SLICE: &str = "kubernetes.io/service-name";
const REGION: &str = "topology.kubernetes.io/region";
const ZONE: &str = "topology.kubernetes.io/zone";
const SUBZONE: &str = "topology.istio.io/subzone";
/// Istio's annotation for `trafficDistribution`, which predates the Kubernetes field.
const DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";
/// Kubernetes' default of `sessionAffinityConfig.clientIP.timeoutSeconds`, in seconds.
const AFFINITY: u64 = 10_800;

pub(super) fn service(context: &mut Context<'_>, value: Value) -> Result<Option<Service>, Invalid> {
    let service: ApiService = context.deserialize_reporting_ignored("", value, |_| false)?;
    let spec = service.spec.unwrap_or_default();
    if spec.type_.as_deref() == Some("ExternalName") {
        let message = "ExternalName is a DNS alias without endpoints; the Service is ignored";
        context.finding(Code::FieldIgnored, "spec.type", message);
        return Ok(None);
    }
    let mut ports = Vec::new();
    for (i, port) in spec.ports.iter().flatten().enumerate() {
        let port = service_port(&format!("spec.ports[{i}]"), port)?;
        if ports.iter().any(|other: &ServicePort| (other.port, other.protocol) == (port.port, port.protocol)) {
            let message = format!("duplicate port {} {}", port.protocol, port.port);
            return Err(invalid(format!("spec.ports[{i}]"), message));
        }
        ports.push(port);
    }
    // A headless Service may have no ports, because it has no address to connect to.
    if ports.is_empty() && spec.cluster_ip.as_deref() != Some("None") {
        return Err(invalid("spec.ports", "is empty; add at least one port"));
    }
    let addresses = addresses(context, &spec)?;
    let node_local = match spec.internal_traffic_policy.as_deref() {
        None | Some("Cluster") => false,
        Some("Local") => true,
        // An unknown value may be stricter than `Cluster`, so it must not fall back to it.
        Some(other) => {
            return Err(invalid(
                "spec.internalTrafficPolicy",
                format!("{other:?} is not valid; use \"Cluster\" or \"Local\""),
            ));
        }
    };
    if spec.external_ips.is_some_and(|list| !list.is_empty()) {
        let message =
            "is ignored: anyone who can edit a Service could intercept traffic to any address (CVE-2020-8554)";
        context.finding(Code::ExternalAddresses, "spec.externalIPs", message);
    }
    if let Some(other) = spec.session_affinity.as_deref().filter(|it| !matches!(*it, "" | "None" | "ClientIP")) {
        let message = format!("{other:?} has no effect; use \"None\" or \"ClientIP\"");
        context.finding(Code::InvalidPart, "spec.sessionAffinity", message);
    }
    let affinity = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let config = spec.session_affinity_config.and_then(|config| config.client_ip?.timeout_seconds);
        Duration::from_secs(config.and_then(|seconds| u64::try_from(seconds).ok()).unwrap_or(AFFINITY))
    });
    let annotated = service.metadata.annotations.unwrap_or_default().remove(DISTRIBUTION);
    let annotation = format!("metadata.annotations[\"{DISTRIBUTION}\"]");
    let fields = [("spec.trafficDistribution", spec.traffic_distribution), (annotation.as_str(), annotated)];
    let mut distribution = None;
    for (field, text) in fields {
        let Some(text) = text else { continue };
        distribution = distribution.or(match text.as_str() {
            "PreferClose" | "PreferSameZone" => Some(TrafficDistribution::PreferSameZone),
            "PreferSameNode" => Some(TrafficDistribution::PreferSameNode),
            "Any" => None,
            _ => {
                let message = format!("{text:?} has no effect; use PreferSameZone, PreferClose, or PreferSameNode");
                context.finding(Code::InvalidPart, field, message);
                None
            }
        });
    }
    Ok(Some(Service {
        name: context.name.clone(),
        addresses,
        ports,
        node_local,
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or_default(),
        distribution,
        affinity,
        selector: spec.selector.unwrap_or_default(),
    }))
}

fn service_port(at: &str, port: &ApiPort) -> Result<ServicePort, Invalid> {
    let protocol =
        Protocol::parse(port.protocol.as_deref()).map_err(|message| invalid(format!("{at}.protocol"), message))?;
    let number = port_number(port.port)
        .ok_or_else(|| invalid(format!("{at}.port"), format!("{} is not a valid port", port.port)))?;
    let name = port.name.clone().unwrap_or_default();
    let target = match &port.target_port {
        None => Target::Number(number),
        Some(IntOrString::String(name)) => Target::Name(name.clone()),
        Some(IntOrString::Int(target)) => {
            let target = port_number(*target)
                .ok_or_else(|| invalid(format!("{at}.targetPort"), format!("{target} is not a valid port")))?;
            Target::Number(target)
        }
    };
    // Istio's protocol selection: `appProtocol`, or else the port name up to the first dash.
    let declared_protocol = port.app_protocol.as_deref().unwrap_or(name.split('-').next().unwrap_or_default());
    let http =
        matches!(declared_protocol.to_ascii_lowercase().as_str(), "http" | "http2" | "grpc" | "kubernetes.io/h2c");
    let http1 = declared_protocol.eq_ignore_ascii_case("http");
    Ok(ServicePort { name, port: number, protocol, target, http, http1 })
}

fn addresses(context: &mut Context<'_>, spec: &ServiceSpec) -> Result<Vec<IpAddr>, Invalid> {
    let plural = spec.cluster_ips.as_deref().unwrap_or_default();
    let singular = if plural.is_empty() { spec.cluster_ip.as_slice() } else { &[] };
    let mut addresses = Vec::new();
    for text in plural.iter().chain(singular).filter(|text| !text.is_empty() && *text != "None") {
        let address =
            text.parse::<IpAddr>().map_err(|_| invalid("spec.clusterIPs", format!("{text:?} is not an IP address")))?;
        match forbidden(context.reader, address) {
            None => addresses.push(address.to_canonical()),
            Some(range) => {
                context.finding(
                    Code::ForbiddenAddress,
                    "spec.clusterIPs",
                    format!("{address} is {range}; not allowed"),
                );
            }
        }
    }
    Ok(addresses)
}

pub(super) fn endpoint_slice(context: &mut Context<'_>, value: Value) -> Result<Option<EndpointSlice>, Invalid> {
    let slice: ApiSlice = context.deserialize_reporting_ignored("", value, |_| false)?;
    if slice.address_type == "FQDN" {
        let message = "FQDN is not supported, because the kernel cannot resolve names; the slice is ignored";
        context.finding(Code::FieldIgnored, "addressType", message);
        return Ok(None);
    }
    let service = slice.metadata.labels.unwrap_or_default().remove(SERVICE_OF_SLICE);
    let Some(service) = service else {
        let message = format!("{SERVICE_OF_SLICE} is missing: the slice belongs to no Service and is ignored");
        context.finding(Code::SliceWithoutService, "metadata.labels", message);
        return Ok(None);
    };
    let mut ports = Vec::new();
    for (i, port) in slice.ports.iter().flatten().enumerate() {
        let Some(number) = port.port else {
            context.finding(Code::FieldIgnored, format!("ports[{i}].port"), "is empty: \"all ports\" is not supported");
            continue;
        };
        let protocol = Protocol::parse(port.protocol.as_deref());
        ports.push(SlicePort {
            name: port.name.clone().unwrap_or_default(),
            port: port_number(number)
                .ok_or_else(|| invalid(format!("ports[{i}].port"), format!("{number} is not a valid port")))?,
            protocol: protocol.map_err(|message| invalid(format!("ports[{i}].protocol"), message))?,
        });
    }
    let mut endpoints = Vec::with_capacity(slice.endpoints.len());
    for (i, endpoint) in slice.endpoints.into_iter().enumerate() {
        let at = format!("endpoints[{i}]");
        endpoints.extend(slice_endpoint(context, &at, &slice.address_type, endpoint));
    }
    Ok(Some(EndpointSlice {
        name: context.name.clone(),
        service: NamespacedName::new(&context.name.namespace, service),
        ports,
        endpoints,
    }))
}

/// Returns `None` and reports a finding if the endpoint is invalid.
fn slice_endpoint(context: &mut Context<'_>, at: &str, family: &str, endpoint: ApiEndpoint) -> Option<SliceEndpoint> {
    let field = || format!("{at}.addresses[0]");
    // In Kubernetes, the addresses are interchangeable, and consumers use the first one.
    let text = endpoint.addresses.first().map(String::as_str).unwrap_or_default();
    let Ok(address) = text.parse::<IpAddr>() else {
        context.finding(Code::InvalidPart, field(), format!("{text:?} is not an IP address"));
        return None;
    };
    if address.is_ipv4() != (family == "IPv4") {
        let message = format!("{address} does not match addressType {family}");
        context.finding(Code::InvalidPart, field(), message);
        return None;
    }
    if let Some(range) = forbidden(context.reader, address) {
        context.finding(Code::ForbiddenAddress, field(), format!("{address} is {range}; not allowed"));
        return None;
    }
    if !context.reader.is_in_range(context.scope, address) {
        let message = format!("{address} is outside the ranges of its cluster (--cluster-ranges); not allowed");
        context.finding(Code::ForbiddenAddress, field(), message);
        return None;
    }
    let conditions = endpoint.conditions.unwrap_or_default();
    let ready = conditions.ready.unwrap_or(true);
    let mut pod = endpoint.target_ref.filter(|target| target.kind.as_deref() == Some("Pod"));
    let elsewhere = |namespace: &String| *namespace != context.name.namespace;
    if let Some(namespace) = pod.as_ref().and_then(|pod| pod.namespace.clone()).filter(elsewhere) {
        let message = format!("the pod is in another namespace, {namespace}; the endpoint is used without labels");
        context.finding(Code::InvalidPart, format!("{at}.targetRef.namespace"), message);
        pod = None;
    }
    let hints = endpoint.hints.map(|hints| {
        Box::new(Hints {
            nodes: hints.for_nodes.unwrap_or_default().into_iter().map(|node| node.name).collect(),
            zones: hints.for_zones.unwrap_or_default().into_iter().map(|zone| zone.name).collect(),
        })
    });
    Some(SliceEndpoint {
        address: address.to_canonical(),
        ready,
        serving: conditions.serving.unwrap_or(ready),
        terminating: conditions.terminating,
        node: endpoint.node_name.map(String::into_boxed_str),
        pod: pod.and_then(|pod| pod.name).map(String::into_boxed_str),
        hints,
    })
}

pub(super) fn node(context: &mut Context<'_>, value: Value) -> Result<Node, Invalid> {
    let labels: Labels = context.typed::<ApiNode>("", value)?.metadata.labels.unwrap_or_default();
    let label = |key: &str| labels.get(key).cloned().unwrap_or_default();
    let locality = Locality { region: label(REGION), zone: label(ZONE), subzone: label(SUBZONE) };
    if locality.region.is_empty() {
        let message = format!("{REGION} is missing: endpoints and clients on this node have no region");
        context.finding(Code::NoRegion, "metadata.labels", message);
    }
    Ok(Node { name: context.name.name.clone(), locality: Arc::new(locality), labels })
}

pub(super) fn pod(context: &mut Context<'_>, value: Value) -> Result<Pod, Invalid> {
    Ok(Pod { name: context.name.clone(), labels: Arc::new(labels(context, &value)?) })
}

pub(super) fn namespace(context: &mut Context<'_>, value: Value) -> Result<Namespace, Invalid> {
    Ok(Namespace { name: context.name.name.clone(), labels: labels(context, &value)? })
}

/// Extracts only the labels, without deserializing the rest of a large object.
fn labels(context: &Context<'_>, value: &Value) -> Result<Labels, Invalid> {
    let labels = value.pointer("/metadata/labels").cloned().unwrap_or_default();
    Ok(context.typed::<Option<_>>("metadata.labels", labels)?.unwrap_or_default())
}

fn port_number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port != 0)
}

/// Returns a description of the range if connections to the address are not allowed.
/// A Service must not become a path to services of the node itself or to the metadata service of a cloud.
/// An IPv4-mapped IPv6 address counts as IPv4.
pub(super) fn forbidden(reader: DecodeOptions, address: IpAddr) -> Option<&'static str> {
    let address = address.to_canonical();
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if address.is_unspecified() {
        Some("the unspecified address")
    } else if address.is_multicast() || address == IpAddr::from([255; 4]) {
        Some("a multicast or broadcast address")
    } else if address.is_loopback() && !reader.allow_loopback {
        Some("a loopback address (--allow-loopback-endpoints allows it)")
    } else if link_local && !reader.allow_loopback {
        Some("a link-local address (--allow-loopback-endpoints allows it)")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_forbidden_ranges() {
        let denied = [
            "127.0.0.1",
            "127.8.8.8",
            "::1",
            "::ffff:127.0.0.1",
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "fe80::1",
            "0.0.0.0",
            "::",
            "224.0.0.1",
            "ff02::1",
            "255.255.255.255",
        ];
        for text in denied {
            assert!(forbidden(DecodeOptions::default(), text.parse().unwrap()).is_some(), "{text}");
        }
        for text in ["10.0.0.1", "20.0.0.1", "fd00::1", "2001:db8::1"] {
            assert!(forbidden(DecodeOptions::default(), text.parse().unwrap()).is_none(), "{text}");
        }
        let allow = DecodeOptions { allow_loopback: true, ..DecodeOptions::default() };
        assert!(forbidden(allow, "127.0.0.1".parse().unwrap()).is_none());
        assert!(forbidden(allow, "224.0.0.1".parse().unwrap()).is_some());
    }
}
