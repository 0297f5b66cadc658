//! The sections of the report: which figures each table has, and what they mean.

use anyhow::Result;

use super::{
    Report, Section,
    budgets::Budget,
    charts,
    comparison::{Change, Compared},
    of_median, with_interval, words,
};
use crate::{
    agents::AgentCost,
    api::OnApi,
    connections::PACE,
    failing::Failing,
    figures::{Arm, Median},
    files::Verb,
    kernel::{InKernel, Program},
    paths::{LIST, Load, OTHER, Way},
    reaction::{Away, RATE, REFUSED_RATE, Reaction},
    tables::Built,
};

impl Report {
    pub(super) fn sections(&self) -> Result<Vec<Section>> {
        let mut all = vec![self.section_of_budgets()];
        all.extend(self.section_of_comparison());
        if !self.arms.is_empty() {
            all.extend([self.section_of_connects()?, self.section_of_requests(), self.section_of_services()?]);
            all.extend([self.section_of_agents(), self.section_of_programs()]);
        }
        all.extend((!self.kernel.is_empty()).then(|| self.section_of_kernel()));
        all.extend((!self.ways.is_empty()).then(|| self.section_of_ways()));
        all.extend((!self.loads.is_empty()).then(|| self.section_of_loads()));
        all.extend((!self.tables.is_empty()).then(|| self.section_of_tables()));
        all.extend(self.on_api.as_ref().map(section_of_api));
        if !self.reaction.is_empty() {
            all.push(self.section_of_reaction()?);
        }
        all.extend(self.failing.as_ref().map(section_of_failing));
        all.extend((!self.away.is_empty()).then(|| self.section_of_away()));
        all.extend((!self.files.is_empty()).then(|| self.section_of_files()));
        Ok(all)
    }

    fn section_of_budgets(&self) -> Section {
        let row = |budget: &Budget| {
            vec![budget.what.clone(), budget.goal.clone(), budget.measured.clone(), budget.verdict.as_str().to_owned()]
        };
        Section {
            title: "Budgets",
            about: String::new(),
            header: words(&["budget", "goal", "measured", "result"]),
            rows: self.budgets.iter().map(row).collect(),
            charts: Vec::new(),
        }
    }

    /// Returns the comparison with an earlier report, if there is one.
    pub(super) fn section_of_comparison(&self) -> Option<Section> {
        let baseline = self.baseline.as_ref()?;
        let compared = baseline.compare(&self.figures);
        let count = |change| compared.iter().filter(|one| one.change == change).count();
        let mut about = format!(
            "{} better, {} worse, {} within the noise: a change counts if the confidence intervals of both reports have \
             nothing in common. The intervals are those of the rounds of one run, in which the maps are in the same places; \
             another run of the same code may differ by more, so repeat it before you believe a small change.",
            count(Change::Better),
            count(Change::Worse),
            count(Change::Noise)
        );
        let only = baseline.only_in_one(&self.figures);
        if !only.is_empty() {
            about += &format!(" Only one of the reports has these {}: {}.", only.len(), only.join("; "));
        }
        if let Some(caveat) = baseline.caveat(&self.machine.kernel, &self.machine.processor) {
            about += &format!(" {caveat}");
        }
        let row = |one: &Compared| {
            let value = |median: Median| of_median(median, if median.median < 100.0 { 3 } else { 0 });
            vec![one.change.as_str().to_owned(), one.name.clone(), value(one.before), value(one.now)]
        };
        Some(Section {
            title: "Compared with the earlier report",
            about,
            header: words(&["", "figure", "before", "now"]),
            rows: compared.iter().map(row).collect(),
            charts: Vec::new(),
        })
    }

