//! The one task that knows everything and writes to the kernel: inputs come in, tables go out.

mod active_health;
mod ejection;
pub mod event_log;
mod findings;
mod overrides;
mod requests;
mod self_probe;
pub mod state_file;
mod termination;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, btree_map::Entry},
    time::{Duration, Instant, SystemTime},
};

use anyhow::Result;
use portolan_common::FrontendKey;
use portolan_core::{
    health::{Health, OverrideCommand},
    model::{Code, Finding, NamespacedName},
    policy::{Client, Compiler, PoolKey, ServiceChange, client::ClientLocation},
    report::{Report, explain::Explanation},
    store::{Changes, Store, Update},
    table::{self, Completeness, GraceEpoch, Layout, Op, PinnedState, Sizes, Table},
};
use portolan_datapath::{Datapath, RemovedEndpointTcp, barrier};
use tokio::sync::{broadcast, mpsc, oneshot};

use self::{
    ejection::EjectionGate,
    event_log::{Event, EventLog},
    findings::{crowded, no_room},
    self_probe::Probe,
    state_file::{PersistedState, StateWriter},
    termination::Closing,
};
use crate::{
    metrics::collect::{Collector, MetricsSnapshot},
    probe::{Prober, self_probe::SelfProbe},
};

pub use self::termination::Closed;

/// Outcomes that are taken in one go, before a new table is published.
const OUTCOMES_AT_ONCE: usize = 256;
/// When something could not be written, it is tried again after this time, and then after twice the time, and so on.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// But no later than this.
const LAST_RETRY: Duration = Duration::from_secs(60);

/// A question to the task.
pub enum Request {
    /// What `get` shows.
    Report(oneshot::Sender<Report>),
    /// What `explain` shows, of this service and port.
    Explain(NamespacedName, Option<u16>, oneshot::Sender<Option<Explanation>>),
    /// What `/metrics` shows.
    MetricsSnapshot(oneshot::Sender<MetricsSnapshot>),
    /// Whether connections are served as they should be; if not, why.
    Ready(oneshot::Sender<Result<(), String>>),
    /// Has something done that was ordered by hand; what was done, or why it was not.
    OverrideCommand(OverrideCommand, oneshot::Sender<Result<String, String>>),
    /// What has happened, and what will.
    Events(oneshot::Sender<(Vec<Event>, broadcast::Receiver<Event>)>),
}

/// The state of the task.
pub struct Reconciler {
    cluster: String,
    place: ClientLocation,
    store: Store,
    health: Health,
    datapath: Datapath,
    layout: Layout,
    events: EventLog,
    collector: Collector,
    client: Client,
    /// What is wrong with it.
    client_findings: Vec<Finding>,
    /// What was wrong when this agent began.
    start_findings: Vec<Finding>,
    compiler: Compiler,
    /// What has changed since the last publication.
    changes: Changes,
    /// How much was known then; `None` where the whole table is to be looked at again.
    completeness: Option<Completeness>,
    /// The pools behind each frontend id.
    pools: HashMap<u32, Vec<PoolKey>>,
    /// The service and port of each frontend id.
    services: HashMap<u32, (NamespacedName, u16)>,
    attached: bool,
    closing: Closing,
    judging: EjectionGate,
    probe: Probe,
    prober: Prober,
    retry: Option<Instant>,
    retry_after: Duration,
    /// Frontends that did not fit. The whole table is gone through again after a while.
    refused: BTreeMap<FrontendKey, Finding>,
    /// Some of them are not even there to refuse.
    passes: bool,
    /// What the last attempt to write ran into.
    trouble: Vec<Finding>,
    /// Maps that are nearly full.
    crowded: Vec<Finding>,
    /// Why not everything is known that should be.
    doubt: Option<String>,
    logged: BTreeSet<Finding>,
    /// Who is told of new findings.
    teller: Option<mpsc::Sender<Finding>>,
}

