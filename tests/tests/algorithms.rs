//! Endpoint selection within a locality: every algorithm, with real connections.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use portolan_tests::{
    Agent, Dialer, Directory, Namespace, ProcessContext, TestBed,
    dial::Task,
    objects::{destination_rule, node, service, slice},
    unique, wait_until,
};
use serde_json::{Value, json};

const BOUND: Duration = Duration::from_secs(20);
const WEB: &str = "172.16.0.10:80";

/// A service with a number of endpoints in each region (`10.<region>.0.<i>`), and a rule.
struct World {
    bed: TestBed,
    directory: Directory,
    policy: Value,
    affinity: Option<u32>,
    regions: Vec<usize>,
}

impl World {
    fn new(regions: &[usize], policy: Value) -> Result<Self> {
        let (bed, directory) = (TestBed::new()?, Directory::new()?);
        let world = Self { bed, directory, policy, affinity: None, regions: regions.to_vec() };
        world.serve_in(&world.bed.namespace)?;
        world.write(&[])?;
        Ok(world)
    }

    fn addresses(&self) -> Vec<(usize, String)> {
        let regions = self.regions.iter().enumerate();
        regions.flat_map(|(region, count)| (1..=*count).map(move |i| (region, format!("10.{region}.0.{i}")))).collect()
    }

    fn serve_in(&self, namespace: &Namespace) -> Result<()> {
        for (_, address) in self.addresses() {
            namespace.add_address(&format!("{address}/32"))?;
            self.bed.serve_in(namespace, &format!("{address}:9080"), &address)?;
        }
        Ok(())
    }