    fn section_of_connects(&self) -> Result<Section> {
        let micros = |arm: &Arm, measure: &str| {
            arm.figure(measure).map_or_else(|| "–".to_owned(), |ns| format!("{:.2}", ns / 1e3))
        };
        let row = |arm: &Arm| {
            if let Some(why) = &arm.missing {
                return [vec![arm.name.clone(), format!("did not run: {why}")], vec![String::new(); 9]].concat();
            }
            let mut row = vec![arm.name.clone(), arm.about.clone()];
            row.extend(
                ["connect p50", "connect p90", "connect p99", "connect p99.9"].map(|measure| micros(arm, measure)),
            );
            row.push(arm.ratios.get("connect p50").map_or_else(|| "–".to_owned(), |ratio| with_interval(*ratio)));
            row.push(arm.figure("connects per second").map_or_else(|| "–".to_owned(), |rate| format!("{rate:.0}")));
            row.extend(
                ["paced connect p50", "paced connect p99", "paced connect p99.9"].map(|measure| micros(arm, measure)),
            );
            row
        };
        let bars = self.arms.iter().filter_map(|arm| Some((arm.name.clone(), arm.figure("connect p50")? / 1e3)));
        let chart = charts::bars("connect(), p50, µs", &bars.collect::<Vec<_>>())?;
        let about = format!(
            "Time of connect(), in µs, to a listener that does not accept, so no process wakes up. \
             Paced: {PACE:.0} connects per second, started on schedule, each timed from its scheduled start. \
             Proxies accept every connect, so they are compared by requests below."
        );
        Ok(Section {
            title: "connect()",
            about,
            header: words(&[
                "arm",
                "",
                "p50",
                "p90",
                "p99",
                "p99.9",
                "p50 / direct",
                "per second",
                "paced p50",
                "paced p99",
                "paced p99.9",
            ]),
            rows: self.arms.iter().map(row).collect(),
            charts: vec![("connect", chart)],
        })
    }

    fn section_of_requests(&self) -> Section {
        let measures: [(&str, f64, usize); 8] = [
            ("requests per second", 1.0, 0),
            ("request p50", 1e3, 2),
            ("request p99", 1e3, 2),
            ("processor time per request", 1e3, 2),
            ("round trip p50", 1e3, 2),
            ("MiB per second", 1.0, 0),
            ("datagrams per second", 1.0, 0),
            ("connected datagram p50", 1e3, 2),
        ];
        let row = |arm: &Arm| {
            let figures = measures.map(|(measure, unit, digits)| {
                arm.figure(measure).map_or_else(|| "–".to_owned(), |figure| format!("{:.digits$}", figure / unit))
            });
            let bulk = ["round trip p50", "MiB per second"]
                .map(|measure| arm.ratios.get(measure).map_or_else(|| "–".to_owned(), |ratio| with_interval(*ratio)));
            [vec![arm.name.clone()], figures.to_vec(), bulk.to_vec()].concat()
        };
        let mut header = vec!["arm".to_owned()];
        header.extend(
            measures.map(|(measure, unit, _)| if unit > 1.0 { format!("{measure}, µs") } else { measure.to_owned() }),
        );
        header.extend(words(&["round trip / direct", "MiB per second / direct"]));
        Section {
            title: "Requests, round trips and datagrams",
            about: "Per request: connect, one byte there, one byte back, close; sequentially, from one client. \
                    Processor time is user and system time of client, server and proxy. \
                    Round trips and bulk use one open connection. \
                    Datagrams use one socket; connected datagrams use a new socket each."
                .to_owned(),
            header,
            rows: self.arms.iter().filter(|arm| arm.missing.is_none()).map(row).collect(),
            charts: Vec::new(),
        }
    }

