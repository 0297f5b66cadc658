//! Tracks the age of new endpoints, whose weight grows during warmup.

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    time::{Duration, Instant},
};

/// Number of steps in which the weight of a new endpoint grows.
const STEPS: u32 = 20;
/// Minimum time between two steps.
const SHORTEST_STEP: Duration = Duration::from_secs(1);

/// Warmup state of one pool.
#[derive(Clone, Debug)]
pub(super) struct Warming {
    pub(super) window: Duration,
    /// When each endpoint appeared; `None` if it was there when the pool was first seen.
    since: HashMap<SocketAddr, Option<Instant>>,
    /// When the next weight increase is due; `None` if no endpoint is warming up.
    pub(super) next: Option<Instant>,
}

impl Warming {
    pub(super) fn new(window: Duration) -> Self {
        Self { window, since: HashMap::new(), next: None }
    }

    /// Replaces the endpoints, and returns whether any of them is new.
    pub(super) fn set_hosts(&mut self, now: Instant, hosts: &BTreeSet<SocketAddr>) -> bool {
        let since = if self.since.is_empty() { None } else { Some(now) };
        self.since.retain(|host, _| hosts.contains(host));
        let before = self.since.len();
        for host in hosts {
            self.since.entry(*host).or_insert(since);
        }
        self.next = self.next_step(now);
        since.is_some() && self.since.len() > before
    }

    pub(super) fn ages(&self, now: Instant) -> HashMap<SocketAddr, Duration> {
        let age = |since: Instant| Some(now.saturating_duration_since(since)).filter(|age| *age < self.window);
        self.since.iter().filter_map(|(host, since)| Some((*host, age((*since)?)?))).collect()
    }

    /// Returns when the next weight increase is due; `None` if no endpoint is warming up.
    pub(super) fn next_step(&self, now: Instant) -> Option<Instant> {
        let youngest = self.since.values().flatten().max()?;
        (now.saturating_duration_since(*youngest) < self.window).then(|| {
            let step = (self.window / STEPS).max(SHORTEST_STEP);
            (now + step).min(*youngest + self.window)
        })
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test gets its times from somewhere")]
mod tests {
    use super::*;

    #[test]
    fn only_endpoints_added_later_warm_up() {
        let [a, b, c] = [1, 2, 3].map(|i| SocketAddr::from(([10, 0, 0, i], 80)));
        let start = Instant::now();
        let window = Duration::from_secs(10);
        let mut warming = Warming::new(window);
        warming.set_hosts(start, &BTreeSet::from([a, b]));
        assert_eq!((warming.ages(start), warming.next), (HashMap::new(), None));
        let later = start + Duration::from_secs(60);
        warming.set_hosts(later, &BTreeSet::from([a, b, c]));
        assert_eq!(warming.ages(later), HashMap::from([(c, Duration::ZERO)]));
        let half = later + window / 2;
        assert_eq!(warming.ages(half), HashMap::from([(c, window / 2)]));
        assert_eq!(warming.next, Some(later + SHORTEST_STEP));
        assert_eq!(warming.next_step(half), Some(half + SHORTEST_STEP));
        assert_eq!((warming.ages(later + window), warming.next_step(later + window)), (HashMap::new(), None));
        // An endpoint that is removed and returns is new again.
        warming.set_hosts(half, &BTreeSet::from([b]));
        warming.set_hosts(half, &BTreeSet::from([a, b]));
        assert_eq!(warming.ages(half), HashMap::from([(a, Duration::ZERO)]));
    }
}
