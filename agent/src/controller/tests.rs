//! The controller without root, clock or I/O: inputs and times go in, a kernel in memory and a list of actions come out.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use portolan_common::{BackendUse, DetectedProtocol, FrontendKey, OutcomeKind};
use portolan_core::{
    decode::{DecodeOptions, read_text},
    health::OverrideCommand,
    model::{Code, NamespacedName, Protocol, Scope},
    store::Origin,
    table::key,
};
use portolan_datapath::{Reason, Reconciled};
use tokio::sync::oneshot;

use super::*;
use crate::{kernel::fake::FakeKernel, probe::ProbeResult};

const WEB: &str = "172.16.0.1:80";
const DNS: &str = "172.16.0.2:53";

/// Two services with the same endpoints, 10.0.0.1 to `endpoints`, of which one ejects after two failures.
fn objects(endpoints: u8) -> String {
    let list: Vec<String> = (1..=endpoints)
        .map(|i| format!("{{addresses: [10.0.0.{i}], nodeName: n1, conditions: {{ready: true}}}}"))
        .collect();
    let list = list.join(", ");
    format!(
        r#"
{{apiVersion: v1, kind: Node, metadata: {{name: n1, labels: {{topology.kubernetes.io/region: r1}}}}}}
---
{{apiVersion: v1, kind: Service, metadata: {{name: web, namespace: default}},
  spec: {{clusterIP: 172.16.0.1, ports: [{{name: tcp, port: 80}}]}}}}
---
{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, ports: [{{name: tcp, port: 80}}],
  metadata: {{name: web-1, namespace: default, labels: {{kubernetes.io/service-name: web}}}}, endpoints: [{list}]}}
---
{{apiVersion: v1, kind: Service, metadata: {{name: dns, namespace: default}},
  spec: {{clusterIP: 172.16.0.2, ports: [{{name: dns, port: 53, protocol: UDP}}]}}}}
---
{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, ports: [{{name: dns, port: 53, protocol: UDP}}],
  metadata: {{name: dns-1, namespace: default, labels: {{kubernetes.io/service-name: dns}}}}, endpoints: [{list}]}}
---
{{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {{name: web, namespace: default}},
  spec: {{host: web, trafficPolicy: {{outlierDetection: {{consecutive5xxErrors: 2, baseEjectionTime: 30s, interval: 1s,
    maxEjectionPercent: 50}}}}}}}}
"#
    )
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn frontend(text: &str, protocol: Protocol) -> FrontendKey {
    key(address(text), protocol)
}

fn web() -> FrontendKey {
    frontend(WEB, Protocol::Tcp)
}

/// A controller over a kernel in memory, at a time that a test moves.
struct World {
    controller: Controller<FakeKernel>,
    now: Now,
}

impl World {
    fn start(kernel: FakeKernel, persisted: Result<Option<PersistedState>, String>, now: Now) -> Self {
        let settings = Settings {
            cluster: "c1".to_owned(),
            location: ClientLocation { node: Some("n1".to_owned()), ..ClientLocation::default() },
            sizes: Sizes { frontends: 16, backends: 64, slots: 1024, affinities: 16, connections: 1 << 14 },
            removed_endpoint_tcp: RemovedEndpointTcp::Idle,
            probes_per_second: 0,
        };
        let start = Start {
            pinned: kernel.read_back(settings.sizes).unwrap(),
            persisted,
            self_probe: (Table::default(), address("127.0.0.1:1")),
            probe_counts: Arc::default(),
        };
        Self { controller: Controller::new(now, settings, kernel, start), now }
    }

    fn now() -> Now {
        Now { instant: Instant::now(), wall: SystemTime::now(), monotonic: Duration::from_secs(1_000) }
    }

    /// An agent that has read `endpoints` endpoints, and serves.
    fn serving(endpoints: u8) -> Self {
        let mut world = Self::start(FakeKernel::default(), Ok(None), Self::now());
        world.read(endpoints);
        world.handle(Input::Updates(vec![Update::Synced]));
        world
    }

