//! ServiceEntry and WorkloadEntry objects.

use crate::{
    common::{World, findings, named, shares},
    objects::{ENTRY, WEB, given},
};

#[test]
fn service_entry_becomes_a_service() {
    let world = World::read(ENTRY, &[("c1", WEB)]);
    let report = world.report("c1", "a");
    let bank = named(&report, "bank");
    assert_eq!((bank.kind.as_deref(), bank.host.as_str()), (Some("ServiceEntry"), "bank.example.com"));
    assert_eq!(bank.frontends, ["172.30.0.1:443"]);
    let addresses: Vec<&str> = bank.endpoints.iter().map(|endpoint| endpoint.address.as_str()).collect();
    assert_eq!(addresses, ["10.9.0.1:8443", "10.9.0.2:9443", "10.9.0.3:8443"]);
    // Shares follow the weights of the endpoints.
    assert_eq!(shares(bank), given(&[("1", 60.0), ("2", 20.0), ("3", 20.0)]));
    // A rule in its namespace applies to it by its host.
    let policy = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: bank, namespace: shop}\n\
                  spec: {host: bank.example.com, trafficPolicy: {outlierDetection: {}}}\n";
    let has_istio_rule = World::read(&format!("{ENTRY}---\n{policy}"), &[("c1", WEB)]);
    assert_eq!(shares(named(&has_istio_rule.report("c1", "a"), "bank")), given(&[("1", 75.0), ("2", 25.0)]));
    assert_eq!(shares(named(&has_istio_rule.report("c1", "b"), "bank")), given(&[("3", 100.0)]));
}

#[test]
fn invalid_service_entries_are_rejected() {
    let code_of = |text: &str, code: &str| {
        let report = World::read(text, &[("c1", WEB)]).report("c1", "a");
        // The Service works, whatever is wrong with the entry.
        assert_eq!(shares(named(&report, "web")).len(), 3);
        let entries = report.services.iter().filter(|service| service.kind.is_some()).count();
        (findings(&report, code).len(), entries)
    };
    // The address of a Service, on any port, and its host name.
    assert_eq!(code_of(&ENTRY.replace("172.30.0.1", "172.16.0.1"), "PTL0045"), (1, 0));
    assert_eq!(code_of(&ENTRY.replace("bank.example.com", "web.default.svc.cluster.local"), "PTL0045"), (1, 0));
    assert_eq!(
        code_of(&ENTRY.replace("  resolution: STATIC", "  resolution: STATIC\n  exportTo: ['.']"), "PTL0023"),
        (1, 0)
    );
    assert_eq!(code_of(&ENTRY.replace("STATIC", "DNS"), "PTL0022"), (1, 0));
    assert_eq!(code_of(&ENTRY.replace("STATIC", "SOMEHOW"), "PTL0020"), (1, 0));
    assert_eq!(code_of(&ENTRY.replace("172.30.0.1", "172.30.0.0/24"), "PTL0044"), (1, 0));
    // An invalid endpoint does not affect the others.
    assert_eq!(code_of(&ENTRY.replace("10.9.0.3", "169.254.169.254"), "PTL0021"), (1, 1));
    assert_eq!(code_of(&ENTRY.replace("10.9.0.3", "db.example.com"), "PTL0021"), (1, 1));
    assert_eq!(code_of(ENTRY, "PTL0021"), (0, 1));
}

#[test]
fn workload_entries_serve_services_that_select_them() {
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
fn workload_entry_resolves_a_named_target_port() {
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
