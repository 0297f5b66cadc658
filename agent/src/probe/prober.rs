//! Active probes: the agent asks endpoints by itself how they are, where a rule wants that. This file decides when, and what a row of answers
//! means; `check` asks.
//!
//! The probes of a node are spread over time, and there are never more in a second than is allowed: where rules want more, each waits longer.

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

/// Probes at once; each holds a descriptor.
const AT_ONCE: usize = 256;
/// Half of these are for endpoints that are not taken for failing; another that is waits so long.
const PUT_OFF: Duration = Duration::from_millis(100);
/// Until something is known of an endpoint, it is asked so many times as often.
const EAGERNESS: u32 = 10;
/// A time between two probes may be so much shorter or longer, in percent, that they do not all fall together.
const JITTER: u32 = 10;

/// An endpoint is found to be otherwise than before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probed {
    /// Which.
    pub target: Target,
    /// The number that it was wanted under: what is found of a former one says nothing of this one.
    pub number: u64,
    /// Why it is failing; `None`: it is well again.
    pub failing: Option<String>,
}

/// Probes so far.
#[derive(Debug, Default)]
pub struct Counts {
    /// The endpoint was well.
    pub well: AtomicU64,
    /// It was not.
    pub failing: AtomicU64,
    /// The agent could not ask.
    pub unknown: AtomicU64,
}

/// The one who probes.
#[derive(Debug)]
pub struct Prober {
    wanted: UnboundedSender<(Target, Option<u64>)>,
    /// What has changed.
    pub found: UnboundedReceiver<Probed>,
    /// Probes so far.
    pub counts: Arc<Counts>,
    /// Probes in a second at the most; with 0 there are none.
    pub per_second: u32,
}

impl Prober {
    /// Begins, with nothing to probe. To be called inside a runtime.
    pub fn start(per_second: u32) -> Self {
        let (wanted, targets) = unbounded_channel();
        let (sender, found) = unbounded_channel();
        let counts = Arc::new(Counts::default());
        if per_second > 0 {
            tokio::spawn(run(targets, sender, Arc::clone(&counts), Duration::from_secs(1) / per_second));
        }
        Self { wanted, found, counts, per_second }
    }

    /// Has an endpoint probed from now on, under this number, or no longer.
    pub fn set(&self, target: Target, wanted: Option<u64>) {
        // An error means that there are to be none.
        let _ = self.wanted.send((target, wanted));
    }
}

/// When each target is due.
#[derive(Debug, Default)]
struct Schedule {
    rows: HashMap<Target, Row>,
    /// With the number of the target's row: entries of rows that are gone are passed over.
    due: BinaryHeap<Reverse<(Instant, u64, Target)>>,
    hasher: RandomState,
}

/// The answers of one endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Row {
    number: u64,
    /// What it is taken for: well, until it has failed often enough.
    failing: bool,
    /// Whether that has been seen, or is only presumed.
    known: bool,
    /// Answers in a row that say the opposite.
    against: u32,
}

impl Row {
    /// Takes an answer; whether it changes what the endpoint is taken for.
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

