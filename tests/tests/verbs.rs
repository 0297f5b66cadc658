//! CLI output: `explain` from files and from the agent, `plan diff`, `plan --all-nodes`, labels, exit codes.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{process::Output, time::Duration};

use anyhow::{Context as _, Result, ensure};
use portolan_tests::{
    Directory, TestBed,
    objects::{destination_rule, node, service, slice},
    wait_until,
};
use serde_json::{Value, json};

const BOUND: Duration = Duration::from_secs(20);

/// Writes a service with an endpoint in each of two regions, and the nodes `near` and `far` there.
fn directory(policy: &Value) -> Result<Directory> {
    let directory = Directory::new()?;
    directory.write("rules.yaml", &[destination_rule("web", &json!({"trafficPolicy": policy}))])?;
    directory.write(
        "c1/all.yaml",
        &[
            node("near", "r1/z1"),
            node("far", "r2/z2"),
            service("web", &["172.16.0.10"], 80),
            slice("web", 9080, &[("10.0.0.1", "near", ""), ("10.0.0.2", "far", "")]),
        ],
    )?;
    Ok(directory)
}

fn run(directory: &Directory, arguments: &[&str]) -> Result<Output> {
    let place = directory.path().display().to_string();
    let arguments = arguments.iter().map(|argument| argument.replace("DIR", &place));
    Ok(directory.portolan_unprivileged()?.args(arguments).output()?)
}

fn json_of(output: &Output) -> Result<Value> {
    serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

fn shares(explanation: &Value) -> Vec<(Value, Value, Value)> {
    let endpoints = explanation["ports"][0]["routes"][0]["endpoints"].as_array().unwrap();
    endpoints.iter().map(|it| (it["address"].clone(), it["health"].clone(), it["share"].clone())).collect()
}

#[test]
fn explain_agrees_between_files_and_agent() -> Result<()> {
    let eager =
        json!({"outlierDetection": {"consecutive5xxErrors": 1, "maxEjectionPercent": 100, "baseEjectionTime": "1m"}});
    let directory = directory(&eager)?;
    let bed = TestBed::new()?;
    for i in 1..=2 {
        bed.namespace.add_address(&format!("10.0.0.{i}/32"))?;
    }
    bed.serve("10.0.0.2:9080", "far")?;
    let _agent = bed.agent(&directory, "c1", "near")?;
    let live = |which: &str| -> Result<Value> {
        json_of(&bed.portolan(&["explain", which, "-o", "json", "--admin", &bed.admin().display().to_string()])?)
    };
    let offline = |more: &[&str]| -> Result<Value> {
        let arguments =
            ["explain", "default/web:80", "--config", "DIR", "--cluster", "c1", "--node", "near", "-o", "json"];
        json_of(&run(&directory, &[&arguments[..], more].concat())?)
    };
    assert_eq!(live("default/web:80")?, offline(&[])?);
    let steps: Vec<Value> = offline(&[])?["ports"][0]["routes"][0]["steps"].as_array().unwrap().clone();
    let step = |name: &str| steps.iter().find(|step| step["step"] == name).unwrap().clone();
    assert_eq!(step("policy")["object"], "DestinationRule default/web");
    // Lesson 29: the output says that outlier detection enabled failover.
    let said = step("locality")["says"].to_string();
    assert!(said.contains("enabled by outlierDetection"), "{said}");
    // The near endpoint refuses and is ejected. The agent then explains what `--eject` shows offline.
    bed.dialer()?.dial("172.16.0.10:80", 1)?;
    wait_until("the ejection", BOUND, || {
        let now = live("default/web")?;
        ensure!(shares(&now)[0].1 == "ejected", "{now:#}");
        Ok(())
    })?;
    let (now, offline) = (live("default/web")?, offline(&["--eject", "10.0.0.1"])?);
    assert_eq!(shares(&now), shares(&offline));
    assert_eq!(shares(&now)[1].2, json!(1.0));
    assert!(now["ports"][0]["routes"][0]["endpoints"][0]["ejectedUntil"].is_string());
    // A service that does not exist.
    let missing = bed.portolan(&["explain", "default/wed", "--admin", &bed.admin().display().to_string()])?;
    assert_eq!(missing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("have no service default/wed"));
    Ok(())
}

#[test]
fn explain_lists_excluded_endpoints() -> Result<()> {
    let directory = directory(&json!({}))?;
    let mut local = service("web", &["172.16.0.10"], 80);
    local["spec"]["internalTrafficPolicy"] = json!("Local");
    let slice = slice("web", 9080, &[("10.0.0.1", "near", ""), ("10.0.0.2", "far", "")]);
    directory.write("c1/all.yaml", &[node("near", "r1/z1"), node("far", "r2/z2"), local, slice])?;
    let arguments = ["explain", "default/web", "--config", "DIR", "--cluster", "c1", "--node", "near"];
    let explanation = json_of(&run(&directory, &[&arguments[..], &["-o", "json"]].concat())?)?;
    let excluded = &explanation["ports"][0]["routes"][0]["leftOut"];
    assert_eq!(excluded[0]["address"], "10.0.0.2");
    assert!(excluded[0]["why"].as_str().unwrap().contains("internalTrafficPolicy"), "{excluded}");
    let text = String::from_utf8(run(&directory, &arguments)?.stdout)?;
    for part in ["10.0.0.1:9080", "EXCLUDED", "internalTrafficPolicy is Local", "STEP"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains('\x1b'), "no colors without a terminal: {text}");
    Ok(())
}

#[test]
fn plan_diff_shows_the_effect_of_a_change() -> Result<()> {
    let directory = directory(&json!({"outlierDetection": {"maxEjectionPercent": 100}}))?;
    let after = directory.scratch("after");
    let copied = std::process::Command::new("cp").arg("-r").arg(directory.path()).arg(&after).status()?;
    ensure!(copied.success(), "cp exited with {copied}");
    let after = after.display().to_string();
    let place = ["--cluster", "c1", "--all-nodes", "-o", "json"];
    let diff = |b: &str| run(&directory, &[&["plan", "diff", "DIR", b][..], &place].concat());
    let same = diff(&after)?;
    assert_eq!((same.status.code(), json_of(&same)?["clients"].clone()), (Some(0), json!([])));
    let split = json!({"trafficPolicy": {"loadBalancer": {"localityLbSetting": {"distribute": [
        {"from": "r1/*", "to": {"r1/*": 90, "r2/*": 10}}]}}}});
    std::fs::write(format!("{after}/rules.yaml"), destination_rule("web", &split).to_string())?;
    let changed = diff(&after)?;
    assert_eq!(changed.status.code(), Some(1));
    let report = json_of(&changed)?;
    // `distribute` has no rule for the far node, and failover is gone along with outlierDetection.
    let client = |i: usize| (report["clients"][i]["client"]["node"].clone(), report["clients"][i]["changes"].clone());
    let change = |endpoint: &str, locality: &str, before: f64, after: f64| json!({"service": "default/web:80", "endpoint": endpoint, "cluster": "c1", "locality": locality, "before": before, "after": after});
    assert_eq!(
        client(0),
        (json!("far"), json!([change("10.0.0.1:9080", "r1/z1", 0.0, 0.5), change("10.0.0.2:9080", "r2/z2", 1.0, 0.5)]))
    );
    assert_eq!(
        client(1),
        (
            json!("near"),
            json!([change("10.0.0.1:9080", "r1/z1", 1.0, 0.9), change("10.0.0.2:9080", "r2/z2", 0.0, 0.1)])
        )
    );
    // Two addresses of one service swap their destinations.
    let mut twin = service("web", &["172.16.0.10", "172.17.0.10"], 80);
    twin["spec"]["clusterIPs"] = json!(["172.16.0.10", "172.17.0.10"]);
    let nodes = [node("near", "r1/z1"), node("far", "r2/z2")];
    let endpoints = slice("web", 9080, &[("10.0.0.1", "near", ""), ("10.0.0.2", "far", "")]);
    directory.write("c1/all.yaml", &[nodes[0].clone(), nodes[1].clone(), twin, endpoints])?;
    std::fs::copy(directory.path().join("c1/all.yaml"), format!("{after}/c1/all.yaml"))?;
    let halves = |first: &str| {
        let subset =
            |name: &str, region: &str| json!({"name": name, "labels": {"topology.kubernetes.io/region": region}});
        let rule = destination_rule("web", &json!({"subsets": [subset("a", "r1"), subset("b", "r2")]}));
        let to = |subset: &str| json!([{"destination": {"host": "web", "subset": subset}}]);
        let second = if first == "a" { "b" } else { "a" };
        let route = json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {"hosts": ["web"], "tcp": [
                {"match": [{"destinationSubnets": ["172.16.0.0/16"]}], "route": to(first)}, {"route": to(second)}]}});
        format!("{rule}\n---\n{route}\n")
    };
    directory.write_text("rules.yaml", &halves("a"))?;
    std::fs::write(format!("{after}/rules.yaml"), halves("b"))?;
    let swapped = json_of(&diff(&after)?)?;
    assert_eq!(swapped["clients"][0]["changes"].as_array().map(Vec::len), Some(4), "{swapped:#}");
    // A new error is listed.
    std::fs::write(format!("{after}/rules.yaml"), "kind: [")?;
    let broken = json_of(&diff(&after)?)?;
    assert_eq!(broken["findings"]["added"][0]["code"], "PTL0002", "{broken:#}");
    Ok(())
}

