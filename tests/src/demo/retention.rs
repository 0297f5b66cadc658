//! Cluster-local traffic: off, by service, by namespace, for all services with an exclusion, and failing closed.

use anyhow::Result;
use serde_json::{Value, json};

use super::{
    Play, Scenario,
    pages::expect,
    report::Report,
    world::{Plan, World},
};
use crate::objects::{destination_rule, mesh_config, tcp_route};

pub(super) const SCENARIO: Scenario = Scenario {
    name: "two clusters in one region, m1c1 with reviews v1 and m1c2 with reviews v2",
    build,
    plays: &[
        Play { name: "retention-off", about: "reviews in both clusters get equal shares", play: off },
        Play {
            name: "retention-service",
            about: "reviews is cluster-local; the other services are not",
            play: by_service,
        },
        Play {
            name: "retention-namespace",
            about: "all services of the namespace are cluster-local",
            play: by_namespace,
        },
        Play { name: "retention-global", about: "all services but one are cluster-local", play: global },
        Play {
            name: "fail-closed",
            about: "cluster-local without endpoints: connections fail, none leaks to the other cluster",
            play: fail_closed,
        },
    ],
};

const FIRST: usize = 0;
const SECOND: usize = 1;

/// Builds the clusters. The gateway of m1c1 reaches the productpage of each one.
///
/// `/productpage1` and `/productpage2` dial Services whose routes lead to the clusters' subsets.
fn build(kubernetes: bool) -> Result<World> {
    let plan = |id, zone| Plan { id, region: "cn-hangzhou", zone };
    let mut world = World::new(
        [plan("m1c1", "cn-hangzhou-h"), plan("m1c2", "cn-hangzhou-i")],
        &[("productpage-m1c1", 11), ("productpage-m1c2", 12)],
        kubernetes,
    )?;
    for cluster in [FIRST, SECOND] {
        for service in ["productpage", "details", "ratings"] {
            world.scale(cluster, service, "v1", 1)?;
        }
    }
    let subset = |name| json!({"name": name, "labels": {"cluster": name}});
    world.apply(
        "rules.yaml",
        &[
            destination_rule("productpage", &json!({"subsets": [subset("m1c1"), subset("m1c2")]})),
            tcp_route("productpage-m1c1", "productpage", "m1c1"),
            tcp_route("productpage-m1c2", "productpage", "m1c2"),
        ],
    )?;
    Ok(world)
}

/// Makes hosts cluster-local (or, with `false`, excludes them), and waits until this is in effect.
/// Both clusters have a pod of reviews.
fn set_cluster_local(world: &mut World, hosts: &[(&str, bool)]) -> Result<()> {
    world.scale(FIRST, "reviews", "v1", 1)?;
    world.scale(SECOND, "reviews", "v2", 1)?;
    let settings: Vec<Value> =
        hosts.iter().map(|(host, local)| json!({"settings": {"clusterLocal": local}, "hosts": [host]})).collect();
    world.apply("mesh.yaml", &[mesh_config(&json!({"serviceSettings": settings}))])?;
    world.settle()
}

/// Requests 100 pages from the productpage of each cluster, and checks where their reviews came from.
fn both(world: &World, report: &mut Report, gateways: [usize; 2], what: &str, stars: [usize; 2]) -> Result<()> {
    for (i, stars) in stars.into_iter().enumerate() {
        let pages = world.pages(gateways[i], &format!("/productpage{}", i + 1), 100)?;
        report.check(
            &format!("{what}: 100 pages of /productpage{}", i + 1),
            &expect(100, stars, 0),
            &pages.to_string(),
        );
        let by = format!("{:?}", pages.by_productpage().into_values().collect::<Vec<_>>());
        let cluster = ["m1c1", "m1c2"][i];
        let own = pages.by_productpage().keys().all(|pod| pod.contains(cluster));
        report.step(&format!("productpage of {cluster} serves them"), "100 of 100", &by, own && by == "[100]");
    }
    Ok(())
}

