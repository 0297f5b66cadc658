//! What objects mean, rule by rule: text in, shares and findings out.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use common::{World, findings, named, shares};
use portolan::policy::{Observed, PoolKey};

/// Nodes in three regions, and a Service `web` whose endpoints 10.0.0.1 to .3 are in one each.
const WEB: &str = r#"
{apiVersion: v1, kind: Node, metadata: {name: a, labels: {topology.kubernetes.io/region: r1, topology.kubernetes.io/zone: z1}}}
---
{apiVersion: v1, kind: Node, metadata: {name: b, labels: {topology.kubernetes.io/region: r2, topology.kubernetes.io/zone: z2}}}
---
{apiVersion: v1, kind: Node, metadata: {name: c, labels: {topology.kubernetes.io/region: r3, topology.kubernetes.io/zone: z3}}}
---
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: default}, spec: {clusterIP: 172.16.0.1, ports: [{port: 80, name: tcp}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
addressType: IPv4
metadata: {name: web-1, namespace: default, labels: {kubernetes.io/service-name: web}}
ports: [{name: tcp, port: 80}]
endpoints:
- {addresses: [10.0.0.1], nodeName: a, targetRef: {kind: Pod, name: web-a}}
- {addresses: [10.0.0.2], nodeName: b, targetRef: {kind: Pod, name: web-b}}
- {addresses: [10.0.0.3], nodeName: c, targetRef: {kind: Pod, name: web-c}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web-a, namespace: default, labels: {version: v1, rack: left}}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web-b, namespace: default, labels: {version: v2, rack: right}}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web-c, namespace: default, labels: {version: v2, rack: right}}}
"#;

/// A DestinationRule for `web` with this policy.
fn rule(policy: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: web, namespace: default}}\n\
         spec: {{host: web, trafficPolicy: {policy}}}\n"
    )
}

fn route(spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: web, namespace: default}}\nspec: {spec}\n"
    )
}

/// A slice of `web` with one endpoint.
fn slice_of(endpoint: &str) -> String {
    format!(
        "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, \
         metadata: {{name: web-9, namespace: default, labels: {{kubernetes.io/service-name: web}}}}, \
         ports: [{{name: tcp, port: 80}}], endpoints: [{{addresses: [{endpoint}}}]}}\n"
    )
}

fn given(pairs: &[(&str, f64)]) -> Vec<(String, f64)> {
    pairs.iter().map(|(host, share)| ((*host).to_owned(), *share)).collect()
}

fn ejected(addresses: &[&str]) -> Observed {
    let everywhere = addresses.iter().map(|address| format!("{address}:80").parse().unwrap());
    Observed { ejected_everywhere: everywhere.collect(), ..Observed::default() }
}

#[test]
fn labels_decide_who_comes_first() {
    let setting = "{outlierDetection: {}, loadBalancer: {localityLbSetting: {failoverPriority: [rack, topology.kubernetes.io/region]}}}";
    let world = World::read(&rule(setting), &[("c1", WEB)]);
    let at = |labels: &[(&str, &str)], observed: &Observed| {
        shares(named(&world.report_for(&world.client("c1", "c", labels), observed), "web"))
    };
    // The same rack, and of those the same region.
    assert_eq!(at(&[("rack", "right")], &Observed::default()), given(&[("3", 100.0)]));
    assert_eq!(at(&[("rack", "right")], &ejected(&["10.0.0.3"])), given(&[("2", 100.0)]));
    assert_eq!(at(&[("rack", "right")], &ejected(&["10.0.0.2", "10.0.0.3"])), given(&[("1", 100.0)]));
    assert_eq!(at(&[("rack", "left")], &Observed::default()), given(&[("1", 100.0)]));
    // A value in the rule counts, whatever the client has.
    let fixed = World::read(&rule(&setting.replace("rack,", "rack=left,")), &[("c1", WEB)]);
    let report = fixed.report_for(&fixed.client("c1", "c", &[("rack", "right")]), &Observed::default());
    assert_eq!(shares(named(&report, "web")), given(&[("1", 100.0)]));
}