/// Gives the system back what reading and computing everything took, and nothing needs any more.
fn give_back_memory() {
    // SAFETY: it may be called at any time.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

impl Reconciler {
    /// Over a datapath that holds what a former agent left. To be called inside a runtime.
    pub fn new(
        cluster: String,
        place: ClientLocation,
        (datapath, held): (Datapath, PinnedState),
        (probe, prober): (SelfProbe, Prober),
        sizes: Sizes,
        removed_endpoint_tcp: RemovedEndpointTcp,
        (kept, state_writer): (Result<Option<PersistedState>>, StateWriter),
    ) -> Self {
        let adopted = held.frontends.len();
        if adopted > 0 {
            tracing::info!(frontends = adopted, backends = held.backends.len(), "took over the maps of a former agent");
        }
        let mut reconciler = Self {
            cluster,
            place,
            store: Store::default(),
            health: Health::default(),
            datapath,
            layout: Layout::from_held(sizes, held),
            events: EventLog::default(),
            collector: Collector::default(),
            client: Client::default(),
            client_findings: Vec::new(),
            start_findings: Vec::new(),
            compiler: Compiler::default(),
            changes: Changes::everything(),
            completeness: None,
            pools: HashMap::new(),
            services: HashMap::new(),
            attached: false,
            closing: Closing::new(removed_endpoint_tcp),
            judging: EjectionGate::new(state_writer),
            probe: Probe::start(probe),
            prober,
            retry: None,
            retry_after: FIRST_RETRY,
            refused: BTreeMap::new(),
            passes: false,
            trouble: Vec::new(),
            crowded: Vec::new(),
            doubt: None,
            logged: BTreeSet::new(),
            teller: None,
        };
        reconciler.take_kept(kept);
        reconciler
    }

    /// The same, which tells somebody of new findings.
    #[must_use]
    pub fn telling(mut self, teller: Option<mpsc::Sender<Finding>>) -> Self {
        self.teller = teller;
        self
    }

    /// Works until the sources or the questions end.
    ///
    /// # Errors
    /// The kernel cannot be listened to, or does not take the programs.
    pub async fn run(
        mut self,
        mut updates: mpsc::Receiver<Vec<Update>>,
        mut requests: mpsc::Receiver<Request>,
    ) -> Result<()> {
        loop {
            let sweep = self.health.poll_timeout(Instant::now(), SystemTime::now());
            let keep = self.judging.poll_timeout();
            let wake = [sweep, self.retry, self.closing.poll_timeout(), keep].into_iter().flatten().min();
            let wake = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            let logs = async {
                match &mut self.datapath.logs {
                    Some(logs) => logs.forward().await,
                    None => std::future::pending().await,
                }
            };
            let changed = tokio::select! {
                update = updates.recv() => {
                    let Some(update) = update else { return Ok(()) };
                    self.take_updates(update, &mut updates)
                }
                outcomes = self.datapath.events.next(OUTCOMES_AT_ONCE) => self.take_outcomes(&outcomes?),
                Some(evidence) = self.judging.evidence.recv() => self.take_evidence(evidence),
                Some(probed) = self.prober.found.recv() => self.record_probe(probed),
                Some(named) = self.judging.named.recv() => {
                    self.take_name(named);
                    false
                }
                () = wake => self.take_time(Instant::now()),
                request = requests.recv() => {
                    let Some(request) = request else { return Ok(()) };
                    self.answer(request)
                }
                epoch = self.datapath.grace.elapsed() => self.reclaim(epoch),
                pass = self.datapath.closer.done() => {
                    self.take_pass(&pass?);
                    false
                }
                Some(seen) = self.probe.results.recv() => {
                    self.take_probe(seen);
                    false
                }
                failed = logs => return failed,
            };
            if changed && self.store.synced() {
                // Twice where publishing finds out something more.
                while !self.changes.is_empty() {
                    self.publish()?;
                }
            }
            self.keep();
        }
    }

    fn take_updates(&mut self, first: Vec<Update>, more: &mut mpsc::Receiver<Vec<Update>>) -> bool {
        let mut batch = Some(first);
        while let Some(updates) = batch {
            for update in updates {
                self.store.apply(update, &mut self.changes);
            }
            batch = more.try_recv().ok();
        }
        !self.changes.is_empty()
    }

    fn take_time(&mut self, now: Instant) -> bool {
        self.sweep(now);
        let retry = self.retry.take_if(|at| *at <= now).is_some();
        // All of the table is tried again, for what did not fit may fit now.
        self.completeness = self.completeness.filter(|_| !retry);
        self.changes.findings |= retry;
        self.expire_overrides();
        let (released, warmer) = self.health.handle_timeout(now);
        for (pool, event) in &released {
            self.judging.dirty = true;
            self.events.add(Event::of_health(pool, event));
        }
        let pools = released.iter().map(|(pool, _)| pool).chain(&warmer);
        self.changes.services.extend(pools.map(|pool| pool.service.clone()));
        retry || !self.changes.is_empty()
    }

    /// What rested is free again. Somebody may have been waiting for it.
    fn reclaim(&mut self, epoch: GraceEpoch) -> bool {
        self.layout.reclaim(epoch);
        let waited = !self.refused.is_empty() && self.retry.is_some();
        if waited {
            self.retry = None;
            self.completeness = None;
            self.changes.findings = true;
        }
        waited
    }

    /// Whether this agent's programs may take the place of a former version's: only with a whole table.
    fn may_attach(&self) -> bool {
        !self.datapath.replaces_another() || (self.doubt.is_none() && self.trouble.is_empty())
    }

    /// Computes what is new and leads the kernel to it.
    fn publish(&mut self) -> Result<()> {
        let (started, first) = (Instant::now(), !self.attached);
        let mut changes = std::mem::take(&mut self.changes);
        let mut findings = Vec::new();
        let client = self.place.client(&self.cluster, &self.store, &mut findings);
        changes.everything |= client != self.client;
        changes.findings |= findings != self.client_findings;
        (self.client, self.client_findings) = (client, findings);
        let changed_services = self.compile(started, &changes);
        self.probe_wanted();

        let completeness = self.what_is_known();
        let whole = self.completeness != Some(completeness);
        let (table, gone) = self.wanted(&changed_services, whole);
        // The agent's own is its own, whatever is known of the others'.
        let (mut ops, _) = self.layout.change(&self.probe.table, &[], Completeness::Complete);
        let (rest, refused) = if whole {
            self.layout.update(&table, completeness)
        } else {
            self.layout.change(&table, &gone, completeness)
        };
        ops.extend(rest);
        self.completeness = Some(completeness);
        if whole {
            self.refused.clear();
        }
        self.refused.retain(|key, _| !table.frontends.contains_key(key) && !gone.contains(key));
        self.passes =
            refused.iter().any(|refused| !refused.held) || (self.passes && !whole && !self.refused.is_empty());
        self.refused.extend(refused.iter().map(|refused| (refused.key, no_room(refused))));
        self.trouble = self.refused.values().cloned().collect();
        if ops.iter().any(|op| matches!(op, Op::RemoveFrontend(_) | Op::ResetFrontend(_))) {
            self.count_frontends();
        }
        if self.collector.before(&ops, &self.datapath.maps) {
            self.recount_later();
        }
        for op in &ops {
            if let Op::SetBackend(id, _) = op {
                self.unhear(*id);
            }
        }
        if let Err(error) = self.datapath.maps.apply(&ops) {
            let message = format!("{error:#}; tried again soon");
            self.trouble.push(Finding::new(Code::KernelWrite, "Kernel", message));
            // What was written before the failure is not known, so it is read, once nobody reads what is to be free.
            barrier();
            self.layout = self.layout.read_again(self.datapath.maps.read_back(self.layout.sizes())?);
            self.completeness = None;
        }
        if let Some(epoch) = self.layout.end_epoch() {
            self.datapath.grace.begin(epoch);
        }
        let crowded = crowded(&self.layout);
        changes.findings |= crowded != self.crowded;
        self.crowded = crowded;
        self.plan_retry(started);
        self.log_findings(changes.findings || whole || !self.trouble.is_empty());
        if whole {
            self.pools.clear();
            self.services.clear();
        }
        self.index_pools(&changed_services, whole);
        self.watch_packets(&changed_services, whole);
        // What changes with it is published next.
        self.recall_spoken(&changed_services);
        if !self.attached && self.may_attach() {
            let replaces = self.datapath.replaces_another();
            self.datapath.attach()?;
            self.attached = true;
            if replaces {
                self.close_after_replacing();
            }
            // A former agent's programs may have been taken off for a while.
            self.recount();
            self.probe.wanted.notify_one();
            self.watch_packets(&[], true);
            let cgroup = self.datapath.cgroup().display();
            tracing::info!(%cgroup, frontends = table.frontends.len(), "attached: connections are served");
        }
        self.close_gone();
        let frontends = ops.iter().filter(|op| matches!(op, Op::Publish(..) | Op::RemoveFrontend(_))).count();
        let took = started.elapsed();
        self.collector.published(took);
        if let Some(failed) = self.judging.failed_at.take() {
            self.collector.ejected(ejection::monotonic().saturating_sub(failed));
        }
        if first {
            give_back_memory();
        }
        if frontends > 0 {
            let message = format!("{frontends} frontends changed, {} writes, {took:.1?}", ops.len());
            self.events.add(Event { kind: "published".to_owned(), message, ..Event::default() });
        }
        Ok(())
    }

    /// Computes what is new, and tells the detectors and the accounts.
    fn compile(&mut self, now: Instant, changes: &Changes) -> Vec<ServiceChange> {
        let mut changed_services: BTreeMap<_, ServiceChange> = BTreeMap::new();
        let mut changes =
            Changes { services: changes.services.clone(), everything: changes.everything, ..Changes::default() };
        // Twice where endpoints begin to warm up, or were ejected by a former agent: only the detectors know.
        while changes.everything || !changes.services.is_empty() {
            let observed = self.health.observed();
            for next in self.compiler.compile(self.store.snapshot(), &self.client, observed, &changes) {
                self.health.configure(now, &next.service, &next.after);
                self.collector.name(&next.service, &next.before, &next.after);
                match changed_services.entry(next.service.clone()) {
                    Entry::Occupied(mut known) => known.get_mut().after = next.after,
                    Entry::Vacant(place) => drop(place.insert(next)),
                }
            }
            changes = Changes { services: self.health.services_to_recompute(), ..Changes::default() };
        }
        changed_services.into_values().collect()
    }

    /// The frontends that shall be: all of them, or those of the services that were computed anew; and those that shall go.
    fn wanted(&self, changed_services: &[ServiceChange], whole: bool) -> (Table, Vec<FrontendKey>) {
        if whole {
            let mut table = Table::new(&self.compiler.output().assignments);
            table.frontends.extend(self.probe.table.frontends.clone());
            return (table, Vec::new());
        }
        let table = Table::new(changed_services.iter().flat_map(|service| &service.after));
        let before = Table::new(changed_services.iter().flat_map(|service| &service.before));
        let gone = before.frontends.into_keys().filter(|key| !table.frontends.contains_key(key)).collect();
        (table, gone)
    }

    /// How much is known of what should be, and why no more.
    fn what_is_known(&mut self) -> Completeness {
        let unknown = || format!("the configuration has nothing of cluster {}", self.cluster);
        let (completeness, doubt) = match self.store.doubt(&self.cluster) {
            Some((doubt, true)) => (Completeness::WithoutSettings, Some(doubt.what.clone())),
            // What another cluster has to add is not waited for.
            Some((doubt, false)) => (Completeness::Partial, doubt.concerns(&self.cluster).then(|| doubt.what.clone())),
            None if !self.store.snapshot().clusters.contains_key(self.cluster.as_str()) => {
                (Completeness::Partial, Some(unknown()))
            }
            None => (Completeness::Complete, None),
        };
        self.doubt = doubt;
        completeness
    }

    fn plan_retry(&mut self, now: Instant) {
        if self.trouble.is_empty() {
            (self.retry, self.retry_after) = (None, FIRST_RETRY);
        } else if self.retry.is_none() {
            self.retry = Some(now + self.retry_after);
            self.retry_after = (self.retry_after * 2).min(LAST_RETRY);
        }
    }

    /// Takes down what the ids of frontends stand for: of all services, or of those that were computed anew.
    fn index_pools(&mut self, changed_services: &[ServiceChange], whole: bool) {
        self.closing
            .forget(changed_services.iter().flat_map(|service| &service.before).map(|assignment| &**assignment));
        let all = if whole { self.compiler.output().assignments } else { Vec::new() };
        for assignment in all.iter().chain(changed_services.iter().flat_map(|service| &service.after)) {
            self.closing.learn(assignment);
            // A route may name a pool twice, which counts once.
            let pools: BTreeSet<PoolKey> = assignment.routes.iter().map(|route| route.pool.key.clone()).collect();
            let pools: Vec<PoolKey> = pools.into_iter().collect();
            for frontend in &assignment.frontends {
                if let Some(id) = self.layout.frontend_id(&table::key(*frontend, assignment.protocol)) {
                    self.pools.insert(id, pools.clone());
                    self.services.insert(id, (assignment.service.name.clone(), assignment.port));
                }
            }
        }
    }

    /// Takes in the counters of all frontends.
    fn count_frontends(&mut self) {
        for (id, (service, port)) in &self.services {
            if let Ok(stats) = self.datapath.maps.frontend_stats(*id) {
                self.collector.take_frontend(*id, service, *port, stats);
            }
        }
    }
}
