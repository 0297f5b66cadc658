//! Scheduling of active probes (`portolan.io/probe`): when to probe each endpoint, and when results change its state.
//! The `check` module makes the probe.
//!
//! Probes are spread over time, and a rate limit applies to the whole node.
//! If rules ask for more, every probe waits longer.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    hash::{BuildHasher as _, RandomState},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use portolan_core::{health::Target, model::Probe};
use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    task::JoinSet,
};

use super::check::{ProbeResult, check};

/// Maximum number of concurrent probes; each uses a file descriptor.
const MAX_IN_FLIGHT: usize = 256;
/// Retry delay of a probe of a failing endpoint, while probes of failing endpoints use half of the limit.
/// Hanging endpoints must not block the probes of healthy ones.
const FAILING_RETRY_DELAY: Duration = Duration::from_millis(100);
/// How many times more often an endpoint is probed until its state is known.
const INITIAL_SPEEDUP: u32 = 10;
/// Maximum deviation of an interval between probes, in percent, so that probes do not synchronize.
const JITTER: u32 = 10;

/// A state change of a probed endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeReport {
    /// Endpoint and probe.
    pub target: Target,
    /// Generation passed to [`Prober::set`]. A result of an earlier generation is stale.
    pub number: u64,
    /// Reason of the last failure; `None` if the endpoint has recovered.
    pub failing: Option<String>,
}

/// Number of finished probes by result, since the agent started.
#[derive(Debug, Default)]
pub struct Counts {
    /// Probes that succeeded.
    pub success: AtomicU64,
    /// Probes that failed.
    pub failing: AtomicU64,
    /// Probes that the agent could not make.
    pub unknown: AtomicU64,
}

/// Handle of the background task that probes endpoints.
#[derive(Debug)]
pub struct Prober {
    wanted: UnboundedSender<(Target, Option<u64>)>,
    /// State changes of endpoints.
    pub found: UnboundedReceiver<ProbeReport>,
    /// Number of finished probes by result.
    pub counts: Arc<Counts>,
    /// Maximum number of probes per second; 0 disables them.
    pub per_second: u32,
}

impl Prober {
    /// Starts the task, with nothing to probe. Must be called from within a Tokio runtime.
    pub fn start(per_second: u32) -> Self {
        let (wanted, targets) = unbounded_channel();
        let (sender, found) = unbounded_channel();
        let counts = Arc::new(Counts::default());
        if per_second > 0 {
            tokio::spawn(run(targets, sender, Arc::clone(&counts), Duration::from_secs(1) / per_second));
        }
        Self { wanted, found, counts, per_second }
    }

    /// Starts probing a target under this generation number, or stops with `None`.
    pub fn set(&self, target: Target, wanted: Option<u64>) {
        // An error means that probes are disabled.
        let _ = self.wanted.send((target, wanted));
    }
}

/// Targets, their state, and the times of their next probes.
#[derive(Debug, Default)]
struct Schedule {
    rows: HashMap<Target, Row>,
    /// Due time, generation and target. Entries of an old generation are stale and skipped.
    due: BinaryHeap<Reverse<(Instant, u64, Target)>>,
    hasher: RandomState,
}

/// State of one target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Row {
    number: u64,
    /// Current state: passing until it fails often enough in a row.
    failing: bool,
    /// Whether a probe has established that state; until then it is assumed.
    known: bool,
    /// Consecutive results that contradict the state.
    against: u32,
}

impl Row {
    /// Records a result. Returns whether it changes the state.
    fn take(&mut self, probe: &Probe, failing: bool) -> bool {
        if failing == self.failing {
            self.known = true;
            self.against = 0;
            return false;
        }
        self.against += 1;
        if self.against < if failing { probe.failures } else { probe.successes } {
            return false;
        }
        (self.failing, self.known, self.against) = (failing, true, 0);
        true
    }

    /// Returns the time to the next probe, without jitter.
    fn wait(&self, probe: &Probe) -> Duration {
        if self.known { probe.period } else { probe.period / INITIAL_SPEEDUP }
    }
}

impl Schedule {
    fn set(&mut self, target: Target, wanted: Option<u64>, now: Instant) {
        let Some(number) = wanted else {
            self.rows.remove(&target);
            return;
        };
        if self.rows.get(&target).is_none_or(|row| row.number != number) {
            let row = Row { number, ..Row::default() };
            let first = row.wait(&target.probe).mul_f64(self.fraction(row.number));
            self.due.push(Reverse((now + first, row.number, target.clone())));
            self.rows.insert(target, row);
        }
    }