#[test]
fn traffic_distribution_prefers_and_falls_back() {
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
        let of = |observed: &Observed| shares(named(&world.report_for(&client, observed), "web"));
        let zone = if same_node { given(&[("1", 100.0)]) } else { given(&[("1", 50.0), ("3", 50.0)]) };
        assert_eq!(of(&Observed::default()), zone, "{value}");
        assert_eq!(of(&ejected(&["10.0.0.1", "10.0.0.3"])), given(&[("2", 100.0)]), "{value}");
        assert_eq!(named(&world.report_for(&client, &Observed::default()), "web").mode, "failover");
    }
    // The DestinationRule's own setting comes first, and may turn it off.
    let world =
        World::read(&rule("{loadBalancer: {localityLbSetting: {enabled: false}}}"), &[("c1", &with("PreferClose"))]);
    assert_eq!(shares(named(&world.report("c1", "a"), "web")).len(), 3);
    // Istio's annotation means the same.
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
fn hints_count_where_no_rule_does() {
    let hinted = ["a", "b", "c"].iter().enumerate().fold(WEB.to_owned(), |text, (i, node)| {
        let zone = i + 1;
        text.replace(
            &format!("nodeName: {node},"),
            &format!("nodeName: {node}, hints: {{forZones: [{{name: z{zone}}}]}},"),
        )
    });
    let world = World::read("", &[("c1", &hinted)]);
    assert_eq!(shares(named(&world.report("c1", "b"), "web")), given(&[("2", 100.0)]));
    let ruled = World::read(&rule("{connectionPool: {tcp: {connectTimeout: 1s}}}"), &[("c1", &hinted)]);
    assert_eq!(shares(named(&ruled.report("c1", "b"), "web")).len(), 3);
}

const ENTRY: &str = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: bank, namespace: shop}
spec:
  hosts: [bank.example.com]
  addresses: [172.30.0.1]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{number: 443, name: tls, protocol: TLS, targetPort: 8443}]
  endpoints:
  - {address: 10.9.0.1, locality: r1/z1, weight: 3}
  - {address: 10.9.0.2, locality: r1/z1, ports: {tls: 9443}}
  - {address: 10.9.0.3, locality: r2/z2}
";

#[test]
fn a_service_entry_is_a_service() {
    let world = World::read(ENTRY, &[("c1", WEB)]);
    let report = world.report("c1", "a");
    let bank = named(&report, "bank");
    assert_eq!((bank.kind.as_deref(), bank.host.as_str()), (Some("ServiceEntry"), "bank.example.com"));
    assert_eq!(bank.frontends, ["172.30.0.1:443"]);
    let addresses: Vec<&str> = bank.endpoints.iter().map(|endpoint| endpoint.address.as_str()).collect();
    assert_eq!(addresses, ["10.9.0.1:8443", "10.9.0.2:9443", "10.9.0.3:8443"]);
    // Weights of endpoints count.
    assert_eq!(shares(bank), given(&[("1", 60.0), ("2", 20.0), ("3", 20.0)]));
    // Rules are found by its host, in its namespace.
    let policy = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: bank, namespace: shop}\n\
                  spec: {host: bank.example.com, trafficPolicy: {outlierDetection: {}}}\n";
    let ruled = World::read(&format!("{ENTRY}---\n{policy}"), &[("c1", WEB)]);
    assert_eq!(shares(named(&ruled.report("c1", "a"), "bank")), given(&[("1", 75.0), ("2", 25.0)]));
    assert_eq!(shares(named(&ruled.report("c1", "b"), "bank")), given(&[("3", 100.0)]));
}

#[test]
fn what_a_service_entry_may_not_have() {
    let code_of = |text: &str, code: &str| {
        let report = World::read(text, &[("c1", WEB)]).report("c1", "a");
        // Whatever is wrong with it, the Service goes on.
        assert_eq!(shares(named(&report, "web")).len(), 3);
        let entries = report.services.iter().filter(|service| service.kind.is_some()).count();
        (findings(&report, code).len(), entries)
    };
    // The address of a Service, on any port; and its name.
    assert_eq!(code_of(&ENTRY.replace("172.30.0.1", "172.16.0.1"), "PTL0045"), (1, 0));
    assert_eq!(code_of(&ENTRY.replace("bank.example.com", "web.default.svc.cluster.local"), "PTL0045"), (1, 0));
    assert_eq!(
        code_of(&ENTRY.replace("  resolution: STATIC", "  resolution: STATIC\n  exportTo: ['.']"), "PTL0023"),
        (1, 0)
    );
    assert_eq!(code_of(&ENTRY.replace("STATIC", "DNS"), "PTL0022"), (1, 0));
    assert_eq!(code_of(&ENTRY.replace("STATIC", "SOMEHOW"), "PTL0020"), (1, 0));
    assert_eq!(code_of(&ENTRY.replace("172.30.0.1", "172.30.0.0/24"), "PTL0044"), (1, 0));
    // One bad endpoint leaves the others.
    assert_eq!(code_of(&ENTRY.replace("10.9.0.3", "169.254.169.254"), "PTL0021"), (1, 1));
    assert_eq!(code_of(&ENTRY.replace("10.9.0.3", "db.example.com"), "PTL0021"), (1, 1));
    assert_eq!(code_of(ENTRY, "PTL0021"), (0, 1));
}

