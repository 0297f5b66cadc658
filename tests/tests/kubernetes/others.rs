//! Remote clusters, configured by Secrets.

use std::time::Duration;

use anyhow::{Result, ensure};
use portolan_tests::{
    Api, TestBed,
    api::secret,
    objects::{node, plain, service, slice},
    wait_until,
};
use serde_json::{Value, json};

use super::*;

/// Sets up a second cluster with an endpoint of the same service, and returns the Secret that configures it.
fn second(bed: &TestBed, endpoint: &str) -> Result<(Api, Value)> {
    let mut api = Api::new()?;
    api.apply(&[
        node("n2", "r2/z1"),
        plain(service("web", &["172.17.0.10"], 80)),
        plain(service("foreign", &["172.17.0.66"], 80)),
        plain(slice("web", 9080, &[(endpoint, "n2", "")])),
        plain(slice("foreign", 9080, &[(endpoint, "n2", "")])),
    ]);
    let named = api.secret(&bed.namespace, "c2")?;
    Ok((api, named))
}

#[test]
fn remote_clusters_are_added_changed_and_removed() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1", "10.1.0.1", "10.2.0.1"])?;
    let (mut other, named) = second(&bed, "10.1.0.1")?;
    api.apply(&web(&["10.0.0.1"]));
    let both = ["10.0.0.1:9080 healthy", "10.1.0.1:9080 healthy"];
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &["--remote-grace", "2s"])?;
    wait_endpoints(&agent, "web", &both[..1])?;
    api.apply(std::slice::from_ref(&named));
    wait_endpoints(&agent, "web", &both)?;
    // A remote cluster only adds endpoints to services that exist here.
    assert_eq!(endpoints(&agent, "foreign")?, Vec::<String>::new());
    assert_eq!(source(&agent, "c2", "endpointslices.discovery.k8s.io")?["objects"], json!(2));
    assert_eq!(other.asked("list", "configmaps") + other.asked("list", "destinationrules.networking.istio.io"), 0);
    let mut client = bed.dialer()?;
    let seen = client.dial(WEB, 10)?;
    assert_eq!((seen.count("10.0.0.1"), seen.count("10.1.0.1")), (5, 5));

    // The same ID in another Secret is ignored. So is the ID of the local cluster.
    let duplicate = secret("another", &[("c2", "{}"), ("c1", "{}")]);
    api.apply(&[duplicate]);
    wait_finding(&agent, "PTL0112", "cluster c2 is also named by istio-system/another")?;
    assert_eq!(endpoints(&agent, "web")?, both);
    assert!(api.delete("secrets", "istio-system", "another"));
    wait_no_finding(&agent, "PTL0112")?;

    // A new kubeconfig: an invalid one or a dead address changes nothing, one that works does.
    let replacement = |text: &str| secret("istio-remote-secret-c2", &[("c2", text)]);
    api.apply(&[replacement("users: [")]);
    wait_finding(&agent, "PTL0112", "not a valid kubeconfig")?;
    api.apply(&[replacement("users: [{user: {token: hush-hush}]")]);
    wait_finding(&agent, "PTL0112", "not a valid kubeconfig")?;
    assert!(!agent.log().contains("hush"), "{}", agent.log());
    let runs = json!({"command": "/bin/false", "apiVersion": "client.authentication.k8s.io/v1"});
    api.apply(&[replacement(&other.kubeconfig("127.0.0.1:9".parse()?, &json!({"exec": runs})).to_string())]);
    wait_finding(&agent, "PTL0112", "a program to run")?;
    api.apply(&[replacement(&other.kubeconfig("127.0.0.1:9".parse()?, &json!({"token": "t"})).to_string())]);
    wait_finding(&agent, "PTL0112", "cannot be read with its new kubeconfig")?;
    assert_eq!(endpoints(&agent, "web")?, both);
    let (third, moved) = second(&bed, "10.2.0.1")?;
    api.apply(&[moved]);
    wait_endpoints(&agent, "web", &["10.0.0.1:9080 healthy", "10.2.0.1:9080 healthy"])?;
    wait_no_finding(&agent, "PTL0112")?;
    drop(third);

    // The cluster is unreachable: after a grace period, its endpoints receive no connections.
    wait_endpoints(&agent, "web", &["10.0.0.1:9080 healthy", "10.2.0.1:9080 unhealthy"])?;
    wait_finding(&agent, "PTL0110", "Cluster c2")?;
    assert_eq!(client.dial(WEB, 6)?.greetings(), ["10.0.0.1"; 6]);
    api.apply(&[named]);
    wait_endpoints(&agent, "web", &both)?;
    wait_no_finding(&agent, "PTL0110")?;
    other.stop();
    other.start()?;
    wait_endpoints(&agent, "web", &both)?;

    // The Secret is deleted.
    assert!(api.delete("secrets", "istio-system", "istio-remote-secret-c2"));
    wait_endpoints(&agent, "web", &both[..1])?;
    assert_eq!(source(&agent, "c2", "services")?, Value::Null);
    Ok(())
}

