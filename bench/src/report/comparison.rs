//! Compares the figures of a run with those of an earlier report.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::Report;
use crate::{
    connections::{DIRECT, DIRECT_IN_TURN},
    figures::Median,
};

/// A figure with a name that is the same in every report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) better: Better,
    pub(crate) value: Median,
}

/// Which of two values is the better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    Lower,
    Higher,
}

/// How a figure has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Change {
    Worse,
    Better,
    /// The confidence intervals overlap, or a figure has none.
    Noise,
}

/// A figure that both reports have.
#[derive(Clone, Debug)]
pub(crate) struct Compared {
    pub(crate) name: String,
    pub(crate) before: Median,
    pub(crate) now: Median,
    pub(crate) change: Change,
}

/// What [`Baseline::read`] needs of an earlier `report.json`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Baseline {
    machine: BaselineMachine,
    quick: bool,
    figures: Vec<Figure>,
}

#[derive(Clone, Debug, Deserialize)]
struct BaselineMachine {
    kernel: String,
    processor: String,
}

impl Baseline {
    /// Reads an earlier report.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let baseline: Self = serde_json::from_str(&text).with_context(|| {
            format!(
                "{} has no figures that can be compared: pass the report.json of a run of this version or a later one",
                path.display()
            )
        })?;
        anyhow::ensure!(!baseline.quick, "{} is a smoke run (--quick), whose figures mean nothing", path.display());
        Ok(baseline)
    }

    /// Compares what both reports have; what has changed comes first.
    pub(crate) fn compare(&self, now: &[Figure]) -> Vec<Compared> {
        let one = |figure: &Figure| {
            let before = self.figures.iter().find(|before| before.name == figure.name)?.value;
            let change = change(before, figure.value, figure.better);
            Some(Compared { name: figure.name.clone(), before, now: figure.value, change })
        };
        let mut all: Vec<Compared> = now.iter().filter_map(one).collect();
        all.sort_by_key(|compared| compared.change);
        all
    }

    /// Returns the names of figures that only one of the reports has.
    pub(crate) fn only_in_one(&self, now: &[Figure]) -> Vec<String> {
        let is_in = |figures: &[Figure], name: &str| figures.iter().any(|figure| figure.name == name);
        let gone = self.figures.iter().filter(|figure| !is_in(now, &figure.name));
        let fresh = now.iter().filter(|figure| !is_in(&self.figures, &figure.name));
        gone.chain(fresh).map(|figure| figure.name.clone()).collect()
    }

    /// Returns why the figures may differ for other reasons than the code, if there is such a reason.
    pub(crate) fn caveat(&self, kernel: &str, processor: &str) -> Option<String> {
        (self.machine.kernel != kernel || self.machine.processor != processor).then(|| {
            format!(
                "The earlier report is from another machine or kernel ({}, {}), so times differ for that reason alone.",
                self.machine.kernel, self.machine.processor
            )
        })
    }
}

/// A change counts only if the confidence intervals have nothing in common.
fn change(before: Median, now: Median, better: Better) -> Change {
    let (Some((low_before, high_before)), Some((low_now, high_now))) = (before.interval, now.interval) else {
        return Change::Noise;
    };
    let (is_lower, is_higher) = (high_now < low_before, low_now > high_before);
    match better {
        Better::Lower if is_lower => Change::Better,
        Better::Lower if is_higher => Change::Worse,
        Better::Higher if is_higher => Change::Better,
        Better::Higher if is_lower => Change::Worse,
        _ => Change::Noise,
    }
}

impl Change {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Worse => "worse",
            Self::Better => "better",
            Self::Noise => "noise",
        }
    }
}

