//! Lessons 7 to 12: kernels, cgroups, programs, maps.

use anyhow::{Result, ensure};
use portolan_tests::{
    Cgroup, Dialer, Directory, Foreign, ForeignProgram, ProcessContext, TestBed,
    dial::{Sender, Task},
    objects::{destination_rule, node, service, slice},
    unique, wait_until,
};
use serde_json::{Value, json};

use crate::world::{BOUND, DNS, ECONNREFUSED, EHOSTUNREACH, ENETUNREACH, WEB, metric, send, two_pods, write_pods};

/// Runs `portolan doctor` and returns its JSON report and its exit code.
fn doctor(bed: &TestBed) -> Result<(Value, i32)> {
    let (cgroup, pins) = (bed.cgroup.path().display().to_string(), bed.pins().display().to_string());
    let admin = bed.admin().display().to_string();
    let output = bed.portolan(&["doctor", "--cgroup", &cgroup, "--bpffs", &pins, "--admin", &admin, "-o", "json"])?;
    Ok((serde_json::from_slice(&output.stdout)?, output.status.code().unwrap_or(-1)))
}

fn state(diagnosis: &Value, check: &str) -> Value {
    let mut checks = diagnosis["checks"].as_array().into_iter().flatten();
    checks.find(|own| own["check"] == check).map_or(Value::Null, |own| own["state"].clone())
}

#[test]
fn lesson_07_refusals_never_return_eperm() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = two_pods(&bed)?;
    write_pods(&directory, &[])?;
    let _agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    assert_eq!(client.dial(WEB, 3)?.errnos(), [ECONNREFUSED; 3]);
    for from in [Sender::Connected, Sender::Fresh] {
        assert_eq!(send(&mut client, DNS, 3, from)?.errnos(), [ECONNREFUSED; 3]);
    }
    Ok(())
}

#[test]
fn lesson_08_refusals_return_the_expected_errno() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = Directory::new()?;
    let keep = json!({"serviceSettings": [{"settings": {"clusterLocal": true}, "hosts": ["strict.default.svc.cluster.local"]}]});
    directory.write("mesh.yaml", &[portolan_tests::objects::mesh_config(&keep)])?;
    directory.write(
        "c1/all.yaml",
        &[
            node("n1", "r1"),
            service("empty", &["172.16.0.10", "fd16::10"], 80),
            service("strict", &["172.16.0.20", "fd16::20"], 80),
        ],
    )?;
    let _agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    for (to, errno) in [
        (WEB, ECONNREFUSED),
        ("[fd16::10]:80", ECONNREFUSED),
        ("172.16.0.20:80", EHOSTUNREACH),
        ("[fd16::20]:80", EHOSTUNREACH),
    ] {
        for (mapped, nonblocking) in [(false, false), (false, true), (true, false), (true, true)] {
            let task = Task::Dial { to: to.parse()?, times: 2, mapped, nonblocking, send: 0 };
            assert_eq!(client.run(&task)?.errnos(), [errno; 2], "{to} mapped {mapped} nonblocking {nonblocking}");
        }
    }
    Ok(())
}

#[test]
fn lesson_09_programs_on_the_wrong_cgroup_are_detected_and_reattached() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = two_pods(&bed)?;
    // A previous agent with the same pins served another cgroup.
    let other = Cgroup::new(&unique("other"))?;
    let elsewhere = other.path().display().to_string();
    let mut previous = bed.agent_with(&directory, "c1", "n1", &["--cgroup", &elsewhere])?;
    previous.process.kill();
    let (diagnosis, code) = doctor(&bed)?;
    assert_eq!((state(&diagnosis, "programs"), code), (json!("error"), 1), "{diagnosis:#}");
    let mut client = bed.dialer()?;
    assert_eq!(client.dial(WEB, 1)?.errnos(), [ENETUNREACH]);

    let agent = bed.agent(&directory, "c1", "n1")?;
    assert!(agent.log().contains("connect4 was attached to cgroup"), "{}", agent.log());
    assert_eq!(client.dial(WEB, 2)?.errnos(), [0; 2]);
    let (diagnosis, code) = doctor(&bed)?;
    assert_eq!(
        (state(&diagnosis, "programs"), state(&diagnosis, "agent"), code),
        (json!("ok"), json!("ok"), 0),
        "{diagnosis:#}"
    );
    let mut outside = Dialer::start(ProcessContext { namespace: Some(&bed.namespace), cgroup: Some(&other) })?;
    assert_eq!(outside.dial(WEB, 1)?.errnos(), [ENETUNREACH], "the previous cgroup is no longer served");
    Ok(())
}

