//! What somebody has ordered: an endpoint that shall get no connections, a region that a service shall leave. It holds until it is taken
//! back or its time is up, over restarts of the agent and of the machine; so its times are the wall clock's.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use crate::model::NamespacedName;

/// The wall clock may be set: no wait is longer.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// A time that is set is no longer than this.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3_600);

/// An order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OverrideCommand {
    /// No new connections to an endpoint, in any pool.
    Eject {
        /// Which one.
        endpoint: SocketAddr,
        /// Milliseconds until it may come back; absent: until it is restored.
        #[serde(default)]
        for_ms: Option<u64>,
        /// Why, for people.
        #[serde(default)]
        reason: String,
    },
    /// Takes [`Self::Eject`] back.
    Restore {
        /// Which one.
        endpoint: SocketAddr,
    },
    /// No new connections of a service to a region.
    Drain {
        /// The service.
        service: NamespacedName,
        /// The region.
        region: String,
        /// Why, for people.
        #[serde(default)]
        reason: String,
    },
    /// Takes [`Self::Drain`] back.
    Undrain {
        /// The service.
        service: NamespacedName,
        /// The region.
        region: String,
    },
}

/// An order in force.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Override {
    /// Since when.
    pub since: SystemTime,
    /// Until when; absent: until it is taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<SystemTime>,
    /// Why.
    pub reason: String,
}

/// A region that a service leaves.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Drain {
    /// The service.
    pub service: NamespacedName,
    /// The region.
    pub region: String,
    /// Since when, and why.
    pub ordered: Override,
}

/// All orders in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overrides {
    ejected: BTreeMap<SocketAddr, Override>,
    drained: BTreeSet<Drain>,
}

impl Overrides {
    /// Endpoints that get no connections.
    pub fn ejected(&self) -> impl Iterator<Item = (&SocketAddr, &Override)> {
        self.ejected.iter()
    }

    /// What was ordered of an endpoint.
    pub fn ejection(&self, endpoint: &SocketAddr) -> Option<&Override> {
        self.ejected.get(endpoint)
    }

    /// Regions that services leave.
    pub fn drained(&self) -> impl Iterator<Item = &Drain> {
        self.drained.iter()
    }

    /// The drain that concerns endpoints of a service in a region.
    pub fn drain(&self, service: &NamespacedName, region: &str) -> Option<&Drain> {
        self.drained.iter().find(|drain| drain.service == *service && drain.region == region)
    }

    /// Whether nothing is in force.
    pub fn is_empty(&self) -> bool {
        self.ejected.is_empty() && self.drained.is_empty()
    }

    /// Takes an order; what was done, for people.
    pub(super) fn take(&mut self, order: &OverrideCommand, now: SystemTime) -> Result<String, String> {
        match order {
            OverrideCommand::Eject { for_ms: Some(time), .. } if *time > LONGEST.as_millis() as u64 => Err(format!(
                "that is longer than {}; without --for it holds until it is restored",
                humantime::format_duration(LONGEST)
            )),
            OverrideCommand::Eject { endpoint, for_ms, reason } => {
                let until = for_ms.and_then(|time| now.checked_add(Duration::from_millis(time)));
                self.ejected.insert(*endpoint, Override { since: now, until, reason: reason.clone() });
                let time = for_ms.map_or_else(
                    || "until it is restored".to_owned(),
                    |time| format!("for {}", humantime::format_duration(Duration::from_millis(time))),
                );
                Ok(format!("{endpoint} ejected by hand {time}{}", because(reason)))
            }
            OverrideCommand::Restore { endpoint } => match self.ejected.remove(endpoint) {
                Some(_) => Ok(format!("{endpoint} restored by hand")),
                None => Err(format!("{endpoint} was not ejected by hand")),
            },
            OverrideCommand::Drain { service, region, reason } => {
                self.drained.retain(|drain| !(drain.service == *service && drain.region == *region));
                let ordered = Override { since: now, until: None, reason: reason.clone() };
                self.drained.insert(Drain { service: service.clone(), region: region.clone(), ordered });
                Ok(format!("{service} leaves region {region} by hand{}", because(reason)))
            }
            OverrideCommand::Undrain { service, region } => {
                let before = self.drained.len();
                self.drained.retain(|drain| !(drain.service == *service && drain.region == *region));
                if self.drained.len() < before {
                    Ok(format!("{service} may use region {region} again"))
                } else {
                    Err(format!("{service} was not drained from region {region}"))
                }
            }
        }
    }

    /// Ends the orders whose time is up; what ended, for people.
    pub(super) fn expire(&mut self, now: SystemTime) -> Vec<String> {
        let ended = self.ejected.extract_if(.., |_, ordered| ordered.until.is_some_and(|until| until <= now));
        ended
            .map(|(endpoint, _)| format!("{endpoint} may be used again: the time that was set by hand is up"))
            .collect()
    }

    /// When to look for orders whose time is up.
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
    fn orders_hold_until_their_time_is_up_or_they_are_taken_back() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let [a, b] = [1, 2].map(|i| SocketAddr::from(([10, 0, 0, i], 80)));
        let mut hand = Overrides::default();
        let eject = |endpoint, for_ms| OverrideCommand::Eject { endpoint, for_ms, reason: "maintenance".to_owned() };
        hand.take(&eject(a, Some(60_000)), now).unwrap();
        assert_eq!(
            hand.take(&eject(b, None), now).unwrap(),
            format!("{b} ejected by hand until it is restored: maintenance")
        );
        assert_eq!(hand.left(now), Some(LONGEST_WAIT));
        assert_eq!(hand.expire(now + Duration::from_secs(59)), Vec::<String>::new());
        assert_eq!(hand.expire(now + Duration::from_secs(60)).len(), 1);
        assert_eq!((hand.ejection(&a), hand.left(now)), (None, None));
        let kept: Overrides = serde_json::from_str(&serde_json::to_string(&hand).unwrap()).unwrap();
        assert_eq!(kept, hand);
        assert!(hand.take(&OverrideCommand::Restore { endpoint: b }, now).is_ok());
        assert!(hand.take(&OverrideCommand::Restore { endpoint: b }, now).is_err() && hand.is_empty());
    }

    #[test]
    fn a_region_is_drained_of_one_service() {
        let (now, service) = (SystemTime::UNIX_EPOCH, NamespacedName::new("default", "web"));
        let drain = |region: &str| OverrideCommand::Drain {
            service: service.clone(),
            region: region.to_owned(),
            reason: String::new(),
        };
        let mut hand = Overrides::default();
        hand.take(&drain("r1"), now).unwrap();
        hand.take(&drain("r1"), now).unwrap();
        assert_eq!(hand.drained().count(), 1);
        assert!(hand.drain(&service, "r1").is_some() && hand.drain(&service, "r2").is_none());
        let back = OverrideCommand::Undrain { service: service.clone(), region: "r1".to_owned() };
        assert!(hand.take(&back, now).is_ok() && hand.take(&back, now).is_err());
    }
}
