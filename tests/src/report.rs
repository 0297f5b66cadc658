//! Accessors for the JSON reports of `plan` and `get`.

use anyhow::{Result, bail};
use serde_json::Value;

/// Returns the first entry of the service with this name.
///
/// # Errors
/// Returns an error if the report has no such service.
pub fn service_named<'a>(report: &'a Value, name: &str) -> Result<&'a Value> {
    let mut services = report["services"].as_array().into_iter().flatten();
    match services.find(|service| service["name"] == name) {
        Some(service) => Ok(service),
        None => bail!("no service {name} in {report}"),
    }
}

/// Returns the address and the share (0 to 1) of each endpoint of a service.
pub fn shares(service: &Value) -> Vec<(String, f64)> {
    column(service, "endpoints", "address")
}

/// Returns the name and the share (0 to 1) of each locality of a service.
pub fn locality_shares(service: &Value) -> Vec<(String, f64)> {
    column(service, "localities", "locality")
}

fn column(service: &Value, list: &str, name: &str) -> Vec<(String, f64)> {
    let entries = service[list].as_array().into_iter().flatten();
    entries
        .map(|entry| (entry[name].as_str().unwrap_or_default().to_owned(), entry["share"].as_f64().unwrap_or_default()))
        .collect()
}

/// Returns the first finding about an object whose `field: message` contains `message`.
///
/// # Errors
/// Returns an error if the report has no such finding.
pub fn finding<'a>(report: &'a Value, object: &str, message: &str) -> Result<&'a Value> {
    let mut findings = report["findings"].as_array().into_iter().flatten();
    let found = findings.find(|finding| {
        let text = |key: &str| finding[key].as_str().unwrap_or_default();
        finding["object"] == object && format!("{}: {}", text("field"), text("message")).contains(message)
    });
    match found {
        Some(finding) => Ok(finding),
        None => bail!("no finding about {object} contains {message:?}: {:#}", report["findings"]),
    }
}
