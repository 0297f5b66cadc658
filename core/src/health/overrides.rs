//! Operator overrides: ejected endpoints, and regions that a service is drained from.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use crate::model::NamespacedName;

/// Maximum time between checks for expired overrides, because the wall clock may be set.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// Maximum duration of an override that expires.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3_600);

/// A command that adds or reverts an override.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OverrideCommand {
    /// Stops new connections to an endpoint, in all pools.
    Eject {
        /// Address and port of the endpoint.
        endpoint: SocketAddr,
        /// Duration in milliseconds; if absent, until the endpoint is restored.
        #[serde(default)]
        for_ms: Option<u64>,
        /// Free-text reason; may be empty.
        #[serde(default)]
        reason: String,
    },
    /// Reverts [`Self::Eject`].
    Restore {
        /// Address and port of the endpoint.
        endpoint: SocketAddr,
    },
    /// Stops new connections of a service to a region.
    Drain {
        /// Namespace and name of the service.
        service: NamespacedName,
        /// Name of the region.
        region: String,
        /// Free-text reason; may be empty.
        #[serde(default)]
        reason: String,
    },
    /// Reverts [`Self::Drain`].
    Undrain {
        /// Namespace and name of the service.
        service: NamespacedName,
        /// Name of the region.
        region: String,
    },
}

/// An override in effect.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Override {
    /// When the override was added.
    pub since: SystemTime,
    /// When the override expires; absent if it lasts until it is reverted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<SystemTime>,
    /// Free-text reason; may be empty.
    pub reason: String,
}

/// A region that a service is drained from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Drain {
    /// Namespace and name of the service.
    pub service: NamespacedName,
    /// Name of the region.
    pub region: String,
    /// When and why the region was drained.
    pub ordered: Override,
}

/// All overrides in effect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overrides {
    ejected: BTreeMap<SocketAddr, Override>,
    drained: BTreeSet<Drain>,
}

impl Overrides {
    /// Returns the ejected endpoints, ordered by address.
    pub fn ejected(&self) -> impl Iterator<Item = (&SocketAddr, &Override)> {
        self.ejected.iter()
    }

    /// Returns the override that ejects an endpoint, if any.
    pub fn ejection(&self, endpoint: &SocketAddr) -> Option<&Override> {
        self.ejected.get(endpoint)
    }

    /// Returns the drained regions, ordered by service and region.
    pub fn drained(&self) -> impl Iterator<Item = &Drain> {
        self.drained.iter()
    }

    /// Returns the drain of a service from a region, if any.
    pub fn drain(&self, service: &NamespacedName, region: &str) -> Option<&Drain> {
        self.drained.iter().find(|drain| drain.service == *service && drain.region == region)
    }

    /// Returns whether no override is in effect.
    pub fn is_empty(&self) -> bool {
        self.ejected.is_empty() && self.drained.is_empty()
    }

    /// Executes a command. Returns a message for the operator, both on success and on failure.
    pub(super) fn take(&mut self, command: &OverrideCommand, now: SystemTime) -> Result<String, String> {
        match command {
            OverrideCommand::Eject { for_ms: Some(time), .. } if *time > LONGEST.as_millis() as u64 => Err(format!(
                "duration is longer than {}; omit --for to eject until restored",
                humantime::format_duration(LONGEST)
            )),
            OverrideCommand::Eject { endpoint, for_ms, reason } => {
                let until = for_ms.and_then(|time| now.checked_add(Duration::from_millis(time)));
                self.ejected.insert(*endpoint, Override { since: now, until, reason: reason.clone() });
                let time = for_ms.map_or_else(
                    || "until restored".to_owned(),
                    |time| format!("for {}", humantime::format_duration(Duration::from_millis(time))),
                );
                Ok(format!("{endpoint} ejected by operator {time}{}", because(reason)))
            }
            OverrideCommand::Restore { endpoint } => match self.ejected.remove(endpoint) {
                Some(_) => Ok(format!("{endpoint} restored by operator")),
                None => Err(format!("{endpoint} is not ejected by an operator")),
            },
            OverrideCommand::Drain { service, region, reason } => {
                self.drained.retain(|drain| !(drain.service == *service && drain.region == *region));
                let ordered = Override { since: now, until: None, reason: reason.clone() };
                self.drained.insert(Drain { service: service.clone(), region: region.clone(), ordered });
                Ok(format!("{service} drained from region {region} by operator{}", because(reason)))
            }
            OverrideCommand::Undrain { service, region } => {
                let before = self.drained.len();
                self.drained.retain(|drain| !(drain.service == *service && drain.region == *region));
                if self.drained.len() < before {
                    Ok(format!("{service} no longer drained from region {region}"))
                } else {
                    Err(format!("{service} is not drained from region {region}"))
                }
            }
        }
    }

    /// Removes expired overrides, and returns a message for the operator about each.
    pub(super) fn expire(&mut self, now: SystemTime) -> Vec<String> {
        let ended = self.ejected.extract_if(.., |_, ordered| ordered.until.is_some_and(|until| until <= now));
        ended.map(|(endpoint, _)| format!("{endpoint} restored: operator ejection expired")).collect()
    }

    /// Returns how long to wait before the next check for expired overrides; `None` if none expires.
    pub(super) fn left(&self, now: SystemTime) -> Option<Duration> {
        let next = self.ejected.values().filter_map(|ordered| ordered.until).min()?;
        Some(next.duration_since(now).unwrap_or_default().min(LONGEST_WAIT))
    }
}

fn because(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overrides_last_until_they_expire_or_are_reverted() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let [a, b] = [1, 2].map(|i| SocketAddr::from(([10, 0, 0, i], 80)));
        let mut overrides = Overrides::default();
        let eject = |endpoint, for_ms| OverrideCommand::Eject { endpoint, for_ms, reason: "maintenance".to_owned() };
        overrides.take(&eject(a, Some(60_000)), now).unwrap();
        assert_eq!(
            overrides.take(&eject(b, None), now).unwrap(),
            format!("{b} ejected by operator until restored: maintenance")
        );
        assert_eq!(overrides.left(now), Some(LONGEST_WAIT));
        assert_eq!(overrides.expire(now + Duration::from_secs(59)), Vec::<String>::new());
        assert_eq!(overrides.expire(now + Duration::from_secs(60)).len(), 1);
        assert_eq!((overrides.ejection(&a), overrides.left(now)), (None, None));
        let parsed: Overrides = serde_json::from_str(&serde_json::to_string(&overrides).unwrap()).unwrap();
        assert_eq!(parsed, overrides);
        assert!(overrides.take(&OverrideCommand::Restore { endpoint: b }, now).is_ok());
        assert!(overrides.take(&OverrideCommand::Restore { endpoint: b }, now).is_err() && overrides.is_empty());
    }

    #[test]
    fn drain_affects_one_region_of_a_service() {
        let (now, service) = (SystemTime::UNIX_EPOCH, NamespacedName::new("default", "web"));
        let drain = |region: &str| OverrideCommand::Drain {
            service: service.clone(),
            region: region.to_owned(),
            reason: String::new(),
        };
        let mut overrides = Overrides::default();
        overrides.take(&drain("r1"), now).unwrap();
        overrides.take(&drain("r1"), now).unwrap();
        assert_eq!(overrides.drained().count(), 1);
        assert!(overrides.drain(&service, "r1").is_some() && overrides.drain(&service, "r2").is_none());
        let back = OverrideCommand::Undrain { service: service.clone(), region: "r1".to_owned() };
        assert!(overrides.take(&back, now).is_ok() && overrides.take(&back, now).is_err());
    }
}