    /// Returns when the next probe is due, and drops stale entries.
    fn next(&mut self) -> Option<Instant> {
        while let Some(Reverse((at, number, target))) = self.due.peek() {
            if self.rows.get(target).is_some_and(|row| row.number == *number) {
                return Some(*at);
            }
            self.due.pop();
        }
        None
    }

    /// Removes and returns the next target, if it is due.
    fn take_due(&mut self, now: Instant) -> Option<(Target, u64)> {
        self.next().filter(|at| *at <= now)?;
        self.due.pop().map(|Reverse((_, number, target))| (target, number))
    }

    /// Records a result and schedules the next probe. Returns the state change, if any.
    fn take(&mut self, (target, number): (Target, u64), verdict: ProbeResult, now: Instant) -> Option<ProbeReport> {
        let fraction = self.fraction(now.elapsed().as_nanos() as u64 ^ number.rotate_left(32));
        let row = self.rows.get_mut(&target).filter(|row| row.number == number)?;
        let changed = match &verdict {
            ProbeResult::Success => row.take(&target.probe, false),
            ProbeResult::Failing(_) => row.take(&target.probe, true),
            ProbeResult::Unknown(_) => false,
        };
        let jitter = f64::from(100 - JITTER) + f64::from(2 * JITTER) * fraction;
        let at = now + row.wait(&target.probe).mul_f64(jitter / 100.0);
        self.due.push(Reverse((at, number, target.clone())));
        let failing = if let ProbeResult::Failing(why) = verdict { Some(why) } else { None };
        changed.then_some(ProbeReport { target, number, failing })
    }

    /// Returns the target to probe now, and whether it is failing.
    /// `failing_in_flight` is the number of running probes of failing targets.
    fn begin(&mut self, now: Instant, failing_in_flight: usize) -> Option<((Target, u64), bool)> {
        let (target, number) = self.take_due(now)?;
        let is_failing = self.rows.get(&target).is_some_and(|row| row.failing);
        if is_failing && failing_in_flight >= MAX_IN_FLIGHT / 2 {
            self.due.push(Reverse((now + FAILING_RETRY_DELAY, number, target)));
            return None;
        }
        Some(((target, number), is_failing))
    }

