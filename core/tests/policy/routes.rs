//! VirtualServices, and precedence among rules.

use crate::{
    common::{World, findings, named, shares},
    objects::{WEB, given, route, rule},
};

#[test]
fn http_routes_without_request_matches_apply_to_connections() {
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
    // A route with a request match is skipped, and the next one applies.
    let looking = format!("{{match: [{{uri: {{prefix: /v2}}}}], route: [{}]}}, {{route: [{}]}}", to("v2"), to("v1"));
    assert_eq!(of(&format!("{{hosts: [web], http: [{looking}]}}")), (given(&[("1", 100.0)]), 1, 0));
    // So is a route for some clients only.
    let canary =
        format!("{{match: [{{sourceLabels: {{canary: 'yes'}}}}], route: [{}]}}, {{route: [{}]}}", to("v2"), to("v1"));
    assert_eq!(of(&format!("{{hosts: [web], tcp: [{canary}]}}")), (given(&[("1", 100.0)]), 0, 1));
    // One matching block of two is enough. A route for gateways is ignored.
    let either = format!("{{match: [{{port: 81}}, {{port: 80}}], route: [{}]}}, {{route: [{}]}}", to("v1"), to("v2"));
    assert_eq!(of(&format!("{{hosts: [web], tcp: [{either}]}}")).0, given(&[("1", 100.0)]));
    let gateway = format!("{{match: [{{gateways: [edge]}}], route: [{}]}}, {{route: [{}]}}", to("v2"), to("v1"));
    assert_eq!(
        of(&format!("{{hosts: [web], gateways: [edge, mesh], http: [{gateway}]}}")),
        (given(&[("1", 100.0)]), 0, 0)
    );
    // If both lists are set, `tcp` takes precedence, unless the port is an HTTP port.
    let both = format!("{{hosts: [web], tcp: [{{route: [{}]}}], http: [{{route: [{}]}}]}}", to("v1"), to("v2"));
    assert_eq!(of(&both).0, given(&[("1", 100.0)]));
    let web = WEB.replace("name: tcp", "name: http");
    let report = World::read(&format!("{subsets}{}", route(&both)), &[("c1", &web)]).report("c1", "a");
    assert_eq!(shares(named(&report, "web")), given(&[("2", 50.0), ("3", 50.0)]));
}

#[test]
fn routes_can_match_destination_addresses() {
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
fn route_cycles_end_after_one_step() {
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
fn destination_without_port_uses_the_only_service_port() {
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
fn rules_for_one_host_are_merged_and_port_settings_replace_them() {
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
    assert_eq!(named(&report, "web").mode, "none", "failover needs outlierDetection");
    assert!(findings(&report, "PTL0068")[0].contains("outlierDetection"));
}

#[test]
fn cluster_rule_takes_precedence_over_mesh_rule() {
    let timeout = |seconds: u32| {
        rule(&format!(
            "{{loadBalancer: {{localityLbSetting: {{distribute: [{{from: r1, to: {{r{seconds}: 100}}}}]}}}}}}"
        ))
    };
    let report = World::read(&timeout(2), &[("c1", &format!("{WEB}---\n{}", timeout(3)))]).report("c1", "a");
    assert_eq!(shares(named(&report, "web")), given(&[("3", 100.0)]));
    assert_eq!(findings(&report, "PTL0062").len(), 1);
}
