//! What has happened: ejections, releases, failures, and each published change. Kept for a while, and told to whoever follows.

use std::{
    collections::VecDeque,
    time::{Duration, SystemTime},
};

use portolan_core::{
    health::{Cause, DetectorEvent, DetectorEventKind},
    policy::PoolKey,
};
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

/// Records that are kept.
const KEPT: usize = 1_000;
/// Failed connections, and ejections that were not allowed, that are kept: in an outage there are many, and they shall not push
/// out what came of them.
const KEPT_FAILURES: usize = 200;

/// One thing that happened.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// When (RFC 3339).
    pub time: String,
    /// `ejected`, `released`, `overflow`, `failed`, `published`, `closed`, `repaired`, `unconfirmed`, `unhealthy`, `healthy` or `by hand`.
    pub kind: String,
    /// The service, as `namespace/name`, where it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// Its port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Its subset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subset: Option<String>,
    /// The endpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// How long an ejection lasts at least, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_seconds: Option<f64>,
    /// Cookie of the network namespace of the client whose connection failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_netns: Option<u64>,
    /// What caused an ejection: the threshold that was reached, and failures in a row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
    /// Endpoints of the pool that are out, and those that it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub out: Option<[usize; 2]>,
    /// For people.
    pub message: String,
}

/// The records.
#[derive(Debug)]
pub struct EventLog {
    recent: Recent,
    failures: Recent,
    next: u64,
    live: broadcast::Sender<Event>,
}

/// The last records of a sort, with their numbers.
type Recent = VecDeque<(u64, Event)>;

impl Default for EventLog {
    fn default() -> Self {
        Self { recent: Recent::new(), failures: Recent::new(), next: 0, live: broadcast::Sender::new(KEPT) }
    }
}

impl EventLog {
    /// Adds a record, with the time of now.
    pub fn add(&mut self, event: Event) {
        let event = Event { time: rfc3339(SystemTime::now()), ..event };
        let (service, endpoint) = (event.service.as_deref(), event.endpoint.as_deref());
        let (kept, most) = if [Event::FAILED, Event::OVERFLOW, Event::UNCONFIRMED].contains(&event.kind.as_str()) {
            tracing::debug!(kind = event.kind, service, endpoint, "{}", event.message);
            (&mut self.failures, KEPT_FAILURES)
        } else {
            tracing::info!(kind = event.kind, service, endpoint, "{}", event.message);
            (&mut self.recent, KEPT)
        };
        if kept.len() == most {
            kept.pop_front();
        }
        kept.push_back((self.next, event.clone()));
        self.next += 1;
        // An error means that nobody follows.
        let _ = self.live.send(event);
    }

    /// What is kept, and what comes.
    pub fn follow(&self) -> (Vec<Event>, broadcast::Receiver<Event>) {
        let mut kept: Vec<_> = self.recent.iter().chain(&self.failures).collect();
        kept.sort_by_key(|(number, _)| *number);
        (kept.into_iter().map(|(_, event)| event.clone()).collect(), self.live.subscribe())
    }
}

/// A point in time for people and scripts.
pub fn rfc3339(time: SystemTime) -> String {
    // What is read from a file may be beyond what can be written.
    let last = SystemTime::UNIX_EPOCH + Duration::from_secs(253_402_300_799);
    let time = time.clamp(SystemTime::UNIX_EPOCH, last);
    humantime::format_rfc3339_millis(time).to_string()
}

impl Event {
    /// The kind of a connect that failed.
    pub const FAILED: &str = "failed";
    /// The kind of an ejection that the limit did not allow.
    pub const OVERFLOW: &str = "overflow";
    /// The kind of an ejection that nobody has confirmed.
    pub const UNCONFIRMED: &str = "unconfirmed";
    /// The kind of an endpoint whose probes fail.
    pub const UNHEALTHY: &str = "unhealthy";
    /// The kind of an endpoint whose probes pass again.
    pub const HEALTHY: &str = "healthy";
    /// The kind of an order by hand.
    pub const BY_HAND: &str = "by hand";
    /// The kind of connections that were ended.
    pub const CLOSED: &str = "closed";
    /// The kind of a repair: a hook was not in its place.
    pub const REPAIRED: &str = "mended";

    /// A record about an endpoint of a pool.
    pub fn of_pool(pool: &PoolKey, endpoint: std::net::SocketAddr, kind: &str, message: String) -> Self {
        Self {
            kind: kind.to_owned(),
            service: Some(pool.service.to_string()),
            port: Some(pool.port),
            subset: pool.subset.clone(),
            endpoint: Some(endpoint.to_string()),
            message,
            ..Self::default()
        }
    }

    /// From a verdict of the outlier detection.
    pub fn of_health(pool: &PoolKey, event: &DetectorEvent) -> Self {
        let DetectorEvent { address, kind, ejected, hosts } = event;
        let (kind, message) = match kind {
            DetectorEventKind::Ejected { cause, duration } => (
                "ejected",
                format!(
                    "{address} ejected from {pool} for {} after {} failures in a row ({}); {ejected} of {hosts} are out",
                    humantime::format_duration(*duration),
                    cause.failures,
                    cause.threshold.field()
                ),
            ),
            DetectorEventKind::Released => {
                ("released", format!("{address} is back in {pool}; {ejected} of {hosts} are out"))
            }
            DetectorEventKind::Overflow { cause } => (
                Self::OVERFLOW,
                format!(
                    "{address} of {pool} failed {} times in a row, but stays: {ejected} of {hosts} are out, \
                     and maxEjectionPercent allows no more",
                    cause.failures
                ),
            ),
        };
        let duration_seconds = match event.kind {
            DetectorEventKind::Ejected { duration, .. } => Some(duration.as_secs_f64()),
            _ => None,
        };
        let cause = match event.kind {
            DetectorEventKind::Ejected { cause, .. } | DetectorEventKind::Overflow { cause } => Some(cause),
            DetectorEventKind::Released => None,
        };
        let out = Some([*ejected, *hosts]);
        Self { duration_seconds, cause, out, ..Self::of_pool(pool, *address, kind, message) }
    }
}