    /// Returns a pseudo-random number in [0, 1), different on each agent.
    fn fraction(&self, of: u64) -> f64 {
        (self.hasher.hash_one(of) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Runs until the [`Prober`] is dropped.
async fn run(
    mut targets: UnboundedReceiver<(Target, Option<u64>)>,
    found: UnboundedSender<ProbeReport>,
    counts: Arc<Counts>,
    pace: Duration,
) {
    let mut schedule = Schedule::default();
    let mut checks = JoinSet::new();
    let mut free = Instant::now();
    // Running probes of failing endpoints. One that hangs occupies its slot until its timeout.
    let mut failing_in_flight = 0;
    loop {
        let due = schedule.next().map(|at| at.max(free)).filter(|_| checks.len() < MAX_IN_FLIGHT);
        let wait = async {
            match due {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            wanted = targets.recv() => {
                let Some((target, wanted)) = wanted else { return };
                schedule.set(target, wanted, Instant::now());
            }
            Some(finished) = checks.join_next() => {
                // Checks neither panic nor are aborted.
                let Ok((asked, was_failing, verdict)) = finished else { continue };
                failing_in_flight -= usize::from(was_failing);
                let count = match &verdict {
                    ProbeResult::Success => &counts.success,
                    ProbeResult::Failing(_) => &counts.failing,
                    ProbeResult::Unknown(_) => &counts.unknown,
                };
                count.fetch_add(1, Ordering::Relaxed);
                if let Some(probed) = schedule.take(asked, verdict, Instant::now())
                    && found.send(probed).is_err()
                {
                    return;
                }
            }
            () = wait => {
                let now = Instant::now();
                if let Some(((target, number), is_failing)) = schedule.begin(now, failing_in_flight) {
                    free = now + pace;
                    failing_in_flight += usize::from(is_failing);
                    checks.spawn(async move {
                        let verdict = check(target.endpoint, &target.probe).await;
                        ((target, number), is_failing, verdict)
                    });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_core::model::ProbeKind;

    fn target(failures: u32, successes: u32) -> Target {
        let probe = Probe {
            kind: ProbeKind::Tcp,
            port: None,
            period: Duration::from_secs(10),
            timeout: Duration::from_secs(1),
            failures,
            successes,
        };
        Target { endpoint: "10.0.0.1:80".parse().unwrap(), probe: Arc::new(probe) }
    }

    #[test]
    fn only_consecutive_results_change_the_state() {
        let target = target(3, 2);
        let mut row = Row::default();
        let results = [true, true, false, true, true, true, true, false, true, false, false, false];
        let changes: Vec<bool> = results.iter().map(|failing| row.take(&target.probe, *failing)).collect();
        let changed: Vec<usize> = (0..results.len()).filter(|i| changes[*i]).collect();
        assert_eq!(changed, [5, 10]);
        assert!(!row.failing);
    }

    #[test]
    fn unknown_state_is_probed_more_often_and_unknown_results_change_nothing() {
        let (mut schedule, target, began) = (Schedule::default(), target(2, 1), Instant::now());
        schedule.set(target.clone(), Some(1), began);
        schedule.set(target.clone(), Some(1), began);
        assert_eq!(schedule.due.len(), 1, "setting the same generation again is a no-op");
        let first = schedule.next().unwrap();
        assert!(first <= began + Duration::from_secs(1));
        let mut now = first;
        let mut answer = |schedule: &mut Schedule, verdict: ProbeResult| {
            now = now.max(schedule.next().unwrap());
            let asked = schedule.take_due(now).unwrap();
            assert_eq!(schedule.take_due(now), None, "a target has at most one probe in flight");
            let probed = schedule.take(asked, verdict, now);
            (probed, schedule.next().unwrap() - now)
        };
        let failing = || ProbeResult::Failing("no".to_owned());
        let (probed, wait) = answer(&mut schedule, failing());
        assert_eq!(probed, None);
        assert!((0.9..=1.1).contains(&wait.as_secs_f64()), "{wait:?}");
        assert_eq!(answer(&mut schedule, ProbeResult::Unknown("no route".to_owned())).0, None);
        let (probed, wait) = answer(&mut schedule, failing());
        assert_eq!(probed, Some(ProbeReport { target: target.clone(), number: 1, failing: Some("no".to_owned()) }));
        assert!((9.0..=11.0).contains(&wait.as_secs_f64()), "{wait:?}");
        assert_eq!(
            answer(&mut schedule, ProbeResult::Success).0,
            Some(ProbeReport { target: target.clone(), number: 1, failing: None })
        );
        // A probe in flight while its target is removed and added again is stale.
        let at = schedule.next().unwrap();
        let asked = schedule.take_due(at).unwrap();
        schedule.set(target.clone(), None, at);
        schedule.set(target, Some(2), at);
        assert_eq!(schedule.take(asked, failing(), at), None);
        assert_eq!(schedule.due.len(), 1);
    }

    /// Hanging endpoints occupy their slots until their timeouts, and must leave slots for others.
    #[test]
    fn failing_endpoints_get_at_most_half_of_the_slots() {
        let (mut schedule, target, began) = (Schedule::default(), target(1, 1), Instant::now());
        schedule.set(target.clone(), Some(1), began);
        let mut now = schedule.next().unwrap();
        let (asked, was_failing) = schedule.begin(now, MAX_IN_FLIGHT).unwrap();
        assert!(!was_failing, "the limit applies only to failing endpoints");
        schedule.take(asked, ProbeResult::Failing("no".to_owned()), now);
        now = schedule.next().unwrap();
        assert_eq!(schedule.begin(now, MAX_IN_FLIGHT / 2), None);
        assert_eq!(schedule.next(), Some(now + FAILING_RETRY_DELAY));
        assert_eq!(schedule.begin(now + FAILING_RETRY_DELAY, MAX_IN_FLIGHT / 2 - 1), Some(((target, 1), true)));
    }

    #[tokio::test]
    async fn probe_rate_stays_within_the_limit() {
        // No listener: each probe fails immediately, and is counted.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = listener.local_addr().unwrap();
        drop(listener);
        let mut prober = Prober::start(50);
        let began = Instant::now();
        for i in 0..30u64 {
            let Target { probe, .. } = target(1, 1);
            // A different period makes each a distinct target.
            let probe = Probe { period: Duration::from_millis(100 + i), ..(*probe).clone() };
            prober.set(Target { endpoint, probe: Arc::new(probe) }, Some(i));
        }
        for _ in 0..30 {
            let probed = prober.found.recv().await.unwrap();
            assert!(probed.failing.is_some(), "{probed:?}");
        }
        // Without the limit, all would finish within about 10 ms.
        assert!(began.elapsed() >= Duration::from_millis(29 * 20), "{:?}", began.elapsed());
        assert!(prober.counts.failing.load(Ordering::Relaxed) >= 30);
    }
}
