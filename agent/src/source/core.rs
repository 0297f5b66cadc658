//! Readers of the kinds of Kubernetes itself.

use std::net::IpAddr;

use k8s_openapi::api::{
    core::v1::{Node as ApiNode, Service as ApiService},
    discovery::v1::{Endpoint as ApiEndpoint, EndpointSlice as ApiSlice},
};
use serde_json::Value;

use super::read::{Context, Reader};
use crate::model::{
    EndpointSlice, Locality, NamespacedName, Node, Pod, Protocol, Service, ServicePort, SliceEndpoint, SlicePort,
};

const SERVICE_OF_SLICE: &str = "kubernetes.io/service-name";
const REGION: &str = "topology.kubernetes.io/region";
const ZONE: &str = "topology.kubernetes.io/zone";
const SUBZONE: &str = "topology.istio.io/subzone";

pub(super) fn service(context: &mut Context<'_>, value: Value) -> Result<Option<Service>, String> {
    let spec = context.typed::<ApiService>("", value)?.spec.unwrap_or_default();
    if spec.type_.as_deref() == Some("ExternalName") {
        context
            .warning("spec.type ExternalName is a name in DNS, which has no endpoints to choose from: it is not used");
        return Ok(None);
    }
    let mut ports = Vec::new();
    for (i, port) in spec.ports.iter().flatten().enumerate() {
        let at = format!("spec.ports[{i}]");
        let protocol = Protocol::parse(port.protocol.as_deref()).map_err(|message| format!("{at}.{message}"))?;
        let number = port_number(port.port).ok_or_else(|| format!("{at}.port: {} is no port", port.port))?;
        ports.push(ServicePort { name: port.name.clone().unwrap_or_default(), port: number, protocol });
    }
    // A headless Service may do without: nothing of it is dialled anyway.
    if ports.is_empty() && spec.cluster_ip.as_deref() != Some("None") {
        return Err("spec.ports is empty: nothing can be dialled; give it a port".to_owned());
    }
    let mut addresses = Vec::new();
    let plural = spec.cluster_ips.unwrap_or_default();
    let singular = if plural.is_empty() { spec.cluster_ip.into_iter().collect() } else { Vec::new() };
    for text in plural.into_iter().chain(singular).filter(|text| !text.is_empty() && text != "None") {
        let address = text.parse::<IpAddr>().map_err(|_| format!("spec.clusterIPs: {text:?} is no address"))?;
        match forbidden(context.reader, address) {
            None => addresses.push(address.to_canonical()),
            Some(range) => context.error(format!("spec.clusterIPs: {address} is {range}: refused")),
        }
    }
    if spec.external_ips.is_some_and(|list| !list.is_empty()) {
        context.warning("spec.externalIPs is ignored: whoever may write a Service must not take any address");
    }
    let not_yet = [
        (spec.session_affinity.as_deref() == Some("ClientIP"), "spec.sessionAffinity"),
        (spec.traffic_distribution.is_some(), "spec.trafficDistribution"),
    ];
    for (_, field) in not_yet.iter().filter(|(set, _)| *set) {
        context.warning(format!("{field} is not honoured yet"));
    }
    Ok(Some(Service {
        name: context.name.clone(),
        addresses,
        ports,
        node_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or_default(),
    }))
}

