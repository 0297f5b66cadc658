//! The share of each endpoint.

use std::{collections::HashMap, time::Duration};

use portolan_core::policy::{HealthView, PoolKey};

use crate::{
    common::{World, findings, named, shares},
    objects::{WEB, ejected, given, rule, slice_of},
};

#[test]
fn failover_priority_ranks_by_labels() {
    let setting = "{outlierDetection: {}, loadBalancer: {localityLbSetting: {failoverPriority: [rack, topology.kubernetes.io/region]}}}";
    let world = World::read(&rule(setting), &[("c1", WEB)]);
    let at = |labels: &[(&str, &str)], observed: &HealthView| {
        shares(named(&world.report_for(&world.client("c1", "c", labels), observed), "web"))
    };
    // Endpoints in the same rack first, and among those the same region.
    assert_eq!(at(&[("rack", "right")], &HealthView::default()), given(&[("3", 100.0)]));
    assert_eq!(at(&[("rack", "right")], &ejected(&["10.0.0.3"])), given(&[("2", 100.0)]));
    assert_eq!(at(&[("rack", "right")], &ejected(&["10.0.0.2", "10.0.0.3"])), given(&[("1", 100.0)]));
    assert_eq!(at(&[("rack", "left")], &HealthView::default()), given(&[("1", 100.0)]));
    // A value in the rule replaces the value of the client.
    let fixed = World::read(&rule(&setting.replace("rack,", "rack=left,")), &[("c1", WEB)]);
    let report = fixed.report_for(&fixed.client("c1", "c", &[("rack", "right")]), &HealthView::default());
    assert_eq!(shares(named(&report, "web")), given(&[("1", 100.0)]));
}

#[test]
fn traffic_distribution_prefers_nearby_and_falls_back() {
    let with = |value: &str| {
        WEB.replace(
            "spec: {clusterIP: 172.16.0.1,",
            &format!("spec: {{clusterIP: 172.16.0.1, trafficDistribution: {value},"),
        )
    };
    let near = WEB.replace("10.0.0.3], nodeName: c", "10.0.0.3], nodeName: a2")
        + "---\n{apiVersion: v1, kind: Node, metadata: {name: a2, labels: {topology.kubernetes.io/region: r1, topology.kubernetes.io/zone: z1}}}";
    for (value, same_node) in [("PreferClose", false), ("PreferSameZone", false), ("PreferSameNode", true)] {
        let text = near.replace(
            "spec: {clusterIP: 172.16.0.1,",
            &format!("spec: {{clusterIP: 172.16.0.1, trafficDistribution: {value},"),
        );
        let world = World::read("", &[("c1", &text)]);
        let client = world.client("c1", "a", &[]);
        let of = |observed: &HealthView| shares(named(&world.report_for(&client, observed), "web"));
        let zone = if same_node { given(&[("1", 100.0)]) } else { given(&[("1", 50.0), ("3", 50.0)]) };
        assert_eq!(of(&HealthView::default()), zone, "{value}");
        assert_eq!(of(&ejected(&["10.0.0.1", "10.0.0.3"])), given(&[("2", 100.0)]), "{value}");
        assert_eq!(named(&world.report_for(&client, &HealthView::default()), "web").mode, "failover");
    }
    // The setting of a DestinationRule takes precedence, and may disable the preference.
    let world =
        World::read(&rule("{loadBalancer: {localityLbSetting: {enabled: false}}}"), &[("c1", &with("PreferClose"))]);
    assert_eq!(shares(named(&world.report("c1", "a"), "web")).len(), 3);
    // The annotation of Istio is equivalent.
    let text = WEB.replace(
        "kind: Service, metadata: {name: web,",
        "kind: Service, metadata: {annotations: {networking.istio.io/traffic-distribution: PreferClose}, name: web,",
    );
    assert_eq!(shares(named(&World::read("", &[("c1", &text)]).report("c1", "b"), "web")), given(&[("2", 100.0)]));
    let report = World::read("", &[("c1", &with("Nearby"))]).report("c1", "a");
    assert_eq!(findings(&report, "PTL0021").len(), 1);
    assert_eq!(shares(named(&report, "web")).len(), 3);
}