    /// Time to the next probe.
    fn wait(&self, probe: &Probe) -> Duration {
        if self.known { probe.period } else { probe.period / EAGERNESS }
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

    /// When the next is due.
    fn next(&mut self) -> Option<Instant> {
        while let Some(Reverse((at, number, target))) = self.due.peek() {
            if self.rows.get(target).is_some_and(|row| row.number == *number) {
                return Some(*at);
            }
            self.due.pop();
        }
        None
    }

    /// The next, if it is due.
    fn take_due(&mut self, now: Instant) -> Option<(Target, u64)> {
        self.next().filter(|at| *at <= now)?;
        self.due.pop().map(|Reverse((_, number, target))| (target, number))
    }

    /// Takes an answer, and plans the next probe; what has changed.
    fn take(&mut self, (target, number): (Target, u64), verdict: ProbeResult, now: Instant) -> Option<Probed> {
        let fraction = self.fraction(now.elapsed().as_nanos() as u64 ^ number.rotate_left(32));
        let row = self.rows.get_mut(&target).filter(|row| row.number == number)?;
        let changed = match &verdict {
            ProbeResult::Well => row.take(&target.probe, false),
            ProbeResult::Failing(_) => row.take(&target.probe, true),
            ProbeResult::Unknown(_) => false,
        };
        let jitter = f64::from(100 - JITTER) + f64::from(2 * JITTER) * fraction;
        let at = now + row.wait(&target.probe).mul_f64(jitter / 100.0);
        self.due.push(Reverse((at, number, target.clone())));
        let failing = if let ProbeResult::Failing(why) = verdict { Some(why) } else { None };
        changed.then_some(Probed { target, number, failing })
    }

    /// The next that is to be asked, and whether it is taken for failing; as so many are that are being asked.
    fn begin(&mut self, now: Instant, of_failing: usize) -> Option<((Target, u64), bool)> {
        let (target, number) = self.take_due(now)?;
        let is_failing = self.rows.get(&target).is_some_and(|row| row.failing);
        if is_failing && of_failing >= AT_ONCE / 2 {
            self.due.push(Reverse((now + PUT_OFF, number, target)));
            return None;
        }
        Some(((target, number), is_failing))
    }

    /// Anything from 0 to 1, another one on each agent.
    fn fraction(&self, of: u64) -> f64 {
        (self.hasher.hash_one(of) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Works until nobody wants to know any more.
async fn run(
    mut targets: UnboundedReceiver<(Target, Option<u64>)>,
    found: UnboundedSender<Probed>,
    counts: Arc<Counts>,
    pace: Duration,
) {
    let mut schedule = Schedule::default();
    let mut checks = JoinSet::new();
    let mut free = Instant::now();
    // Checks under way of endpoints that are taken for failing: who hangs holds a place until its timeout.
    let mut of_failing = 0;
    loop {
        let due = schedule.next().map(|at| at.max(free)).filter(|_| checks.len() < AT_ONCE);
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
            Some(frame_len) = checks.join_next() => {
                // A check does not panic, and nobody ends one.
                let Ok((asked, was_failing, verdict)) = frame_len else { continue };
                of_failing -= usize::from(was_failing);
                let count = match &verdict {
                    ProbeResult::Well => &counts.well,
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
                if let Some(((target, number), is_failing)) = schedule.begin(now, of_failing) {
                    free = now + pace;
                    of_failing += usize::from(is_failing);
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
    fn rows_of_answers_decide_and_one_of_the_other_sort_begins_them_anew() {
        let target = target(3, 2);
        let mut row = Row::default();
        let answers = [true, true, false, true, true, true, true, false, true, false, false, false];
        let changes: Vec<bool> = answers.iter().map(|failing| row.take(&target.probe, *failing)).collect();
        let changed: Vec<usize> = (0..answers.len()).filter(|i| changes[*i]).collect();
        assert_eq!(changed, [5, 10]);
        assert!(!row.failing);
    }

    #[test]
    fn what_is_not_known_yet_is_asked_more_often_and_what_cannot_be_asked_changes_nothing() {
        let (mut schedule, target, began) = (Schedule::default(), target(2, 1), Instant::now());
        schedule.set(target.clone(), Some(1), began);
        schedule.set(target.clone(), Some(1), began);
        assert_eq!(schedule.due.len(), 1, "once is enough");
        let first = schedule.next().unwrap();
        assert!(first <= began + Duration::from_secs(1));
        let mut now = first;
        let mut answer = |schedule: &mut Schedule, verdict: ProbeResult| {
            now = now.max(schedule.next().unwrap());
            let asked = schedule.take_due(now).unwrap();
            assert_eq!(schedule.take_due(now), None, "nobody is asked twice at once");
            let probed = schedule.take(asked, verdict, now);
            (probed, schedule.next().unwrap() - now)
        };
        let failing = || ProbeResult::Failing("no".to_owned());
        let (probed, wait) = answer(&mut schedule, failing());
        assert_eq!(probed, None);
        assert!((0.9..=1.1).contains(&wait.as_secs_f64()), "{wait:?}");
        assert_eq!(answer(&mut schedule, ProbeResult::Unknown("no route".to_owned())).0, None);
        let (probed, wait) = answer(&mut schedule, failing());
        assert_eq!(probed, Some(Probed { target: target.clone(), number: 1, failing: Some("no".to_owned()) }));
        assert!((9.0..=11.0).contains(&wait.as_secs_f64()), "{wait:?}");
        assert_eq!(
            answer(&mut schedule, ProbeResult::Well).0,
            Some(Probed { target: target.clone(), number: 1, failing: None })
        );
        // One that is under way when it is wanted no more, and then again, is not the new one's.
        let at = schedule.next().unwrap();
        let asked = schedule.take_due(at).unwrap();
        schedule.set(target.clone(), None, at);
        schedule.set(target, Some(2), at);
        assert_eq!(schedule.take(asked, failing(), at), None);
        assert_eq!(schedule.due.len(), 1);
    }

    /// Those that hang hold their places until their timeouts: others shall have some as well.
    #[test]
    fn endpoints_that_are_taken_for_failing_have_half_of_the_places() {
        let (mut schedule, target, began) = (Schedule::default(), target(1, 1), Instant::now());
        schedule.set(target.clone(), Some(1), began);
        let mut now = schedule.next().unwrap();
        let (asked, was_failing) = schedule.begin(now, AT_ONCE).unwrap();
        assert!(!was_failing, "of one that is not, nobody asks how many of the others there are");
        schedule.take(asked, ProbeResult::Failing("no".to_owned()), now);
        now = schedule.next().unwrap();
        assert_eq!(schedule.begin(now, AT_ONCE / 2), None);
        assert_eq!(schedule.next(), Some(now + PUT_OFF));
        assert_eq!(schedule.begin(now + PUT_OFF, AT_ONCE / 2 - 1), Some(((target, 1), true)));
    }

    #[tokio::test]
    async fn no_more_in_a_second_than_is_allowed() {
        // Nobody listens: each probe of the loopback fails at once, and is counted.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = listener.local_addr().unwrap();
        drop(listener);
        let mut prober = Prober::start(50);
        let began = Instant::now();
        for i in 0..30u64 {
            let Target { probe, .. } = target(1, 1);
            // Each is another target.
            let probe = Probe { period: Duration::from_millis(100 + i), ..(*probe).clone() };
            prober.set(Target { endpoint, probe: Arc::new(probe) }, Some(i));
        }
        for _ in 0..30 {
            let probed = prober.found.recv().await.unwrap();
            assert!(probed.failing.is_some(), "{probed:?}");
        }
        // As often as it liked it would have been done after 10 ms.
        assert!(began.elapsed() >= Duration::from_millis(29 * 20), "{:?}", began.elapsed());
        assert!(prober.counts.failing.load(Ordering::Relaxed) >= 30);
    }
}