#[test]
fn lesson_09_second_agent_on_the_same_cgroup_does_not_start() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = two_pods(&bed)?;
    let mut agent = bed.agent(&directory, "c1", "n1")?;
    let pins = format!("{}-b", bed.pins().display());
    let admin = directory.scratch("second.sock").display().to_string();
    let more = ["--bpffs", pins.as_str(), "--admin", &admin, "--metrics", "127.0.0.1:15921"];
    let mut second = bed.start_with(&directory, "c1", "n1", &more)?;
    assert_eq!(second.process.wait(BOUND)?.code(), Some(1));
    assert!(second.log().contains("another agent serves the cgroup"), "{}", second.log());
    // Nor does it start while the programs of an agent with other pins are still attached.
    agent.process.kill();
    let mut second = bed.start_with(&directory, "c1", "n1", &more)?;
    assert_eq!(second.process.wait(BOUND)?.code(), Some(1));
    assert!(second.log().contains("programs of another Portolan"), "{}", second.log());
    let mut client = bed.dialer()?;
    assert_eq!(client.dial(WEB, 2)?.errnos(), [0; 2]);
    let cleaned = bed.portolan(&["cleanup", "--bpffs", &pins])?;
    assert!(cleaned.status.success(), "{cleaned:?}");
    Ok(())
}

#[test]
fn lesson_10_foreign_programs_stay_attached() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = two_pods(&bed)?;
    let foreign = ForeignProgram::attach(&bed.cgroup, Foreign::Allow)?;
    // The agent starts, serves, is killed, restarts, and is cleaned up.
    let mut agent = bed.agent(&directory, "c1", "n1")?;
    let mut client = bed.dialer()?;
    assert_eq!(client.dial(WEB, 2)?.errnos(), [0; 2]);
    assert!(foreign.is_attached());
    let (diagnosis, code) = doctor(&bed)?;
    assert_eq!((state(&diagnosis, "other programs: connect4"), code), (json!("note"), 0), "{diagnosis:#}");
    agent.process.kill();
    let mut agent = bed.agent(&directory, "c1", "n1")?;
    assert_eq!(client.dial(WEB, 2)?.errnos(), [0; 2]);
    assert!(foreign.is_attached());
    agent.process.kill();
    ensure!(bed.portolan(&["cleanup", "--bpffs", &bed.pins().display().to_string()])?.status.success());
    assert_eq!(client.dial(WEB, 1)?.errnos(), [ENETUNREACH], "Portolan's own programs are removed");
    assert!(foreign.is_attached());
    Ok(())
}

/// Maximum number of instructions that the verifier may process for each program.
/// Raise a budget only as a deliberate decision.
const BUDGETS: [(&str, u32); 11] = [
    ("connect4", 40_000),
    ("connect6", 60_000),
    ("getpeername4", 500),
    ("getpeername6", 500),
    ("received", 15_000),
    ("recvmsg4", 2_500),
    ("recvmsg6", 2_500),
    ("sendmsg4", 30_000),
    ("sendmsg6", 40_000),
    ("sock_ops", 24_000),
    ("sock_release", 2_000),
];

