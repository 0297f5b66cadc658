//! Disaster recovery between regions: baseline, failover, outages, distribution.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

use super::{
    Play, Scenario,
    pages::expect,
    report::Report,
    world::{Plan, World},
};
use crate::{
    objects::{destination_rule, mesh_config},
    report::{locality_shares, service_named},
    wait_until,
};

pub(super) const SCENARIO: Scenario = Scenario {
    name: "two clusters in two regions, ack-hangzhou and ack-shanghai",
    build,
    plays: &[
        Play {
            name: "baseline",
            about: "no rules: reviews v1, v2, and v3 get equal shares, regardless of region",
            play: baseline,
        },
        Play {
            name: "failover",
            about: "reviews in Hangzhou scaled to zero and back: failover to Shanghai and failback",
            play: failover,
        },
        Play {
            name: "outage",
            about: "reviews in Hangzhou refuses connections: ejection, failover, release, second ejection",
            play: outage,
        },
        Play { name: "blackhole", about: "packets to reviews in Hangzhou are silently dropped", play: blackhole },
        Play { name: "sick", about: "reviews in Hangzhou accepts, then returns 500, resets, or hangs", play: sick },
        Play { name: "distribution", about: "90% to Hangzhou, 10% to Shanghai", play: distribution },
        Play {
            name: "exclusive",
            about: "failover and distribution in one setting are mutually exclusive, as in Istio",
            play: exclusive,
        },
    ],
};

const HANGZHOU: usize = 0;
const SHANGHAI: usize = 1;
const BOUND: Duration = Duration::from_secs(30);

/// Builds the clusters, with productpage only in the gateway's region.
/// In both regions, the mesh-wide shares would apply twice: to the gateway's call and to productpage's.
fn build(kubernetes: bool) -> Result<World> {
    let mut world = World::new(
        [
            Plan { id: "ack-hangzhou", region: "cn-hangzhou", zone: "cn-hangzhou-h" },
            Plan { id: "ack-shanghai", region: "cn-shanghai", zone: "cn-shanghai-b" },
        ],
        &[],
        kubernetes,
    )?;
    world.scale(HANGZHOU, "productpage", "v1", 1)?;
    for cluster in [HANGZHOU, SHANGHAI] {
        world.scale(cluster, "details", "v1", 1)?;
        world.scale(cluster, "ratings", "v1", 1)?;
    }
    Ok(world)
}

/// Scales reviews by version, applies the settings, and waits until they are in effect.
fn set(world: &mut World, v1: usize, v2: usize, v3: usize, mesh: &Value, reviews: Option<&Value>) -> Result<()> {
    world.scale(HANGZHOU, "reviews", "v1", v1)?;
    world.scale(SHANGHAI, "reviews", "v2", v2)?;
    world.scale(HANGZHOU, "reviews", "v3", v3)?;
    world.apply("mesh.yaml", &[mesh_config(mesh)])?;
    let rule = reviews.map(|policy| destination_rule("reviews", &json!({"trafficPolicy": policy})));
    // The agent ignores a file that became empty, so the file always has a rule.
    world.apply("rules.yaml", &[rule.unwrap_or_else(|| destination_rule("productpage", &json!({})))])?;
    world.settle()
}

fn failover_setting() -> Value {
    json!({"localityLbSetting": {"failover": [
        {"from": "cn-shanghai", "to": "cn-hangzhou"}, {"from": "cn-hangzhou", "to": "cn-shanghai"}]}})
}

fn distribute_setting() -> Value {
    json!({"localityLbSetting": {"distribute": [
        {"from": "cn-hangzhou/*", "to": {"cn-hangzhou/*": 90, "cn-shanghai/*": 10}}]}})
}

/// Returns the traffic policy of the scenario's DestinationRule, with `more` added to its outlierDetection.
fn reviews_policy(more: &Value) -> Value {
    let mut policy = json!({
        "connectionPool": {"http": {"maxRequestsPerConnection": 1}},
        "outlierDetection": {"baseEjectionTime": "1m", "consecutive5xxErrors": 1, "interval": "1s"},
    });
    for (field, value) in more.as_object().into_iter().flatten() {
        policy["outlierDetection"][field] = value.clone();
    }
    policy
}

