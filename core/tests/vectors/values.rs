//! Accessors for values in the vectors.

use std::{collections::BTreeSet, net::SocketAddr};

use portolan_core::{
    model::{Labels, Locality},
    report::EndpointReport,
};
use serde_json::Value;

pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

pub fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_default()
}

pub fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

pub fn locality(value: &Value) -> Locality {
    text(value).parse().unwrap()
}

pub fn host(i: u64) -> SocketAddr {
    SocketAddr::from(([10, 0, (i / 200) as u8, (i % 200) as u8 + 1], 80))
}

pub fn labels(value: &Value) -> Labels {
    value.as_object().into_iter().flatten().map(|(key, value)| (key.clone(), text(value))).collect()
}

pub fn texts(value: &Value) -> BTreeSet<String> {
    list(value).iter().map(text).collect()
}

pub fn ip(endpoint: &EndpointReport) -> String {
    endpoint.address.split(':').next().unwrap().to_owned()
}
