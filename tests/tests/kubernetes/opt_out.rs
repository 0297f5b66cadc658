//! Pods that a label has left alone.

use anyhow::{Result, ensure};
use portolan_tests::{
    Cgroup, Dialler, Place,
    dial::{Sender, Task},
    objects::{node, pod, udp_service, udp_slice},
    wait_until,
};
use serde_json::json;

use super::*;

const LABEL: &str = "portolan.io/opt-out";
const DNS: &str = "172.16.0.53:53";
/// What a Service address that was not rewritten leads to here: there is no route to it.
const ENETUNREACH: i32 = 101;

/// A pod of the node, with this label of its own.
fn labelled(name: &str, says: Option<&str>) -> Value {
    let labels = says.map_or_else(|| json!({}), |says| json!({LABEL: says}));
    let mut pod = pod(name, &labels);
    pod["spec"] = json!({"nodeName": "n1"});
    pod
}

/// The namespace of all pods, with this label.
fn namespace(says: Option<&str>) -> Value {
    let labels = says.map_or_else(|| json!({}), |says| json!({LABEL: says}));
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default", "labels": labels}})
}

/// Where the kubelet has the container of a pod, without systemd.
fn plain_cgroup_of(bed: &Bed, name: &str) -> Result<Cgroup> {
    bed.cgroup.make_inside(&format!("kubepods/burstable/poduid-default-{name}/{name}"))
}

/// Where it has it with systemd.
fn cgroup_of(bed: &Bed, name: &str) -> Result<Cgroup> {
    let slice = format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-poduid_default_{name}.slice");
    bed.cgroup.make_inside(&format!("{slice}/cri-containerd-{name}.scope"))
}

fn client_in(bed: &Bed, cgroup: &Cgroup) -> Result<Dialler> {
    Dialler::start(Place { namespace: Some(&bed.namespace), cgroup: Some(cgroup) })
}

/// Waits until these pods are left alone, where they run.
fn wait_left_alone(agent: &Agent, expected: &[&str]) -> Result<()> {
    wait_until(&format!("{expected:?} to be left alone"), BOUND, || {
        let outs = agent.get("opt-outs")?;
        let pods = outs["pods"].as_array().into_iter().flatten();
        let names: Vec<_> =
            pods.filter(|pod| pod["cgroups"] != json!([])).filter_map(|pod| pod["name"].as_str()).collect();
        ensure!(names == expected, "{outs}\n{}", agent.log());
        Ok(())
    })
}

#[test]
fn pods_that_ask_for_it_are_left_alone() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1"])?;
    bed.serve_datagrams("10.0.0.1:5353", "10.0.0.1")?;
    api.apply(&web(&["10.0.0.1"]));
    let dns = [udp_service("dns", &["172.16.0.53"], 53), udp_slice("dns", 5353, &[("10.0.0.1", "n1", "")])];
    api.apply(&dns.map(plain));
    api.apply(&[labelled("a", Some("true")), labelled("b", None), namespace(None), node("n2", "r1/z1")]);
    // Of another node; a cgroup of its name is here all the same.
    let mut elsewhere = labelled("c", Some("true"));
    elsewhere["spec"]["nodeName"] = json!("n2");
    api.apply(&[elsewhere]);
    let (of_a, of_b, _of_c) = (cgroup_of(&bed, "a")?, cgroup_of(&bed, "b")?, cgroup_of(&bed, "c")?);
    let (mut a, mut b) = (client_in(&bed, &of_a)?, client_in(&bed, &of_b)?);
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    wait_left_alone(&agent, &["a"])?;
    let datagram = || -> Result<Task> { Ok(Task::HoldDatagram { to: DNS.parse()?, mapped: false, then: None }) };
    let send =
        || -> Result<Task> { Ok(Task::Datagrams { to: DNS.parse()?, times: 2, from: Sender::Fresh, mapped: false }) };
    let answer = |client: &mut Dialler| client.dial(WEB, 2);
    for (client, greetings, errnos) in [(&mut a, [""; 2], [ENETUNREACH; 2]), (&mut b, ["10.0.0.1"; 2], [0; 2])] {
        let seen = answer(client)?;
        assert_eq!((seen.greetings(), seen.errnos()), (greetings.to_vec(), errnos.to_vec()));
        assert_eq!(client.run(&send()?)?.errnos(), errnos);
        assert_eq!(client.run(&datagram()?)?.errnos(), errnos[..1]);
    }
    assert!(agent.http("/metrics")?.1.contains("\nportolan_opted_out_pods 1\n"));

    // What is connected when the label comes stays so.
    let kept = || -> Result<Task> {
        Ok(Task::Datagrams { to: DNS.parse()?, times: 2, from: Sender::KeptConnected, mapped: false })
    };
    assert_eq!(b.run(&kept()?)?.greetings(), ["10.0.0.1"; 2]);

    // The namespace asks for all; a pod of it does not.
    api.apply(&[namespace(Some("true")), labelled("a", Some("false"))]);
    wait_left_alone(&agent, &["b"])?;
    assert_eq!((answer(&mut a)?.errnos(), answer(&mut b)?.errnos()), (vec![0; 2], vec![ENETUNREACH; 2]));
    assert_eq!(b.run(&kept()?)?.greetings(), ["10.0.0.1"; 2]);
    api.apply(&[labelled("a", Some("sure"))]);
    wait_finding(&agent, "PTL0114", "Pod default/a has \"sure\"")?;
    wait_left_alone(&agent, &["a", "b"])?;
    api.apply(&[namespace(None)]);
    wait_left_alone(&agent, &[])?;
    assert_eq!((answer(&mut a)?.errnos(), answer(&mut b)?.errnos()), (vec![0; 2], vec![0; 2]));
    // What was connected while its pod was left alone stays so as well.
    bed.namespace.add_address("172.16.0.53/32")?;
    bed.serve_datagrams(DNS, "by itself")?;
    api.apply(&[labelled("a", Some("true"))]);
    wait_left_alone(&agent, &["a"])?;
    assert_eq!(a.run(&kept()?)?.greetings(), ["by itself"; 2]);
    api.apply(&[labelled("a", Some("sure"))]);
    wait_left_alone(&agent, &[])?;
    assert_eq!(a.run(&kept()?)?.greetings(), ["by itself"; 2]);
    assert_eq!(a.run(&send()?)?.greetings(), ["10.0.0.1"; 2]);
    wait_finding(&agent, "PTL0114", "Pod default/a")?;
    api.apply(&[labelled("a", None)]);
    wait_no_finding(&agent, "PTL0114")
}