impl Report {
    /// Returns all figures that have confidence intervals, by name.
    ///
    /// Where an arm has a ratio to the direct one, it stands for the time: it depends less on the machine's load.
    pub(super) fn comparable(&self) -> Vec<Figure> {
        let mut all = Vec::new();
        let mut add = |name: String, better: Better, value: Median| {
            // JSON has no infinity.
            let bounds = value.interval.map_or([value.median; 2], |(low, high)| [low, high]);
            let is_finite = value.median.is_finite() && bounds.into_iter().all(f64::is_finite);
            all.extend(is_finite.then_some(Figure { name, better, value }));
        };
        for arm in self.arms.iter().filter(|arm| arm.name != DIRECT && arm.name != DIRECT_IN_TURN) {
            let baseline = if arm.is_in_turn() { DIRECT_IN_TURN } else { DIRECT };
            for (measure, ratio) in &arm.ratios {
                let better = if measure.contains("per second") { Better::Higher } else { Better::Lower };
                add(format!("{}: {measure} / {baseline}", arm.name), better, *ratio);
            }
        }
        for (name, ratio) in self.agents.iter().flat_map(|agent| self.added_beside_dnat(agent.services)) {
            add(name, Better::Lower, ratio);
        }
        for row in &self.kernel {
            let name = |what: &str| {
                format!("{what}, {} services, {} endpoints, {} threads", row.services, row.endpoints, row.threads)
            };
            add(name("connect4 / floor, hit"), Better::Lower, row.hit_to_floor);
            add(name("connect4 / floor, miss"), Better::Lower, row.miss_to_floor);
            add(name("all hooks, ns"), Better::Lower, row.connection);
            add(name("all hooks on one CPU, ns"), Better::Lower, row.connection_on_one_cpu);
        }
        for way in &self.ways {
            add(format!("{}: {}, ns", way.what, way.hook), Better::Lower, way.call);
            add(format!("{}: all hooks, ns", way.what), Better::Lower, way.all);
        }
        for one in &self.reaction {
            let name = |what: &str| format!("{}, {:?}: {what}", one.who, one.death);
            add(name("failed requests"), Better::Lower, one.failed);
            add(name("last failure, ms"), Better::Lower, one.last);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn median(low: f64, high: f64) -> Median {
        Median { median: (low + high) / 2.0, interval: Some((low, high)) }
    }

    #[test]
    fn only_separate_intervals_are_a_change() {
        let (before, overlapping, lower) = (median(10.0, 12.0), median(8.0, 10.0), median(7.0, 9.0));
        assert_eq!(change(before, overlapping, Better::Lower), Change::Noise);
        assert_eq!(change(before, lower, Better::Lower), Change::Better);
        assert_eq!(change(lower, before, Better::Lower), Change::Worse);
        assert_eq!(change(before, lower, Better::Higher), Change::Worse);
        assert_eq!(change(lower, before, Better::Higher), Change::Better);
        assert_eq!(change(before, Median { median: 1.0, interval: None }, Better::Lower), Change::Noise);
    }

    #[test]
    fn figures_are_compared_by_name_and_changes_come_first() {
        let figure = |name: &str, value| Figure { name: name.to_owned(), better: Better::Lower, value };
        let baseline = Baseline {
            machine: BaselineMachine { kernel: "6.1".to_owned(), processor: "a".to_owned() },
            quick: false,
            figures: vec![
                figure("same", median(1.0, 2.0)),
                figure("slower", median(1.0, 2.0)),
                figure("gone", median(1.0, 2.0)),
            ],
        };
        let now =
            [figure("new", median(1.0, 2.0)), figure("same", median(1.5, 2.5)), figure("slower", median(3.0, 4.0))];
        let compared = baseline.compare(&now);
        let seen: Vec<_> = compared.iter().map(|one| (one.name.as_str(), one.change)).collect();
        assert_eq!(seen, [("slower", Change::Worse), ("same", Change::Noise)]);
        assert_eq!(baseline.only_in_one(&now), ["gone", "new"]);
        assert!(baseline.caveat("6.1", "a").is_none());
        assert!(baseline.caveat("6.12", "a").is_some());
    }
}
