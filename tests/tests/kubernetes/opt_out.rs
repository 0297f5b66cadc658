//! Pods that opt out with a label.

use anyhow::{Result, ensure};
use portolan_tests::{
    Cgroup, Dialer, ProcessContext,
    dial::{Sender, Task},
    objects::{node, pod, udp_service, udp_slice},
    wait_until,
};
use serde_json::json;

use super::*;

const LABEL: &str = "portolan.io/opt-out";
const DNS: &str = "172.16.0.53:53";
/// The error of connecting to a Service address that is not rewritten: there is no route to it.
const ENETUNREACH: i32 = 101;

/// Returns a pod of this node with this value of the label.
fn labeled(name: &str, value: Option<&str>) -> Value {
    let labels = value.map_or_else(|| json!({}), |value| json!({LABEL: value}));
    let mut pod = pod(name, &labels);
    pod["spec"] = json!({"nodeName": "n1"});
    pod
}

/// Returns the namespace of all pods with this value of the label.
fn namespace(value: Option<&str>) -> Value {
    let labels = value.map_or_else(|| json!({}), |value| json!({LABEL: value}));
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default", "labels": labels}})
}

/// Creates the cgroup of a container as the kubelet does with the cgroupfs driver.
fn plain_cgroup_of(bed: &TestBed, name: &str) -> Result<Cgroup> {
    bed.cgroup.make_inside(&format!("kubepods/burstable/poduid-default-{name}/{name}"))
}

/// Creates the cgroup of a container as the kubelet does with the systemd driver.
fn cgroup_of(bed: &TestBed, name: &str) -> Result<Cgroup> {
    let slice = format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-poduid_default_{name}.slice");
    bed.cgroup.make_inside(&format!("{slice}/cri-containerd-{name}.scope"))
}

fn client_in(bed: &TestBed, cgroup: &Cgroup) -> Result<Dialer> {
    Dialer::start(ProcessContext { namespace: Some(&bed.namespace), cgroup: Some(cgroup) })
}

/// Waits until exactly these pods are opted out, with their cgroups.
fn wait_opted_out(agent: &Agent, expected: &[&str]) -> Result<()> {
    wait_until(&format!("{expected:?} to be opted out"), BOUND, || {
        let outs = agent.get("opt-outs")?;
        let pods = outs["pods"].as_array().into_iter().flatten();
        let names: Vec<_> =
            pods.filter(|pod| pod["cgroups"] != json!([])).filter_map(|pod| pod["name"].as_str()).collect();
        ensure!(names == expected, "{outs}\n{}", agent.log());
        Ok(())
    })
}

#[test]
fn labeled_pods_are_opted_out() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1"])?;
    bed.serve_datagrams("10.0.0.1:5353", "10.0.0.1")?;
    api.apply(&web(&["10.0.0.1"]));
    let dns = [udp_service("dns", &["172.16.0.53"], 53), udp_slice("dns", 5353, &[("10.0.0.1", "n1", "")])];
    api.apply(&dns.map(plain));
    api.apply(&[labeled("a", Some("true")), labeled("b", None), namespace(None), node("n2", "r1/z1")]);
    // A pod of another node. A cgroup with its name exists here all the same.
    let mut elsewhere = labeled("c", Some("true"));
    elsewhere["spec"]["nodeName"] = json!("n2");
    api.apply(&[elsewhere]);
    let (of_a, of_b, _of_c) = (cgroup_of(&bed, "a")?, cgroup_of(&bed, "b")?, cgroup_of(&bed, "c")?);
    let (mut a, mut b) = (client_in(&bed, &of_a)?, client_in(&bed, &of_b)?);
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    wait_opted_out(&agent, &["a"])?;
    let datagram = || -> Result<Task> { Ok(Task::HoldDatagram { to: DNS.parse()?, mapped: false, then: None }) };
    let send =
        || -> Result<Task> { Ok(Task::Datagrams { to: DNS.parse()?, times: 2, from: Sender::Fresh, mapped: false }) };
    let answer = |client: &mut Dialer| client.dial(WEB, 2);
    for (client, greetings, errnos) in [(&mut a, [""; 2], [ENETUNREACH; 2]), (&mut b, ["10.0.0.1"; 2], [0; 2])] {
        let seen = answer(client)?;
        assert_eq!((seen.greetings(), seen.errnos()), (greetings.to_vec(), errnos.to_vec()));
        assert_eq!(client.run(&send()?)?.errnos(), errnos);
        assert_eq!(client.run(&datagram()?)?.errnos(), errnos[..1]);
    }
    assert!(agent.http("/metrics")?.1.contains("\nportolan_opted_out_pods 1\n"));

    // Connections from before the label stay as they are.
    let connected = || -> Result<Task> {
        Ok(Task::Datagrams { to: DNS.parse()?, times: 2, from: Sender::KeptConnected, mapped: false })
    };
    assert_eq!(b.run(&connected()?)?.greetings(), ["10.0.0.1"; 2]);

    // The namespace opts out, but one of its pods overrides that.
    api.apply(&[namespace(Some("true")), labeled("a", Some("false"))]);
    wait_opted_out(&agent, &["b"])?;
    assert_eq!((answer(&mut a)?.errnos(), answer(&mut b)?.errnos()), (vec![0; 2], vec![ENETUNREACH; 2]));
    assert_eq!(b.run(&connected()?)?.greetings(), ["10.0.0.1"; 2]);
    api.apply(&[labeled("a", Some("sure"))]);
    wait_finding(&agent, "PTL0114", "Pod default/a has \"sure\"")?;
    wait_opted_out(&agent, &["a", "b"])?;
    api.apply(&[namespace(None)]);
    wait_opted_out(&agent, &[])?;
    assert_eq!((answer(&mut a)?.errnos(), answer(&mut b)?.errnos()), (vec![0; 2], vec![0; 2]));
    // Connections from the time of the opt-out stay as they are as well.
    bed.namespace.add_address("172.16.0.53/32")?;
    bed.serve_datagrams(DNS, "direct")?;
    api.apply(&[labeled("a", Some("true"))]);
    wait_opted_out(&agent, &["a"])?;
    assert_eq!(a.run(&connected()?)?.greetings(), ["direct"; 2]);
    api.apply(&[labeled("a", Some("sure"))]);
    wait_opted_out(&agent, &[])?;
    assert_eq!(a.run(&connected()?)?.greetings(), ["direct"; 2]);
    assert_eq!(a.run(&send()?)?.greetings(), ["10.0.0.1"; 2]);
    wait_finding(&agent, "PTL0114", "Pod default/a")?;
    api.apply(&[labeled("a", None)]);
    wait_no_finding(&agent, "PTL0114")
}