#[test]
fn workload_entries_serve_what_selects_them() {
    let machine = |name: &str, address: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {name}, namespace: default}}\n\
             spec: {{address: {address}, labels: {{app: web}}, locality: r2/z2, weight: 2}}\n"
        )
    };
    let selecting = WEB.replace("spec: {clusterIP: 172.16.0.1,", "spec: {clusterIP: 172.16.0.1, selector: {app: web},");
    let world = World::read(&machine("vm", "10.8.0.9"), &[("c1", &selecting)]);
    assert_eq!(
        shares(named(&world.report("c1", "a"), "web")),
        given(&[("1", 20.0), ("2", 20.0), ("3", 20.0), ("9", 40.0)])
    );
    let entry = ENTRY[..ENTRY.find("  endpoints:").unwrap()].replace("namespace: shop", "namespace: default")
        + "  workloadSelector: {labels: {app: web}}\n";
    let text = format!("{entry}---\n{}---\n{}", machine("vm1", "10.8.0.1"), machine("vm2", "10.8.0.2"));
    let report = World::read(&text, &[("c1", WEB)]).report("c1", "a");
    assert_eq!(shares(named(&report, "bank")), given(&[("1", 50.0), ("2", 50.0)]));
}

#[test]
fn http_routes_that_look_into_nothing_are_taken_for_connections() {
    let subsets = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: web, namespace: default}\n\
                   spec: {host: web, subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]}\n---\n";
    let to = |subset: &str| format!("{{destination: {{host: web, subset: {subset}}}}}");
    let split =
        "{destination: {host: web, subset: v1}, weight: 60}, {destination: {host: web, subset: v2}, weight: 40}";
    let of = |spec: &str| {
        let report = World::read(&format!("{subsets}{}", route(spec)), &[("c1", WEB)]).report("c1", "a");
        let all = report.services.iter().flat_map(shares).collect::<Vec<_>>();
        (all, findings(&report, "PTL0069").len(), findings(&report, "PTL0023").len())
    };
    assert_eq!(
        of(&format!("{{hosts: [web], http: [{{route: [{split}]}}]}}")),
        (given(&[("1", 60.0), ("2", 20.0), ("3", 20.0)]), 0, 0)
    );
    // A route that looks into requests is left out; the next one counts.
    let looking = format!("{{match: [{{uri: {{prefix: /v2}}}}], route: [{}]}}, {{route: [{}]}}", to("v2"), to("v1"));
    assert_eq!(of(&format!("{{hosts: [web], http: [{looking}]}}")), (given(&[("1", 100.0)]), 1, 0));
    // So is one for some clients only.
    let canary =
        format!("{{match: [{{sourceLabels: {{canary: 'yes'}}}}], route: [{}]}}, {{route: [{}]}}", to("v2"), to("v1"));
    assert_eq!(of(&format!("{{hosts: [web], tcp: [{canary}]}}")), (given(&[("1", 100.0)]), 0, 1));
    // One of two blocks is enough; a route for gateways is for others.
    let either = format!("{{match: [{{port: 81}}, {{port: 80}}], route: [{}]}}, {{route: [{}]}}", to("v1"), to("v2"));
    assert_eq!(of(&format!("{{hosts: [web], tcp: [{either}]}}")).0, given(&[("1", 100.0)]));
    let gateway = format!("{{match: [{{gateways: [edge]}}], route: [{}]}}, {{route: [{}]}}", to("v2"), to("v1"));
    assert_eq!(
        of(&format!("{{hosts: [web], gateways: [edge, mesh], http: [{gateway}]}}")),
        (given(&[("1", 100.0)]), 0, 0)
    );
    // Of both lists, the one for connections comes first, unless the port says that it speaks HTTP.
    let both = format!("{{hosts: [web], tcp: [{{route: [{}]}}], http: [{{route: [{}]}}]}}", to("v1"), to("v2"));
    assert_eq!(of(&both).0, given(&[("1", 100.0)]));
    let web = WEB.replace("name: tcp", "name: http");
    let report = World::read(&format!("{subsets}{}", route(&both)), &[("c1", &web)]).report("c1", "a");
    assert_eq!(shares(named(&report, "web")), given(&[("2", 50.0), ("3", 50.0)]));
}