fn off(world: &mut World, report: &mut Report) -> Result<()> {
    set_cluster_local(world, &[])?;
    both(world, report, [FIRST, FIRST], "half with stars", [100, 100])
}

fn by_service(world: &mut World, report: &mut Report) -> Result<()> {
    set_cluster_local(world, &[("reviews.default.svc.cluster.local", true)])?;
    let before = world.connections(FIRST, "details")?;
    both(world, report, [FIRST, FIRST], "none or all with stars", [0, 200])?;
    let after = world.connections(FIRST, "details")?;
    let seen = format!("{} and {}", after[0] - before[0], after[1] - before[1]);
    report.check("details is not cluster-local: connections from m1c1 to each cluster", "50 and 50", &seen);
    Ok(())
}

fn by_namespace(world: &mut World, report: &mut Report) -> Result<()> {
    set_cluster_local(world, &[("*.default.svc.cluster.local", true)])?;
    let before = world.connections(FIRST, "details")?;
    // The gateway of m1c1 now reaches only its own cluster, so the gateway of m1c2 serves the second path.
    both(world, report, [FIRST, SECOND], "none or all with stars", [0, 200])?;
    let after = world.connections(FIRST, "details")?;
    let seen = format!("{} and {}", after[0] - before[0], after[1] - before[1]);
    report.check("details is cluster-local too: connections from m1c1 to each cluster", "100 and 0", &seen);
    Ok(())
}

fn global(world: &mut World, report: &mut Report) -> Result<()> {
    set_cluster_local(world, &[("*", true), ("productpage.default.svc.cluster.local", false)])?;
    both(world, report, [FIRST, FIRST], "productpage excluded, reviews cluster-local", [0, 200])
}

fn fail_closed(world: &mut World, report: &mut Report) -> Result<()> {
    set_cluster_local(world, &[("reviews.default.svc.cluster.local", true)])?;
    world.scale(FIRST, "reviews", "v1", 0)?;
    // Failover is configured as well, and must not weaken it.
    let subset = |name| json!({"name": name, "labels": {"cluster": name}});
    let rules = |more: &[Value]| {
        let own = [
            destination_rule("productpage", &json!({"subsets": [subset("m1c1"), subset("m1c2")]})),
            tcp_route("productpage-m1c1", "productpage", "m1c1"),
            tcp_route("productpage-m1c2", "productpage", "m1c2"),
        ];
        [&own[..], more].concat()
    };
    let failover = json!({"trafficPolicy": {
        "outlierDetection": {"consecutive5xxErrors": 1, "maxEjectionPercent": 100},
        "loadBalancer": {"localityLbSetting": {"failover": [{"from": "cn-hangzhou", "to": "cn-shanghai"}]}}}});
    world.apply("rules.yaml", &rules(&[destination_rule("reviews", &failover)]))?;
    world.settle()?;
    let before = world.connections(FIRST, "reviews")?;
    let pages = world.pages(FIRST, "/productpage1", 10)?;
    report.check("no reviews in m1c1: all its pages fail", &expect(10, 0, 10), &pages.to_string());
    let after = world.connections(FIRST, "reviews")?;
    report.check("connections from m1c1 to reviews in m1c2", "0", &(after[1] - before[1]).to_string());
    let service = &world.get(FIRST, "services")?["services"];
    let reviews = service.as_array().into_iter().flatten().find(|entry| entry["name"] == "reviews");
    let refused = reviews.map_or(json!(null), |entry| entry["kernel"]["refused"].clone());
    report.check("the kernel refused them", "10", &refused.to_string());
    let pages = world.pages(FIRST, "/productpage2", 10)?;
    report.check("m1c2 is not affected", &expect(10, 20, 0), &pages.to_string());
    world.apply("rules.yaml", &rules(&[]))
}