fn baseline(world: &mut World, report: &mut Report) -> Result<()> {
    set(world, 1, 1, 1, &json!({}), None)?;
    let programs = world.programs(HANGZHOU)?;
    let names = ["connect4", "connect6", "getpeername4", "getpeername6", "sock_ops"];
    let seen: Vec<_> = names.into_iter().filter(|name| programs.contains(name)).collect();
    report.check("bpftool shows the programs on the node's cgroup", &names.join(" "), &seen.join(" "));
    let pages = world.pages(HANGZHOU, "/productpage", 30)?;
    let seen = ["v1", "v2", "v3"].map(|version| format!("{version} {}", pages.from(&format!("reviews-{version}"))));
    report.check("30 pages by version of reviews", "v1 10, v2 10, v3 10", &seen.join(", "));
    report.check("no page fails", "0 errors", &format!("{} errors", pages.errors()));
    Ok(())
}

fn failover(world: &mut World, report: &mut Report) -> Result<()> {
    set(world, 1, 1, 0, &failover_setting(), Some(&reviews_policy(&json!({}))))?;
    let pages = world.pages(HANGZHOU, "/productpage", 10)?;
    report.check("Hangzhou serves its own traffic (v1 has no stars)", &expect(10, 0, 0), &pages.to_string());

    set(world, 0, 1, 0, &failover_setting(), Some(&reviews_policy(&json!({}))))?;
    let pages = world.pages(HANGZHOU, "/productpage", 10)?;
    report.check("no replicas in Hangzhou: all pages from Shanghai (v2)", &expect(10, 20, 0), &pages.to_string());
    report.check("10 of 10 from v2", "10", &pages.from("reviews-v2-ack-shanghai").to_string());

    set(world, 1, 1, 0, &failover_setting(), Some(&reviews_policy(&json!({}))))?;
    let pages = world.pages(HANGZHOU, "/productpage", 10)?;
    report.check("Hangzhou is back, and so is its traffic", &expect(10, 0, 0), &pages.to_string());
    Ok(())
}

fn ejected(world: &World) -> Result<usize> {
    let report = world.get(HANGZHOU, "ejections")?;
    Ok(report["services"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|service| service["endpoints"].as_array().map_or(0, Vec::len))
        .sum())
}

/// Counts the endpoints of reviews whose probes fail.
fn unhealthy(world: &World) -> Result<usize> {
    let report = world.get(HANGZHOU, "services")?;
    let endpoints = service_named(&report, "reviews")?["endpoints"].as_array().cloned().unwrap_or_default();
    Ok(endpoints.iter().filter(|endpoint| endpoint["health"] == "unhealthy").count())
}

/// Requests pages until `wanted` endpoints are ejected. Returns the number of pages with an error.
fn until_ejected(world: &World, wanted: usize) -> Result<usize> {
    let mut errors = 0;
    for _ in 0..400 {
        if ejected(world)? >= wanted {
            return Ok(errors);
        }
        let before = ejected(world)?;
        let failed = world.pages(HANGZHOU, "/productpage", 1)?.errors();
        errors += failed;
        if failed > 0 {
            wait_until("the ejection", BOUND, || {
                ensure!(ejected(world)? > before, "no new ejection after a failed page");
                Ok(())
            })?;
        }
    }
    bail!("{} of {wanted} endpoints ejected after 400 pages", ejected(world)?)
}

