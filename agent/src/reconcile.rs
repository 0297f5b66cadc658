//! The one task that knows everything and writes to the kernel: inputs come in, tables go out.

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Result;
use portolan_common::OutcomeKind;
use tokio::sync::{broadcast, mpsc, oneshot};

use crate::{
    accounts::{Accounts, Destination, Sample},
    datapath::{Datapath, Outcome},
    health::{EventKind, Health, Verdict as Outlook},
    journal::{Journal, Record, rfc3339},
    model::{Finding, Locality, NamespacedName, Severity},
    policy::{Client, PoolKey, Verdict, assign},
    report::{EndpointKernel, FrontendKernel, Report},
    source::Update,
    store::{Snapshot, Store},
    table::{self, Held, Knowledge, Layout, Op, Sizes, Table},
};

/// Outcomes that are taken in one go, before a new table is published.
const OUTCOMES_AT_ONCE: usize = 256;
/// Findings that are logged one by one when they appear together.
const LOGGED_AT_ONCE: usize = 50;
/// When something could not be written, it is tried again after this time, and then after twice the time, and so on.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// But no later than this.
const LAST_RETRY: Duration = Duration::from_secs(60);

/// Who the agent works for.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// The node, whose Node object says where it is.
    pub node: Option<String>,
    /// Where it is, whatever the Node object says.
    pub locality: Option<Locality>,
}

impl Place {
    /// The client that the policy is asked for.
    pub fn client(&self, cluster: &str, snapshot: &Snapshot, findings: &mut Vec<Finding>) -> Client {
        let node =
            self.node.as_ref().map(|name| (name, snapshot.clusters.get(cluster).and_then(|it| it.nodes.get(name))));
        if let (Some((name, None)), None) = (node, &self.locality) {
            let message = format!(
                "cluster {cluster} has no such Node: where its clients are is unknown, so everything is far away"
            );
            findings.push(Finding::error(format!("Node {name}"), message));
        }
        let of_node = || node.and_then(|(_, node)| node).map(|node| node.locality.clone());
        let locality = self.locality.clone().or_else(of_node).unwrap_or_default();
        let node = self.node.clone();
        Client { cluster: cluster.to_owned(), node, locality }
    }
}

/// A question to the task.
pub enum Request {
    /// What `get` shows.
    Report(oneshot::Sender<Report>),
    /// What `/metrics` shows.
    Sample(oneshot::Sender<Sample>),
    /// Whether connections are served as they should be; if not, why.
    Ready(oneshot::Sender<Result<(), String>>),
    /// What has happened, and what will.
    Events(oneshot::Sender<(Vec<Record>, broadcast::Receiver<Record>)>),
}

/// The state of the task.
pub struct Reconciler {
    cluster: String,
    place: Place,
    store: Store,
    health: Health,
    datapath: Datapath,
    layout: Layout,
    journal: Journal,
    accounts: Accounts,
    client: Client,
    verdict: Verdict,
    /// The pools behind each frontend id.
    pools: HashMap<u32, Vec<PoolKey>>,
    /// The service and port of each frontend id.
    services: HashMap<u32, (NamespacedName, u16)>,
    attached: bool,
    retry: Option<Instant>,
    retry_after: Duration,
    /// What the last attempt to write ran into.
    trouble: Vec<Finding>,
    /// Why not everything is known that should be.
    doubt: Option<String>,
    logged: BTreeSet<Finding>,
}

