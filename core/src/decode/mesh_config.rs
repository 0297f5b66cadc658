//! Decoder for the MeshConfig, which the ConfigMap `istio` contains as text.

use serde::Deserialize;
use serde_json::Value;

use super::{
    annotations::{DISTRIBUTE_WITH_FAILOVER, PREFER_CLUSTER_LOCAL},
    context::{Context, Invalid, invalid},
    locality_lb::{LocalitySpec, locality_setting, maybe_duration, null_as_default},
    yaml,
};
use crate::model::{ClusterLocal, ClusterLocalRule, Code, LocalitySetting, MeshConfig};

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct MeshSpec {
    #[serde(default)]
    root_namespace: Option<String>,
    #[serde(default)]
    connect_timeout: Option<String>,
    #[serde(default)]
    locality_lb_setting: Option<LocalitySpec>,
    #[serde(default, deserialize_with = "null_as_default")]
    service_settings: Vec<ServiceSettingSpec>,
}

#[derive(Deserialize)]
struct ServiceSettingSpec {
    #[serde(default)]
    settings: SettingsSpec,
    #[serde(default, deserialize_with = "null_as_default")]
    hosts: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SettingsSpec {
    #[serde(default)]
    cluster_local: bool,
}

/// Fields about identity, telemetry, HTTP, and Istio's own processes.
/// They do not affect endpoint selection, and every installation sets some of them, so they are not reported.
const UNRELATED_FIELDS: [&str; 18] = [
    "accessLogFile",
    "accessLogFormat",
    "accessLogEncoding",
    "ca",
    "caCertificates",
    "certificates",
    "configSources",
    "defaultConfig",
    "defaultProviders",
    "enableAutoMtls",
    "enablePrometheusMerge",
    "enableTracing",
    "extensionProviders",
    "ingressClass",
    "ingressControllerMode",
    "ingressService",
    "trustDomain",
    "trustDomainAliases",
];

pub(super) fn mesh_config(context: &mut Context<'_>, value: Value) -> Result<MeshConfig, Invalid> {
    let data = value.get("data").and_then(Value::as_object);
    let Some(text) = data.and_then(|data| data.get("mesh")?.as_str()) else {
        let message = "is not a string; write the MeshConfig as text after `mesh: |`. \
                       Without it, the agent cannot tell which traffic must stay in its cluster";
        return Err(invalid("data.mesh", message));
    };
    for key in data.into_iter().flat_map(|data| data.keys()).filter(|key| *key != "mesh") {
        context.finding(
            Code::FieldIgnored,
            format!("data.{key}"),
            "is not supported: Portolan assumes a flat network and reads only data.mesh",
        );
    }
    let config = yaml::parse(text).map_err(|error| {
        let at =
            error.at.map(|(line, column)| format!("line {line}, column {column} of the text: ")).unwrap_or_default();
        invalid("data.mesh", format!("{at}{}", error.message))
    })?;
    let spec = match config {
        Value::Null => MeshSpec::default(),
        config => context.deserialize_reporting_ignored("data.mesh", config, |path| {
            UNRELATED_FIELDS.contains(&path.split('.').next().unwrap_or_default())
        })?,
    };
    let default = MeshConfig::default();
    let allow_both = context.bool_annotation(&value, DISTRIBUTE_WITH_FAILOVER);
    let locality = match spec.locality_lb_setting {
        Some(setting) => locality_setting(context, "data.mesh.localityLbSetting", setting, allow_both)?,
        None => LocalitySetting::default(),
    };
    let mut cluster_local = Vec::new();
    for (i, setting) in spec.service_settings.into_iter().enumerate() {
        for host in setting.hosts {
            check_host(&format!("data.mesh.serviceSettings[{i}].hosts"), &host)?;
            let strict = if setting.settings.cluster_local { ClusterLocal::Strict } else { ClusterLocal::Off };
            cluster_local.push(ClusterLocalRule { host, cluster_local: strict });
        }
    }
    let preferred = value.pointer("/metadata/annotations").and_then(|map| map.get(PREFER_CLUSTER_LOCAL));
    if preferred.is_some_and(|list| !list.is_string()) {
        let field = format!("metadata.annotations[\"{PREFER_CLUSTER_LOCAL}\"]");
        context.finding(Code::UnknownAnnotation, field, "is not a string and is ignored");
    }
    let preferred = preferred.and_then(Value::as_str);
    let preferred = preferred.into_iter().flat_map(|list| list.split(',')).map(str::trim);
    for host in preferred.filter(|host| !host.is_empty()) {
        check_host(&format!("metadata.annotations[\"{PREFER_CLUSTER_LOCAL}\"]"), host)?;
        cluster_local.push(ClusterLocalRule { host: host.to_owned(), cluster_local: ClusterLocal::Prefer });
    }
    Ok(MeshConfig {
        root_namespace: spec.root_namespace.unwrap_or(default.root_namespace),
        domain: default.domain,
        locality,
        cluster_local,
        connect_timeout: maybe_duration("data.mesh.connectTimeout", spec.connect_timeout)?,
    })
}

fn check_host(at: &str, host: &str) -> Result<(), Invalid> {
    if host.is_empty() || host.trim_start_matches('*').contains('*') {
        return Err(invalid(at, format!("{host:?} is not valid; `*` is allowed only at the start")));
    }
    Ok(())
}
