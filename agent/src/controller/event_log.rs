//! What happened on this node: ejections, releases, failures, changes. A bounded log, and a stream for those who follow it.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use portolan_core::{
    health::{Cause, DetectorEvent, DetectorEventKind},
    policy::PoolKey,
};
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

/// Events that are kept, apart from failures.
const MAX_EVENTS: usize = 1_000;
/// Failures that are kept. An outage brings many, and they must not evict the ejections that follow from them.
const MAX_FAILURES: usize = 200;

/// What kind of event it is. The names are the values of `kind` in JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// An endpoint is ejected by outlier detection.
    Ejected,
    /// An ejection has ended.
    Released,
    /// An endpoint reached a threshold, but `maxEjectionPercent` allows no further ejection.
    #[serde(alias = "overflow")]
    EjectionLimited,
    /// An endpoint reached a threshold, but only one pod saw the failures and the agent could not confirm them.
    Unconfirmed,
    /// A connection failed, or a response counts as a failure.
    Failed,
    /// Active probes of an endpoint fail.
    Unhealthy,
    /// Active probes of an endpoint pass again.
    Healthy,
    /// An operator ejected, drained or restored something, or such an override expired.
    #[serde(alias = "by hand")]
    Override,
    /// Connections were terminated.
    Closed,
    /// A hook, or the accounting of connections, was repaired.
    #[serde(alias = "mended")]
    Repaired,
    /// The kernel holds a new table.
    Published,
    /// A kind that this version does not know: the agent is newer.
    #[default]
    #[serde(other)]
    Unknown,
}

impl EventKind {
    /// Returns the name that JSON and the log use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ejected => "ejected",
            Self::Released => "released",
            Self::EjectionLimited => "ejection-limited",
            Self::Unconfirmed => "unconfirmed",
            Self::Failed => "failed",
            Self::Unhealthy => "unhealthy",
            Self::Healthy => "healthy",
            Self::Override => "override",
            Self::Closed => "closed",
            Self::Repaired => "repaired",
            Self::Published => "published",
            Self::Unknown => "unknown",
        }
    }

    /// Reports whether an outage brings many of them.
    fn is_failure(self) -> bool {
        matches!(self, Self::Failed | Self::EjectionLimited | Self::Unconfirmed)
    }
}

/// Something that happened on this node, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// When it happened (RFC 3339, with milliseconds).
    pub time: String,
    /// What kind of event it is.
    pub kind: EventKind,
    /// The service that it is about, as `namespace/name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// The port of the service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The subset of the service, where its rule defines one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subset: Option<String>,
    /// The endpoint that it is about, as `address:port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// The minimum duration of an ejection, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_seconds: Option<f64>,
    /// Cookie of the network namespace of the client whose connection failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_netns: Option<u64>,
    /// The threshold that was reached, and the number of consecutive failures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
    /// Endpoints of the pool that are ejected, and endpoints that it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub out: Option<[usize; 2]>,
    /// The event in words.
    pub message: String,
}

impl Event {
    /// An event that is about no single endpoint.
    pub fn new(kind: EventKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), ..Self::default() }
    }

    /// An event about an endpoint of a pool.
    pub fn of_pool(pool: &PoolKey, endpoint: SocketAddr, kind: EventKind, message: impl Into<String>) -> Self {
        Self {
            service: Some(pool.service.to_string()),
            port: Some(pool.port),
            subset: pool.subset.clone(),
            endpoint: Some(endpoint.to_string()),
            ..Self::new(kind, message)
        }
    }

    /// The event of an outlier detector.
    pub fn of_detector(pool: &PoolKey, event: &DetectorEvent) -> Self {
        let DetectorEvent { address, kind, ejected, hosts } = event;
        let out = format!("{ejected} of {hosts} endpoints are ejected");
        let (kind, message, cause, duration) = match kind {
            DetectorEventKind::Ejected { cause, duration } => {
                let (time, field) = (humantime::format_duration(*duration), cause.threshold.field());
                let why = format!("after {} consecutive failures ({field})", cause.failures);
                let message = format!("{address} ejected from {pool} for {time} {why}; {out}");
                (EventKind::Ejected, message, Some(*cause), Some(duration.as_secs_f64()))
            }
            DetectorEventKind::Released => {
                (EventKind::Released, format!("{address} is back in {pool}; {out}"), None, None)
            }
            DetectorEventKind::Overflow { cause } => {
                let failures = cause.failures;
                let message = format!(
                    "{address} of {pool} has {failures} consecutive failures, but is not ejected: {out}, and \
                     maxEjectionPercent allows no more"
                );
                (EventKind::EjectionLimited, message, Some(*cause), None)
            }
        };
        let out = Some([*ejected, *hosts]);
        Self { duration_seconds: duration, cause, out, ..Self::of_pool(pool, *address, kind, message) }
    }
}

