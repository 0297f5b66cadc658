//! What was measured, for people and for machines.

mod budgets;
mod charts;
mod page;

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use serde::Serialize;

use self::budgets::Budget;
use crate::{
    agents::AgentCost,
    api::OnApi,
    connections::PACE,
    failing::Failing,
    figures::{Arm, Median},
    files::Verb,
    kernel::{InKernel, Program},
    machine::Machine,
    reaction::{Away, RATE, REFUSED_RATE, Reaction},
    tables::Built,
};

/// Everything.
#[derive(Serialize)]
pub(crate) struct Report {
    machine: Machine,
    /// Whether it was a smoke run, whose figures say nothing.
    quick: bool,
    budgets: Vec<Budget>,
    pub(crate) arms: Vec<Arm>,
    pub(crate) agents: Vec<AgentCost>,
    /// Nanoseconds.
    pub(crate) kernel: Vec<InKernel>,
    /// On requests and datagrams to one service, one after the other.
    pub(crate) programs: Vec<Program>,
    pub(crate) tables: Vec<Built>,
    pub(crate) on_api: Option<OnApi>,
    pub(crate) reaction: Vec<Reaction>,
    pub(crate) failing: Option<Failing>,
    pub(crate) away: Vec<Away>,
    pub(crate) files: Vec<Verb>,
}

/// A table of the report, with what is to be said of it.
struct Section {
    title: &'static str,
    about: String,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
    /// Its name, and what is drawn.
    charts: Vec<(&'static str, String)>,
}

impl Report {
    pub(crate) fn new(machine: Machine, quick: bool) -> Self {
        let (budgets, arms, agents, kernel, programs) = Default::default();
        let (tables, on_api, reaction, failing, away, files) = Default::default();
        Self { machine, quick, budgets, arms, agents, kernel, programs, tables, on_api, reaction, failing, away, files }
    }

    /// Names of figures that are no numbers.
    pub(crate) fn not_finite(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut check = |name: String, is: bool| wrong.extend((!is).then_some(name));
        for arm in &self.arms {
            check(arm.name.clone(), may_be_missing(arm) || !arm.figures.is_empty());
            for (measure, figure) in arm.figures.iter().chain(&arm.ratios) {
                check(format!("{}: {measure}", arm.name), figure.is_finite());
            }
        }
        for row in &self.kernel {
            let sound = [row.hit, row.miss, row.outcome, row.nothing].iter().all(|it| it.is_finite() && *it > 0.0);
            check(format!("in the kernel, {}", row.services), sound);
        }
        for row in &self.tables {
            let sound =
                [row.policy, row.written, row.change[0], row.change[1]].iter().all(|it| it.is_finite() && *it > 0.0);
            check(format!("tables, {}", row.services), sound);
        }
        for one in &self.reaction {
            check(format!("{}: {:?}", one.who, one.death), one.failed.is_finite() && one.last.is_finite());
        }
        for agent in &self.agents {
            let sound = [agent.ready, agent.mib, agent.maps_mib, agent.idle].iter().all(|it| it.is_finite());
            check(format!("the agent, {}", agent.services), sound && agent.mib > 1.0 && agent.maps_mib > 1.0);
        }
        for program in &self.programs {
            check(program.program.to_owned(), program.runs > 0 && program.mean > 0.0);
        }
        if let Some(on_api) = &self.on_api {
            let figures = [on_api.ready, on_api.spent].into_iter().chain(on_api.mib).chain(on_api.change);
            check("the agent on an API server".to_owned(), figures.into_iter().all(|it| it.is_finite() && it > 0.0));
        }
        if let Some(failing) = &self.failing {
            let times = failing.within.iter().chain(&failing.single_within).all(|time| time.is_finite() && *time > 0.0);
            let sound = failing.until > 0.0 && times && failing.failed >= u64::from(failing.failing);
            check(format!("{} endpoints fail", failing.failing), sound && failing.connections > failing.failed);
        }
        for away in &self.away {
            check(away.what.to_owned(), away.requests > 0);
        }
        for verb in &self.files {
            check(verb.verb.clone(), verb.seconds > 0.0 && verb.mib > 1.0);
        }
        wrong
    }