    fn handle(&mut self, input: Input) {
        self.controller.handle(self.now, input).unwrap();
    }

    fn read(&mut self, endpoints: u8) {
        self.read_text(&objects(endpoints));
    }

    fn read_text(&mut self, text: &str) {
        let scope = Scope::Cluster("c1".to_owned());
        let contents = read_text(DecodeOptions::default(), &scope, "c1/all.yaml", text);
        assert!(contents.findings.is_empty(), "{:?}", contents.findings);
        self.handle(Input::Updates(vec![Update::Replace { origin: Origin::file("c1/all.yaml"), contents }]));
    }

    /// The pool of port 80 of a service.
    fn pool(&self, name: &str) -> portolan_core::policy::PoolKey {
        let assignments = self.controller.compiler.output().assignments;
        let of = |assignment: &&Arc<portolan_core::policy::Assignment>| assignment.service.name.name == name;
        assignments.iter().find(of).unwrap().routes[0].pool.key.clone()
    }

    /// The codes of the findings that were to be recorded since the last call.
    fn recorded(&mut self) -> Vec<Code> {
        let code = |action| match action {
            Action::RecordFinding(finding) => Some(finding.code),
            _ => None,
        };
        self.controller.take_actions().into_iter().filter_map(code).collect()
    }

    /// Lets time pass, with every timeout that comes in it.
    fn advance(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.controller.poll_timeout(self.now).filter(|at| *at <= end.instant) {
            self.now = self.now + at.saturating_duration_since(self.now.instant).max(Duration::from_millis(1));
            self.handle(Input::Timeout);
        }
        self.now = end;
    }

    /// The endpoints that the next connections get, each once, in order.
    fn picks(&self, key: &FrontendKey) -> Vec<String> {
        let picks = self.kernel().maps.picks(key, 60).into_iter();
        let picks: BTreeSet<String> =
            picks.map(|pick| pick.map_or("refused".to_owned(), |it| it.to_string())).collect();
        picks.into_iter().collect()
    }

    fn kernel(&self) -> &FakeKernel {
        self.controller.kernel()
    }

    fn backend(&self, endpoint: &str) -> portolan_core::table::BackendId {
        self.controller.publisher.layout().backend_id(&address(endpoint)).unwrap()
    }

    /// Has this network namespace, and another one, use an endpoint now.
    fn use_by(&mut self, endpoint: &str, netns: [u64; 2]) {
        let (id, at) = (self.backend(endpoint), self.now.monotonic.as_nanos() as u64);
        let uses = BackendUse {
            last_netns: netns[0],
            other_netns: netns[1],
            last_ns: at,
            other_ns: at,
            ..BackendUse::default()
        };
        self.controller.kernel_mut().maps.backend_use.insert(id, uses);
    }

    /// Reports failed connections of a network namespace to an endpoint.
    fn fail(&mut self, endpoint: &str, netns: u64, times: usize) {
        self.fail_of_epoch(1, endpoint, netns, times);
    }

    /// Reports the same for connections that dialed the frontend when its id had this epoch.
    fn fail_of_epoch(&mut self, frontend_epoch: u16, endpoint: &str, netns: u64, times: usize) {
        let (frontend_id, ..) = self.kernel().maps.frontend(&web()).unwrap();
        let outcome = Outcome {
            at: self.now.monotonic,
            backend: address(endpoint),
            frontend_id,
            frontend_epoch,
            kind: OutcomeKind::Failed,
            errno: 111,
            latency: Duration::from_millis(1),
            netns_cookie: netns,
            pod: netns as u32,
            failures: 1,
        };
        self.handle(Input::Outcomes { outcomes: vec![outcome; times], drained: true });
    }

    fn codes(&mut self) -> Vec<Code> {
        let (reply, mut report) = oneshot::channel();
        self.handle(Input::Request(Request::Report(reply)));
        report.try_recv().unwrap().findings.into_iter().map(|finding| finding.code).collect()
    }

    fn kinds(&self) -> Vec<EventKind> {
        self.controller.events.follow().0.into_iter().map(|event| event.kind).collect()
    }