/// The last events of a sort, with their sequence numbers.
type Recent = VecDeque<(u64, Event)>;

/// The last events, and the stream of those to come.
#[derive(Debug)]
pub struct EventLog {
    recent: Recent,
    failures: Recent,
    next: u64,
    live: broadcast::Sender<Event>,
}

impl Default for EventLog {
    fn default() -> Self {
        Self { recent: Recent::new(), failures: Recent::new(), next: 0, live: broadcast::Sender::new(MAX_EVENTS) }
    }
}

impl EventLog {
    /// Adds an event, with its time.
    pub fn add(&mut self, now: SystemTime, event: Event) {
        let event = Event { time: rfc3339(now), ..event };
        let (kind, service, endpoint) = (event.kind.as_str(), event.service.as_deref(), event.endpoint.as_deref());
        let (log, max) = if event.kind.is_failure() {
            tracing::debug!(kind, service, endpoint, "{}", event.message);
            (&mut self.failures, MAX_FAILURES)
        } else {
            tracing::info!(kind, service, endpoint, "{}", event.message);
            (&mut self.recent, MAX_EVENTS)
        };
        if log.len() == max {
            log.pop_front();
        }
        log.push_back((self.next, event.clone()));
        self.next += 1;
        // An error means that there are no followers.
        let _ = self.live.send(event);
    }

    /// Returns the events so far, oldest first, and a stream of those to come.
    pub fn follow(&self) -> (Vec<Event>, broadcast::Receiver<Event>) {
        let mut events: Vec<_> = self.recent.iter().chain(&self.failures).collect();
        events.sort_by_key(|(number, _)| *number);
        (events.into_iter().map(|(_, event)| event.clone()).collect(), self.live.subscribe())
    }
}

/// Formats a time as RFC 3339 with milliseconds. Times before 1970 and after 9999 are clamped.
pub fn rfc3339(time: SystemTime) -> String {
    // A state file may hold any time.
    let last = SystemTime::UNIX_EPOCH + Duration::from_secs(253_402_300_799);
    let time = time.clamp(SystemTime::UNIX_EPOCH, last);
    humantime::format_rfc3339_millis(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_do_not_evict_other_events() {
        let mut log = EventLog::default();
        let now = SystemTime::now();
        log.add(now, Event::new(EventKind::Ejected, "first"));
        for _ in 0..2 * MAX_EVENTS {
            log.add(now, Event::new(EventKind::Failed, "failed"));
        }
        let (events, _) = log.follow();
        assert_eq!(events.len(), MAX_FAILURES + 1);
        assert_eq!(events[0].message, "first");
    }

    #[test]
    fn kinds_of_other_versions_are_read() {
        let kind = |text: &str| serde_json::from_str::<EventKind>(&format!("{text:?}")).unwrap();
        assert_eq!(kind("mended"), EventKind::Repaired);
        assert_eq!(kind("by hand"), EventKind::Override);
        assert_eq!(kind("overflow"), EventKind::EjectionLimited);
        assert_eq!(kind("what a later version says"), EventKind::Unknown);
        for known in [EventKind::EjectionLimited, EventKind::Published, EventKind::Override] {
            assert_eq!(serde_json::to_string(&known).unwrap(), format!("{:?}", known.as_str()));
        }
    }
}
