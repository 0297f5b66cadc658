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
    health::{Health, Verdict as Outlook},
    journal::{Journal, Record, rfc3339},
    model::{Finding, Locality, Severity},
    policy::{Client, PoolKey, Verdict, assign},
    report::{EndpointKernel, FrontendKernel, Report},
    source::Update,
    store::{Snapshot, Store},
    table::{self, Held, Layout, Op, Sizes, Table},
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
#[derive(Clone, Debug)]
pub enum Place {
    /// A node, whose Node object says where it is.
    Node(String),
    /// A place that was given.
    Locality(Locality),
}

impl Place {
    /// The client that the policy is asked for.
    pub fn client(&self, cluster: &str, snapshot: &Snapshot, findings: &mut Vec<Finding>) -> Client {
        let (node, locality) = match self {
            Self::Locality(locality) => (None, locality.clone()),
            Self::Node(name) => {
                let node = snapshot.clusters.get(cluster).and_then(|objects| objects.nodes.get(name));
                if node.is_none() {
                    let message = format!(
                        "cluster {cluster} has no such Node: where its clients are is unknown, so everything is far away"
                    );
                    findings.push(Finding::error(format!("Node {name}"), message));
                }
                (Some(name.clone()), node.map(|node| node.locality.clone()).unwrap_or_default())
            }
        };
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
    attached: bool,
    retry: Option<Instant>,
    retry_after: Duration,
    /// What the last attempt to write ran into.
    trouble: Vec<Finding>,
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
            attached: false,
            retry: None,
            retry_after: FIRST_RETRY,
            trouble: Vec::new(),
            logged: BTreeSet::new(),
        }
    }

    /// Works until the sources or the questions end.
    ///
    /// # Errors
    /// The kernel cannot be listened to, or does not take the programs.
    pub async fn run(
        mut self,
        mut updates: mpsc::Receiver<Update>,
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

    fn take_updates(&mut self, first: Update, more: &mut mpsc::Receiver<Update>) -> bool {
        let mut changed = self.store.apply(first);
        while let Ok(update) = more.try_recv() {
            changed |= self.store.apply(update);
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
                self.journal.add(Record::of_pool(pool, outcome.backend, Record::FAILED, message));
            }
            for (pool, event) in self.health.observe(now, pools, outcome.backend, outlook) {
                self.accounts.count_health(&pool, &event);
                self.journal.add(Record::of_health(&pool, &event));
                changed = true;
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
        let (ops, refused) = self.layout.update(started, &table, true);
        self.trouble = refused
            .iter()
            .map(|refused| {
                let (address, full) = (refused.key.endpoint().socket_addr(), refused.full);
                let message = format!(
                    "stays as it was: {} has no room for {} entries of {}",
                    refused.map, full.wanted, full.size
                );
                Finding::error(format!("Frontend {address}"), message)
            })
            .collect();
        self.name_backends();
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
        for assignment in &self.verdict.assignments {
            for pool in assignment.routes.iter().map(|route| &route.pool) {
                for endpoint in &pool.endpoints {
                    self.accounts.name(endpoint.address, || Destination::new(&pool.key, endpoint));
                }
            }
        }
    }

    fn index_pools(&mut self) {
        let ids: HashMap<_, u32> = self.layout.frontends().map(|(key, frontend)| (*key, frontend.id)).collect();
        self.pools.clear();
        for assignment in &self.verdict.assignments {
            let pools: Vec<PoolKey> = assignment.routes.iter().map(|route| route.pool.key.clone()).collect();
            for frontend in &assignment.frontends {
                if let Some(id) = ids.get(&table::key(*frontend, assignment.protocol.number())) {
                    self.pools.insert(*id, pools.clone());
                }
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
        self.datapath.check_hooks().map_err(|error| format!("{error:#}"))
    }

    fn sample(&mut self) -> Sample {
        self.accounts.collect(&self.layout, &self.datapath.maps);
        let frontends = self.verdict.assignments.iter().map(|assignment| {
            let kernel = self.frontend_kernel(&assignment.frontends, assignment.protocol.number());
            (assignment.service.clone(), assignment.port, kernel)
        });
        Sample {
            frontends: frontends.collect(),
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
            service.kernel = Some(self.frontend_kernel(&assignment.frontends, assignment.protocol.number()));
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
            sum.connections += stats.cursor;
            sum.refused += stats.refused;
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
