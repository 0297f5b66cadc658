//! From what the kernel tells of connections to ejections: signs, and evidence where one pod alone has seen failures.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use portolan_common::{BackendStats, DetectedProtocol, OutcomeKind};
use portolan_core::{
    health::{DetectorEventKind, Signal, ThresholdReached},
    model::{Code, Finding, Probe, ProbeKind, Protocol, ServiceId, SuccessCriterion},
    policy::{Assignment, PoolKey, ServiceChange},
    table,
};
use portolan_datapath::Outcome;
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::{
    mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    oneshot,
};

use super::{Reconciler, event_log::Event, state_file::StateWriter};
use crate::probe::confirm::{Confirmation, Confirmer, LATELY, dial};

/// How long a finding of this file stays after the last time.
const REMEMBERED: Duration = Duration::from_secs(600);
/// Findings of this file that there are at most: of more, the latest.
const MOST: usize = 200;
/// What outlives the agent is written no more often than this.
const BETWEEN: Duration = Duration::from_millis(200);
/// Failures that are made up for where outcomes were lost: more change nothing.
const MADE_UP: u64 = 100;

/// Whom the agent has asked, and what.
type Asked = (SocketAddr, Arc<Probe>);

/// What stands between an outcome and an ejection.
pub(super) struct EjectionGate {
    witness: Confirmer,
    pub(super) evidence: UnboundedReceiver<Confirmation>,
    /// Thresholds that were reached by one network namespace alone, until there is evidence, by what is asked of whom.
    suspects: HashMap<Asked, Vec<(PoolKey, ThresholdReached)>>,
    /// What people should know, since when, by pool and endpoint.
    findings: BTreeMap<(PoolKey, SocketAddr, Code), (Instant, Finding)>,
    /// What is told of whom, once it is known who a network namespace is.
    namer: UnboundedSender<Named>,
    pub(super) named: UnboundedReceiver<Named>,
    /// What is spoken in place of HTTP/1, by pool.
    spoken: BTreeMap<PoolKey, u64>,
    /// Services whose responses are looked at, and whether the program that does it is attached.
    pool_state: HashSet<ServiceId>,
    watching: Option<bool>,
    /// Why it is not.
    unwatched: Option<Finding>,
    /// Whose network namespaces were looked for, and what was found; whether somebody is looking.
    names: HashMap<u64, Option<String>>,
    naming: bool,
    /// When this agent began, on CLOCK_MONOTONIC.
    began: Duration,
    /// Failures of each backend id that were told, and outcomes that were lost, when it was last looked at.
    pub(super) heard: HashMap<u32, u64>,
    pub(super) lost: u64,
    pub(super) state_writer: StateWriter,
    /// When the first failure happened that has led to an ejection which is not published yet, on CLOCK_MONOTONIC.
    pub(super) failed_at: Option<Duration>,
    /// Whether there is something new to keep, and when the last was given away.
    pub(super) dirty: bool,
    pub(super) kept_at: Instant,
    /// Orders that were taken, and who is to be told.
    pub(super) orders: Vec<(String, oneshot::Sender<Result<String, String>>)>,
}

/// A network namespace, named for people.
pub(super) struct Named {
    pool: PoolKey,
    endpoint: SocketAddr,
    said: String,
    client: u64,
    name: Option<String>,
}

impl EjectionGate {
    /// To be called inside a runtime.
    pub(super) fn new(state_writer: StateWriter) -> Self {
        let (witness, evidence) = Confirmer::new();
        let (namer, named) = unbounded_channel();
        let (suspects, heard, spoken) = (HashMap::new(), HashMap::new(), BTreeMap::new());
        Self {
            witness,
            evidence,
            suspects,
            findings: BTreeMap::new(),
            namer,
            named,
            spoken,
            pool_state: HashSet::new(),
            watching: None,
            unwatched: None,
            names: HashMap::new(),
            naming: false,
            began: monotonic(),
            heard,
            lost: 0,
            state_writer,
            failed_at: None,
            dirty: false,
            kept_at: Instant::now(),
            orders: Vec::new(),
        }
    }