pub(super) fn endpoint_slice(context: &mut Context<'_>, value: Value) -> Result<Option<EndpointSlice>, String> {
    let slice = context.typed::<ApiSlice>("", value)?;
    if slice.address_type == "FQDN" {
        context.warning("addressType FQDN: names cannot be dialled in the kernel; it is not used");
        return Ok(None);
    }
    let service = slice.metadata.labels.unwrap_or_default().remove(SERVICE_OF_SLICE);
    let Some(service) = service else {
        context.warning(format!(
            "metadata.labels: {SERVICE_OF_SLICE} is missing: no Service claims it, so it is not used"
        ));
        return Ok(None);
    };
    let mut ports = Vec::new();
    for (i, port) in slice.ports.iter().flatten().enumerate() {
        let Some(number) = port.port else {
            context.warning(format!("ports[{i}].port is empty: \"all ports\" is not honoured"));
            continue;
        };
        ports.push(SlicePort {
            name: port.name.clone().unwrap_or_default(),
            port: port_number(number).ok_or_else(|| format!("ports[{i}].port: {number} is no port"))?,
            protocol: Protocol::parse(port.protocol.as_deref()).map_err(|message| format!("ports[{i}].{message}"))?,
        });
    }
    if slice.endpoints.iter().any(|endpoint| endpoint.hints.is_some()) {
        context.warning("endpoints.hints are not honoured yet");
    }
    let namespace = context.name.namespace.clone();
    let mut endpoints = Vec::new();
    for (i, endpoint) in slice.endpoints.into_iter().enumerate() {
        match slice_endpoint(context.reader, &namespace, &slice.address_type, endpoint) {
            Ok(endpoint) => endpoints.push(endpoint),
            Err(message) => context.error(format!("endpoints[{i}].{message}")),
        }
    }
    Ok(Some(EndpointSlice {
        name: context.name.clone(),
        service: NamespacedName::new(namespace, service),
        ports,
        endpoints,
    }))
}

fn slice_endpoint(
    reader: Reader,
    namespace: &str,
    family: &str,
    endpoint: ApiEndpoint,
) -> Result<SliceEndpoint, String> {
    // Kubernetes: the addresses are interchangeable, and consumers use the first.
    let text = endpoint.addresses.first().ok_or("addresses is empty")?;
    let address: IpAddr = text.parse().map_err(|_| format!("addresses[0]: {text:?} is no address"))?;
    if address.is_ipv4() != (family == "IPv4") {
        return Err(format!("addresses[0]: {address} does not go with addressType {family}"));
    }
    if let Some(range) = forbidden(reader, address) {
        return Err(format!("addresses[0]: {address} is {range}: refused"));
    }
    let conditions = endpoint.conditions.unwrap_or_default();
    let ready = conditions.ready.unwrap_or(true);
    let pod = endpoint.target_ref.filter(|target| target.kind.as_deref() == Some("Pod"));
    Ok(SliceEndpoint {
        address: address.to_canonical(),
        ready,
        serving: conditions.serving.unwrap_or(ready),
        terminating: conditions.terminating.unwrap_or(false),
        node: endpoint.node_name,
        pod: pod.map(|target| {
            NamespacedName::new(
                target.namespace.unwrap_or_else(|| namespace.to_owned()),
                target.name.unwrap_or_default(),
            )
        }),
    })
}

pub(super) fn node(context: &mut Context<'_>, value: Value) -> Result<Node, String> {
    let mut labels = context.typed::<ApiNode>("", value)?.metadata.labels.unwrap_or_default();
    let mut label = |key: &str| labels.remove(key).unwrap_or_default();
    let locality = Locality { region: label(REGION), zone: label(ZONE), subzone: label(SUBZONE) };
    if locality.region.is_empty() {
        context.warning(format!("metadata.labels: {REGION} is missing: what runs here has no region"));
    }
    Ok(Node { name: context.name.name.clone(), locality })
}

pub(super) fn pod(context: &mut Context<'_>, value: Value) -> Result<Pod, String> {
    // Only the labels matter, and a Pod is a large object: the rest is not even looked at.
    let labels = value.pointer("/metadata/labels").cloned().unwrap_or_default();
    let labels = context.typed::<Option<_>>("metadata.labels", labels)?.unwrap_or_default();
    Ok(Pod { name: context.name.clone(), labels })
}

fn port_number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port != 0)
}

/// The range that an address lies in, if nothing may be sent there: a Service must not become a way to the
/// node's own services or to the metadata service of a cloud. v4-mapped forms are IPv4.
fn forbidden(reader: Reader, address: IpAddr) -> Option<&'static str> {
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
    fn denied_ranges() {
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
            assert!(forbidden(Reader::default(), text.parse().unwrap()).is_some(), "{text}");
        }
        for text in ["10.0.0.1", "20.0.0.1", "fd00::1", "2001:db8::1"] {
            assert!(forbidden(Reader::default(), text.parse().unwrap()).is_none(), "{text}");
        }
        let allow = Reader { allow_loopback: true };
        assert!(forbidden(allow, "127.0.0.1".parse().unwrap()).is_none());
        assert!(forbidden(allow, "224.0.0.1".parse().unwrap()).is_some());
    }
}