fn outage(world: &mut World, report: &mut Report) -> Result<()> {
    // The default maxEjectionPercent first: 10% of 4 endpoints rounds down to none.
    set(world, 3, 1, 0, &failover_setting(), Some(&reviews_policy(&json!({}))))?;
    world.kill(HANGZHOU, "reviews");
    let pages = world.pages(HANGZHOU, "/productpage", 9)?;
    report.check(
        "10% of 4 endpoints rounds down to none: no ejection, every page fails",
        &expect(9, 0, 9),
        &pages.to_string(),
    );
    let findings = world.plan(HANGZHOU, &[])?.0["findings"].to_string();
    let said = findings.contains("maxEjectionPercent") && findings.contains("no endpoint is ever ejected");
    report.step(
        "a finding reports it",
        "a finding about maxEjectionPercent",
        if said { "it does" } else { &findings },
        said,
    );

    world.revive(HANGZHOU, "reviews", 3)?;
    set(world, 3, 1, 0, &failover_setting(), Some(&reviews_policy(&json!({"maxEjectionPercent": 100}))))?;
    let pages = world.pages(HANGZHOU, "/productpage", 9)?;
    report.check("maxEjectionPercent 100, all endpoints healthy", &expect(9, 0, 0), &pages.to_string());
    world.kill(HANGZHOU, "reviews");
    let errors = until_ejected(world, 3)?;
    report.check("outage: one failed page for each local endpoint", "3", &errors.to_string());
    let pages = world.pages(HANGZHOU, "/productpage", 10)?;
    report.check("then all pages from Shanghai", &expect(10, 20, 0), &pages.to_string());
    let explanation = world.explain(HANGZHOU, "default/reviews")?;
    let why = |endpoint: &Value| endpoint["why"].as_str().unwrap_or_default().to_owned();
    let endpoints = explanation["ports"][0]["routes"][0]["endpoints"].as_array().cloned().unwrap_or_default();
    let ejected =
        endpoints.iter().filter(|endpoint| why(endpoint).contains("ejected by outlier detection or by an")).count();
    let serving = endpoints.iter().filter(|endpoint| why(endpoint).contains("share the 100% of priority 1")).count();
    let seen = format!("{ejected} ejected, {serving} serving");
    report.check("`portolan explain` gives the reasons", "3 ejected, 1 serving", &seen);

    // One pod recovers and stays in use. The other two do not, and are ejected again.
    world.revive(HANGZHOU, "reviews", 1)?;
    report.note("       (waiting one minute for the ejections to end)");
    let seen_before = world.events(HANGZHOU)?.len();
    let again = second_ejections(world, seen_before)?;
    let times: Vec<f64> = release_times(&world.events(HANGZHOU)?)?;
    let shown: Vec<_> = times.iter().map(|time| format!("{time:.1} s")).collect();
    let in_time = times.len() == 3 && times.iter().all(|time| (60.0..61.2).contains(time));
    report.step("released at the first sweep after baseEjectionTime", "3 × 60 to 61 s", &shown.join(", "), in_time);
    report.check("the two that still refuse are ejected for twice as long", "120 s, 120 s", &again);
    let pages = world.pages(HANGZHOU, "/productpage", 100)?;
    let local = pages.from("reviews-v1");
    let seen = format!("{} errors, {local} of 100 local", pages.errors());
    // One of three is healthy: a third, times the overprovisioning factor of 1.4, is 46%.
    report.check("the recovered pod serves its region's remaining share", "0 errors, 46 of 100 local", &seen);
    Ok(())
}

/// Requests pages until two endpoints have been ejected again. Returns the durations of these ejections.
fn second_ejections(world: &World, seen: usize) -> Result<String> {
    let end = Instant::now() + Duration::from_secs(90);
    while Instant::now() < end {
        let events = world.events(HANGZHOU)?;
        let again: Vec<_> = events.iter().skip(seen).filter(|event| event["kind"] == "ejected").collect();
        if again.len() == 2 {
            let durations =
                again.iter().map(|event| format!("{} s", event["durationSeconds"].as_f64().unwrap_or_default()));
            return Ok(durations.collect::<Vec<_>>().join(", "));
        }
        world.pages(HANGZHOU, "/productpage", 1)?;
        thread::park_timeout(Duration::from_millis(50));
    }
    bail!("no second ejection within 90 s")
}

/// Returns, for each release, the seconds since the last ejection of that endpoint before it.
fn release_times(events: &[Value]) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    for released in events.iter().filter(|event| event["kind"] == "released") {
        let ejected = events
            .iter()
            .take_while(|event| *event != released)
            .filter(|event| event["kind"] == "ejected" && event["endpoint"] == released["endpoint"]);
        if let Some(ejected) = ejected.last() {
            times.push(seconds(released)? - seconds(ejected)?);
        }
    }
    Ok(times)
}