    fn section_of_services(&self) -> Result<Section> {
        let kinds = ["hit", "miss", "nftables", "iptables"];
        let of = |kind: &str, measure: &str| -> Vec<(f64, f64)> {
            let own = self.arms.iter().filter(|arm| arm.name.split(',').next() == Some(kind));
            own.filter_map(|arm| Some((f64::from(arm.services?), arm.figure(measure)? / 1e3))).collect()
        };
        let mut rows = Vec::new();
        for kind in kinds {
            let p99 = of(kind, "connect p99");
            for ((services, p50), (_, p99)) in of(kind, "connect p50").into_iter().zip(p99) {
                rows.push(vec![kind.to_owned(), format!("{services:.0}"), format!("{p50:.2}"), format!("{p99:.2}")]);
            }
        }
        let lines: Vec<(&str, Vec<(f64, f64)>)> = kinds
            .into_iter()
            .map(|kind| (kind, of(kind, "connect p50")))
            .filter(|(_, line)| !line.is_empty())
            .collect();
        Ok(Section {
            title: "connect() by number of services",
            about: "Times in µs. Clients always dial the same Service, one of many. It has ten endpoints in all arms. \
                    The other Services have ten endpoints each for Portolan, and two each in the DNAT rules. \
                    The DNAT rules are those of kube-proxy that a connection from the node to a cluster IP traverses. \
                    They leave out node ports, external and load balancer IPs, and the firewall of the filter table, \
                    which would make DNAT slower."
                .to_owned(),
            header: words(&["", "services", "p50", "p99"]),
            rows,
            charts: vec![("services", charts::lines("connect(), p50, µs, by number of services", &lines)?)],
        })
    }

    fn section_of_agents(&self) -> Section {
        let row = |agent: &AgentCost| {
            vec![
                agent.services.to_string(),
                agent.endpoints.to_string(),
                format!("{:.2}", agent.ready),
                format!("{:.1}", agent.mib),
                format!("{:.1}", agent.maps_mib),
                format!("{:.2}", agent.idle * 100.0),
            ]
        };
        Section {
            title: "The agent",
            about: "An agent process that reads its objects from files: \
                    seconds from start to ready (mostly parsing YAML), its anonymous memory, \
                    the kernel memory of its maps (allocated at start), and its CPU use while nothing changes."
                .to_owned(),
            header: words(&["services", "endpoints", "ready, s", "memory, MiB", "maps, MiB", "idle CPU, %"]),
            rows: self.agents.iter().map(row).collect(),
            charts: Vec::new(),
        }
    }

    fn section_of_programs(&self) -> Section {
        let row = |row: &Program| vec![row.program.to_owned(), row.runs.to_string(), format!("{:.0}", row.mean)];
        Section {
            title: "Program run time, per program",
            about: "Mean time per run in ns, from the kernel's statistics, including the time that these take. \
                    The load is requests, datagrams from one socket and datagrams from a new socket each, \
                    in equal numbers, sequentially, to one Service."
                .to_owned(),
            header: words(&["program", "runs", "ns"]),
            rows: self.programs.iter().map(row).collect(),
            charts: Vec::new(),
        }
    }

    fn section_of_kernel(&self) -> Section {
        let row = |row: &InKernel| {
            let connect4 = [row.hit, row.floor_hit, row.miss, row.floor_miss];
            let hooks = [row.connection, row.connection_on_one_cpu];
            let mut figures: Vec<_> = connect4.into_iter().chain(hooks).map(|ns| of_median(ns, 0)).collect();
            let gross = row.connection_on_one_cpu.median + row.connection_runs.median * row.nothing.median;
            figures.extend([of_median(row.connection_runs, 1), format!("{gross:.0}"), of_median(row.nothing, 0)]);
            [vec![row.services.to_string(), row.endpoints.to_string(), row.threads.to_string()], figures].concat()
        };
        Section {
            title: "Program run time, by number of services",
            about: "Time per run in ns, from the kernel's statistics (bpf_stats), as the median of interleaved rounds. \
                    All Services are dialed in turn. Threads that dial the same Service share its cursor. \
                    The floor is a minimal program: one hash lookup, one array read, the rewrite, no state. \
                    `all hooks` is the sum over connect4, sock_ops and sock_release for one connection with one request and its answer; \
                    the client and the server are on different CPUs, which move the cache lines that the programs write, or on one. \
                    The statistics themselves take as long as the empty program for each run. The other figures are net of that; \
                    the gross one includes it."
                .to_owned(),
            header: words(&[
                "services",
                "endpoints",
                "threads",
                "connect4, hit",
                "floor, hit",
                "connect4, miss",
                "floor, miss",
                "all hooks, two CPUs",
                "all hooks, one CPU",
                "runs",
                "gross, one CPU",
                "empty program",
            ]),
            rows: self.kernel.iter().map(row).collect(),
            charts: Vec::new(),
        }
    }