    fn ready(&mut self) -> Result<(), String> {
        let (reply, mut ready) = oneshot::channel();
        self.handle(Input::Request(Request::Ready(reply)));
        ready.try_recv().unwrap()
    }

    /// The confirmation that the last actions ask for.
    fn confirmation(&mut self, result: ProbeResult) -> Option<Confirmation> {
        self.controller.take_actions().into_iter().find_map(|action| match action {
            Action::Confirm { endpoint, probe } => Some(Confirmation { endpoint, probe, result: result.clone() }),
            _ => None,
        })
    }

    fn saves(&mut self) -> Vec<(u64, PersistedState)> {
        let saves = self.controller.take_actions().into_iter().filter_map(|action| match action {
            Action::Save { id, state } => Some((id, state)),
            _ => None,
        });
        saves.collect()
    }

    fn eject_by_operator(&mut self, endpoint: &str) -> oneshot::Receiver<Result<String, String>> {
        let (reply, answer) = oneshot::channel();
        let command =
            OverrideCommand::Eject { endpoint: address(endpoint), for_ms: None, reason: "ticket 1234".to_owned() };
        self.handle(Input::Request(Request::Override(command, reply)));
        answer
    }
}

fn failing() -> ProbeResult {
    ProbeResult::Failing("connection refused".to_owned())
}

const BOTH: [&str; 2] = ["10.0.0.1:80", "10.0.0.2:80"];

#[test]
fn nothing_is_published_before_the_initial_sync() {
    let mut world = World::start(FakeKernel::default(), Ok(None), World::now());
    world.read(2);
    assert!(world.kernel().maps.frontend(&web()).is_none() && !world.kernel().attached);
    assert_eq!(world.ready(), Err("initial sync incomplete".to_owned()));
    world.handle(Input::Updates(vec![Update::Synced]));
    assert_eq!(world.picks(&web()), BOTH);
    assert!(world.kernel().attached);
}

#[test]
fn endpoint_that_no_other_pod_uses_is_ejected_at_once() {
    let mut world = World::serving(2);
    world.fail(BOTH[0], 7, 2);
    assert_eq!(world.picks(&web()), [BOTH[1]]);
    assert!(world.confirmation(failing()).is_none());
    let ejection = world.controller.take_publications().into_iter().filter(|it| it.first_failure.is_some()).count();
    assert_eq!(ejection, 1, "its delay is measured once");
}

#[test]
fn failures_from_two_pods_eject_without_confirmation() {
    let mut world = World::serving(2);
    world.use_by(BOTH[0], [7, 8]);
    world.fail(BOTH[0], 7, 1);
    world.fail(BOTH[0], 8, 1);
    assert_eq!(world.picks(&web()), [BOTH[1]]);
}

#[test]
fn ejection_is_confirmed_by_the_agents_own_connection() {
    let mut world = World::serving(2);
    world.use_by(BOTH[0], [7, 8]);
    world.fail(BOTH[0], 7, 2);
    assert_eq!(world.picks(&web()), BOTH, "a single pod does not eject what others use");
    let confirmation = world.confirmation(failing()).unwrap();
    assert_eq!(confirmation.endpoint, address(BOTH[0]));
    world.handle(Input::Confirmation(confirmation));
    assert_eq!(world.picks(&web()), [BOTH[1]]);
    assert!(world.kinds().contains(&EventKind::Ejected));
    // It comes back after its time, without being told.
    world.advance(Duration::from_secs(40));
    assert_eq!(world.picks(&web()), BOTH);
    assert!(world.kinds().contains(&EventKind::Released));
}