/// Returns the time of day of an event, in seconds.
fn seconds(event: &Value) -> Result<f64> {
    let time = event["time"].as_str().unwrap_or_default();
    let clock = time.split('T').nth(1).unwrap_or_default().trim_end_matches('Z');
    clock.split(':').try_fold(0.0, |sum, part| Ok(sum * 60.0 + part.parse::<f64>()?))
}

fn blackhole(world: &mut World, report: &mut Report) -> Result<()> {
    let mut policy = reviews_policy(&json!({"maxEjectionPercent": 100}));
    policy["connectionPool"]["tcp"] = json!({"connectTimeout": "1s"});
    // Fresh pods, because those of the outage are still ejected.
    set(world, 0, 1, 0, &failover_setting(), Some(&policy))?;
    set(world, 1, 1, 0, &failover_setting(), Some(&policy))?;
    world.revive(HANGZHOU, "reviews", 1)?;
    let pages = world.pages(HANGZHOU, "/productpage", 10)?;
    report.check("all endpoints healthy", &expect(10, 0, 0), &pages.to_string());
    world.swallow(HANGZHOU, "reviews", true)?;
    let began = Instant::now();
    let errors = until_ejected(world, 1)?;
    report.check("packets are dropped: one failed page", "1", &errors.to_string());
    let took = began.elapsed();
    let seen = format!("{:.1} s", took.as_secs_f64());
    report.step("connect fails after connectTimeout, 1 s", "1 to 4 s", &seen, (1.0..4.0).contains(&took.as_secs_f64()));
    let pages = world.pages(HANGZHOU, "/productpage", 10)?;
    report.check("then all pages from Shanghai", &expect(10, 20, 0), &pages.to_string());
    world.swallow(HANGZHOU, "reviews", false)
}

/// Tests endpoints that listen but do not serve.
/// Reports the failed pages for each fault, and the time until the last one.
fn sick(world: &mut World, report: &mut Report) -> Result<()> {
    let played = play_sick(world, report);
    // Remove the faulty pods, whatever the result.
    world.scale(HANGZHOU, "reviews", "v1", 0)?;
    played
}

fn play_sick(world: &mut World, report: &mut Report) -> Result<()> {
    let policy = reviews_policy(&json!({"maxEjectionPercent": 100, "consecutive5xxErrors": 2}));
    for (how, about) in [
        ("errors", "every response is a 500"),
        ("resets", "every connection is reset, with early resets counted"),
        ("hangs", "requests hang, with an active probe"),
    ] {
        // Fresh pods that have not been ejected yet.
        set(world, 0, 1, 0, &failover_setting(), Some(&policy))?;
        set(world, 1, 1, 0, &failover_setting(), Some(&policy))?;
        let mut rule = destination_rule("reviews", &json!({"trafficPolicy": policy}));
        if how == "hangs" {
            let probe = "{httpGet: {path: /reviews}, periodSeconds: 1, failureThreshold: 2}";
            rule["metadata"]["annotations"] = json!({"portolan.io/probe": probe});
        } else if how == "resets" {
            rule["metadata"]["annotations"] = json!({"portolan.io/count-early-resets": "true"});
        }
        world.apply("rules.yaml", &[rule])?;
        world.settle()?;
        report.check(
            &format!("{about}: before"),
            &expect(2, 0, 0),
            &world.pages(HANGZHOU, "/productpage", 2)?.to_string(),
        );
        world.make_sick(HANGZHOU, "reviews", how)?;
        let began = Instant::now();
        if how == "hangs" {
            // Connections are established, and then applications time out.
            // The kernel cannot tell this from a normal close, but a probe can.
            let mut failed = 0;
            while unhealthy(world)? == 0 {
                ensure!(began.elapsed() < BOUND, "the probes did not fail in time");
                failed += world.pages(HANGZHOU, "/productpage", 1)?.errors();
            }
            let took = began.elapsed();
            report.step(
                &format!("{about}: failed pages until it is unhealthy"),
                "1 to 3",
                &failed.to_string(),
                (1..=3).contains(&failed),
            );
            report.note(&format!("       (two probes, one second apart, failed after {:.1} s)", took.as_secs_f64()));
            report.check("no endpoint is ejected: no connection failed", "0", &ejected(world)?.to_string());
            let pages = world.pages(HANGZHOU, "/productpage", 10)?;
            report.check(&format!("{about}: then all pages from Shanghai"), &expect(10, 20, 0), &pages.to_string());
            continue;
        }
        let failed = world.pages(HANGZHOU, "/productpage", 2)?.errors();
        let took = began.elapsed();
        report.check(&format!("{about}: two pages fail"), "2", &failed.to_string());
        report.note(&format!("       (the last failed page finished after {:.0} ms)", took.as_secs_f64() * 1e3));
        wait_until("the ejection", BOUND, || {
            ensure!(ejected(world)? == 1, "no endpoint is ejected");
            Ok(())
        })?;
        let pages = world.pages(HANGZHOU, "/productpage", 10)?;
        report.check(&format!("{about}: then all pages from Shanghai"), &expect(10, 20, 0), &pages.to_string());
    }
    Ok(())
}