/// The label exists before the cgroup of the pod does.
#[test]
fn pod_is_opted_out_as_soon_as_its_cgroup_exists() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1"])?;
    api.apply(&web(&["10.0.0.1"]));
    api.apply(&[labeled("a", Some("true"))]);
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    wait_until("the pod to be known", BOUND, || {
        let outs = agent.get("opt-outs")?;
        ensure!(outs["pods"][0]["name"] == "a" && outs["pods"][0]["cgroups"] == json!([]), "{outs}");
        Ok(())
    })?;
    let of_a = plain_cgroup_of(&bed, "a")?;
    wait_opted_out(&agent, &["a"])?;
    assert_eq!(client_in(&bed, &of_a)?.dial(WEB, 1)?.errnos(), [ENETUNREACH]);
    // Its cgroup is removed, and created again with another ID.
    drop(of_a);
    bed.cgroup.remove_inside("kubepods")?;
    wait_opted_out(&agent, &[])?;
    let of_a = plain_cgroup_of(&bed, "a")?;
    wait_opted_out(&agent, &["a"])?;
    assert_eq!(client_in(&bed, &of_a)?.dial(WEB, 1)?.errnos(), [ENETUNREACH]);
    Ok(())
}

/// An opt-out stays in effect while no agent runs, and while the next agent may not read pods.
#[test]
fn opt_out_persists_while_pods_cannot_be_read() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1"])?;
    api.apply(&web(&["10.0.0.1"]));
    api.apply(&[labeled("a", Some("true"))]);
    let of_a = cgroup_of(&bed, "a")?;
    let mut a = client_in(&bed, &of_a)?;
    let mut agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    wait_opted_out(&agent, &["a"])?;
    agent.process.kill();
    assert_eq!(a.dial(WEB, 1)?.errnos(), [ENETUNREACH]);
    // Other sizes, so all maps of the table are new.
    api.forbid("pods", true);
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &["--max-backends", "1000", "--resync", "2s"])?;
    wait_finding(&agent, "PTL0111", "pods (opt-out)")?;
    assert_eq!(bed.dialer()?.dial(WEB, 1)?.greetings(), ["10.0.0.1"]);
    assert_eq!(a.dial(WEB, 1)?.errnos(), [ENETUNREACH]);
    // Pods can be read again, and the label is gone.
    api.apply(&[labeled("a", None)]);
    api.forbid("pods", false);
    wait_until("the pod to be served", BOUND, || {
        let seen = a.dial(WEB, 1)?;
        ensure!(seen.errnos() == [0], "{:?}\n{}", seen.errnos(), agent.log());
        Ok(())
    })
}

/// The agent verifies the programs through its own connections. It could never become ready if it opted out.
#[test]
fn agent_pod_cannot_opt_out() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1"])?;
    api.apply(&web(&["10.0.0.1"]));
    let of_a = cgroup_of(&bed, "a")?;
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    std::fs::write(of_a.path().join("cgroup.procs"), agent.process.id().to_string())?;
    api.apply(&[labeled("a", Some("true"))]);
    wait_finding(&agent, "PTL0114", "Pod default/a runs this agent")?;
    assert_eq!(client_in(&bed, &of_a)?.dial(WEB, 1)?.greetings(), ["10.0.0.1"]);
    assert_eq!(agent.get("opt-outs")?["pods"][0]["cgroups"], json!([]));
    Ok(())
}