    /// Writes the objects, except for these endpoints.
    fn write(&self, without: &[&str]) -> Result<()> {
        let addresses = self.addresses();
        let nodes = ["n0", "n1", "n2"];
        let endpoints: Vec<(&str, &str, &str)> = addresses
            .iter()
            .filter(|(_, address)| !without.contains(&address.as_str()))
            .map(|(region, address)| (address.as_str(), nodes[*region], ""))
            .collect();
        let mut web = service("web", &["172.16.0.10"], 80);
        if let Some(seconds) = self.affinity {
            web["spec"]["sessionAffinity"] = json!("ClientIP");
            web["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
        }
        let mut objects = vec![web, slice("web", 9080, &endpoints)];
        objects.extend(nodes.iter().zip(0..).map(|(name, region)| node(name, &format!("r{region}/z1"))));
        objects.push(destination_rule("web", &json!({"trafficPolicy": self.policy})));
        self.directory.write("c1/all.yaml", &objects)
    }

    fn agent(&self) -> Result<Agent> {
        self.bed.agent(&self.directory, "c1", "n0")
    }

    /// Creates `count` pods: network namespaces, each with its own copies of the endpoints.
    fn pods(&self, count: usize) -> Result<Vec<Namespace>> {
        let pods: Result<Vec<Namespace>> = (0..count).map(|_| Namespace::new(unique("pod"))).collect();
        let pods = pods?;
        pods.iter().try_for_each(|pod| self.serve_in(pod))?;
        Ok(pods)
    }

    fn client(&self, pod: &Namespace) -> Result<Dialer> {
        Dialer::start(ProcessContext { namespace: Some(pod), cgroup: Some(&self.bed.cgroup) })
    }
}

fn counts(client: &mut Dialer, times: u32) -> Result<BTreeMap<String, u32>> {
    let mut counts = BTreeMap::new();
    for seen in client.dial(WEB, times)?.seen {
        ensure!(seen.errno == 0, "{seen:?}");
        *counts.entry(seen.greeting).or_default() += 1;
    }
    Ok(counts)
}

/// Returns the endpoint that a client gets each time.
fn only(client: &mut Dialer) -> Result<String> {
    let counts = counts(client, 5)?;
    ensure!(counts.len() == 1, "{counts:?}");
    Ok(counts.into_keys().next().unwrap())
}

/// Returns the active connections of each endpoint, as the kernel counts them.
fn active(agent: &Agent) -> Result<BTreeMap<String, u64>> {
    let report = agent.get("endpoints")?;
    let endpoints = report["services"][0]["endpoints"].as_array().into_iter().flatten();
    let address = |text: &str| text.split(':').next().unwrap().to_owned();
    Ok(endpoints
        .map(|endpoint| {
            (address(endpoint["address"].as_str().unwrap()), endpoint["kernel"]["active"].as_u64().unwrap())
        })
        .collect())
}

#[test]
fn random_selection_keeps_the_split() -> Result<()> {
    let split = json!({"distribute": [{"from": "r0/*", "to": {"r0/*": 80, "r1/*": 20}}]});
    let world = World::new(&[4, 1], json!({"loadBalancer": {"simple": "RANDOM", "localityLbSetting": split}}))?;
    let agent = world.agent()?;
    let mut client = world.bed.dialer()?;
    let reply = client.dial(WEB, 2_000)?;
    let mut of: BTreeMap<&str, f64> = BTreeMap::new();
    reply.greetings().into_iter().for_each(|greeting| *of.entry(greeting).or_default() += 1.0);
    // Five counts of 400 are expected, each within six standard deviations.
    assert_eq!(of.len(), 5, "{of:?}");
    assert!(of.values().all(|count| (count - 400.0).abs() < 6.0 * (2_000.0f64 * 0.2 * 0.8).sqrt()), "{of:?}");
    // Under round robin, no endpoint would be selected twice in a row.
    let twice = reply.seen.windows(2).filter(|pair| pair[0].greeting == pair[1].greeting).count();
    assert!(twice > 100, "{twice} of 2,000 repeated the previous endpoint");
    assert_eq!(agent.get("services")?["services"][0]["algorithm"], json!("RANDOM"));
    Ok(())
}

#[test]
fn least_request_prefers_endpoints_with_fewer_connections() -> Result<()> {
    let split = json!({"distribute": [{"from": "r0/*", "to": {"r0/*": 90, "r1/*": 10}}]});
    let world = World::new(&[2, 2], json!({"loadBalancer": {"simple": "LEAST_REQUEST", "localityLbSetting": split}}))?;
    let agent = world.agent()?;
    let mut busy = world.bed.dialer()?;
    // With two endpoints, both are drawn, and the one with fewer connections is selected: they stay level.
    busy.run(&Task::Hold { to: WEB.parse()?, times: 200 })?;
    let levels = active(&agent)?;
    assert_eq!(levels["10.0.0.1"], levels["10.0.0.2"], "{levels:?}");
    assert_eq!((levels["10.0.0.1"], levels["10.1.0.1"], levels["10.1.0.2"]), (90, 10, 10), "{levels:?}");
    // One endpoint is removed and added again, without connections: it gets all of its locality's until it is level.
    world.write(&["10.0.0.1"])?;
    let mut client = world.bed.dialer()?;
    wait_until("the endpoint to be removed", BOUND, || {
        ensure!(!counts(&mut client, 40)?.contains_key("10.0.0.1"));
        Ok(())
    })?;
    world.write(&[])?;
    wait_until("the endpoint to be back", BOUND, || {
        ensure!(counts(&mut client, 40)?.contains_key("10.0.0.1"));
        Ok(())
    })?;
    let reply = counts(&mut client, 100)?;
    assert_eq!((reply.get("10.0.0.1"), reply.get("10.0.0.2")), (Some(&90), None), "{reply:?}");
    // The split between localities stays exact.
    assert_eq!(reply["10.1.0.1"] + reply["10.1.0.2"], 10, "{reply:?}");
    // The application exits without closing. Its connections are no longer counted.
    drop(busy);
    wait_until("no connection to be active", BOUND, || {
        let levels = active(&agent)?;
        ensure!(levels.values().all(|count| *count == 0), "{levels:?}");
        Ok(())
    })
}

#[test]
fn active_connections_are_counted_across_restarts_and_failures() -> Result<()> {
    let world = World::new(&[2], json!({"loadBalancer": {"simple": "LEAST_REQUEST"}}))?;
    let mut agent = world.agent()?;
    let mut holder = world.bed.dialer()?;
    holder.run(&Task::Hold { to: WEB.parse()?, times: 10 })?;
    agent.process.kill();
    // They are counted without an agent as well.
    holder.run(&Task::Hold { to: WEB.parse()?, times: 10 })?;
    let agent = world.agent()?;
    assert_eq!(active(&agent)?.values().sum::<u64>(), 20);
    // Connects that fail, are aborted, or never send a SYN are not active afterwards.
    world.bed.namespace.ip(&["address", "delete", "10.0.0.1/32", "dev", "lo"])?;
    let mut client = world.bed.dialer()?;
    assert!(client.dial(WEB, 20)?.errnos().iter().any(|errno| *errno != 0));
    world.bed.namespace.swallow("10.0.0.1/32")?;
    for _ in 0..10 {
        client.run(&Task::GiveUp { to: WEB.parse()? })?;
    }
    holder.run(&Task::Release)?;
    wait_until("no connection to be active", BOUND, || {
        let levels = active(&agent)?;
        ensure!(levels.values().all(|count| *count == 0), "{levels:?}");
        Ok(())
    })
}

#[test]
fn consistent_hash_sends_each_client_to_one_endpoint() -> Result<()> {
    let hash = json!({"loadBalancer": {"consistentHash": {"useSourceIp": true}}});
    let world = World::new(&[5], hash)?;
    let mut agent = world.agent()?;
    let pods = world.pods(24)?;
    let clients: Result<Vec<Dialer>> = pods.iter().map(|pod| world.client(pod)).collect();
    let mut clients = clients?;
    let mut of = |what: &str| -> Result<Vec<String>> {
        clients.iter_mut().map(|client| only(client).map_err(|error| error.context(what.to_owned()))).collect()
    };
    let before = of("at first")?;
    let used: std::collections::BTreeSet<&String> = before.iter().collect();
    assert!(used.len() >= 3, "24 clients use {used:?}");
    // A new agent changes nothing.
    agent.process.kill();
    let agent = world.agent()?;
    assert_eq!(of("after a restart")?, before);
    // An endpoint is removed: its clients move, and few others.
    let gone = before[0].clone();
    world.write(&[&gone])?;
    wait_until("the endpoint to be removed", BOUND, || {
        ensure!(agent.get("services")?["services"][0]["endpoints"].as_array().map(Vec::len) == Some(4));
        Ok(())
    })?;
    let after = of("without one")?;
    assert!(!after.contains(&gone));
    let moved = before.iter().zip(&after).filter(|(before, after)| **before != gone && before != after).count();
    assert!(moved <= 4, "{moved} clients of other endpoints moved: {before:?} {after:?}");
    world.write(&[])?;
    wait_until("the endpoint to be back", BOUND, || {
        ensure!(agent.get("services")?["services"][0]["endpoints"].as_array().map(Vec::len) == Some(5));
        Ok(())
    })?;
    assert_eq!(of("with all of them again")?, before);
    Ok(())
}

#[test]
fn connection_limit_applies_to_session_affinity() -> Result<()> {
    let mut world = World::new(&[3], json!({"connectionPool": {"tcp": {"maxConnections": 3}}}))?;
    world.affinity = Some(600);
    world.write(&[])?;
    let agent = world.agent()?;
    let mut client = world.bed.dialer()?;
    let hold = Task::Hold { to: WEB.parse()?, times: 4 };
    let errnos = client.run(&hold)?.errnos();
    assert_eq!(errnos.iter().filter(|errno| **errno != 0).count(), 1, "{errnos:?}");
    // The same holds in another version of the frontend.
    let own = active(&agent)?.into_iter().find(|(_, count)| *count == 3).map(|(address, _)| address);
    let own = own.context("the connections went to several endpoints")?;
    let other = ["10.0.0.1", "10.0.0.2"].into_iter().find(|address| *address != own).unwrap();
    world.write(&[other])?;
    wait_until("the change", BOUND, || {
        ensure!(agent.get("services")?["services"][0]["endpoints"].as_array().map(Vec::len) == Some(2));
        Ok(())
    })?;
    assert!(client.run(&hold)?.errnos().iter().all(|errno| *errno != 0));
    client.run(&Task::Release)?;
    wait_until("there to be room", BOUND, || {
        ensure!(client.run(&Task::Hold { to: WEB.parse()?, times: 1 })?.errnos() == [0]);
        Ok(())
    })?;
    let levels = active(&agent)?;
    ensure!(levels.get(&own) == Some(&1), "it came back to {own}: {levels:?}");
    Ok(())
}

#[test]
fn session_affinity_lasts_until_timeout_or_removal() -> Result<()> {
    let mut world = World::new(&[3], json!({}))?;
    world.affinity = Some(3);
    world.write(&[])?;
    let mut agent = world.agent()?;
    let pods = world.pods(6)?;
    let clients: Result<Vec<Dialer>> = pods.iter().map(|pod| world.client(pod)).collect();
    let mut clients = clients?;
    let all = |clients: &mut Vec<Dialer>| -> Result<Vec<String>> { clients.iter_mut().map(only).collect() };
    let before = all(&mut clients)?;
    // New clients follow round robin: two for each endpoint.
    let mut sorted = before.clone();
    sorted.sort();
    assert_eq!(sorted, ["10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2", "10.0.0.3", "10.0.0.3"]);
    agent.process.kill();
    let agent = world.agent()?;
    assert_eq!(all(&mut clients)?, before, "a new agent changes nothing");
    // Clients leave a removed endpoint at once, before the timeout. Clients of other endpoints stay.
    world.write(&[&before[0]])?;
    wait_until("the endpoint to be removed", BOUND, || {
        ensure!(agent.get("services")?["services"][0]["endpoints"].as_array().map(Vec::len) == Some(2));
        Ok(())
    })?;
    let after = all(&mut clients)?;
    for (before_one, after_one) in before.iter().zip(&after) {
        let was_gone = *before_one == before[0];
        assert_eq!(before_one != after_one, was_gone, "{before:?} {after:?}");
    }
    let given = agent.get("services")?["services"][0]["kernel"]["connections"].as_u64();
    assert_eq!(given, Some(90), "connections selected by affinity are counted");
    // After the timeout, a client is treated as a new one.
    world.write(&[])?;
    wait_until("the endpoint to be back and to be selected", BOUND, || {
        std::thread::park_timeout(Duration::from_millis(3_100));
        ensure!(only(&mut clients[1])? != after[1]);
        Ok(())
    })
}