    /// Writes all forms of it into a folder.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let sections = self.sections()?;
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        write("report.json", &serde_json::to_string_pretty(self)?)?;
        write("report.md", &page::markdown(&self.heading(), &sections))?;
        write("index.html", &page::html(&self.heading(), &sections))?;
        sections
            .iter()
            .flat_map(|section| &section.charts)
            .try_for_each(|(name, svg)| write(&format!("{name}.svg"), svg))
    }

    /// For the terminal: the budgets.
    pub(crate) fn text(&self) -> String {
        let line = |budget: &Budget| {
            format!("  {:<14}  {}: {} (goal {})\n", budget.verdict.as_str(), budget.what, budget.measured, budget.goal)
        };
        format!("\nbudgets:\n{}", self.budgets.iter().map(line).collect::<String>())
    }

    fn heading(&self) -> Vec<String> {
        let machine = &self.machine;
        let pairs = |pairs: &[(String, String)]| {
            pairs.iter().map(|(name, value)| format!("{name}: {value}")).collect::<Vec<_>>().join("; ")
        };
        let mut lines = vec![
            format!("Kernel {}, {}, {} processors, {:.0} GiB; load when it began: {}.", machine.kernel, machine.processor, machine.processors, machine.memory_gib, machine.load),
            format!("Versions: {}.", pairs(&machine.versions)),
            format!("Mitigations: {}.", pairs(&machine.mitigations)),
            "Medians over rounds, with their 95 % intervals; ratios are between arms of the same round. Client and server are pinned to a processor each.".to_owned(),
        ];
        if self.quick {
            lines.insert(0, "A smoke run: these figures say nothing.".to_owned());
        }
        lines
    }

    fn sections(&self) -> Result<Vec<Section>> {
        let mut all = vec![self.section_of_budgets()];
        if !self.arms.is_empty() {
            all.extend([self.section_of_connects()?, self.section_of_requests(), self.section_of_services()?]);
            all.extend([self.section_of_agents(), self.section_of_programs()]);
        }
        all.extend((!self.kernel.is_empty()).then(|| self.section_of_kernel()));
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
            header: words(&["what", "goal", "measured", ""]),
            rows: self.budgets.iter().map(row).collect(),
            charts: Vec::new(),
        }
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
            "connect() to a queue that nobody takes from, so that nobody is woken; µs. Paced: begun {PACE:.0} times a second whatever the ones before take, each timed from when it should have begun. Proxies accept everything: see the requests."
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
            title: "Requests, and what comes after connect()",
            about: "A request is a connection with one byte there and one back; one client, one after the other. Processor time: user and system, of client, server and proxy. Round trips and bulk on one open connection. Datagrams: from one socket; connected: from a socket each.".to_owned(),
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
            about: "µs. Always the same service is dialled, one of so many. It has ten endpoints in all arms; the other services have ten for Portolan, and two in the rules for DNAT. Of kube-proxy's rules those are there that a connection from the node itself goes through on its way to a cluster address; left out are node ports, external and load balancer addresses, and the filter table's firewall, which would cost DNAT more.".to_owned(),
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
            about: "As a process, with the objects in files: seconds until it is ready (most of it reads YAML); memory of its own; memory of the maps in the kernel, which is theirs from the start; part of a processor while nothing changes.".to_owned(),
            header: words(&["services", "endpoints", "ready, s", "memory, MiB", "maps, MiB", "at rest, %"]),
            rows: self.agents.iter().map(row).collect(),
            charts: Vec::new(),
        }
    }

    fn section_of_programs(&self) -> Section {
        let row = |row: &Program| vec![row.program.to_owned(), row.runs.to_string(), format!("{:.0}", row.mean)];
        Section {
            title: "In the kernel, program by program",
            about: "Mean nanoseconds of a run, by the kernel's own count, on as many requests, datagrams from one socket and datagrams from a socket each, one after the other, to one service.".to_owned(),
            header: words(&["program", "runs", "ns"]),
            rows: self.programs.iter().map(row).collect(),
            charts: Vec::new(),
        }
    }

    fn section_of_kernel(&self) -> Section {
        let row = |row: &InKernel| {
            let figures = [row.hit, row.miss, row.outcome, row.nothing].map(|ns| format!("{ns:.0}"));
            [vec![row.services.to_string(), row.endpoints.to_string(), row.threads.to_string()], figures.to_vec()]
                .concat()
        };
        Section {
            title: "In the kernel",
            about: "Mean nanoseconds of a run, by the kernel's own count (bpf_stats), over all services in turn. Threads of one service share its cursor. A program that does nothing shows what the counting takes, which is in all the others.".to_owned(),
            header: words(&["services", "endpoints", "threads", "connect4, hit", "connect4, miss", "sock_ops, an event", "nothing"]),
            rows: self.kernel.iter().map(row).collect(),
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
            title: "From objects to the kernel's maps",
            about: "All services from nothing: seconds for the policy, and for its verdict to be laid out and written into empty maps. One endpoint that changes, from the store to the kernel: milliseconds.".to_owned(),
            header: words(&["services", "endpoints", "rules", "policy, s", "written, s", "change p50, ms", "change p99, ms"]),
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
        let chart = charts::bars("ms from the death to the last request that failed", &bars.collect::<Vec<_>>())?;
        Ok(Section {
            title: "An endpoint dies",
            about: format!(
                "One of two, at {REFUSED_RATE:.0} requests a second where it refuses and {RATE:.0} where it is silent, whatever becomes of the ones before; with the same rules for both: three failures in a row eject it, a connect shall fail after 250 ms. Milliseconds to the beginning of the last request that failed, and by how much requests were begun too late at the most."
            ),
            header: words(&["how", "who", "failed requests", "until the last, ms", "begun late, ms", "failed before"]),
            rows: self.reaction.iter().map(row).collect(),
            charts: vec![("reaction", chart)],
        })
    }

    fn section_of_away(&self) -> Section {
        let row = |away: &Away| vec![away.what.to_owned(), away.requests.to_string(), away.failed.to_string()];
        Section {
            title: "The agent comes and goes",
            about: format!("Again and again, at {RATE:.0} requests a second."),
            header: words(&["it is", "requests", "failed"]),
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
            title: "Verbs that read files",
            about: "Services with ten endpoints each, a hundred to a file. Nearly all of the time reads YAML."
                .to_owned(),
            header: words(&["", "services", "seconds", "MiB at most"]),
            rows: self.files.iter().map(row).collect(),
            charts: Vec::new(),
        }
    }
}