#[test]
fn unreachable_remote_cluster_delays_startup_only_briefly() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1"])?;
    let (mut other, named) = second(&bed, "10.1.0.1")?;
    other.stop();
    api.apply(&web(&["10.0.0.1"]));
    api.apply(&[named]);
    let began = std::time::Instant::now();
    let mut agent = bed.start_on_api(&kubeconfig, "c1", "n1", &[])?;
    wait_until("the agent to be ready", Duration::from_secs(60), || {
        let (status, why) = agent.http("/readyz")?;
        ensure!(status == 200, "{why}");
        Ok(())
    })?;
    println!("ready after {:.1?} without a configured cluster", began.elapsed());
    wait_finding(&agent, "PTL0110", "Cluster c2")?;
    let mut client = bed.dialer()?;
    assert_eq!(client.dial(WEB, 1)?.greetings(), ["10.0.0.1"]);
    other.start()?;
    wait_until("the endpoints of the other cluster", AFTER_LONG, || {
        let seen = endpoints(&agent, "web")?;
        ensure!(seen == ["10.0.0.1:9080 healthy", "10.1.0.1:9080 healthy"], "{seen:?}");
        Ok(())
    })?;
    agent.wait_ready()
}

/// An agent that starts while a remote cluster is unreachable keeps what the previous agent published of it.
/// An agent that stops removes nothing.
#[test]
fn endpoints_of_an_unreachable_cluster_survive_a_restart() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.1.0.1"])?;
    let (mut other, named) = second(&bed, "10.1.0.1")?;
    // All endpoints are in the remote cluster.
    api.apply(&web(&[]));
    api.apply(&[named]);
    let mut agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    let mut client = bed.dialer()?;
    assert_eq!(client.dial(WEB, 2)?.greetings(), ["10.1.0.1"; 2]);
    agent.process.signal(rustix::process::Signal::TERM)?;
    agent.process.wait(BOUND)?;
    assert_eq!(client.dial(WEB, 2)?.greetings(), ["10.1.0.1"; 2]);
    other.stop();
    let agent = bed.start_on_api(&kubeconfig, "c1", "n1", &SOON)?;
    wait_until("the agent to be ready", Duration::from_secs(60), || {
        let (status, why) = agent.http("/readyz")?;
        ensure!(status == 200, "{why}");
        Ok(())
    })?;
    assert_eq!(client.dial(WEB, 2)?.greetings(), ["10.1.0.1"; 2]);
    // The cluster is reachable again, without the endpoint.
    other.replace(&[node("n2", "r2/z1"), plain(service("web", &["172.17.0.10"], 80))]);
    other.start()?;
    wait_until("no endpoint to be left", AFTER_LONG, || {
        let errnos = client.dial(WEB, 1)?.errnos();
        ensure!(errnos == [ECONNREFUSED], "{errnos:?}");
        Ok(())
    })
}

/// While the Secrets cannot be read, endpoints of remote clusters are kept.
#[test]
fn remote_endpoints_survive_a_restart_while_secrets_cannot_be_read() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.1.0.1"])?;
    let (other, named) = second(&bed, "10.1.0.1")?;
    api.apply(&web(&[]));
    api.apply(&[named]);
    let mut agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    let mut client = bed.dialer()?;
    assert_eq!(client.dial(WEB, 2)?.greetings(), ["10.1.0.1"; 2]);
    agent.process.kill();
    api.forbid("secrets", true);
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &SOON)?;
    wait_finding(&agent, "PTL0111", "not allowed to list secrets")?;
    assert_eq!(client.dial(WEB, 2)?.greetings(), ["10.1.0.1"; 2]);
    other.replace(&[node("n2", "r2/z1"), plain(service("web", &["172.17.0.10"], 80))]);
    api.forbid("secrets", false);
    wait_until("no endpoint to be left", AFTER_LONG, || {
        let errnos = client.dial(WEB, 1)?.errnos();
        ensure!(errnos == [ECONNREFUSED], "{errnos:?}");
        Ok(())
    })
}