    /// When there is something to be kept: in a storm of ejections, not after each of them.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.dirty.then(|| self.kept_at + BETWEEN)
    }

    fn find(&mut self, now: Instant, pool: &PoolKey, endpoint: SocketAddr, code: Code, message: String) {
        let finding = Finding::new(code, pool.service.object(), message);
        self.findings.retain(|_, (at, _)| now.saturating_duration_since(*at) < REMEMBERED);
        if self.findings.len() >= MOST {
            let oldest = self.findings.iter().min_by_key(|(_, (at, _))| *at).map(|(key, _)| key.clone());
            oldest.map(|key| self.findings.remove(&key));
        }
        self.findings.insert((pool.clone(), endpoint, code), (now, finding));
    }
}

impl Reconciler {
    /// Takes what the kernel tells; whether that changes a service.
    pub(super) fn take_outcomes(&mut self, outcomes: &[Outcome]) -> bool {
        let now = Instant::now();
        let mut changed = false;
        // What happened while no agent was there is nobody's news.
        let began = self.judging.began;
        for outcome in outcomes.iter().filter(|outcome| outcome.at >= began) {
            let Some(pools) = self.pools.get(&outcome.frontend_id).cloned() else { continue };
            if outcome.kind == OutcomeKind::NotHttp {
                changed |= self.take_spoken(&pools, outcome);
                continue;
            }
            let signal = signal(outcome);
            if signal.is_failure() {
                self.tell_failure(&pools, outcome, signal);
            }
            for (pool, reached) in self.health.observe(&pools, outcome.backend, signal, outcome.netns_cookie) {
                if self.judge(now, pool, reached, signal) {
                    self.judging.failed_at.get_or_insert(outcome.at);
                    changed = true;
                }
            }
        }
        // What is still in the ring buffer has been counted, and will be heard.
        if outcomes.len() < super::OUTCOMES_AT_ONCE {
            changed |= self.make_up(now);
        }
        // Each endpoint once, after all its outcomes: while no pool counts failures of it, its successes are of no interest.
        let endpoints: HashSet<SocketAddr> = outcomes.iter().map(|outcome| outcome.backend).collect();
        for endpoint in endpoints {
            if let Some(id) = self.layout.backend_id(&endpoint)
                && let Err(error) =
                    self.datapath.maps.set_report_success(id, self.health.is_counting_failures(&endpoint))
            {
                tracing::warn!("cannot mark backend {endpoint}: {error:#}");
            }
        }
        changed
    }

    fn tell_failure(&mut self, pools: &[PoolKey], outcome: &Outcome, signal: Signal) {
        if matches!(signal, Signal::Refused | Signal::TimedOut)
            && let Some(id) = self.layout.backend_id(&outcome.backend)
        {
            *self.judging.heard.entry(id).or_default() += 1;
        }
        let Some(pool) = pools.first() else { return };
        let message = match signal {
            Signal::Status(status) => format!("{} answered with status {status}", outcome.backend),
            signal => {
                let what = std::io::Error::from_raw_os_error(outcome.errno as i32);
                let when = if signal == Signal::Broken { "broke before an answer, " } else { "failed " };
                format!("connection to {} {when}after {:.1?}: {what}", outcome.backend, outcome.latency)
            }
        };
        let record = Event::of_pool(pool, outcome.backend, Event::FAILED, message);
        self.events.add(Event { client_netns: Some(outcome.netns_cookie), ..record });
    }

