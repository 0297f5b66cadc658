//! Decoder for VirtualServices: keeps the routes that a node can apply to whole connections.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::{
    context::{Context, Invalid, invalid},
    locality_lb::null_as_default,
};
use crate::model::{Code, Match, Route, VirtualService, WeightedDestination};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct VirtualServiceSpec {
    #[serde(default, deserialize_with = "null_as_default")]
    hosts: Vec<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    gateways: Vec<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    export_to: Vec<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    tcp: Vec<RouteSpec>,
    #[serde(default, deserialize_with = "null_as_default")]
    http: Vec<RouteSpec>,
}

/// A `tcp` or `http` route.
#[derive(Deserialize)]
struct RouteSpec {
    #[serde(default, rename = "match", deserialize_with = "null_as_default")]
    matches: Vec<MatchSpec>,
    #[serde(default, deserialize_with = "null_as_default")]
    route: Vec<DestinationSpec>,
    #[serde(default)]
    redirect: Option<Value>,
    #[serde(default, rename = "directResponse")]
    direct_response: Option<Value>,
    #[serde(default)]
    delegate: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct MatchSpec {
    #[serde(default)]
    port: Option<u16>,
    #[serde(default, deserialize_with = "null_as_default")]
    destination_subnets: Vec<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    source_labels: BTreeMap<String, String>,
    #[serde(default)]
    source_namespace: Option<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    gateways: Vec<String>,
    #[serde(default, rename = "name")]
    _name: Option<String>,
    /// Conditions that require request inspection, and unknown fields.
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
struct DestinationSpec {
    destination: HostSpec,
    #[serde(default)]
    weight: u32,
}

#[derive(Deserialize)]
struct HostSpec {
    host: String,
    #[serde(default)]
    subset: Option<String>,
    #[serde(default)]
    port: Option<PortSelector>,
}

#[derive(Deserialize)]
struct PortSelector {
    number: u16,
}

/// The reserved gateway name for clients inside the mesh.
const MESH: &str = "mesh";

pub(super) fn virtual_service(context: &mut Context<'_>, mut value: Value) -> Result<Option<VirtualService>, Invalid> {
    let is_name = |path: &str| path.starts_with("http.") && path.ends_with(".name");
    let spec: VirtualServiceSpec = context.deserialize_reporting_ignored("spec", value["spec"].take(), is_name)?;
    if !spec.gateways.is_empty() && !spec.gateways.iter().any(|gateway| gateway == MESH) {
        let message = "does not include \"mesh\": the routes apply only to gateways, so the VirtualService is ignored";
        context.finding(Code::FieldIgnored, "spec.gateways", message);
        return Ok(None);
    }
    if spec.hosts.is_empty() {
        return Err(invalid("spec.hosts", "is empty; add at least one host"));
    }
    if let Some(host) = spec.hosts.iter().find(|host| host.is_empty() || host.trim_start_matches('*').contains('*')) {
        return Err(invalid(
            "spec.hosts",
            format!("{host:?} is not a valid host name; `*` is allowed only at the start"),
        ));
    }
    if !context.exported_to_all(&spec.export_to) {
        return Ok(None);
    }
    let tcp = routes(context, "spec.tcp", spec.tcp)?;
    let http = routes(context, "spec.http", spec.http)?;
    Ok(Some(VirtualService { name: context.name.clone(), hosts: spec.hosts, tcp, http }))
}

fn routes(context: &mut Context<'_>, at: &str, specs: Vec<RouteSpec>) -> Result<Vec<Route>, Invalid> {
    let mut routes = Vec::new();
    for (i, spec) in specs.into_iter().enumerate() {
        routes.extend(route(context, &format!("{at}[{i}]"), spec)?);
    }
    Ok(routes)
}

/// Returns `None` if the route does not apply to clients on this node, or if a node cannot apply it.
fn route(context: &mut Context<'_>, at: &str, spec: RouteSpec) -> Result<Option<Route>, Invalid> {
    let proxy_actions = [
        ("redirect", spec.redirect.is_some()),
        ("directResponse", spec.direct_response.is_some()),
        ("delegate", spec.delegate.is_some()),
    ];
    if let Some((field, _)) = proxy_actions.iter().find(|(_, set)| *set) {
        let message = "requires an HTTP proxy; the route is ignored";
        context.finding(Code::NeedsHttp, format!("{at}.{field}"), message);
        return Ok(None);
    }
    let destinations = destinations(&format!("{at}.route"), spec.route)?;
    let always = spec.matches.is_empty();
    let mut matches = Vec::new();
    for (i, block) in spec.matches.into_iter().enumerate() {
        matches.extend(match_block(context, &format!("{at}.match[{i}]"), block)?);
    }
    Ok((always || !matches.is_empty()).then_some(Route { matches, destinations }))
}

/// Returns `None` if the match never holds for clients on this node, or if a node cannot evaluate it.
fn match_block(context: &mut Context<'_>, at: &str, spec: MatchSpec) -> Result<Option<Match>, Invalid> {
    if let Some(field) = spec.rest.keys().next() {
        let message = "requires request inspection; this match is ignored";
        context.finding(Code::NeedsHttp, format!("{at}.{field}"), message);
        return Ok(None);
    }
    let client_conditions = [
        ("sourceLabels", !spec.source_labels.is_empty()),
        ("sourceNamespace", spec.source_namespace.is_some_and(|namespace| !namespace.is_empty())),
    ];
    if let Some((field, _)) = client_conditions.iter().find(|(_, set)| *set) {
        let message = "is not supported: the policy of a node cannot depend on the client; this match is ignored";
        context.finding(Code::ScopeNotEnforceable, format!("{at}.{field}"), message);
        return Ok(None);
    }
    if !spec.gateways.is_empty() && !spec.gateways.iter().any(|gateway| gateway == MESH) {
        return Ok(None);
    }
    let mut subnets = Vec::new();
    for (i, text) in spec.destination_subnets.iter().enumerate() {
        let field = || format!("{at}.destinationSubnets[{i}]");
        subnets.push(text.parse().map_err(|message: String| invalid(field(), message))?);
    }
    Ok(Some(Match { port: spec.port, subnets }))
}

fn destinations(at: &str, specs: Vec<DestinationSpec>) -> Result<Vec<WeightedDestination>, Invalid> {
    if specs.is_empty() {
        return Err(invalid(at, "has no destination"));
    }
    let single = specs.len() == 1;
    let sum: u64 = specs.iter().map(|spec| u64::from(spec.weight)).sum();
    if sum == 0 && !single {
        return Err(invalid(at, format!("the weights of the {} destinations are all 0", specs.len())));
    }
    let destinations = specs.into_iter().map(|spec| WeightedDestination {
        host: spec.destination.host,
        subset: spec.destination.subset.filter(|subset| !subset.is_empty()),
        port: spec.destination.port.map(|port| port.number),
        weight: if single { 1 } else { spec.weight },
    });
    Ok(destinations.collect())
}