#[test]
fn routes_may_tell_addresses_apart() {
    let dual = WEB.replace("clusterIP: 172.16.0.1", "clusterIPs: [172.16.0.1, 172.17.0.1]");
    let subsets = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: web, namespace: default}\n\
                   spec: {host: web, subsets: [{name: v1, labels: {version: v1}}]}\n---\n";
    let spec = "{hosts: [web], tcp: [{match: [{destinationSubnets: [172.17.0.0/16]}], route: [{destination: {host: web, subset: v1}}]}]}";
    let report = World::read(&format!("{subsets}{}", route(spec)), &[("c1", &dual)]).report("c1", "a");
    let of = |address: &str| report.services.iter().find(|service| service.frontends == [address]).unwrap();
    assert_eq!(shares(of("172.16.0.1:80")).len(), 3);
    assert_eq!(shares(of("172.17.0.1:80")), given(&[("1", 100.0)]));
}

#[test]
fn routes_that_lead_in_circles_end_after_one_step() {
    let other = WEB
        .replace("name: web", "name: other")
        .replace("172.16.0.1", "172.16.0.2")
        .replace("service-name: web", "service-name: other")
        .replace("10.0.0.", "10.0.1.");
    let text = format!("{WEB}---\n{other}");
    let back =
        route("{hosts: [other], tcp: [{route: [{destination: {host: web}}]}]}").replace("name: web,", "name: other,");
    let rules = format!("{}---\n{back}", route("{hosts: [web], tcp: [{route: [{destination: {host: other}}]}]}"));
    let report = World::read(&rules, &[("c1", &text)]).report("c1", "a");
    let of =
        |name: &str| named(&report, name).endpoints.iter().map(|endpoint| endpoint.address.clone()).collect::<Vec<_>>();
    assert!(of("web").iter().all(|address| address.starts_with("10.0.1.")), "{:?}", of("web"));
    assert!(of("other").iter().all(|address| address.starts_with("10.0.0.")), "{:?}", of("other"));
}

#[test]
fn the_share_of_a_dead_locality_follows_failover_where_that_is_asked_for() {
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
    // r2's share goes to r3, as the rule says; r1's, for which none is set, to both others alike.
    assert_eq!(of(&["10.0.0.2"]), given(&[("1", 70.0), ("3", 30.0)]));
    assert_eq!(of(&["10.0.0.1"]), given(&[("2", 65.0), ("3", 35.0)]));
    assert_eq!(of(&["10.0.0.1", "10.0.0.2"]), given(&[("3", 100.0)]));
    assert_eq!(of(&["10.0.0.1", "10.0.0.2", "10.0.0.3"]), []);
    let report = world.report("c1", "a");
    assert_eq!(named(&report, "web").mode, "distribute");
    assert_eq!(named(&report, "web").priorities.iter().map(|level| level.load).collect::<Vec<_>>(), [100, 0]);
    // Istio's own meaning loses the share of the dead one to the living.
    let plain = World::read(&rule(&setting.replace(", failover: [{from: r2, to: r3}]", "")), &[("c1", WEB)]);
    let report = plain.report_for(&plain.client("c1", "a", &[]), &ejected(&["10.0.0.2"]));
    assert_eq!(shares(named(&report, "web")), given(&[("1", 100.0)]));
}