    /// An endpoint has failed as often as its pool allows. Whether it is ejected at once.
    fn judge(&mut self, now: Instant, pool: PoolKey, reached: ThresholdReached, signal: Signal) -> bool {
        let Some(client) = reached.client else { return self.eject(now, &pool, reached) };
        // A response comes on a connection that is open, which is the client's own.
        let own_is_open = matches!(signal, Signal::Status(_) | Signal::Broken);
        if !self.used_by_others(&reached.address, client, own_is_open) {
            return self.eject(now, &pool, reached);
        }
        let of_answers = matches!(signal, Signal::Status(_) | Signal::Broken);
        let asks = |probe: &&Arc<Probe>| of_answers && probe.kind != ProbeKind::Tcp && self.prober.per_second > 0;
        let probe = self.health.probe_of(&pool).filter(asks).cloned();
        if of_answers && probe.is_none() {
            let why =
                "that connections are established says nothing of it, and no portolan.io/probe says what to ask for";
            self.tell_unconfirmed(now, pool, reached, why);
        } else if self.is_frontend(&probe.as_ref().map_or(reached.address, |probe| probe.dialled(reached.address))) {
            self.tell_unconfirmed(
                now,
                pool,
                reached,
                "the agent cannot dial it, for its address is a Service's as well",
            );
        } else {
            let probe = probe.unwrap_or_else(|| Arc::new(dial(self.health.connect_timeout_of(&pool))));
            let waiting = self.judging.suspects.entry((reached.address, Arc::clone(&probe))).or_default();
            let first = waiting.is_empty();
            // A pool that reaches the threshold again waits already.
            if waiting.iter().all(|(waits, _)| *waits != pool) {
                waiting.push((pool, reached));
            }
            if first {
                self.judging.witness.ask(reached.address, probe);
            }
        }
        false
    }

    /// The agent has dialled an endpoint itself.
    pub(super) fn take_evidence(&mut self, evidence: Confirmation) -> bool {
        let now = Instant::now();
        let mut changed = false;
        for (pool, reached) in self.judging.suspects.remove(&(evidence.endpoint, evidence.probe)).unwrap_or_default() {
            if evidence.failed {
                changed |= self.eject(now, &pool, reached);
            } else {
                self.tell_unconfirmed(now, pool, reached, "what the agent itself asked of it went well");
            }
        }
        changed
    }

    fn eject(&mut self, now: Instant, pool: &PoolKey, reached: ThresholdReached) -> bool {
        let Some(event) = self.health.eject(now, pool, reached.address, reached.cause) else { return false };
        self.collector.count_health(pool, &event);
        let record = Event::of_health(pool, &event);
        if let DetectorEventKind::Overflow { .. } = event.kind {
            self.judging.find(now, pool, reached.address, Code::EjectionRefused, record.message.clone());
            self.events.add(record);
            return false;
        }
        self.events.add(record);
        self.judging.dirty = true;
        self.changes.services.insert(pool.service.clone());
        true
    }

    fn tell_unconfirmed(&mut self, now: Instant, pool: PoolKey, reached: ThresholdReached, why: &str) {
        let (endpoint, client) = (reached.address, reached.client.unwrap_or_default());
        let said = format!(
            "{endpoint} of {pool} failed {} times in a row, but only for one pod, and others use it; it stays, for {why}",
            reached.cause.failures
        );
        self.collector.count_unconfirmed(&pool);
        let record = Event::of_pool(&pool, endpoint, Event::UNCONFIRMED, said.clone());
        self.events.add(Event { client_netns: Some(client), ..record });
        let named = self.judging.names.get(&client).cloned();
        let whose = named.clone().flatten().map_or_else(
            || format!("the pod has network namespace {client}"),
            |name| format!("the pod is that of {name}"),
        );
        let message = format!("{said}; {whose}");
        let key = (pool.clone(), endpoint, Code::NotConfirmed);
        self.changes.findings |= !self.judging.findings.contains_key(&key);
        self.judging.find(now, &pool, endpoint, Code::NotConfirmed, message);
        if named.is_some() || std::mem::replace(&mut self.judging.naming, true) {
            return;
        }
        let (namer, helper) = (self.judging.namer.clone(), self.datapath.helper.clone());
        tokio::task::spawn_blocking(move || {
            // An error means that the agent is ending.
            let _ = namer.send(Named { pool, endpoint, said, client, name: helper.name_namespace(client) });
        });
    }

    /// It is known whose network namespace it is.
    pub(super) fn take_name(&mut self, named: Named) {
        let Named { pool, endpoint, said, client, name } = named;
        self.judging.naming = false;
        if self.judging.names.len() >= MOST {
            self.judging.names.clear();
        }
        if let Some(name) = &name {
            let message = format!("{said}; the pod is that of {name}");
            tracing::warn!("{message}");
            self.judging.find(Instant::now(), &pool, endpoint, Code::NotConfirmed, message);
        }
        self.judging.names.insert(client, name);
    }

