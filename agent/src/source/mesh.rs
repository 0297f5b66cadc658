//! Reader of the MeshConfig, which lives as text in the ConfigMap `istio`.

use serde::Deserialize;
use serde_json::Value;

use super::{
    document,
    istio::{LocalitySpec, duration, locality_setting, nullable},
    read::Context,
};
use crate::model::{ClusterLocalRule, LocalitySetting, MeshConfig};

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct MeshSpec {
    #[serde(default)]
    root_namespace: Option<String>,
    #[serde(default)]
    connect_timeout: Option<String>,
    #[serde(default)]
    locality_lb_setting: Option<LocalitySpec>,
    #[serde(default, deserialize_with = "nullable")]
    service_settings: Vec<ServiceSettingSpec>,
}

#[derive(Deserialize)]
struct ServiceSettingSpec {
    #[serde(default)]
    settings: SettingsSpec,
    #[serde(default, deserialize_with = "nullable")]
    hosts: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SettingsSpec {
    #[serde(default)]
    cluster_local: bool,
}

/// Fields about identity, telemetry, HTTP and Istio's own processes: they say nothing of endpoints, and every
/// installation has some of them.
const OF_OTHERS: [&str; 18] = [
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

pub(super) fn mesh_config(context: &mut Context<'_>, value: Value) -> Result<MeshConfig, String> {
    let text = value.pointer("/data/mesh").and_then(Value::as_str).unwrap_or_default();
    let config = document::parse(1, text).map_err(|message| format!("data.mesh: {message}"))?;
    let spec = match config {
        Value::Null => MeshSpec::default(),
        config => context
            .honoured("data.mesh", config, |path| OF_OTHERS.contains(&path.split('.').next().unwrap_or_default()))?,
    };
    let default = MeshConfig::default();
    let locality = spec.locality_lb_setting.map(|setting| locality_setting("data.mesh.localityLbSetting", setting));
    let timeout = spec.connect_timeout.map(|text| duration("data.mesh.connectTimeout", &text));
    let mut cluster_local = Vec::new();
    for (i, setting) in spec.service_settings.into_iter().enumerate() {
        for host in setting.hosts {
            if host.is_empty() || host.trim_start_matches('*').contains('*') {
                return Err(format!("data.mesh.serviceSettings[{i}].hosts: {host:?}: `*` may only lead"));
            }
            cluster_local.push(ClusterLocalRule { host, cluster_local: setting.settings.cluster_local });
        }
    }
    Ok(MeshConfig {
        root_namespace: spec.root_namespace.unwrap_or(default.root_namespace),
        domain: default.domain,
        locality: locality.transpose()?.unwrap_or_else(LocalitySetting::default),
        cluster_local,
        connect_timeout: timeout.transpose()?,
    })
}