#[test]
fn the_own_cluster_may_come_first_without_being_the_only_one() {
    let config = |annotation: &str, mesh: &str| {
        format!(
            "{{apiVersion: v1, kind: ConfigMap, metadata: {{name: istio, namespace: istio-system, annotations: {{{annotation}}}}}, data: {{mesh: '{mesh}'}}}}\n"
        )
    };
    let far = WEB
        .replace("10.0.0.", "10.1.0.")
        .replace("172.16.", "172.17.")
        .replace("[10.1.0.1]", "[10.1.0.4]")
        .replace("[10.1.0.2]", "[10.1.0.5]")
        .replace("[10.1.0.3]", "[10.1.0.6]");
    let strict = r#"{"serviceSettings": [{"settings": {"clusterLocal": true}, "hosts": ["*"]}]}"#;
    let prefer = "portolan.io/prefer-cluster-local: \"*.default.svc.cluster.local\"";
    let of = |config: &str, dead: &[&str]| {
        let world = World::read(config, &[("c1", WEB), ("c2", &far)]);
        shares(named(&world.report_for(&world.client("c1", "a", &[]), &ejected(dead)), "web"))
    };
    let all = ["10.0.0.1", "10.0.0.2", "10.0.0.3"];
    assert_eq!(of(&config("", "{}"), &[]).len(), 6);
    assert_eq!(of(&config("", strict), &all), []);
    assert_eq!(of(&config(prefer, "{}"), &[]).len(), 3);
    assert_eq!(of(&config(prefer, "{}"), &all), given(&[("4", 33.3333), ("5", 33.3333), ("6", 33.3333)]));
    // The more specific pattern counts, whichever it is.
    assert_eq!(of(&config(prefer, strict), &all).len(), 3);
    let exact = strict.replace("\"*\"", "\"web.default.svc.cluster.local\"");
    assert_eq!(of(&config(prefer, &exact), &all), []);
    // A mistyped switch is no switch.
    let world = World::read(&config("portolan.io/prefer-clusterlocal: '*'", "{}"), &[("c1", WEB)]);
    assert_eq!(findings(&world.report("c1", "a"), "PTL0025").len(), 1);
}

#[test]
fn settings_that_are_no_text_are_not_taken_for_none() {
    for data in ["{mesh: {serviceSettings: []}}", "{meshConfig: ''}", "{}"] {
        let config = format!(
            "{{apiVersion: v1, kind: ConfigMap, metadata: {{name: istio, namespace: istio-system}}, data: {data}}}"
        );
        let world = World::read(&config, &[("c1", WEB)]);
        assert_eq!(findings(&world.report("c1", "a"), "PTL0020").len(), 1, "{data}");
        assert_eq!(world.0.doubt("c1").map(|(_, settings)| settings), Some(true), "{data}");
    }
    // Where they may be in what cannot be read: in the mesh's files, or in the own cluster's while none are known.
    let doubt = |mesh: &str, own: &str, other: &str| {
        World::read(mesh, &[("c1", own), ("c2", other)]).0.doubt("c1").map(|(_, settings)| settings)
    };
    let known = "{apiVersion: v1, kind: ConfigMap, metadata: {name: istio, namespace: istio-system}, data: {mesh: ''}}";
    assert_eq!(doubt("kind: [", WEB, WEB), Some(true));
    assert_eq!(doubt("", "kind: [", WEB), Some(true));
    assert_eq!(doubt(known, "kind: [", WEB), Some(false));
    assert_eq!(doubt(known, WEB, "kind: ["), Some(false));
    assert_eq!(doubt(known, WEB, WEB), None);
}

#[test]
fn passthrough_is_left_alone_unless_it_would_leave_the_cluster() {
    let policy = rule("{loadBalancer: {simple: PASSTHROUGH}}");
    let report = World::read(&policy, &[("c1", WEB)]).report("c1", "a");
    let web = named(&report, "web");
    assert_eq!((web.algorithm.as_str(), web.on_empty.as_str(), shares(web).len()), ("PASSTHROUGH", "pass", 0));
    let strict = "---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: istio, namespace: istio-system}, \
                  data: {mesh: '{serviceSettings: [{settings: {clusterLocal: true}, hosts: [\"*\"]}]}'}}";
    let report = World::read(&format!("{policy}{strict}"), &[("c1", WEB)]).report("c1", "a");
    assert_eq!((named(&report, "web").on_empty.as_str(), findings(&report, "PTL0070").len()), ("refuse", 1));
}

