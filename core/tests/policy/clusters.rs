//! Cluster-local traffic, and isolation between tenants.

use std::collections::BTreeSet;

use crate::{
    common::{World, findings, named, shares},
    objects::{ENTRY, WEB, ejected, given, route, rule, slice_of},
};

#[test]
fn prefer_cluster_local_falls_back_to_other_clusters() {
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
    // The more specific pattern takes precedence.
    assert_eq!(of(&config(prefer, strict), &all).len(), 3);
    let exact = strict.replace("\"*\"", "\"web.default.svc.cluster.local\"");
    assert_eq!(of(&config(prefer, &exact), &all), []);
    // A mistyped annotation has no effect and is a finding.
    let world = World::read(&config("portolan.io/prefer-clusterlocal: '*'", "{}"), &[("c1", WEB)]);
    assert_eq!(findings(&world.report("c1", "a"), "PTL0025").len(), 1);
}

#[test]
fn unreadable_mesh_settings_are_not_treated_as_absent() {
    for data in ["{mesh: {serviceSettings: []}}", "{meshConfig: ''}", "{}"] {
        let config = format!(
            "{{apiVersion: v1, kind: ConfigMap, metadata: {{name: istio, namespace: istio-system}}, data: {data}}}"
        );
        let world = World::read(&config, &[("c1", WEB)]);
        assert_eq!(findings(&world.report("c1", "a"), "PTL0020").len(), 1, "{data}");
        assert_eq!(world.0.first_unread("c1").map(|(_, settings)| settings), Some(true), "{data}");
    }
    // The settings may be in an unreadable file: one of the mesh, or one of the local cluster if no settings are known.
    let settings_unread = |mesh: &str, own: &str, other: &str| {
        World::read(mesh, &[("c1", own), ("c2", other)]).0.first_unread("c1").map(|(_, settings)| settings)
    };
    let known = "{apiVersion: v1, kind: ConfigMap, metadata: {name: istio, namespace: istio-system}, data: {mesh: ''}}";
    assert_eq!(settings_unread("kind: [", WEB, WEB), Some(true));
    assert_eq!(settings_unread("", "kind: [", WEB), Some(true));
    assert_eq!(settings_unread(known, "kind: [", WEB), Some(false));
    assert_eq!(settings_unread(known, WEB, "kind: ["), Some(false));
    assert_eq!(settings_unread(known, WEB, WEB), None);
}

#[test]
fn unreadable_mesh_settings_make_every_service_cluster_local() {
    let far = WEB.replace("10.0.0.", "10.1.0.").replace("172.16.", "172.17.");
    let broken = "{apiVersion: v1, kind: ConfigMap, metadata: {name: istio, namespace: istio-system}, data: {mesh: '{connectTimeout: soon}'}}";
    for mesh in [broken, "kind: ["] {
        let report = World::read(mesh, &[("c1", WEB), ("c2", &far)]).report("c1", "a");
        let web = named(&report, "web");
        assert!(web.cluster_local && web.endpoints.iter().all(|endpoint| endpoint.cluster == "c1"), "{web:?}");
        let world = World::read(mesh, &[("c1", WEB), ("c2", &far)]);
        assert!(world.client("c1", "a", &[]).default_cluster_local);
    }
    let sound = broken.replace("soon", "1s");
    let report = World::read(&sound, &[("c1", WEB), ("c2", &far)]).report("c1", "a");
    assert_eq!(shares(named(&report, "web")).len(), 6);
    // Settings of the cluster that replace those of the mesh are a finding. So are hosts that match no service.
    let own = format!("{WEB}---\n{}", sound.replace("'{connectTimeout: 1s}'", "'{serviceSettings: [{settings: {clusterLocal: true}, hosts: [reviews, \"*.nowhere.svc.cluster.local\", web.default.svc.cluster.local]}]}'"));
    let report = World::read(&sound, &[("c1", &own), ("c2", &far)]).report("c1", "a");
    assert_eq!((findings(&report, "PTL0070").len(), findings(&report, "PTL0060").len()), (1, 2));
    assert!(named(&report, "web").cluster_local);
}

#[test]
fn passthrough_is_not_rewritten_unless_it_could_leave_the_cluster() {
    let policy = rule("{loadBalancer: {simple: PASSTHROUGH}}");
    let report = World::read(&policy, &[("c1", WEB)]).report("c1", "a");
    let web = named(&report, "web");
    assert_eq!((web.algorithm.as_str(), web.on_empty.as_str(), shares(web).len()), ("PASSTHROUGH", "pass", 0));
    let strict = "---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: istio, namespace: istio-system}, \
                  data: {mesh: '{serviceSettings: [{settings: {clusterLocal: true}, hosts: [\"*\"]}]}'}}";
    let report = World::read(&format!("{policy}{strict}"), &[("c1", WEB)]).report("c1", "a");
    assert_eq!((named(&report, "web").on_empty.as_str(), findings(&report, "PTL0070").len()), ("refuse", 1));
}

/// Threats 2 to 7 of the threat model: attempts of a tenant to get connections of another one.
#[test]
fn tenants_cannot_capture_foreign_traffic() {
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
    // 3: forbidden endpoint addresses, and labels of a pod in another namespace.
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
    // 4: a ServiceEntry, see `invalid_service_entries_are_rejected`. 5: a rule from another namespace.
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
    // A rogue cluster that claims that local pods are not ready, wherever its name sorts.
    let lying = format!("{}---\n{rogue}", slice_of("10.0.0.1], conditions: {ready: false}"));
    for name in ["a-cluster", "z-cluster"] {
        let (seen, _, report) = hosts(WEB, "", &[(name, &lying)]);
        assert_eq!(seen, pods, "{name}");
        assert!(named(&report, "web").endpoints.iter().all(|endpoint| endpoint.cluster == "c1"));
    }
    // A rogue cluster whose Service has the address or the name of a ServiceEntry here.
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
    let nearest = |endpoint: &&portolan_core::report::EndpointReport| endpoint.priority == 0;
    assert!(named(&report, "web").endpoints.iter().filter(nearest).all(|endpoint| endpoint.cluster == "c1"));
}