#[test]
fn ejection_is_refused_where_the_agents_own_connection_succeeds() {
    let mut world = World::serving(2);
    world.use_by(BOTH[0], [7, 8]);
    world.fail(BOTH[0], 7, 2);
    let confirmation = world.confirmation(ProbeResult::Success).unwrap();
    world.handle(Input::Confirmation(confirmation));
    assert_eq!(world.picks(&web()), BOTH);
    assert!(world.kinds().contains(&EventKind::Unconfirmed));
    assert!(world.codes().contains(&Code::EjectionUnconfirmed));
    let asked = world.controller.take_actions();
    let named = asked.into_iter().find_map(|action| match action {
        Action::NameNamespace(unconfirmed) => Some(unconfirmed),
        _ => None,
    });
    world.handle(Input::NamespaceName(named.unwrap(), Some("pod default/client".to_owned())));
    let (reply, mut report) = oneshot::channel();
    world.handle(Input::Request(Request::Report(reply)));
    let findings = report.try_recv().unwrap().findings;
    assert!(findings.iter().any(|finding| finding.message.contains("pod default/client")), "{findings:?}");
    // The finding expires.
    world.advance(Duration::from_secs(700));
    assert!(!world.codes().contains(&Code::EjectionUnconfirmed));
}

#[test]
fn ejection_waits_for_a_connection_that_the_agent_can_make() {
    let mut world = World::serving(2);
    world.use_by(BOTH[0], [7, 8]);
    world.fail(BOTH[0], 7, 2);
    let confirmation = world.confirmation(ProbeResult::Unknown("too many open files".to_owned())).unwrap();
    world.handle(Input::Confirmation(confirmation));
    assert_eq!(world.picks(&web()), BOTH, "what was not observed proves nothing");
    let (reply, mut report) = oneshot::channel();
    world.handle(Input::Request(Request::Report(reply)));
    let findings = report.try_recv().unwrap().findings;
    assert!(findings.iter().any(|finding| finding.message.contains("could not dial it: too many open files")));
}

/// The pool of `web` is also the destination of a route of `other`.
#[test]
fn limits_of_a_shared_pool_survive_the_removal_of_a_route_to_it() {
    let base = objects(2).replace("outlierDetection:", "connectionPool: {tcp: {idleTimeout: 1h}}, outlierDetection:");
    let other = "\n---\n{apiVersion: v1, kind: Service, metadata: {name: other, namespace: default}, \
                 spec: {clusterIP: 172.16.0.9, ports: [{name: tcp, port: 80}]}}\n";
    let route = "\n---\n{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: other, namespace: default}, \
                 spec: {hosts: [other], tcp: [{route: [{destination: {host: web, port: {number: 80}}}]}]}}\n";
    let mut world = World::start(FakeKernel::default(), Ok(None), World::now());
    world.read_text(&format!("{base}{other}{route}"));
    world.handle(Input::Updates(vec![Update::Synced]));
    world.read_text(&format!("{base}{other}"));
    let (id, epoch) = world.controller.publisher.layout().pool(&world.pool("web")).unwrap();
    world.controller.kernel_mut().maps.pool_stats.get_mut(&id).unwrap().active = 1.into();
    world.kernel().sweeps.borrow_mut().clear();
    world.advance(Duration::from_secs(120));
    let sweeps = world.kernel().sweeps.take();
    assert!(sweeps.iter().any(|sweep| sweep.lifetimes.contains_key(&(id.get(), epoch as u16))), "{sweeps:?}");
}

#[test]
fn max_ejection_percent_limits_ejections() {
    let mut world = World::serving(2);
    world.fail(BOTH[0], 7, 2);
    world.fail(BOTH[1], 7, 2);
    assert_eq!(world.picks(&web()), [BOTH[1]], "half of two endpoints is one");
    assert!(world.kinds().contains(&EventKind::EjectionLimited));
    assert!(world.codes().contains(&Code::EjectionRefused));
}

#[test]
fn outcomes_from_before_the_start_are_ignored() {
    let mut world = World::serving(2);
    let now = world.now;
    world.now.monotonic -= Duration::from_secs(5);
    world.fail(BOTH[0], 7, 2);
    world.now = now;
    assert_eq!(world.picks(&web()), BOTH);
}

#[test]
fn late_outcome_of_a_reused_frontend_id_is_not_counted() {
    let mut world = World::serving(2);
    world.fail_of_epoch(0, BOTH[0], 7, 10);
    assert_eq!(world.picks(&web()), BOTH);
    world.fail_of_epoch(1, BOTH[0], 7, 2);
    assert_eq!(world.picks(&web()), [BOTH[1]]);
}

