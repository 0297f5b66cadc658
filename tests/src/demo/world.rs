//! Two linked clusters, and a client in front of them.
//!
//! Each cluster is a network namespace with its own pods, gateway, and agent.

use std::{
    io::Read as _,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::pages::Pages;
use crate::{
    Agent, Api, Directory, Namespace, Process, ProcessContext, TestBed, binary, link,
    objects::{node, pod, service, slice},
    unique, wait_until,
};

/// Time limit for any change to take effect.
const BOUND: Duration = Duration::from_secs(30);
const PORT: u16 = 9080;
/// The services of Bookinfo, with the last byte of their Service addresses.
const SERVICES: [(&str, u8); 4] = [("productpage", 10), ("details", 20), ("reviews", 30), ("ratings", 40)];

/// The ID and the locality of a cluster.
pub(super) struct Plan {
    pub(super) id: &'static str,
    pub(super) region: &'static str,
    pub(super) zone: &'static str,
}

struct Cluster {
    plan: Plan,
    // Declared before the bed, so that the processes exit before their cgroup is removed.
    pods: Vec<Pod>,
    gateway: Option<Process>,
    agent: Agent,
    bed: TestBed,
    index: usize,
    /// The cluster's API server; `None` if the agents read files.
    api: Option<Api>,
}

struct Pod {
    service: &'static str,
    version: &'static str,
    name: String,
    address: String,
    /// The fault that the pod's process simulates (`--sick`); `None` if it is healthy.
    sick: Option<&'static str>,
    process: Option<Process>,
}

pub(super) struct World {
    clusters: Vec<Cluster>,
    client: Namespace,
    directory: Directory,
    extra_services: Vec<(&'static str, u8)>,
    made: u8,
}

impl World {
    /// Creates two clusters without pods, with the Services of Bookinfo and `extra` ones (name, last address byte).
    ///
    /// Agents read files, or, with `kubernetes`, one API server per cluster, which has a Secret for the other one.
    pub(super) fn new(plans: [Plan; 2], extra: &[(&'static str, u8)], kubernetes: bool) -> Result<Self> {
        let directory = Directory::new()?;
        let client = Namespace::new(unique("client"))?;
        let beds = [TestBed::named(plans[0].id)?, TestBed::named(plans[1].id)?];
        join(&beds, &client)?;
        let mut clusters = Vec::new();
        for (index, (plan, bed)) in plans.into_iter().zip(beds).enumerate() {
            write_cluster(&directory, index, &plan, extra)?;
            clusters.push((index, plan, bed));
        }
        let mut world = Self { clusters: Vec::new(), client, directory, extra_services: extra.to_vec(), made: 0 };
        let mut apis = if kubernetes { vec![Some(Api::new()?), Some(Api::new()?)] } else { vec![None, None] };
        for (at, other) in [(0, 1), (1, 0)] {
            if let Some(api) = &mut apis[other] {
                let secret = api.secret(&clusters[at].2.namespace, clusters[other].1.id)?;
                apis[at].iter().for_each(|api| api.apply(std::slice::from_ref(&secret)));
            }
        }
        for (index, plan, bed) in clusters {
            let (mut api, node) = (apis[index].take(), node_name(&plan));
            let agent = match &mut api {
                Some(api) => bed.agent_on_api(&api.reach(&bed.namespace)?, plan.id, &node, &[])?,
                None => bed.agent(&world.directory, plan.id, &node)?,
            };
            world.clusters.push(Cluster { plan, pods: Vec::new(), gateway: None, agent, bed, index, api });
            world.start_gateway(index)?;
        }
        world.publish()?;
        Ok(world)
    }

    /// Copies the objects in the files to the API servers: to each one those of its own cluster and the mesh-wide ones.
    fn publish(&self) -> Result<()> {
        for cluster in &self.clusters {
            let Some(api) = &cluster.api else { continue };
            let mut objects = self.directory.objects("")?;
            objects.extend(self.directory.objects(cluster.plan.id)?);
            api.replace(&objects);
        }
        Ok(())
    }

    /// Scales a deployment: starts or kills processes, and updates the EndpointSlice.
    pub(super) fn scale(
        &mut self,
        cluster: usize,
        service: &'static str,
        version: &'static str,
        replicas: usize,
    ) -> Result<()> {
        let is_of = |pod: &Pod| pod.service == service && pod.version == version;
        while self.clusters[cluster].pods.iter().filter(|pod| is_of(pod)).count() > replicas {
            let last = self.clusters[cluster].pods.iter().rposition(is_of).unwrap_or_default();
            self.clusters[cluster].pods.remove(last);
        }
        while self.clusters[cluster].pods.iter().filter(|pod| is_of(pod)).count() < replicas {
            self.made += 1;
            let address = format!("10.{cluster}.0.{}", self.made);
            self.clusters[cluster].bed.namespace.add_address(&format!("{address}/32"))?;
            let name = format!("{service}-{version}-{}-{}", self.clusters[cluster].plan.id, self.made);
            self.clusters[cluster].pods.push(Pod { service, version, name, address, sick: None, process: None });
            let pod = self.clusters[cluster].pods.len() - 1;
            self.start(cluster, pod)?;
        }
        self.clusters[cluster].write_endpoints(&self.directory)?;
        self.publish()
    }

    /// Kills the processes of a deployment. Its endpoints stay listed, and refuse connections.
    pub(super) fn kill(&mut self, cluster: usize, service: &str) {
        for pod in self.clusters[cluster].pods.iter_mut().filter(|pod| pod.service == service) {
            pod.process = None;
        }
    }

    /// Restarts the first `count` killed processes of a deployment.
    pub(super) fn revive(&mut self, cluster: usize, service: &str, count: usize) -> Result<()> {
        let dead = |pod: &Pod| pod.service == service && pod.process.is_none();
        let pods: Vec<usize> =
            (0..self.clusters[cluster].pods.len()).filter(|&i| dead(&self.clusters[cluster].pods[i])).collect();
        pods.into_iter().take(count).try_for_each(|pod| self.start(cluster, pod))
    }

    /// Restarts the processes of a deployment with a simulated fault.
    pub(super) fn make_sick(&mut self, cluster: usize, service: &str, how: &'static str) -> Result<()> {
        self.kill(cluster, service);
        for pod in self.clusters[cluster].pods.iter_mut().filter(|pod| pod.service == service) {
            pod.sick = Some(how);
        }
        self.revive(cluster, service, usize::MAX)
    }

    /// Drops all packets to the pods of a deployment, or stops dropping them. Its endpoints stay listed.
    pub(super) fn swallow(&self, cluster: usize, service: &str, swallow: bool) -> Result<()> {
        let Cluster { pods, bed, .. } = &self.clusters[cluster];
        for pod in pods.iter().filter(|pod| pod.service == service) {
            let address = format!("{}/32", pod.address);
            if swallow { bed.namespace.swallow(&address)? } else { bed.namespace.restore(&address)? }
        }
        Ok(())
    }

    fn start(&mut self, cluster: usize, pod: usize) -> Result<()> {
        let Cluster { bed, pods, .. } = &mut self.clusters[cluster];
        let pod = &mut pods[pod];
        let mut command = Command::new(binary("bookinfo")?);
        command.arg(pod.service).args(["--version", pod.version, "--pod", &pod.name]);
        command.args(["--listen", &format!("{}:{PORT}", pod.address)]);
        command.args(pod.sick.into_iter().flat_map(|how| ["--sick", how]));
        for (service, byte) in &SERVICES[1..] {
            command.arg(format!("--{service}")).arg(service_address(cluster, *byte));
        }
        pod.process = Some(Process::spawn(command, bed.place())?);
        let address = format!("{}:{PORT}", pod.address);
        wait_until(&format!("{} to listen", pod.name), BOUND, || {
            bed.namespace.enter(|| std::net::TcpStream::connect(&address).map(drop).context("not yet"))
        })
    }

    /// Starts nginx as the cluster's ingress gateway. It dials Services, once for each request.
    fn start_gateway(&mut self, cluster: usize) -> Result<()> {
        let address = gateway_address(cluster);
        let Cluster { bed, gateway, plan, .. } = &mut self.clusters[cluster];
        bed.namespace.add_address(&format!("{address}/32"))?;
        let mut locations =
            format!("location = /productpage {{ proxy_pass http://{}; }}\n", service_address(cluster, SERVICES[0].1));
        for (i, (_, byte)) in self.extra_services.iter().enumerate() {
            let service = service_address(cluster, *byte);
            // Rewrite the path, as the scenario's VirtualService does.
            locations += &format!("location = /productpage{} {{ proxy_pass http://{service}/productpage; }}\n", i + 1);
        }
        let scratch = self.directory.scratch(&format!("nginx-{}", plan.id));
        std::fs::create_dir(&scratch)?;
        let folder = scratch.display();
        let config = format!(
            "daemon off;\nmaster_process off;\npid {folder}/pid;\nerror_log {folder}/error.log;\nevents {{}}\nhttp {{\n\
             access_log off;\nclient_body_temp_path {folder}/body;\nproxy_temp_path {folder}/proxy;\nfastcgi_temp_path {folder}/fastcgi;\n\
             uwsgi_temp_path {folder}/uwsgi;\nscgi_temp_path {folder}/scgi;\nproxy_next_upstream off;\n\
             server {{\nlisten {address}:80;\n{locations}}}\n}}\n"
        );
        let file = scratch.join("nginx.conf");
        std::fs::write(&file, config)?;
        let mut command = Command::new("nginx");
        command.arg("-c").arg(&file).arg("-e").arg(scratch.join("error.log")).stderr(Stdio::null());
        *gateway = Some(Process::spawn(command, bed.place()).context("nginx (Debian: nginx-light)")?);
        wait_until("nginx to listen", BOUND, || {
            bed.namespace.enter(|| std::net::TcpStream::connect((address.as_str(), 80)).map(drop).context("not yet"))
        })
    }

    /// Writes mesh-wide objects to a file. An empty list removes the file.
    pub(super) fn apply(&self, file: &str, objects: &[Value]) -> Result<()> {
        if objects.is_empty() {
            self.directory.remove(file)?;
        } else {
            self.directory.write(file, objects)?;
        }
        self.publish()
    }

    /// Waits until every agent has applied the current objects.
    pub(super) fn settle(&self) -> Result<()> {
        for cluster in &self.clusters {
            wait_until(&format!("the agent of {} to apply the change", cluster.plan.id), BOUND, || {
                let (planned, held) = (self.plan(cluster.index, &[])?.0, cluster.agent.get("services")?);
                if cluster.api.is_some() {
                    self.has_read(cluster)?;
                    ensure!(
                        intended(&planned) == intended(&held),
                        "the agent has applied {}, expected {}",
                        intended(&held),
                        intended(&planned)
                    );
                    return Ok(());
                }
                ensure!(
                    planned["config"] == held["config"],
                    "the agent has read {}, expected {}",
                    held["config"],
                    planned["config"]
                );
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Returns an error unless an agent has read the latest version of every API server.
    fn has_read(&self, cluster: &Cluster) -> Result<()> {
        let sources = cluster.agent.get("sources")?;
        for of in &self.clusters {
            let version = of.api.as_ref().map_or(0, Api::version);
            for source in sources["sources"].as_array().into_iter().flatten().filter(|it| it["cluster"] == of.plan.id) {
                let seen = source["version"].as_str().and_then(|seen| seen.parse::<u64>().ok());
                ensure!(seen.is_some_and(|seen| seen >= version), "it has not reached {version}: {source}");
            }
        }
        Ok(())
    }

    /// Runs `portolan plan` for a cluster's node. Returns the report and the exit status.
    pub(super) fn plan(&self, cluster: usize, more: &[&str]) -> Result<(Value, i32)> {
        let plan = &self.clusters[cluster].plan;
        self.directory.plan(plan.id, &node_name(plan), more)
    }

    /// Returns a report of a cluster's agent: `services`, `endpoints`, or `ejections`.
    pub(super) fn get(&self, cluster: usize, what: &str) -> Result<Value> {
        self.clusters[cluster].agent.get(what)
    }

    /// Returns the report of `portolan explain` on a service from a cluster's agent.
    pub(super) fn explain(&self, cluster: usize, service: &str) -> Result<Value> {
        self.clusters[cluster].agent.explain(service)
    }

    /// Returns the events of a cluster's agent, oldest first.
    pub(super) fn events(&self, cluster: usize) -> Result<Vec<Value>> {
        self.clusters[cluster].agent.events()
    }

    /// Returns the kernel's connection counts on a cluster's node for a service, by the endpoints' cluster.
    pub(super) fn connections(&self, cluster: usize, service: &str) -> Result<[u64; 2]> {
        let report = self.get(cluster, "endpoints")?;
        let mut counts = [0; 2];
        for (i, of) in self.clusters.iter().enumerate() {
            let services = report["services"].as_array().into_iter().flatten().filter(|entry| entry["name"] == service);
            let endpoints = services.flat_map(|entry| entry["endpoints"].as_array().into_iter().flatten());
            let own = endpoints.filter(|endpoint| endpoint["cluster"] == of.plan.id);
            counts[i] = own.map(|endpoint| endpoint["kernel"]["connections"].as_u64().unwrap_or_default()).sum();
        }
        Ok(counts)
    }

    /// Fetches `count` pages, one after another, with curl from the client through a cluster's gateway.
    pub(super) fn pages(&self, gateway: usize, path: &str, count: usize) -> Result<Pages> {
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--max-time", "300", "--noproxy", "*"]);
        command.arg(format!("http://{}{path}?n=[1-{count}]", gateway_address(gateway)));
        command.stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut curl =
            Process::spawn(command, ProcessContext { namespace: Some(&self.client), cgroup: None }).context("curl")?;
        let mut text = String::new();
        let mut output = curl.child().stdout.take().context("curl has no output")?;
        output.read_to_string(&mut text)?;
        let status = curl.wait(BOUND)?;
        ensure!(status.success(), "curl exited with {status}");
        Ok(Pages::new(&text))
    }

    /// Returns the programs on a node's cgroup, as `bpftool` lists them.
    pub(super) fn programs(&self, cluster: usize) -> Result<String> {
        let output =
            Command::new("bpftool").args(["cgroup", "tree"]).arg(self.clusters[cluster].bed.cgroup.path()).output()?;
        ensure!(output.status.success(), "bpftool (Debian: bpftool): {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Returns the agents' logs, to print after a failure.
    pub(super) fn logs(&self) -> String {
        let logs = self
            .clusters
            .iter()
            .map(|cluster| format!("log of the agent of {}:\n{}", cluster.plan.id, cluster.agent.log()));
        logs.collect::<Vec<_>>().join("\n")
    }

    /// Prints how to inspect the clusters, and waits for an interrupt.
    pub(super) fn wait_for_visitors(&self) -> ! {
        println!("\nThe clusters keep running. Objects: {}", self.directory.path().display());
        for cluster in &self.clusters {
            let gateway = gateway_address(cluster.index);
            println!(
                "{}: ip netns exec {} curl http://{gateway}/productpage\n  portolan get endpoints --admin {}\n  bpftool cgroup tree {}",
                cluster.plan.id,
                self.client.name(),
                cluster.bed.admin().display(),
                cluster.bed.cgroup.path().display()
            );
        }
        println!("Press Ctrl-C to clean up.");
        loop {
            std::thread::park();
        }
    }
}

impl Cluster {
    fn write_endpoints(&self, directory: &Directory) -> Result<()> {
        let node = node_name(&self.plan);
        let mut objects = Vec::new();
        for (name, _) in SERVICES {
            let pods = self.pods.iter().filter(|pod| pod.service == name);
            let endpoints: Vec<_> = pods.map(|pod| (pod.address.as_str(), node.as_str(), pod.name.as_str())).collect();
            objects.push(slice(name, PORT, &endpoints));
        }
        let labels = |pod: &Pod| json!({"app": pod.service, "version": pod.version, "cluster": self.plan.id});
        objects.extend(self.pods.iter().map(|it| pod(&it.name, &labels(it))));
        directory.write(&format!("{}/endpoints.yaml", self.plan.id), &objects)
    }
}

/// Returns the configuration of services in a report, without the runtime state of their endpoints.
fn intended(report: &Value) -> Value {
    let of =
        |endpoint: &Value| json!([endpoint["address"], endpoint["cluster"], endpoint["priority"], endpoint["weight"]]);
    let services = report["services"].as_array().into_iter().flatten().map(|service| {
        let endpoints: Vec<Value> = service["endpoints"].as_array().into_iter().flatten().map(of).collect();
        json!([
            service["name"],
            service["subset"],
            service["mode"],
            service["clusterLocal"],
            service["extensions"],
            endpoints
        ])
    });
    services.collect()
}

fn write_cluster(directory: &Directory, index: usize, plan: &Plan, extra: &[(&'static str, u8)]) -> Result<()> {
    let mut objects = vec![node(&node_name(plan), &format!("{}/{}", plan.region, plan.zone))];
    for (name, byte) in SERVICES.iter().chain(extra) {
        let address = service_address(index, *byte);
        objects.push(service(name, &[address.split(':').next().unwrap_or_default()], PORT));
    }
    directory.write(&format!("{}/cluster.yaml", plan.id), &objects)
}

/// Links the two clusters' namespaces, and the client's namespace to both. There is no route to the outside.
fn join(beds: &[TestBed; 2], client: &Namespace) -> Result<()> {
    let [first, second] = [&beds[0].namespace, &beds[1].namespace];
    link((first, "second", "192.168.0.1/30"), (second, "first", "192.168.0.2/30"))?;
    link((client, "first", "192.168.1.1/30"), (first, "client", "192.168.1.2/30"))?;
    link((client, "second", "192.168.2.1/30"), (second, "client", "192.168.2.2/30"))?;
    first.ip(&["route", "add", "10.1.0.0/16", "via", "192.168.0.2"])?;
    second.ip(&["route", "add", "10.0.0.0/16", "via", "192.168.0.1"])?;
    client.ip(&["route", "add", "20.0.0.0/16", "via", "192.168.1.2"])?;
    client.ip(&["route", "add", "21.0.0.0/16", "via", "192.168.2.2"])
}

fn node_name(plan: &Plan) -> String {
    format!("{}-node", plan.id)
}

fn service_address(cluster: usize, byte: u8) -> String {
    format!("172.{}.0.{byte}:{PORT}", 16 + cluster)
}

fn gateway_address(cluster: usize) -> String {
    format!("{}.0.0.10", 20 + cluster)
}
