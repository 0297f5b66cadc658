//! Decoder for `portolan.io/probe`: an active health check in the format of a Kubernetes container probe.

use std::{sync::Arc, time::Duration};

use k8s_openapi::{api::core::v1 as api, apimachinery::pkg::util::intstr::IntOrString};
use serde_json::Value;

use super::{
    annotations::PROBE,
    context::{Context, Invalid, invalid},
};
use crate::model::{Code, Probe, ProbeKind};

/// Parses the probe annotation of an object. An invalid probe is reported and ignored.
pub(super) fn probe(context: &mut Context<'_>, object: &Value) -> Option<Arc<Probe>> {
    let text = object.pointer("/metadata/annotations")?.get(PROBE)?.as_str()?.to_owned();
    let at = format!("metadata.annotations[\"{PROBE}\"]");
    match read(context, &at, &text) {
        Ok(probe) => Some(Arc::new(probe)),
        Err(Invalid { field, message }) => {
            context.finding(Code::UnknownAnnotation, field, format!("{message}. The probe is ignored"));
            None
        }
    }
}

fn read(context: &mut Context<'_>, at: &str, text: &str) -> Result<Probe, Invalid> {
    let value: Value =
        serde_saphyr::from_str(text).map_err(|error| invalid(at, format!("is not valid YAML: {error}")))?;
    let spec: api::Probe = context.deserialize_reporting_ignored(at, value, |_| false)?;
    let unused = [
        ("initialDelaySeconds", spec.initial_delay_seconds.is_some()),
        ("terminationGracePeriodSeconds", spec.termination_grace_period_seconds.is_some()),
    ];
    for (field, _) in unused.iter().filter(|(_, set)| *set) {
        context.finding(Code::FieldIgnored, format!("{at}.{field}"), "is not supported and has no effect");
    }
    let (kind, port) = match (spec.http_get, spec.tcp_socket, spec.grpc, spec.exec) {
        (Some(http), None, None, None) => http_get(context, at, http)?,
        (None, Some(tcp), None, None) => {
            if tcp.host.is_some() {
                context.finding(
                    Code::FieldIgnored,
                    format!("{at}.tcpSocket.host"),
                    "is not supported: the probe connects to the endpoint itself",
                );
            }
            (ProbeKind::Tcp, port(&format!("{at}.tcpSocket.port"), &tcp.port)?)
        }
        (None, None, Some(grpc), None) => {
            let port = port(&format!("{at}.grpc.port"), &IntOrString::Int(grpc.port))?;
            (ProbeKind::Grpc { service: grpc.service.unwrap_or_default() }, port)
        }
        (None, None, None, Some(_)) => {
            return Err(invalid(
                format!("{at}.exec"),
                "is not supported: the agent cannot run commands in a container",
            ));
        }
        _ => return Err(invalid(at, "must have exactly one of httpGet, tcpSocket, and grpc")),
    };
    let seconds = |field: &str, value: Option<i32>, default: u64| match value {
        Some(value) if value < 1 => Err(invalid(format!("{at}.{field}"), format!("{value} is less than 1"))),
        Some(value) => Ok(Duration::from_secs(value.unsigned_abs().into())),
        None => Ok(Duration::from_secs(default)),
    };
    let times = |field: &str, value: Option<i32>, default: u32| match value {
        Some(value) if value < 1 => Err(invalid(format!("{at}.{field}"), format!("{value} is less than 1"))),
        Some(value) => Ok(value.unsigned_abs()),
        None => Ok(default),
    };
    let period = seconds("periodSeconds", spec.period_seconds, 10)?;
    Ok(Probe {
        kind,
        port,
        period,
        // A shorter timeout keeps a slow endpoint from delaying the probes of others.
        timeout: seconds("timeoutSeconds", spec.timeout_seconds, 1)?.min(period),
        failures: times("failureThreshold", spec.failure_threshold, 3)?,
        successes: times("successThreshold", spec.success_threshold, 1)?,
    })
}

fn http_get(
    context: &mut Context<'_>,
    at: &str,
    http: api::HTTPGetAction,
) -> Result<(ProbeKind, Option<u16>), Invalid> {
    let at = format!("{at}.httpGet");
    if http.scheme.as_deref().is_some_and(|scheme| scheme != "HTTP") {
        return Err(invalid(format!("{at}.scheme"), "only HTTP is supported"));
    }
    if http.host.is_some() {
        let message = "is not supported: probes connect to the endpoint; to select a virtual host, set a Host header";
        context.finding(Code::FieldIgnored, format!("{at}.host"), message);
    }
    let path = http.path.unwrap_or_else(|| "/".to_owned());
    if !path.starts_with('/') || path.parse::<http::Uri>().is_err() {
        return Err(invalid(format!("{at}.path"), format!("{path:?} is not a valid path")));
    }
    let headers: Vec<_> = http.http_headers.into_iter().flatten().map(|header| (header.name, header.value)).collect();
    for (name, value) in &headers {
        let valid =
            name.parse::<http::header::HeaderName>().is_ok() && value.parse::<http::header::HeaderValue>().is_ok();
        if !valid {
            return Err(invalid(format!("{at}.httpHeaders"), format!("{name:?}: {value:?} is not a valid header")));
        }
    }
    Ok((ProbeKind::Http { path, headers }, port(&format!("{at}.port"), &http.port)?))
}

/// Parses the port of a probe. `None`, for 0 or an empty name, means the port of the endpoint.
fn port(at: &str, port: &IntOrString) -> Result<Option<u16>, Invalid> {
    match port {
        IntOrString::Int(0) => Ok(None),
        IntOrString::Int(number) => match u16::try_from(*number) {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(invalid(at, format!("{number} is not a valid port"))),
        },
        IntOrString::String(name) if name.is_empty() => Ok(None),
        IntOrString::String(name) => {
            Err(invalid(at, format!("{name:?} is a port name, which is not supported; use the port number")))
        }
    }
}