#[test]
fn lost_outcomes_are_recovered_from_the_counters() {
    let mut world = World::serving(2);
    let id = world.backend(BOTH[0]);
    let kernel = world.controller.kernel_mut();
    kernel.maps.backend_stats.get_mut(&id).unwrap().failed = 5;
    kernel.failures.insert(id, 5);
    kernel.counters.events_lost = 5;
    // Any outcome makes the gate look.
    world.fail(BOTH[1], 7, 1);
    assert_eq!(world.picks(&web()), [BOTH[1]]);
}

#[test]
fn failures_without_a_report_are_not_lost_outcomes() {
    let mut world = World::serving(2);
    let id = world.backend(BOTH[0]);
    let kernel = world.controller.kernel_mut();
    // Connections of another service, which no rule evaluates, failed at the same endpoint.
    kernel.maps.backend_stats.get_mut(&id).unwrap().failed = 5;
    kernel.counters.events_lost = 5;
    world.fail(BOTH[1], 7, 1);
    assert_eq!(world.picks(&web()), BOTH);
}

#[test]
fn ejections_are_restored_after_a_restart() {
    let mut world = World::serving(2);
    world.fail(BOTH[0], 7, 2);
    world.advance(Duration::from_secs(1));
    let (_, state) = world.saves().pop().unwrap();
    let (kernel, later) = (world.controller.kernel, world.now + Duration::from_secs(5));
    // The next agent finds the maps of the previous one, and its state file.
    let mut world = World::start(kernel, Ok(Some(state)), later);
    assert_eq!(world.picks(&web()), [BOTH[1]], "adopted");
    world.read(2);
    world.handle(Input::Updates(vec![Update::Synced]));
    assert_eq!(world.picks(&web()), [BOTH[1]], "still ejected");
    world.advance(Duration::from_secs(40));
    assert_eq!(world.picks(&web()), BOTH);
}

#[test]
fn unreadable_state_is_a_finding_and_nothing_else() {
    let mut world = World::start(FakeKernel::default(), Err("damaged".to_owned()), World::now());
    world.read(2);
    world.handle(Input::Updates(vec![Update::Synced]));
    assert_eq!(world.picks(&web()), BOTH);
    assert!(world.codes().contains(&Code::PersistedStateUnreadable));
}

#[test]
fn failed_write_is_retried_and_every_prefix_serves() {
    let writes = {
        let mut world = World::serving(2);
        world.controller.take_publications();
        world.read(3);
        world.controller.take_publications().iter().map(|publication| publication.writes).sum::<usize>()
    };
    assert!(writes > 6, "{writes} writes");
    let three: Vec<String> = (1..=3).map(|i| format!("10.0.0.{i}:80")).collect();
    for failing in 0..writes {
        let mut world = World::serving(2);
        world.controller.kernel_mut().fail_write = Some(failing);
        world.read(3);
        let picks = world.picks(&web());
        assert!(picks == BOTH || picks == three, "after {failing} writes: {picks:?}");
        assert!(world.codes().contains(&Code::KernelWrite), "{failing}");
        // The retry comes by itself.
        world.advance(Duration::from_secs(2));
        assert_eq!(world.picks(&web()), three, "after {failing} writes and a retry");
        assert!(!world.codes().contains(&Code::KernelWrite), "{failing}");
        // And what was freed meanwhile is not lost: many further changes fit.
        for endpoints in [1, 4, 2, 5, 3] {
            world.read(endpoints);
            let epoch = world.kernel().grace_epoch.get().unwrap();
            world.handle(Input::GraceElapsed(epoch));
        }
        assert_eq!(world.picks(&web()), three);
    }
}