/// The label is there before the pod is.
#[test]
fn a_pod_that_begins_later_is_left_alone_as_soon_as_its_cgroup_is_there() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1"])?;
    api.apply(&web(&["10.0.0.1"]));
    api.apply(&[labelled("a", Some("true"))]);
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    wait_until("the pod to be known", BOUND, || {
        let outs = agent.get("opt-outs")?;
        ensure!(outs["pods"][0]["name"] == "a" && outs["pods"][0]["cgroups"] == json!([]), "{outs}");
        Ok(())
    })?;
    let of_a = plain_cgroup_of(&bed, "a")?;
    wait_left_alone(&agent, &["a"])?;
    assert_eq!(client_in(&bed, &of_a)?.dial(WEB, 1)?.errnos(), [ENETUNREACH]);
    // Its cgroup is gone, and made again with another id.
    drop(of_a);
    bed.cgroup.remove_inside("kubepods")?;
    wait_left_alone(&agent, &[])?;
    let of_a = plain_cgroup_of(&bed, "a")?;
    wait_left_alone(&agent, &["a"])?;
    assert_eq!(client_in(&bed, &of_a)?.dial(WEB, 1)?.errnos(), [ENETUNREACH]);
    Ok(())
}

/// Who is left alone stays so while there is no agent, and while the next one may not read who it is.
#[test]
fn who_is_left_alone_stays_so_for_want_of_knowledge() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1"])?;
    api.apply(&web(&["10.0.0.1"]));
    api.apply(&[labelled("a", Some("true"))]);
    let of_a = cgroup_of(&bed, "a")?;
    let mut a = client_in(&bed, &of_a)?;
    let mut agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    wait_left_alone(&agent, &["a"])?;
    agent.process.kill();
    assert_eq!(a.dial(WEB, 1)?.errnos(), [ENETUNREACH]);
    // With other sizes: all of the table's maps are new.
    api.forbid("pods", true);
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &["--max-backends", "1000", "--resync", "2s"])?;
    wait_finding(&agent, "PTL0111", "pods (opt-out)")?;
    assert_eq!(bed.dialler()?.dial(WEB, 1)?.greetings(), ["10.0.0.1"]);
    assert_eq!(a.dial(WEB, 1)?.errnos(), [ENETUNREACH]);
    // It is known again, and is not asked for any more.
    api.apply(&[labelled("a", None)]);
    api.forbid("pods", false);
    wait_until("the pod to be served", BOUND, || {
        let seen = a.dial(WEB, 1)?;
        ensure!(seen.errnos() == [0], "{:?}\n{}", seen.errnos(), agent.log());
        Ok(())
    })
}

/// Its own connections show whether the programs work: it would never be ready.
#[test]
fn the_agents_own_pod_is_not_left_alone() -> Result<()> {
    let (bed, api, kubeconfig) = node_with(&["10.0.0.1"])?;
    api.apply(&web(&["10.0.0.1"]));
    let of_a = cgroup_of(&bed, "a")?;
    let agent = bed.agent_on_api(&kubeconfig, "c1", "n1", &[])?;
    std::fs::write(of_a.path().join("cgroup.procs"), agent.process.id().to_string())?;
    api.apply(&[labelled("a", Some("true"))]);
    wait_finding(&agent, "PTL0114", "Pod default/a runs this agent")?;
    assert_eq!(client_in(&bed, &of_a)?.dial(WEB, 1)?.greetings(), ["10.0.0.1"]);
    assert_eq!(agent.get("opt-outs")?["pods"][0]["cgroups"], json!([]));
    Ok(())
}