#[test]
fn hints_apply_only_without_an_istio_rule() {
    let hinted = ["a", "b", "c"].iter().enumerate().fold(WEB.to_owned(), |text, (i, node)| {
        let zone = i + 1;
        text.replace(
            &format!("nodeName: {node},"),
            &format!("nodeName: {node}, hints: {{forZones: [{{name: z{zone}}}]}},"),
        )
    });
    let world = World::read("", &[("c1", &hinted)]);
    assert_eq!(shares(named(&world.report("c1", "b"), "web")), given(&[("2", 100.0)]));
    let has_istio_rule = World::read(&rule("{connectionPool: {tcp: {connectTimeout: 1s}}}"), &[("c1", &hinted)]);
    assert_eq!(shares(named(&has_istio_rule.report("c1", "b"), "web")).len(), 3);
}

#[test]
fn share_of_a_dead_locality_follows_failover_with_the_annotation() {
    let setting = "{loadBalancer: {localityLbSetting: {distribute: [{from: r1, to: {r1: 70, r2: 30}}], failover: [{from: r2, to: r3}]}}}";
    let refused = World::read(&rule(setting), &[("c1", WEB)]).report("c1", "a");
    assert!(
        findings(&refused, "PTL0020")[0].contains("portolan.io/distribute-with-failover"),
        "{:?}",
        refused.findings
    );
    let annotated = rule(setting)
        .replace("{name: web,", "{annotations: {portolan.io/distribute-with-failover: 'true'}, name: web,");
    let world = World::read(&annotated, &[("c1", WEB)]);
    let of = |dead: &[&str]| shares(named(&world.report_for(&world.client("c1", "a", &[]), &ejected(dead)), "web"));
    assert_eq!(of(&[]), given(&[("1", 70.0), ("2", 30.0)]));
    // The share of r2 goes to r3, as the rule says. The share of r1, without a rule, is split evenly between the
    // others.
    assert_eq!(of(&["10.0.0.2"]), given(&[("1", 70.0), ("3", 30.0)]));
    assert_eq!(of(&["10.0.0.1"]), given(&[("2", 65.0), ("3", 35.0)]));
    assert_eq!(of(&["10.0.0.1", "10.0.0.2"]), given(&[("3", 100.0)]));
    assert_eq!(of(&["10.0.0.1", "10.0.0.2", "10.0.0.3"]), []);
    let report = world.report("c1", "a");
    assert_eq!(named(&report, "web").mode, "distribute");
    assert_eq!(named(&report, "web").priorities.iter().map(|level| level.load).collect::<Vec<_>>(), [100, 0]);
    // Without the annotation, as in Istio, the remaining localities take over the share.
    let plain = World::read(&rule(&setting.replace(", failover: [{from: r2, to: r3}]", "")), &[("c1", WEB)]);
    let report = plain.report_for(&plain.client("c1", "a", &[]), &ejected(&["10.0.0.2"]));
    assert_eq!(shares(named(&report, "web")), given(&[("1", 100.0)]));
}

#[test]
fn new_endpoints_warm_up() {
    let warm = rule("{loadBalancer: {simple: ROUND_ROBIN, warmup: {duration: 10s}}}");
    let world = World::read(&warm, &[("c1", WEB)]);
    let key = PoolKey {
        service: portolan_core::model::ServiceId::service("default/web".parse().unwrap()),
        port: 80,
        protocol: portolan_core::model::Protocol::Tcp,
        subset: None,
        family: portolan_core::model::IpFamily::V4,
    };
    let of = |age: u64| {
        let ages = HashMap::from([("10.0.0.3:80".parse().unwrap(), Duration::from_secs(age))]);
        let observed = HealthView { ages: [(key.clone(), ages)].into(), ..HealthView::default() };
        shares(named(&world.report_for(&world.client("c1", "a", &[]), &observed), "web"))
    };
    // 1 : 1 : 0.1, then 1 : 1 : 0.5, then equal.
    assert_eq!(of(0), given(&[("1", 47.619), ("2", 47.619), ("3", 4.7619)]));
    assert_eq!(of(5), given(&[("1", 40.0), ("2", 40.0), ("3", 20.0)]));
    assert_eq!(of(10), given(&[("1", 33.3333), ("2", 33.3333), ("3", 33.3333)]));
}