#[test]
fn retries_become_rarer_while_writes_fail() {
    let mut world = World::serving(2);
    let (mut attempts, start) = (0, world.now);
    world.controller.kernel_mut().fail_write = Some(0);
    world.read(3);
    while world.now.instant - start.instant < Duration::from_secs(600) {
        let Some(at) = world.controller.publisher.poll_timeout() else { break };
        world.controller.kernel_mut().fail_write = Some(0);
        world.now = world.now + at.saturating_duration_since(world.now.instant);
        world.handle(Input::Timeout);
        attempts += 1;
    }
    // 1, 2, 4, 8, 16 and 32 seconds, then each minute.
    assert!((13..=16).contains(&attempts), "{attempts} attempts in ten minutes");
}

#[test]
fn frontend_that_does_not_fit_is_reported_and_fits_later() {
    let mut world = World::serving(2);
    let many = objects(2) + &(0..20).map(service).collect::<String>();
    world.read_text(&many);
    assert!(world.codes().contains(&Code::MapFull));
    assert!(world.ready().unwrap_err().contains("no room"));
    assert_eq!(world.picks(&web()), BOTH, "others are served");
    world.read(2);
    let epoch = world.kernel().grace_epoch.get().unwrap();
    world.handle(Input::GraceElapsed(epoch));
    assert!(!world.codes().contains(&Code::MapFull));
}

fn service(i: u8) -> String {
    format!(
        "\n---\n{{apiVersion: v1, kind: Service, metadata: {{name: more-{i}, namespace: default}}, spec: {{clusterIP: 172.17.0.{i}, ports: [{{port: 80}}]}}}}\n"
    )
}

#[test]
fn removed_endpoints_are_swept_in_one_batch() {
    let mut world = World::serving(4);
    world.kernel().sweeps.borrow_mut().clear();
    world.read(2);
    let sweeps = world.kernel().sweeps.take();
    assert_eq!(sweeps.len(), 1, "one request for both services and both endpoints");
    let sweep = &sweeps[0];
    assert!(sweep.complete && sweep.removed_endpoint_tcp == RemovedEndpointTcp::Idle);
    let udp = sweep.removed_udp.as_ref().unwrap();
    for i in 1..=4 {
        assert_eq!(udp.may_be(&address(&format!("10.0.0.{i}:53"))), i > 2, "endpoint {i}");
    }
    assert_eq!(sweep.endpoints[&web()].len(), 2);
    assert_eq!(sweep.endpoints[&frontend(DNS, Protocol::Udp)].len(), 2);
    // What could not be closed is looked for again, a little later and only once.
    let report = SweepReport { unfinished: sweep.removed_udp.clone(), closing: true, ..SweepReport::default() };
    world.handle(Input::Sweep(report));
    world.advance(Duration::from_secs(20));
    let again: Vec<_> = world.kernel().sweeps.take().into_iter().filter(|sweep| sweep.removed_udp.is_some()).collect();
    assert_eq!(again.len(), 1);
    assert_eq!(again[0].removed_udp, sweep.removed_udp);
}

#[test]
fn reports_of_sweeps_are_logged_and_counted() {
    let mut world = World::serving(2);
    let closed = BTreeMap::from([((Reason::Gone, Protocol::Udp, address("10.0.0.9:53")), 3)]);
    let recounted = Some(Reconciled { freed: 1, corrected: 2, unsettled: 0 });
    let report = SweepReport { closed, closing: true, counting: true, recounted, ..SweepReport::default() };
    world.handle(Input::Sweep(report));
    assert_eq!(world.controller.termination.closed()[&(Reason::Gone, Protocol::Udp)], 3);
    let kinds = world.kinds();
    assert!(kinds.contains(&EventKind::Closed) && kinds.contains(&EventKind::Repaired), "{kinds:?}");
}

#[test]
fn recount_after_attaching_repeats_until_counts_rest() {
    let mut world = World::serving(2);
    world.kernel().sweeps.borrow_mut().clear();
    for _ in 0..20 {
        world.advance(Duration::from_millis(1_100));
        if world.kernel().sweeps.take().iter().any(|sweep| sweep.recount) {
            let recounted = Some(Reconciled { freed: 0, corrected: 0, unsettled: 1 });
            world.handle(Input::Sweep(SweepReport { counting: true, recounted, ..SweepReport::default() }));
        }
    }
    world.advance(Duration::from_secs(60));
    assert!(world.kernel().sweeps.take().is_empty(), "it gives up after ten attempts");
}

