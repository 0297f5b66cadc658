//! Endpoints that are new, and get less at first.

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    time::{Duration, Instant},
};

/// Steps in which the share of a new endpoint grows.
const STEPS: u32 = 20;
/// But no more often than this.
const SHORTEST_STEP: Duration = Duration::from_secs(1);

/// Endpoints that are new.
#[derive(Clone, Debug)]
pub(super) struct Warming {
    pub(super) window: Duration,
    /// Since when each is there; `None`: from the beginning.
    since: HashMap<SocketAddr, Option<Instant>>,
    /// When somebody is to get more.
    pub(super) next: Option<Instant>,
}

impl Warming {
    pub(super) fn new(window: Duration) -> Self {
        Self { window, since: HashMap::new(), next: None }
    }

    /// Those that are there when the pool is first seen count as old: how long they have been there is not known. Returns whether anybody
    /// is new.
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

    /// While anybody is new.
    pub(super) fn next_step(&self, now: Instant) -> Option<Instant> {
        let youngest = self.since.values().flatten().max()?;
        (now.saturating_duration_since(*youngest) < self.window).then(|| {
            let step = (self.window / STEPS).max(SHORTEST_STEP);
            (now + step).min(*youngest + self.window)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_comes_later_is_new() {
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
        // One that goes and comes back is new again.
        warming.set_hosts(half, &BTreeSet::from([b]));
        warming.set_hosts(half, &BTreeSet::from([a, b]));
        assert_eq!(warming.ages(half), HashMap::from([(a, Duration::ZERO)]));
    }
}