fn distribution(world: &mut World, report: &mut Report) -> Result<()> {
    set(world, 1, 1, 0, &distribute_setting(), None)?;
    let pages = world.pages(HANGZHOU, "/productpage", 10)?;
    report.check("10 pages: 9 from Hangzhou, 1 from Shanghai", &expect(10, 2, 0), &pages.to_string());
    let pages = world.pages(HANGZHOU, "/productpage", 1000)?;
    let (local, remote) = (pages.from("reviews-v1"), pages.from("reviews-v2"));
    report.check("1,000 pages", "900 and 100", &format!("{local} and {remote}"));
    let planned = world.plan(HANGZHOU, &["--service", "default/reviews"])?.0;
    let planned = locality_shares(service_named(&planned, "reviews")?);
    let shown: Vec<_> = planned.iter().map(|(locality, share)| format!("{locality} {}", share * 100.0)).collect();
    let measured = [("cn-hangzhou/cn-hangzhou-h", local), ("cn-shanghai/cn-shanghai-b", remote)]
        .map(|(place, count)| format!("{place} {}", count as f64 / 10.0));
    report.check(
        "`portolan plan`, without root, matches the measurement (percent)",
        &shown.join(", "),
        &measured.join(", "),
    );
    set(world, 3, 1, 0, &distribute_setting(), None)?;
    let pages = world.pages(HANGZHOU, "/productpage", 10)?;
    report.check("the same with three pods in Hangzhou", &expect(10, 2, 0), &pages.to_string());
    Ok(())
}

fn exclusive(world: &mut World, report: &mut Report) -> Result<()> {
    set(world, 1, 1, 0, &distribute_setting(), None)?;
    let mut both = distribute_setting();
    both["localityLbSetting"]["failover"] = failover_setting()["localityLbSetting"]["failover"].clone();
    world.apply("mesh.yaml", &[mesh_config(&both)])?;
    let (plan, status) = world.plan(HANGZHOU, &[])?;
    let said = plan["findings"].to_string().contains("mutually exclusive");
    let seen = format!(
        "exit status {status}, {}",
        if said { "a finding that they exclude each other" } else { "no such finding" }
    );
    report.check(
        "`portolan plan` rejects both together",
        "exit status 1, a finding that they exclude each other",
        &seen,
    );
    wait_until("the agent to report the conflict", BOUND, || {
        ensure!(world.get(HANGZHOU, "services")?["findings"].to_string().contains("mutually exclusive"), "no finding");
        Ok(())
    })?;
    let pages = world.pages(HANGZHOU, "/productpage", 10)?;
    report.check("the agent keeps the last valid setting, 90/10", &expect(10, 2, 0), &pages.to_string());
    set(world, 1, 1, 0, &failover_setting(), Some(&reviews_policy(&json!({}))))?;
    let pages = world.pages(HANGZHOU, "/productpage", 10)?;
    report.check("failover alone instead", &expect(10, 0, 0), &pages.to_string());
    Ok(())
}