/// A limit that does its job refuses all the time.
#[test]
fn recounts_become_rare_while_a_pool_refuses_and_counts_are_right() {
    let mut world = World::start(FakeKernel::default(), Ok(None), World::now());
    let text = objects(2).replace("outlierDetection:", "connectionPool: {tcp: {maxConnections: 3}}, outlierDetection:");
    world.read_text(&text);
    world.handle(Input::Updates(vec![Update::Synced]));
    let (id, _) = world.controller.publisher.layout().pool(&world.pool("web")).unwrap();
    let recounts = |world: &mut World, seconds: u32, corrected: usize| {
        let mut count = 0;
        for _ in 0..seconds {
            world.controller.kernel_mut().maps.pool_stats.get_mut(&id).unwrap().overflow += 1;
            world.advance(Duration::from_secs(1));
            if world.kernel().sweeps.take().iter().any(|sweep| sweep.recount) {
                count += 1;
                let recounted = Some(Reconciled { freed: 0, corrected, unsettled: 0 });
                world.handle(Input::Sweep(SweepReport { counting: true, recounted, ..SweepReport::default() }));
            }
        }
        count
    };
    recounts(&mut world, 120, 0);
    assert!((8..=12).contains(&recounts(&mut world, 600, 0)), "one each minute");
    // Once a count was wrong, others may be as well.
    assert!(recounts(&mut world, 60, 1) > 0);
    assert!(recounts(&mut world, 60, 0) > 3);
}

#[test]
fn override_is_acknowledged_once_it_is_saved() {
    let mut world = World::serving(2);
    let mut answer = world.eject_by_operator(BOTH[0]);
    assert_eq!(world.picks(&web()), [BOTH[1]], "in effect at once");
    assert!(answer.try_recv().is_err(), "not acknowledged yet");
    let saves = world.saves();
    let [(id, state)] = saves.as_slice() else { panic!("{saves:?}") };
    assert!(!state.overrides.is_empty());
    world.handle(Input::Saved(*id, Ok(())));
    assert_eq!(
        answer.try_recv().unwrap(),
        Ok("10.0.0.1:80 ejected by operator until restored: ticket 1234".to_owned())
    );
    assert!(world.codes().contains(&Code::Override));
}

#[test]
fn interrupted_persistence_is_reported_and_repeated() {
    let mut world = World::serving(2);
    let mut answer = world.eject_by_operator(BOTH[0]);
    let (id, _) = world.saves().pop().unwrap();
    world.handle(Input::Saved(id, Err("disk full".to_owned())));
    let said = answer.try_recv().unwrap().unwrap();
    assert!(said.ends_with("; but it is lost when the agent restarts: disk full"), "{said}");
    assert_eq!(world.picks(&web()), [BOTH[1]], "it is in effect nevertheless");
    // The state is saved again without another change.
    world.advance(Duration::from_secs(15));
    let (id, state) = world.saves().pop().unwrap();
    assert!(!state.overrides.is_empty());
    world.handle(Input::Saved(id, Ok(())));
    world.advance(Duration::from_secs(60));
    assert!(world.saves().is_empty(), "nothing is left to save");
}

#[test]
fn operator_does_not_wait_for_a_disk_that_hangs() {
    let mut world = World::serving(2);
    let mut answer = world.eject_by_operator(BOTH[0]);
    world.advance(Duration::from_secs(6));
    let said = answer.try_recv().unwrap().unwrap();
    assert!(said.ends_with("timed out"), "{said}");
}