#[test]
fn rules_for_one_host_are_merged_and_ports_replace_everything() {
    let first = rule("{outlierDetection: {consecutive5xxErrors: 1}}");
    let second = "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: web-subsets, namespace: default}\n\
                  spec: {host: web.default.svc.cluster.local, subsets: [{name: v1, labels: {version: v1}}]}\n---\n";
    let to = route("{hosts: [web], tcp: [{route: [{destination: {host: web, subset: v1}}]}]}");
    let report = World::read(&format!("{first}{second}{to}"), &[("c1", WEB)]).report("c1", "a");
    assert_eq!(shares(named(&report, "web")), given(&[("1", 100.0)]));
    assert_eq!(named(&report, "web").mode, "failover");
    assert_eq!(findings(&report, "PTL0062"), Vec::<String>::new());
    let ported = rule(
        "{outlierDetection: {}, portLevelSettings: [{port: {number: 80}, connectionPool: {tcp: {connectTimeout: 1s}}}]}",
    );
    let report = World::read(&ported, &[("c1", WEB)]).report("c1", "a");
    assert_eq!(named(&report, "web").mode, "none", "failover went with outlierDetection");
    assert!(findings(&report, "PTL0068")[0].contains("outlierDetection"));
}

#[test]
fn new_endpoints_warm_up() {
    let warm = rule("{loadBalancer: {simple: ROUND_ROBIN, warmup: {duration: 10s}}}");
    let world = World::read(&warm, &[("c1", WEB)]);
    let key = PoolKey {
        service: portolan::model::ServiceId::service("default/web".parse().unwrap()),
        port: 80,
        subset: None,
        v6: false,
    };
    let of = |age: u64| {
        let ages = HashMap::from([("10.0.0.3:80".parse().unwrap(), Duration::from_secs(age))]);
        let observed = Observed { ages: [(key.clone(), ages)].into(), ..Observed::default() };
        shares(named(&world.report_for(&world.client("c1", "a", &[]), &observed), "web"))
    };
    // 1 : 1 : 0.1, then 1 : 1 : 0.5, then all alike.
    assert_eq!(of(0), given(&[("1", 47.619), ("2", 47.619), ("3", 4.7619)]));
    assert_eq!(of(5), given(&[("1", 40.0), ("2", 40.0), ("3", 20.0)]));
    assert_eq!(of(10), given(&[("1", 33.3333), ("2", 33.3333), ("3", 33.3333)]));
}