    fn section_of_ways(&self) -> Section {
        let of = |what: &str| self.ways.iter().find(|way| way.what == what).map(|way| way.call.median);
        let (list, other) = (of(LIST).unwrap_or(f64::NAN), of(OTHER).unwrap_or(f64::NAN));
        let row = |way: &Way| {
            vec![
                way.what.to_owned(),
                way.hook.to_owned(),
                of_median(way.call, 0),
                format!("{:+.0}", way.call.median - list),
                of_median(way.all, 0),
                of_median(way.runs, 1),
            ]
        };
        Section {
            title: "Program run time, by way through the programs",
            about: format!(
                "Time per run in ns, from the kernel's statistics, without what those take. \
                 A list of endpoints is the common case. \
                 Determining that an address is not that of a Service takes {other:.0} ns; a connect to one takes {list:.0} ns. \
                 `all hooks` also has the programs at later events of the same socket, until it is closed."
            ),
            header: words(&["what is dialed", "program", "ns", "difference from a plain list", "all hooks", "runs"]),
            rows: self.ways.iter().map(row).collect(),
            charts: Vec::new(),
        }
    }

    fn section_of_loads(&self) -> Section {
        let row = |load: &Load| {
            let percent = |part: u64, of: usize| format!("{:.1} %", part as f64 / of.max(1) as f64 * 100.0);
            let in_entries = load.connections as u64 - load.in_storage;
            vec![
                load.connections.to_string(),
                format!("{} %", load.percent),
                percent(in_entries, load.entries as usize),
                percent(load.in_storage, load.connections),
                format!("{} of {}", load.last.1, load.last.0),
                percent(load.last.1, load.last.0),
            ]
        };
        let entries = self.loads.first().map_or(0, |load| load.entries);
        Section {
            title: "Connections without an entry",
            about: format!(
                "Connections that stay open, in a table of {entries} entries. \
                 A connection that finds both of its entries taken has its state in socket storage, \
                 which is as complete, and slower to create. The last connections are the last hundredth of the entries: \
                 with as many open, a further one finds both taken as often."
            ),
            header: words(&[
                "open connections",
                "of the entries",
                "entries in use",
                "in socket storage",
                "of the last connections",
                "share",
            ]),
            rows: self.loads.iter().map(row).collect(),
            charts: Vec::new(),
        }
    }

    fn section_of_tables(&self) -> Section {
        let row = |row: &Built| {
            vec![
                row.services.to_string(),
                row.endpoints.to_string(),
                row.rules.to_string(),
                format!("{:.3}", row.policy),
                format!("{:.3}", row.written),
                format!("{:.3}", row.change[0]),
                format!("{:.3}", row.change[1]),
            ]
        };
        Section {
            title: "From objects to BPF maps",
            about: "Full table from scratch: seconds to compile the policy, \
                    and to lay out its output and write it into empty maps. \
                    Change of one endpoint: milliseconds from the store to the maps."
                .to_owned(),
            header: words(&[
                "services",
                "endpoints",
                "rules",
                "policy, s",
                "written, s",
                "change p50, ms",
                "change p99, ms",
            ]),
            rows: self.tables.iter().map(row).collect(),
            charts: Vec::new(),
        }
    }

    fn section_of_reaction(&self) -> Result<Section> {
        let row = |one: &Reaction| {
            vec![
                format!("{:?}", one.death).to_lowercase(),
                one.who.to_owned(),
                of_median(one.failed, 0),
                of_median(one.last, 1),
                of_median(one.late, 1),
                one.before.to_string(),
            ]
        };
        let bars = self
            .reaction
            .iter()
            .map(|one| (format!("{}, {}", one.who, format!("{:?}", one.death).to_lowercase()), one.last.median));
        let chart = charts::bars("ms from the death to the last failed request", &bars.collect::<Vec<_>>())?;
        Ok(Section {
            title: "Endpoint failure",
            about: format!(
                "One of two endpoints dies under open-loop load: \
                 {REFUSED_RATE:.0} requests per second if it refuses connects, {RATE:.0} if it drops packets. \
                 Both balancers have the same rules: three consecutive failures eject an endpoint, \
                 and the connect timeout is 250 ms. \
                 The table has milliseconds from the death to the start of the last failed request, \
                 and the largest delay of a request behind its schedule."
            ),
            header: words(&[
                "failure",
                "balancer",
                "failed requests",
                "last failure, ms",
                "start delay, ms",
                "failed before",
            ]),
            rows: self.reaction.iter().map(row).collect(),
            charts: vec![("reaction", chart)],
        })
    }