#[test]
fn override_without_effect_is_refused() {
    let mut world = World::serving(2);
    let mut answer = world.eject_by_operator("10.0.0.77:80");
    assert!(answer.try_recv().unwrap().unwrap_err().contains("no service has an endpoint 10.0.0.77:80"));
    let (reply, mut answer) = oneshot::channel();
    let service = NamespacedName::new("default", "web");
    let command = OverrideCommand::Drain { service, region: "r9".to_owned(), reason: String::new() };
    world.handle(Input::Request(Request::Override(command, reply)));
    assert_eq!(answer.try_recv().unwrap(), Err("default/web has no endpoint in region r9".to_owned()));
    assert!(world.saves().is_empty());
}

#[test]
fn incomplete_input_removes_nothing_that_a_previous_agent_published() {
    let kernel = World::serving(2).controller.kernel;
    let mut world = World::start(kernel, Ok(None), World::now());
    // The source has synced, and knows nothing of this cluster.
    world.handle(Input::Updates(vec![Update::Synced]));
    assert_eq!(world.picks(&web()), BOTH);
    assert!(world.ready().unwrap_err().contains("frontends are unchanged since the previous agent published them"));
    // Another version's programs are not replaced with an incomplete table either.
    let mut kernel = world.controller.kernel;
    (kernel.attached, kernel.replaces_another) = (false, true);
    let mut world = World::start(kernel, Ok(None), World::now());
    world.handle(Input::Updates(vec![Update::Synced]));
    assert!(!world.kernel().attached);
    assert!(world.ready().unwrap_err().starts_with("the previous version's programs are still serving"));
    world.read(2);
    assert!(world.kernel().attached);
}

#[test]
fn broken_hooks_are_repaired_after_the_self_probe() {
    let mut world = World::serving(2);
    world.controller.take_actions();
    world.controller.kernel_mut().broken_hooks = vec!["connect4 has been detached".to_owned()];
    assert!(world.ready().unwrap_err().contains("connect4"));
    world.handle(Input::SelfProbe(Err("connection refused".to_owned())));
    assert!(world.kinds().contains(&EventKind::Repaired));
    assert!(world.controller.take_actions().iter().any(|action| matches!(action, Action::SelfProbe)), "probes again");
    assert_eq!(world.ready(), Err("the self-probe failed: connection refused".to_owned()));
}

#[test]
fn nearly_full_map_is_reported_when_an_incremental_change_fills_it() {
    let mut world = World::serving(2);
    assert_eq!(world.recorded(), []);
    // 58 of 64 backends.
    world.read(29);
    assert_eq!(world.recorded(), [Code::MapNearlyFull]);
    world.read(28);
    let epoch = world.kernel().grace_epoch.get().unwrap();
    world.handle(Input::GraceElapsed(epoch));
    assert_eq!(world.recorded(), []);
    assert!(!world.controller.publisher.findings().any(|finding| finding.code == Code::MapNearlyFull));
}

#[test]
fn detected_protocol_counts_unless_it_is_from_before_the_agent() {
    let mut world = World::serving(2);
    world.read_text(&objects(2).replace("name: tcp", "name: http"));
    let (frontend_id, ..) = world.kernel().maps.frontend(&web()).unwrap();
    let outcome = Outcome {
        at: world.now.monotonic,
        backend: address(BOTH[0]),
        frontend_id,
        frontend_epoch: 1,
        kind: OutcomeKind::NotHttp,
        errno: DetectedProtocol::TLS as u32,
        latency: Duration::ZERO,
        netns_cookie: 7,
        pod: 7,
        failures: 0,
    };
    let earlier = Outcome { at: outcome.at - Duration::from_millis(1), ..outcome };
    world.handle(Input::Outcomes { outcomes: vec![earlier], drained: true });
    assert!(!world.codes().contains(&Code::NotHttp));
    world.handle(Input::Outcomes { outcomes: vec![outcome], drained: true });
    assert!(world.codes().contains(&Code::NotHttp));
}

#[test]
fn slots_for_connections_that_run_out_are_a_finding() {
    let mut world = World::serving(2);
    world.controller.kernel_mut().connection_slots = (89, 100, 0);
    assert!(!world.codes().contains(&Code::MapNearlyFull));
    world.controller.kernel_mut().connection_slots = (90, 100, 0);
    assert!(world.codes().contains(&Code::MapNearlyFull));
}
