//! Figures of many rounds: medians, how sure they are, and ratios between arms of the same round.

use std::collections::BTreeMap;

use serde::Serialize;

/// What an arm has measured in one round, by measure.
pub(crate) type Round = BTreeMap<&'static str, f64>;

/// A median with its 95 % interval.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Median {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Median {
    /// Of these values; `None` of nothing. The interval follows from their order (binomial).
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let n = values.len() as f64;
        let at = |position: f64| values.get((position.max(0.0) as usize).min(values.len().saturating_sub(1))).copied();
        let reach = 0.98 * n.sqrt();
        Some(Self { median: percentile(&values, 0.5)?, low: at(n / 2.0 - reach)?, high: at(n / 2.0 + reach)? })
    }

    pub(crate) fn is_finite(&self) -> bool {
        self.median.is_finite() && self.low.is_finite() && self.high.is_finite()
    }
}

/// A percentile of sorted values, `part` between 0 and 1.
pub(crate) fn percentile(sorted: &[f64], part: f64) -> Option<f64> {
    sorted.get((sorted.len().saturating_sub(1) as f64 * part).round() as usize).copied()
}

/// What one arm has measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Arm {
    pub(crate) name: String,
    pub(crate) about: String,
    /// Services in the table, where there is one.
    pub(crate) services: Option<u32>,
    /// Why it did not run.
    pub(crate) missing: Option<String>,
    #[serde(skip)]
    pub(crate) rounds: Vec<Round>,
    pub(crate) figures: BTreeMap<&'static str, Median>,
    /// By measure, to the arm `direct`, round by round.
    pub(crate) ratios: BTreeMap<&'static str, Median>,
}

impl Arm {
    pub(crate) fn new(name: impl Into<String>, about: impl Into<String>, services: Option<u32>) -> Self {
        let (figures, ratios) = Default::default();
        Self { name: name.into(), about: about.into(), services, missing: None, rounds: Vec::new(), figures, ratios }
    }

    pub(crate) fn figure(&self, measure: &str) -> Option<f64> {
        self.figures.get(measure).map(|figure| figure.median)
    }

    /// Medians of its rounds, and of their ratios to those of another arm.
    pub(crate) fn sum_up(&mut self, direct: &[Round]) {
        let measures: Vec<&'static str> = self.rounds.first().into_iter().flat_map(Round::keys).copied().collect();
        for measure in measures {
            let own = || self.rounds.iter().map(|round| round.get(measure).copied());
            if let Some(median) = Median::of(own().flatten()) {
                self.figures.insert(measure, median);
            }
            let theirs = direct.iter().map(|round| round.get(measure).copied());
            let ratio = own().zip(theirs).filter_map(|(own, other)| Some(own? / other?));
            if let Some(median) = Median::of(ratio) {
                self.ratios.insert(measure, median);
            }
        }
    }
}

/// The ratio of a measure between two arms, round by round.
pub(crate) fn ratio(one: &Arm, other: &Arm, measure: &str) -> Option<Median> {
    let pairs = one.rounds.iter().zip(&other.rounds);
    Median::of(pairs.filter_map(|(one, other)| Some(one.get(measure)? / other.get(measure)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_their_intervals() {
        let of = Median::of((1..=101).map(f64::from)).unwrap();
        assert_eq!(of.median, 51.0);
        assert!(of.low < 45.0 && of.low > 38.0 && of.high > 57.0 && of.high < 64.0, "{of:?}");
        assert!(Median::of([]).is_none());
        let one = Median::of([3.0]).unwrap();
        assert_eq!((one.median, one.low, one.high), (3.0, 3.0, 3.0));
    }

    #[test]
    fn ratios_are_those_of_the_same_round() {
        let round = |value| Round::from([("x", value)]);
        let mut arm = Arm::new("a", "", None);
        arm.rounds = vec![round(2.0), round(20.0), round(200.0)];
        arm.sum_up(&[round(1.0), round(10.0), round(100.0)]);
        assert_eq!(arm.ratios["x"].median, 2.0);
        assert_eq!(arm.figures["x"].median, 20.0);
    }
}