fn section_of_api(on_api: &OnApi) -> Section {
    Section {
        title: "The agent on an API server",
        about: format!(
            "A stand-in for one, which speaks the real protocol over HTTPS, with lists in pages of 500: seconds until the agent is ready, and its processor time until then; its memory at the most, and what it and its helper have after. One endpoint that changes, {} times, each when the one before was published: milliseconds from the server's having it to the running agent's having published it.",
            on_api.changes
        ),
        header: words(&[
            "services",
            "endpoints",
            "ready, s",
            "processor time, s",
            "memory at most, MiB",
            "after, MiB",
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
            "{} endpoints of {} in {} services refuse from one moment on, while two threads dial all services in turn as fast as they can; the first failure ejects. Milliseconds until the last is ejected: each must be dialled before. From a failure in the kernel to the table without the endpoint: the bounds, in the agent's histogram, within which half of them and 99 of 100 are; and the same of {} that are found to fail one after the other before, while the machine has nothing else to do.",
            failing.failing, failing.endpoints, failing.services, failing.single
        ),
        header: words(&[
            "all ejected, ms",
            "connections",
            "failed",
            "ejected within, half, ms",
            "99 %, ms",
            "one by one, half, ms",
            "99 %, ms",
            "agent's processor time, s",
            "its memory, MiB",
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

/// What this machine need not have.
fn may_be_missing(arm: &Arm) -> bool {
    arm.missing.is_some() && ["IPVS", "Envoy"].contains(&arm.name.as_str())
}

fn with_interval(ratio: Median) -> String {
    of_median(ratio, 3)
}

fn of_median(of: Median, digits: usize) -> String {
    match of.interval {
        Some((low, high)) => format!("{:.digits$} ({low:.digits$} to {high:.digits$})", of.median),
        None => format!("{:.digits$}", of.median),
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}