#[test]
fn panic_revives_what_was_ejected_and_not_what_is_not_ready() {
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

/// threats.md 2 to 7: what one party might try in order to have another's connections.
#[test]
fn nobody_takes_what_is_not_theirs() {
    let pods = BTreeSet::from(["1".to_owned(), "2".to_owned(), "3".to_owned()]);
    let hosts = |text: &str, mesh: &str, more: &[(&str, &str)]| {
        let clusters: Vec<(&str, &str)> = [("c1", text)].into_iter().chain(more.iter().copied()).collect();
        let report = World::read(mesh, &clusters).report("c1", "a");
        let web = named(&report, "web");
        let frontends: Vec<String> = report.services.iter().flat_map(|service| service.frontends.clone()).collect();
        (shares(web).into_iter().map(|(host, _)| host).collect::<BTreeSet<_>>(), frontends, report)
    };
    // 2: external addresses.
    let text = WEB.replace("spec: {clusterIP: 172.16.0.1,", "spec: {externalIPs: [8.8.8.8], clusterIP: 172.16.0.1,");
    let (seen, frontends, report) = hosts(&text, "", &[]);
    assert_eq!(
        (seen, frontends, findings(&report, "PTL0046").len()),
        (pods.clone(), vec!["172.16.0.1:80".to_owned()], 1)
    );
    // 3: endpoints that are not for anybody, and labels of another namespace's pod.
    for address in ["127.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1"] {
        let text = WEB.replace("[10.0.0.3]", &format!("[{address}]"));
        let (seen, _, report) = hosts(&text, "", &[]);
        assert_eq!((seen.len(), findings(&report, "PTL0024").len()), (2, 1), "{address}");
    }
    let subset = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: web, namespace: default}\n\
                  spec: {host: web, subsets: [{name: v2, labels: {version: v2}}]}\n---\n";
    let to = route("{hosts: [web], tcp: [{route: [{destination: {host: web, subset: v2}}]}]}");
    let text = WEB.replace("name: web-c}", "name: web-c, namespace: other}");
    let (seen, _, report) = hosts(&text, &format!("{subset}{to}"), &[]);
    assert_eq!((seen, findings(&report, "PTL0021").len()), (BTreeSet::from(["2".to_owned()]), 1));
    // 4: a ServiceEntry, see `what_a_service_entry_may_not_have`. 5: a rule from another namespace.
    let foreign = rule("{loadBalancer: {localityLbSetting: {distribute: [{from: r1, to: {r3: 100}}]}}}")
        .replace("namespace: default", "namespace: other")
        .replace("host: web", "host: web.default.svc.cluster.local");
    let (seen, _, report) = hosts(WEB, &foreign, &[]);
    assert_eq!((seen, findings(&report, "PTL0061").len()), (pods.clone(), 1));
    // 6: a pod that claims to be near.
    let near = rule("{outlierDetection: {}}");
    let text = WEB.replace(
        "labels: {version: v2, rack: right}",
        "labels: {topology.kubernetes.io/region: r1, topology.kubernetes.io/zone: z1, istio-locality: r1.z1}",
    );
    assert_eq!(hosts(&text, &near, &[]).0, BTreeSet::from(["1".to_owned()]));
    // 7: a rogue cluster with a Service that is not here, and with another address for one that is.
    let rogue = "{apiVersion: v1, kind: Service, metadata: {name: web, namespace: default}, spec: {clusterIP: 172.16.0.66, ports: [{port: 80, name: tcp}]}}\n---\n\
                 {apiVersion: v1, kind: Service, metadata: {name: trap, namespace: default}, spec: {clusterIP: 172.16.0.67, ports: [{port: 80}]}}\n---\n\
                 {apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: web, namespace: default}, spec: {host: web, trafficPolicy: {loadBalancer: {localityLbSetting: {distribute: [{from: r1, to: {r3: 100}}]}}}}}";
    let (seen, frontends, _) = hosts(WEB, "", &[("rogue", rogue)]);
    assert_eq!((seen, frontends), (pods.clone(), vec!["172.16.0.1:80".to_owned()]));
    // One that says of the own pods that they are not ready, whatever its name sorts before.
    let liar = format!("{}---\n{rogue}", slice_of("10.0.0.1], conditions: {ready: false}"));
    for name in ["a-cluster", "z-cluster"] {
        let (seen, _, report) = hosts(WEB, "", &[(name, &liar)]);
        assert_eq!(seen, pods, "{name}");
        assert!(named(&report, "web").endpoints.iter().all(|endpoint| endpoint.cluster == "c1"));
    }
    // One whose Service has the address or the name of an entry here.
    let rogue = "{apiVersion: v1, kind: Service, metadata: {name: bank, namespace: shop}, spec: {clusterIP: 172.30.0.1, ports: [{port: 443}]}}";
    for host in ["bank.example.com", "bank.shop.svc.cluster.local"] {
        let entry = ENTRY.replace("bank.example.com", host);
        assert_eq!(shares(named(&hosts(WEB, &entry, &[("rogue", rogue)]).2, "bank")).len(), 3, "{host}");
    }
    // A pod that claims to be in the client's network.
    let system = |network: &str| {
        format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: istio-system, labels: {{topology.istio.io/network: {network}}}}}}}\n---\n"
        )
    };
    let by_network = rule(
        "{outlierDetection: {}, loadBalancer: {localityLbSetting: {failoverPriority: [topology.istio.io/network]}}}",
    );
    let far = WEB
        .replace("10.0.0.", "10.1.0.")
        .replace("172.16.", "172.17.")
        .replace("version: v1", "topology.istio.io/network: here");
    let (seen, _, report) =
        hosts(&format!("{}{WEB}", system("here")), &by_network, &[("c2", &format!("{}{far}", system("there")))]);
    assert_eq!(seen, pods);
    let nearest = |endpoint: &&portolan::report::EndpointReport| endpoint.priority == 0;
    assert!(named(&report, "web").endpoints.iter().filter(nearest).all(|endpoint| endpoint.cluster == "c1"));
}

#[test]
fn a_destination_without_a_port_is_the_only_one_that_there_is() {
    let front = "{apiVersion: v1, kind: Service, metadata: {name: front, namespace: default}, spec: {clusterIP: 172.16.0.9, ports: [{port: 8080}]}}";
    let text = format!("{WEB}---\n{front}");
    let to = |port: &str| {
        let spec = format!("{{hosts: [front], tcp: [{{route: [{{destination: {{host: web{port}}}}}]}}]}}");
        World::read(&route(&spec), &[("c1", &text)]).report("c1", "a")
    };
    assert_eq!(shares(named(&to(""), "front")).len(), 3);
    let wrong = to(", port: {number: 81}");
    assert_eq!((shares(named(&wrong, "front")).len(), findings(&wrong, "PTL0063").len()), (0, 1));
}