#[test]
fn plan_supports_all_nodes_and_labels() -> Result<()> {
    let policy = json!({"outlierDetection": {}, "loadBalancer": {"localityLbSetting": {"failoverPriority": ["topology.kubernetes.io/region"]}}});
    let directory = directory(&policy)?;
    let plan = ["plan", "--config", "DIR", "--cluster", "c1"];
    let all = json_of(&run(&directory, &[&plan[..], &["--all-nodes", "-o", "json"]].concat())?)?;
    let nodes: Vec<&Value> = all.as_array().unwrap().iter().map(|report| &report["client"]["node"]).collect();
    assert_eq!(nodes, ["far", "near"]);
    let share = |report: &Value| report["services"][0]["endpoints"][0]["share"].clone();
    assert_eq!((share(&all[0]), share(&all[1])), (json!(0.0), json!(1.0)));
    // A label in addition to those of the node.
    let labelled =
        [&plan[..], &["--node", "near", "--label", "topology.kubernetes.io/region=r2", "-o", "json"]].concat();
    assert_eq!(share(&json_of(&run(&directory, &labelled)?)?), json!(0.0));
    // Nodes with the same shares are shown together.
    let text = String::from_utf8(run(&directory, &[&plan[..], &["--all-nodes", "--no-color"]].concat())?.stdout)?;
    assert_eq!(text.matches("Client: ").count(), 2, "{text}");
    for (arguments, code) in [
        (vec!["plan"], 2),
        (plan.to_vec(), 2),
        ([&plan[..], &["--node", "near", "--label", "nonsense"]].concat(), 2),
        ([&plan[..], &["--node", "near", "--service", "default/wed"]].concat(), 1),
        ([&plan[..], &["--node", "nowhere"]].concat(), 1),
        ([&plan[..], &["--node", "near"]].concat(), 0),
    ] {
        let output = run(&directory, &arguments)?;
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
