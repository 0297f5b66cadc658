//! The benchmark's report, as JSON, Markdown and HTML.

mod budgets;
mod charts;
mod comparison;
mod page;
mod sections;

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use serde::Serialize;

pub(crate) use self::comparison::Baseline;
use self::{
    budgets::Budget,
    comparison::{Change, Figure},
};
use crate::{
    agents::AgentCost,
    api::OnApi,
    failing::Failing,
    figures::{Arm, Median},
    files::Verb,
    kernel::{InKernel, Program},
    machine::Machine,
    paths::{Load, Way},
    reaction::{Away, Reaction},
    tables::Built,
};

/// All figures of a run; serialized as `report.json`.
#[derive(Serialize)]
pub(crate) struct Report {
    machine: Machine,
    /// Whether this is a smoke run (`--quick`), whose figures mean nothing.
    quick: bool,
    budgets: Vec<Budget>,
    pub(crate) arms: Vec<Arm>,
    pub(crate) agents: Vec<AgentCost>,
    /// Run times of the programs, in nanoseconds.
    pub(crate) kernel: Vec<InKernel>,
    /// Run time per program, for sequential requests and datagrams to one Service.
    pub(crate) programs: Vec<Program>,
    /// Run time for each way through the programs.
    pub(crate) ways: Vec<Way>,
    /// How often both entries of a connection are taken.
    pub(crate) loads: Vec<Load>,
    pub(crate) tables: Vec<Built>,
    pub(crate) on_api: Option<OnApi>,
    pub(crate) reaction: Vec<Reaction>,
    pub(crate) failing: Option<Failing>,
    pub(crate) away: Vec<Away>,
    pub(crate) files: Vec<Verb>,
    /// What later reports are compared with.
    figures: Vec<Figure>,
    /// An earlier report that this one is compared with.
    #[serde(skip)]
    baseline: Option<Baseline>,
}

/// A section of the report: a table, with an introduction and charts.
struct Section {
    title: &'static str,
    about: String,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
    /// File name without extension, and SVG text.
    charts: Vec<(&'static str, String)>,
}

impl Report {
    pub(crate) fn new(machine: Machine, quick: bool, baseline: Option<Baseline>) -> Self {
        let (budgets, arms, agents, kernel, programs, ways, loads) = Default::default();
        let (tables, on_api, reaction, failing, away, files, figures) = Default::default();
        Self {
            machine,
            quick,
            budgets,
            arms,
            agents,
            kernel,
            programs,
            ways,
            loads,
            tables,
            on_api,
            reaction,
            failing,
            away,
            files,
            figures,
            baseline,
        }
    }

    /// Evaluates the figures so far, and writes the report.
    pub(crate) fn save(&mut self, folder: &Path) -> Result<()> {
        self.judge();
        self.figures = self.comparable();
        self.write(folder)
    }

    /// Returns the names of figures that are missing, not finite or implausible.
    pub(crate) fn not_finite(&self) -> Vec<String> {
        let mut invalid = Vec::new();
        let mut check = |name: String, is: bool| invalid.extend((!is).then_some(name));
        for arm in &self.arms {
            check(arm.name.clone(), may_be_missing(arm) || !arm.figures.is_empty());
            for (measure, figure) in arm.figures.iter().chain(&arm.ratios) {
                check(format!("{}: {measure}", arm.name), figure.is_finite());
            }
        }
        for row in &self.kernel {
            let connect4 = [row.hit, row.miss, row.floor_hit, row.floor_miss];
            let hooks = [row.connection, row.connection_on_one_cpu, row.nothing];
            let mut figures = connect4.iter().chain(&hooks);
            check(format!("in the kernel, {}", row.services), figures.all(|figure| self.is_sound(figure)));
        }
        for way in &self.ways {
            check(way.what.to_owned(), [way.call, way.all].iter().all(|figure| self.is_sound(figure)));
        }
        for load in &self.loads {
            check(format!("{} % of the entries", load.percent), load.in_storage < load.connections as u64);
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
        invalid
    }

    /// Returns whether a figure without the time of the statistics can be right: in the few calls of a smoke run, they may
    /// take longer than what they measure.
    fn is_sound(&self, figure: &Median) -> bool {
        figure.is_finite() && (self.quick || figure.median > 0.0)
    }

    /// Writes the report and its charts into a directory, in all formats.
    fn write(&self, folder: &Path) -> Result<()> {
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

    /// Returns the summary for the terminal: all budgets.
    pub(crate) fn text(&self) -> String {
        let line = |budget: &Budget| {
            format!("  {:<14}  {}: {} (goal {})\n", budget.verdict.as_str(), budget.what, budget.measured, budget.goal)
        };
        let mut text = format!("\nbudgets:\n{}", self.budgets.iter().map(line).collect::<String>());
        if let Some(compared) = self.section_of_comparison() {
            text += &format!("\n{}\n", compared.about);
            for row in compared.rows.iter().filter(|row| row[0] != Change::Noise.as_str()) {
                text += &format!("  {:<6}  {}: {} before, {} now\n", row[0], row[1], row[2], row[3]);
            }
        }
        text
    }

    fn heading(&self) -> Vec<String> {
        let machine = &self.machine;
        let pairs = |pairs: &[(String, String)]| {
            pairs.iter().map(|(name, value)| format!("{name}: {value}")).collect::<Vec<_>>().join("; ")
        };
        let mut lines = vec![
            format!(
                "Kernel {}, {}, {} CPUs, {:.0} GiB; load at start: {}.",
                machine.kernel, machine.processor, machine.processors, machine.memory_gib, machine.load
            ),
            format!("Versions: {}.", pairs(&machine.versions)),
            format!("Mitigations: {}.", pairs(&machine.mitigations)),
            "Medians over rounds, with 95 % confidence intervals. Ratios compare arms of the same round. \
             Client and server are each pinned to a CPU."
                .to_owned(),
        ];
        if self.quick {
            lines.insert(0, "Smoke run: these figures mean nothing.".to_owned());
        }
        lines
    }
}

/// Returns whether an arm may be missing: not every machine has IPVS or Envoy.
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