#[test]
fn panic_uses_ejected_but_not_unready_endpoints() {
    let policy =
        rule("{outlierDetection: {minHealthPercent: 80}, loadBalancer: {localityLbSetting: {enabled: false}}}");
    let unready = WEB.replace("nodeName: c,", "nodeName: c, conditions: {ready: false, terminating: false},");
    for distribution in ["", "trafficDistribution: PreferClose,"] {
        let text = unready.replace("spec: {clusterIP", &format!("spec: {{{distribution} clusterIP"));
        let world = World::read(&policy, &[("c1", &text)]);
        let report = world.report_for(&world.client("c1", "a", &[]), &ejected(&["10.0.0.1"]));
        let web = named(&report, "web");
        assert!(web.priorities[0].panic, "{web:?}");
        assert_eq!(shares(web), given(&[("1", 50.0), ("2", 50.0)]), "{distribution}");
    }
}

#[test]
fn endpoint_in_two_slices_is_ready_if_either_is() {
    let stale = slice_of("10.0.0.1], conditions: {ready: false}").replace("web-9", "web-0");
    let report = World::read("", &[("c1", &format!("{stale}---\n{WEB}"))]).report("c1", "a");
    assert_eq!(shares(named(&report, "web")).len(), 3);
}

/// Many groups with coprime sizes: adding their fractions must not overflow.
#[test]
fn shares_of_many_odd_groups_do_not_overflow() {
    let primes: Vec<u32> = (2..200u32).filter(|n| (2..*n).all(|d| n % d > 0)).take(40).collect();
    let mut text = "{apiVersion: v1, kind: Service, metadata: {name: web, namespace: default}, spec: {clusterIP: 172.16.0.1, ports: [{port: 80, name: tcp}]}}\n".to_owned();
    let mut endpoints = Vec::new();
    for (region, size) in primes.iter().enumerate() {
        text += &format!(
            "---\n{{apiVersion: v1, kind: Node, metadata: {{name: n{region}, labels: {{topology.kubernetes.io/region: r{region}}}}}}}\n"
        );
        for i in 0..*size {
            let ready = i % 3 > 0;
            endpoints.push(format!(
                "{{addresses: [10.{}.{}.{}], nodeName: n{region}, conditions: {{ready: {ready}}}}}",
                region,
                i / 250,
                i % 250 + 1
            ));
        }
    }
    text += &format!(
        "---\n{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, metadata: {{name: web-1, namespace: default, \
         labels: {{kubernetes.io/service-name: web}}}}, ports: [{{name: tcp, port: 80}}], endpoints: [{}]}}\n",
        endpoints.join(", ")
    );
    let to: Vec<String> = (0..40).map(|i| format!("r{i}: {}", if i == 0 { 61 } else { 1 })).collect();
    for annotation in ["", "annotations: {portolan.io/distribute-with-failover: 'true'}, "] {
        let rule = rule(&format!("{{outlierDetection: {{}}, loadBalancer: {{localityLbSetting: {{distribute: [{{from: '*', to: {{{}}}}}]}}}}}}", to.join(", ")))
            .replace("{name: web,", &format!("{{{annotation}name: web,"));
        let report = World::read(&rule, &[("c1", &text)]).report("c1", "n0");
        let sum: f64 = named(&report, "web").endpoints.iter().map(|endpoint| endpoint.share).sum();
        assert!((sum - 1.0).abs() < 1e-9, "{sum}");
        assert_eq!(named(&report, "web").extensions.is_empty(), annotation.is_empty());
    }
}