    fn section_of_away(&self) -> Section {
        let row = |away: &Away| vec![away.what.to_owned(), away.requests.to_string(), away.failed.to_string()];
        Section {
            title: "Agent restarts",
            about: format!("The agent restarts over and over, under {RATE:.0} requests per second."),
            header: words(&["the agent is", "requests", "failed"]),
            rows: self.away.iter().map(row).collect(),
            charts: Vec::new(),
        }
    }

    fn section_of_files(&self) -> Section {
        let row = |verb: &Verb| {
            vec![
                format!("portolan {}", verb.verb),
                verb.services.to_string(),
                format!("{:.2}", verb.seconds),
                format!("{:.0}", verb.mib),
            ]
        };
        Section {
            title: "Subcommands that read files",
            about: "Services have ten endpoints each, 100 Services per file. Nearly all time goes into parsing YAML."
                .to_owned(),
            header: words(&["command", "services", "seconds", "peak MiB"]),
            rows: self.files.iter().map(row).collect(),
            charts: Vec::new(),
        }
    }
}

fn section_of_api(on_api: &OnApi) -> Section {
    Section {
        title: "Agent on an API server",
        about: format!(
            "The API server is a stand-in that speaks the real protocol over HTTPS, with lists in pages of 500. \
             Seconds until the agent is ready, and its CPU time until then. \
             Its peak memory, and the anonymous memory of agent and helper once ready. \
             {} changes of one endpoint, each after the previous one is published: \
             milliseconds from the change on the server to its publication by the agent.",
            on_api.changes
        ),
        header: words(&[
            "services",
            "endpoints",
            "ready, s",
            "CPU time, s",
            "peak memory, MiB",
            "memory when ready, MiB",
            "change p50, ms",
            "change p99, ms",
        ]),
        rows: vec![vec![
            on_api.services.to_string(),
            on_api.endpoints.to_string(),
            format!("{:.2}", on_api.ready),
            format!("{:.2}", on_api.spent),
            format!("{:.1}", on_api.mib[0]),
            format!("{:.1}", on_api.mib[1]),
            format!("{:.2}", on_api.change[0]),
            format!("{:.2}", on_api.change[1]),
        ]],
        charts: Vec::new(),
    }
}

fn section_of_failing(failing: &Failing) -> Section {
    let Failing { until, within, single_within, spent, mib, .. } = failing;
    Section {
        title: "Many endpoints fail at once",
        about: format!(
            "{} endpoints of {} in {} Services start to refuse connects at the same moment, \
             while two threads dial all Services in turn as fast as they can. The first failure ejects. \
             Milliseconds until the last one is ejected, which includes the time until it is dialed. \
             p50 and p99 from a failure in the kernel to a published table without the endpoint, \
             as bucket bounds of the agent's histogram. \
             One by one: the same for {} endpoints that fail in sequence beforehand, on an otherwise idle machine.",
            failing.failing, failing.endpoints, failing.services, failing.single
        ),
        header: words(&[
            "all ejected, ms",
            "connections",
            "failed",
            "ejected within, p50, ms",
            "p99, ms",
            "one by one, p50, ms",
            "p99, ms",
            "agent CPU time, s",
            "agent memory, MiB",
        ]),
        rows: vec![vec![
            format!("{until:.0}"),
            failing.connections.to_string(),
            failing.failed.to_string(),
            format!("{:.1}", within[0]),
            format!("{:.1}", within[1]),
            format!("{:.1}", single_within[0]),
            format!("{:.1}", single_within[1]),
            format!("{spent:.2}"),
            format!("{:.1}, then {:.1}", mib[0], mib[1]),
        ]],
        charts: Vec::new(),
    }
}