    /// Whether pods of other network namespaces than this one use an endpoint.
    fn used_by_others(&self, endpoint: &SocketAddr, client: u64, own_is_open: bool) -> bool {
        let since = u64::try_from(monotonic().saturating_sub(LATELY).as_nanos()).unwrap_or(u64::MAX);
        let Some(id) = self.layout.backend_id(endpoint) else { return false };
        let lately = self.datapath.maps.backend_use(id).is_ok_and(|uses| uses.used_by_others(client, since));
        // Connections that stand may be older, and anybody's. Those that are under way are no use by anybody.
        let stand = |stats: BackendStats| stats.active.min(stats.opened.wrapping_sub(stats.closed)) as i64 > 0;
        lately || !own_is_open && self.datapath.maps.backend_stats(id).is_ok_and(stand)
    }

    pub(super) fn is_frontend(&self, address: &SocketAddr) -> bool {
        self.layout.frontend_id(&table::key(*address, Protocol::Tcp)).is_some()
    }

    /// Outcomes that found the ring buffer full are gone, but their failures were counted.
    fn make_up(&mut self, now: Instant) -> bool {
        let lost = self.datapath.maps.counters().map_or(self.judging.lost, |counters| counters.events_lost);
        if lost == self.judging.lost {
            return false;
        }
        self.judging.lost = lost;
        let mut changed = false;
        let backends: Vec<(SocketAddr, u32)> = self.layout.backends().collect();
        for (address, id) in backends {
            let Ok(stats) = self.datapath.maps.backend_stats(id) else { continue };
            let heard = self.judging.heard.insert(id, stats.failed).unwrap_or_default();
            let missing = stats.failed.saturating_sub(heard);
            if missing == 0 {
                continue;
            }
            let pools = self.health.pools_of(&address);
            for _ in 0..missing.min(MADE_UP) {
                // Whose they were is not known, so that they are believed where the agent sees the same.
                for (pool, reached) in self.health.observe(&pools, address, Signal::Refused, 0) {
                    changed |= self.judge(now, pool, reached, Signal::Refused);
                }
            }
        }
        changed
    }

    /// Something else than HTTP/1 comes back where that was expected.
    fn take_spoken(&mut self, pools: &[PoolKey], outcome: &Outcome) -> bool {
        let own = self.health.pools_of(&outcome.backend);
        let mut changed = false;
        for pool in pools.iter().filter(|pool| own.contains(pool)) {
            changed |= self.note_spoken(pool, u64::from(outcome.errno));
        }
        changed
    }

    /// One client or endpoint may speak whatever it likes: a pool of which valid responses were seen is HTTP/1.
    fn note_spoken(&mut self, pool: &PoolKey, spoken: u64) -> bool {
        let responded = self.health.hosts_of(pool).into_iter().any(|address| {
            let uses = self.layout.backend_id(&address).and_then(|id| self.datapath.maps.backend_use(id).ok());
            uses.is_some_and(|uses| uses.responses > 0)
        });
        if responded {
            return false;
        }
        *self.judging.spoken.entry(pool.both_families()).or_default() |= spoken;
        let new = self.health.not_http(pool);
        if new {
            self.changes.services.insert(pool.service.clone());
            self.changes.findings = true;
        }
        new
    }

    /// What was spoken before this agent began is in the kernel's counters of pools. Whether that changes a service.
    pub(super) fn recall_spoken(&mut self, changed_services: &[ServiceChange]) -> bool {
        let assignments = changed_services.iter().flat_map(|service| &service.after);
        let pools = assignments.flat_map(|assignment| &assignment.routes).map(|route| &route.pool);
        let pool_state: Vec<PoolKey> = pools
            .filter(|pool| pool.success_criterion == SuccessCriterion::HttpStatus)
            .map(|pool| pool.key.clone())
            .collect();
        let mut changed = false;
        for pool in pool_state {
            let place = self.layout.pool(&pool).and_then(|(id, _)| self.datapath.maps.pool_stats(id).ok());
            if let Some(stats) = place.filter(|stats| stats.spoken != 0) {
                changed |= self.note_spoken(&pool, stats.spoken);
            }
        }
        changed
    }