impl Reconciler {
    /// Over a datapath that holds what a former agent left.
    pub fn new(cluster: String, place: Place, datapath: Datapath, held: Held, sizes: Sizes) -> Self {
        let inherited = held.frontends.len();
        if inherited > 0 {
            tracing::info!(
                frontends = inherited,
                backends = held.backends.len(),
                "took over the maps of a former agent"
            );
        }
        Self {
            cluster,
            place,
            store: Store::default(),
            health: Health::default(),
            datapath,
            layout: Layout::from_held(sizes, held),
            journal: Journal::default(),
            accounts: Accounts::default(),
            client: Client::default(),
            verdict: Verdict::default(),
            pools: HashMap::new(),
            services: HashMap::new(),
            attached: false,
            retry: None,
            retry_after: FIRST_RETRY,
            trouble: Vec::new(),
            doubt: None,
            logged: BTreeSet::new(),
        }
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
            let sweep = self.health.poll_timeout();
            let wake = [sweep, self.retry].into_iter().flatten().min();
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
                () = wake => self.take_time(Instant::now()),
                request = requests.recv() => {
                    let Some(request) = request else { return Ok(()) };
                    self.answer(request);
                    false
                }
                failed = logs => return failed,
            };
            if changed && self.store.synced() {
                self.publish()?;
            }
        }
    }

    fn take_updates(&mut self, first: Vec<Update>, more: &mut mpsc::Receiver<Vec<Update>>) -> bool {
        let mut changed = false;
        let mut batch = Some(first);
        while let Some(updates) = batch {
            for update in updates {
                changed |= self.store.apply(update);
            }
            batch = more.try_recv().ok();
        }
        changed
    }

    fn take_outcomes(&mut self, outcomes: &[Outcome]) -> bool {
        let now = Instant::now();
        let mut changed = false;
        for outcome in outcomes {
            let Some(pools) = self.pools.get(&outcome.frontend_id) else { continue };
            let outlook = match outcome.kind {
                OutcomeKind::Established => Outlook::Success,
                OutcomeKind::Failed | OutcomeKind::TimedOut => Outlook::Failure,
            };
            if outlook == Outlook::Failure
                && let Some(pool) = pools.first()
            {
                let what = std::io::Error::from_raw_os_error(outcome.errno as i32);
                let message = format!("connection to {} failed after {:.1?}: {what}", outcome.backend, outcome.latency);
                let record = Record::of_pool(pool, outcome.backend, Record::FAILED, message);
                self.journal.add(Record { client_netns: Some(outcome.netns_cookie), ..record });
            }
            for (pool, event) in self.health.observe(now, pools, outcome.backend, outlook) {
                self.accounts.count_health(&pool, &event);
                self.journal.add(Record::of_health(&pool, &event));
                changed |= !matches!(event.kind, EventKind::Overflow { .. });
            }
        }
        // Each endpoint once, after all its outcomes: while no pool counts failures of it, its successes are of no interest.
        let endpoints: BTreeSet<SocketAddr> = outcomes.iter().map(|outcome| outcome.backend).collect();
        for endpoint in endpoints {
            if let Some(id) = self.layout.backend_id(&endpoint)
                && let Err(error) = self.datapath.maps.set_troubled(id, self.health.counts(&endpoint))
            {
                tracing::warn!("cannot mark backend {endpoint}: {error:#}");
            }
        }
        changed
    }

    fn take_time(&mut self, now: Instant) -> bool {
        let retry = self.retry.take_if(|at| *at <= now).is_some();
        let released = self.health.handle_timeout(now);
        for (pool, event) in &released {
            self.journal.add(Record::of_health(pool, event));
        }
        retry || !released.is_empty()
    }

    /// Computes the verdict and leads the kernel to it.
    fn publish(&mut self) -> Result<()> {
        let started = Instant::now();
        let snapshot = self.store.snapshot();
        let mut findings = Vec::new();
        self.client = self.place.client(&self.cluster, &snapshot, &mut findings);
        let mut ejections = self.health.ejections();
        self.verdict = assign(&snapshot, &self.client, &ejections);
        self.health.configure(started, &self.verdict.assignments);
        // A rule or an endpoint that went took its ejections with it.
        if self.health.ejections() != ejections {
            ejections = self.health.ejections();
            self.verdict = assign(&snapshot, &self.client, &ejections);
        }
        self.verdict.findings.splice(0..0, findings);

        let table = Table::new(&self.verdict.assignments);
        let knowledge = self.knowledge(&snapshot);
        let (ops, refused) = self.layout.update(started, &table, knowledge);
        self.trouble = refused
            .iter()
            .map(|refused| {
                let (address, full) = (refused.key.endpoint().socket_addr(), refused.full);
                let message = format!(
                    "{} ({} entries) has no room for {} more: it stays as it was, or refuses if it is new",
                    refused.map, full.size, full.wanted
                );
                Finding::error(format!("Frontend {address}"), message)
            })
            .collect();
        self.name_backends();
        if ops.iter().any(|op| matches!(op, Op::RemoveFrontend(_) | Op::ResetFrontend(_))) {
            self.count_frontends();
        }
        self.accounts.before(&ops, &self.datapath.maps);
        if let Err(error) = self.datapath.maps.apply(&ops) {
            self.trouble.push(Finding::error("Kernel", format!("{error:#}; tried again soon")));
            // What was written before the failure is not known, so it is read.
            self.layout = Layout::from_held(self.layout.sizes(), self.datapath.maps.held(self.layout.sizes())?);
        }
        self.plan_retry(started);
        self.log_findings();
        self.index_pools();
        if !self.attached {
            self.datapath.attach()?;
            self.attached = true;
            let cgroup = self.datapath.cgroup().display();
            tracing::info!(%cgroup, frontends = table.frontends.len(), "attached: connections are served");
        }
        let frontends = ops.iter().filter(|op| matches!(op, Op::SetFrontend(..) | Op::RemoveFrontend(_))).count();
        let took = started.elapsed();
        self.accounts.published(took);
        if frontends > 0 {
            let message = format!("{frontends} frontends changed, {} writes, {took:.1?}", ops.len());
            self.journal.add(Record { kind: "published".to_owned(), message, ..Record::default() });
        }
        Ok(())
    }

    /// How much is known of what should be, and why no more.
    fn knowledge(&mut self, snapshot: &Snapshot) -> Knowledge {
        let unknown = || format!("the configuration has nothing of cluster {}", self.cluster);
        let (knowledge, doubt) = match self.store.doubt() {
            Some(doubt) if doubt.settings => (Knowledge::WithoutSettings, Some(doubt.what.clone())),
            Some(doubt) => (Knowledge::Partial, Some(doubt.what.clone())),
            None if !snapshot.clusters.contains_key(&self.cluster) => (Knowledge::Partial, Some(unknown())),
            None => (Knowledge::Complete, None),
        };
        self.doubt = doubt;
        knowledge
    }

    fn plan_retry(&mut self, now: Instant) {
        if self.trouble.is_empty() {
            (self.retry, self.retry_after) = (None, FIRST_RETRY);
        } else {
            self.retry = Some(now + self.retry_after);
            self.retry_after = (self.retry_after * 2).min(LAST_RETRY);
        }
    }

    /// Logs the findings that were not there before.
    fn log_findings(&mut self) {
        let findings: BTreeSet<Finding> = self.findings().into_iter().collect();
        let mut fresh = findings.difference(&self.logged);
        for finding in fresh.by_ref().take(LOGGED_AT_ONCE) {
            let Finding { object, message, source, .. } = finding;
            let source = Some(source).filter(|source| !source.is_empty());
            match finding.severity {
                Severity::Error => tracing::error!(source, "{object}: {message}"),
                Severity::Warning => tracing::warn!(source, "{object}: {message}"),
            }
        }
        let more = fresh.count();
        if more > 0 {
            tracing::warn!("{more} more findings: portolan get services");
        }
        self.logged = findings;
    }

    /// Tells the accounts what endpoints belong to.
    fn name_backends(&mut self) {
        let pools = self.verdict.assignments.iter().flat_map(|assignment| &assignment.routes).map(|route| &route.pool);
        self.accounts.name(pools.flat_map(|pool| {
            pool.endpoints.iter().map(|endpoint| (endpoint.address, Destination::new(&pool.key, endpoint)))
        }));
    }

    fn index_pools(&mut self) {
        let ids: HashMap<_, u32> = self.layout.frontends().map(|(key, frontend)| (*key, frontend.id)).collect();
        self.pools.clear();
        self.services.clear();
        for assignment in &self.verdict.assignments {
            let pools: Vec<PoolKey> = assignment.routes.iter().map(|route| route.pool.key.clone()).collect();
            for frontend in &assignment.frontends {
                if let Some(id) = ids.get(&table::key(*frontend, assignment.protocol.number())) {
                    self.pools.insert(*id, pools.clone());
                    self.services.insert(*id, (assignment.service.clone(), assignment.port));
                }
            }
        }
    }

    /// Takes in the counters of all frontends.
    fn count_frontends(&mut self) {
        for (id, (service, port)) in &self.services {
            if let Ok(stats) = self.datapath.maps.frontend_stats(*id) {
                self.accounts.take_frontend(*id, service, *port, stats);
            }
        }
    }

    fn answer(&mut self, request: Request) {
        // Where the one who asked has gone away, the answer is for nobody.
        match request {
            Request::Report(reply) => drop(reply.send(self.report())),
            Request::Sample(reply) => drop(reply.send(self.sample())),
            Request::Ready(reply) => drop(reply.send(self.ready())),
            Request::Events(reply) => drop(reply.send(self.journal.follow())),
        }
    }

    fn ready(&self) -> Result<(), String> {
        if !self.store.synced() {
            return Err("not everything has been read yet".to_owned());
        }
        let inherited = self.layout.inherited();
        if let Some(doubt) = self.doubt.as_ref().filter(|_| inherited > 0) {
            return Err(format!("{inherited} frontends are left as a former agent published them, for {doubt}"));
        }
        self.datapath.check_hooks().map_err(|error| format!("{error:#}"))
    }

    fn sample(&mut self) -> Sample {
        self.accounts.collect(&self.layout, &self.datapath.maps);
        self.count_frontends();
        Sample {
            services: self.accounts.services().clone(),
            totals: self.accounts.totals().clone(),
            ejected: self.health.ejected(),
            health: self.accounts.health().clone(),
            publish_seconds: self.accounts.publish_seconds(),
            counters: self.datapath.maps.counters().unwrap_or_default(),
            used: self.layout.used(),
            sizes: self.layout.sizes(),
            ready: self.ready().is_ok(),
            findings: self.findings(),
        }
    }

    fn findings(&self) -> Vec<Finding> {
        self.verdict.findings.iter().chain(&self.trouble).cloned().collect()
    }

    /// The verdict, with what the kernel holds beside it.
    fn report(&self) -> Report {
        let mut report = Report::new(&self.client, self.store.fingerprint(), &self.verdict);
        report.findings = self.findings();
        let routes = self
            .verdict
            .assignments
            .iter()
            .flat_map(|assignment| assignment.routes.iter().map(move |route| (assignment, route)));
        for (service, (assignment, route)) in report.services.iter_mut().zip(routes) {
            if std::ptr::eq(route, &raw const assignment.routes[0]) {
                service.kernel = Some(self.frontend_kernel(&assignment.frontends, assignment.protocol.number()));
            }
            for (endpoint, intended) in service.endpoints.iter_mut().zip(&route.pool.endpoints) {
                endpoint.kernel = self.endpoint_kernel(&intended.address);
                endpoint.ejected_until = self.health.ejection(&route.pool.key, &intended.address).map(|ejection| {
                    let left = ejection.until.saturating_duration_since(Instant::now());
                    rfc3339(SystemTime::now() + left)
                });
            }
        }
        report
    }

    fn frontend_kernel(&self, frontends: &[SocketAddr], protocol: u32) -> FrontendKernel {
        let mut sum = FrontendKernel::default();
        for frontend in
            frontends.iter().filter_map(|address| self.datapath.maps.frontend(&table::key(*address, protocol)))
        {
            let stats = self.datapath.maps.frontend_stats(frontend.id).unwrap_or_default();
            sum.slots += frontend.period;
            sum.generation = sum.generation.max(frontend.generation);
            sum.connections += stats.given();
            sum.refused += stats.refused_in_all();
        }
        sum
    }

    fn endpoint_kernel(&self, address: &SocketAddr) -> Option<EndpointKernel> {
        let stats = self.datapath.maps.backend_stats(self.layout.backend_id(address)?).ok()?;
        Some(EndpointKernel {
            connections: stats.opened,
            active: stats.opened.saturating_sub(stats.closed),
            failures: stats.failed,
        })
    }
}