#[test]
fn lesson_11_programs_stay_within_their_instruction_budgets() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = two_pods(&bed)?;
    // The packet program is loaded only if a rule counts errors on an HTTP port.
    let outlier = json!({"trafficPolicy": {"outlierDetection": {"consecutive5xxErrors": 1}}});
    directory.write("c1/rule.yaml", &[destination_rule("web", &outlier)])?;
    let _agent = bed.agent(&directory, "c1", "n1")?;
    let (diagnosis, _) = doctor(&bed)?;
    let programs = diagnosis["programs"].as_array().cloned().unwrap_or_default();
    for (name, budget) in BUDGETS {
        let program = programs.iter().find(|program| program["name"] == name);
        let count = program.and_then(|program| program["verifiedInstructions"].as_u64());
        let count = count.unwrap_or_else(|| panic!("no instruction count of {name} in {diagnosis:#}"));
        println!("verified program {name} {count} of {budget}");
        assert!(count <= budget.into(), "{name}: {count} instructions, budget {budget}");
    }
    assert_eq!(programs.len(), BUDGETS.len());
    Ok(())
}

#[test]
fn lesson_12_frontend_that_does_not_fit_is_refused_and_reported_until_there_is_room() -> Result<()> {
    let bed = TestBed::new()?;
    let directory = two_pods(&bed)?;
    // `web` has two backends, `dns` the same two on another port, and the self-probe one for each address family: one
    // entry is free.
    let own = 4 + 1 + u64::from(std::net::TcpListener::bind("[::1]:0").is_ok());
    let most = (own + 1).to_string();
    let sizes = ["--max-backends", &most, "--max-frontends", "16", "--max-slots", "64"];
    let mut agent = bed.agent_with(&directory, "c1", "n1", &sizes)?;
    assert_eq!(metric(&agent, "portolan_map_entries{map=\"backends\"}")?, own);
    assert_eq!(metric(&agent, "portolan_map_capacity{map=\"backends\"}")?, own + 1);
    let mut client = bed.dialer()?;
    for i in 3..=4 {
        bed.namespace.add_address(&format!("10.0.0.{i}/32"))?;
        bed.serve(&format!("10.0.0.{i}:9080"), "more")?;
    }
    let more = [("10.0.0.3", "n1", ""), ("10.0.0.4", "n1", "")];
    directory.write("c1/more.yaml", &[service("more", &["172.16.0.30"], 80), slice("more", 9080, &more)])?;
    directory.write("c1/one.yaml", &[service("one", &["172.16.0.31"], 80), slice("one", 9080, &more[..1])])?;
    wait_until("the finding", BOUND, || {
        let findings = agent.get("services")?["findings"].to_string();
        ensure!(findings.contains("PTL0090") && findings.contains("172.16.0.30:80"), "{findings}");
        Ok(())
    })?;
    // Only that frontend refuses, instead of bypassing Portolan. All others work, including the new one that fits.
    assert_eq!(client.dial("172.16.0.30:80", 2)?.errnos(), [ECONNREFUSED; 2]);
    assert_eq!(client.dial("172.16.0.31:80", 2)?.greetings(), ["more"; 2]);
    assert_eq!(client.dial(WEB, 4)?.count("pod1"), 2);
    assert_eq!(metric(&agent, "portolan_map_entries{map=\"backends\"}")?, own + 1);
    // An agent with larger maps takes over without failed connections.
    let mut load = bed.dialer()?;
    load.begin(&Task::Load { to: WEB.parse()? })?;
    agent.process.kill();
    let agent = bed.agent_with(&directory, "c1", "n1", &["--max-backends", "100"])?;
    assert_eq!(client.dial("172.16.0.30:80", 2)?.greetings(), ["more"; 2]);
    let reply = load.run(&Task::Stop)?;
    assert!(reply.bad == 0 && reply.good > 0, "{} failed, {} succeeded", reply.bad, reply.good);
    assert_eq!(metric(&agent, "portolan_map_capacity{map=\"backends\"}")?, 100);
    // An agent whose maps are too small does not take over: the previous maps stay in use.
    drop(agent);
    let agent = bed.start_with(&directory, "c1", "n1", &["--max-backends", "3"])?;
    wait_until("the agent to report what is missing", BOUND, || {
        let (status, why) = agent.http("/readyz")?;
        ensure!(status == 503 && why.contains("no room"), "{status} {why}");
        Ok(())
    })?;
    assert_eq!(client.dial("172.16.0.30:80", 2)?.greetings(), ["more"; 2]);
    assert_eq!(client.dial(WEB, 4)?.count("pod1"), 2);
    Ok(())
}