    /// What is known of pools whose connections carry something else than HTTP/1; and all else that this file has found.
    pub(super) fn findings_of_health(&self) -> Vec<Finding> {
        let now = Instant::now();
        let of_pools = self.judging.spoken.iter().filter(|(pool, _)| self.health.knows(pool)).map(|(pool, spoken)| {
            let what = if spoken & DetectedProtocol::TLS != 0 {
                "TLS"
            } else if spoken & DetectedProtocol::HTTP2 != 0 {
                "HTTP/2"
            } else {
                "no HTTP/1"
            };
            let message = format!(
                "port {} is HTTP by its name or appProtocol, but {what} comes back; no status can be seen, so connections alone say how \
                 its endpoints are",
                pool.port
            );
            Finding::new(Code::NotHttp, pool.service.object(), message)
        });
        let lately = self.judging.findings.values().filter(|(at, _)| now.saturating_duration_since(*at) < REMEMBERED);
        let hand = self.health.overrides();
        let ejected = hand.ejected().map(|(endpoint, ordered)| {
            let until = ordered.until.map_or_else(
                || "until it is restored".to_owned(),
                |until| format!("until {}", crate::controller::event_log::rfc3339(until)),
            );
            let message = format!(
                "ejected by hand {until}; take it back with: portolan restore {endpoint}{}",
                because(&ordered.reason)
            );
            Finding::new(Code::Overrides, format!("Endpoint {endpoint}"), message)
        });
        let drained = hand.drained().map(|drain| {
            let message = format!(
                "no new connections to region {}, by hand; take it back with: portolan restore {} --region {}{}",
                drain.region,
                drain.service,
                drain.region,
                because(&drain.ordered.reason)
            );
            Finding::new(Code::Overrides, format!("Service {}", drain.service), message)
        });
        let unwatched = self.judging.unwatched.clone();
        of_pools
            .chain(unwatched)
            .chain(self.findings_of_probes())
            .chain(lately.map(|(_, finding)| finding.clone()))
            .chain(ejected)
            .chain(drained)
            .collect()
    }

    /// Attaches the program that sees packets while a pool wants it, and takes it off after.
    pub(super) fn watch_packets(&mut self, changed_services: &[ServiceChange], whole: bool) {
        let is_watched = |assignment: &Arc<Assignment>| {
            assignment.routes.iter().any(|route| route.pool.success_criterion == SuccessCriterion::HttpStatus)
        };
        if whole {
            let all = self.compiler.output().assignments;
            let pool_state = all.iter().filter(|assignment| is_watched(assignment));
            self.judging.pool_state = pool_state.map(|assignment| assignment.service.clone()).collect();
        }
        for service in changed_services {
            if service.after.iter().any(is_watched) {
                self.judging.pool_state.insert(service.service.clone());
            } else {
                self.judging.pool_state.remove(&service.service);
            }
        }
        let wanted = !self.judging.pool_state.is_empty();
        if self.attached && self.judging.watching != Some(wanted) {
            match self.datapath.watch_responses(wanted) {
                Ok(_) => (self.judging.watching, self.judging.unwatched) = (Some(wanted), None),
                Err(error) => {
                    let message = format!("the status of responses is not seen: {error:#}");
                    self.judging.unwatched = Some(Finding::new(Code::KernelWrite, "Kernel", message));
                }
            }
        }
    }

    /// A backend id has another endpoint: what was heard of the former one is nobody's.
    pub(super) fn unhear(&mut self, id: u32) {
        self.judging.heard.remove(&id);
    }
}

/// The kernel's clock.
pub(super) fn monotonic() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

fn because(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(" ({reason})") }
}

fn signal(outcome: &Outcome) -> Signal {
    match outcome.kind {
        OutcomeKind::Established => Signal::Connected,
        OutcomeKind::Failed => Signal::Refused,
        OutcomeKind::TimedOut => Signal::TimedOut,
        OutcomeKind::Responded => Signal::Status(outcome.errno as u16),
        OutcomeKind::Broken => Signal::Broken,
        // Of the last one nobody asks.
        OutcomeKind::Answered | OutcomeKind::NotHttp => Signal::Answered,
    }
}