#[test]
fn a_named_target_port_is_the_workloads_to_say() {
    let machine = |name: &str, ports: &str| {
        format!(
            "{{apiVersion: networking.istio.io/v1, kind: WorkloadEntry, metadata: {{name: {name}, namespace: default}}, \
             spec: {{address: 10.8.0.{name}, labels: {{app: web}}{ports}}}}}\n---\n"
        )
        .replace("name: ", "name: vm-")
        .replace("vm-vm-", "vm-")
    };
    let web = WEB.replace(
        "spec: {clusterIP: 172.16.0.1, ports: [{port: 80, name: tcp}]}",
        "spec: {clusterIP: 172.16.0.1, selector: {app: web}, ports: [{port: 80, name: tcp, targetPort: main}]}",
    );
    let text = format!("{}{}", machine("1", ", ports: {main: 8080}"), machine("2", ""));
    let report = World::read(&text, &[("c1", &web)]).report("c1", "a");
    let machines: Vec<&str> = named(&report, "web")
        .endpoints
        .iter()
        .map(|it| it.address.as_str())
        .filter(|it| it.starts_with("10.8."))
        .collect();
    assert_eq!(machines, ["10.8.0.1:8080"]);
    let twice = WEB.replace("[{port: 80, name: tcp}]", "[{port: 80, name: tcp}, {port: 80, name: other}]");
    assert_eq!(findings(&World::read("", &[("c1", &twice)]).report("c1", "a"), "PTL0020").len(), 1);
}

#[test]
fn while_settings_cannot_be_read_everything_stays_in_its_cluster() {
    let far = WEB.replace("10.0.0.", "10.1.0.").replace("172.16.", "172.17.");
    let broken = "{apiVersion: v1, kind: ConfigMap, metadata: {name: istio, namespace: istio-system}, data: {mesh: '{connectTimeout: soon}'}}";
    for mesh in [broken, "kind: ["] {
        let report = World::read(mesh, &[("c1", WEB), ("c2", &far)]).report("c1", "a");
        let web = named(&report, "web");
        assert!(web.cluster_local && web.endpoints.iter().all(|endpoint| endpoint.cluster == "c1"), "{web:?}");
        let world = World::read(mesh, &[("c1", WEB), ("c2", &far)]);
        assert!(world.client("c1", "a", &[]).confined);
    }
    let sound = broken.replace("soon", "1s");
    let report = World::read(&sound, &[("c1", WEB), ("c2", &far)]).report("c1", "a");
    assert_eq!(shares(named(&report, "web")).len(), 6);
    // Settings of the cluster's own in place of the mesh's are told; so are hosts that nobody has.
    let own = format!("{WEB}---\n{}", sound.replace("'{connectTimeout: 1s}'", "'{serviceSettings: [{settings: {clusterLocal: true}, hosts: [reviews, \"*.nowhere.svc.cluster.local\", web.default.svc.cluster.local]}]}'"));
    let report = World::read(&sound, &[("c1", &own), ("c2", &far)]).report("c1", "a");
    assert_eq!((findings(&report, "PTL0070").len(), findings(&report, "PTL0060").len()), (1, 2));
    assert!(named(&report, "web").cluster_local);
}

#[test]
fn the_clusters_own_rule_comes_before_the_meshs() {
    let timeout = |seconds: u32| {
        rule(&format!(
            "{{loadBalancer: {{localityLbSetting: {{distribute: [{{from: r1, to: {{r{seconds}: 100}}}}]}}}}}}"
        ))
    };
    let report = World::read(&timeout(2), &[("c1", &format!("{WEB}---\n{}", timeout(3)))]).report("c1", "a");
    assert_eq!(shares(named(&report, "web")), given(&[("3", 100.0)]));
    assert_eq!(findings(&report, "PTL0062").len(), 1);
}

#[test]
fn of_an_endpoint_in_two_slices_the_ready_one_counts() {
    let stale = slice_of("10.0.0.1], conditions: {ready: false}").replace("web-9", "web-0");
    let report = World::read("", &[("c1", &format!("{stale}---\n{WEB}"))]).report("c1", "a");
    assert_eq!(shares(named(&report, "web")).len(), 3);
}

/// Many groups of sizes that have nothing in common: no fraction may be added up beyond its bounds.
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
