//! Statistics over many rounds: medians, their confidence intervals, and ratios between arms of the same round.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The figures of one arm in one round, by measure.
pub(crate) type Round = BTreeMap<&'static str, f64>;

/// A median, with its 95 % confidence interval if there are enough values for one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Median {
    pub(crate) median: f64,
    pub(crate) interval: Option<(f64, f64)>,
}

impl Median {
    /// Returns the median of the values, or `None` if there are none.
    ///
    /// The interval comes from order statistics: how many of n values lie below the true median is binomial.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let upper = *values.get(middle)?;
        let median = if values.len() % 2 == 1 { upper } else { (values[middle - 1] + upper) / 2.0 };
        let interval = outside(values.len()).map(|outside| (values[outside], values[values.len() - 1 - outside]));
        Some(Self { median, interval })
    }

    pub(crate) fn is_finite(&self) -> bool {
        self.median.is_finite() && self.interval.is_none_or(|(low, high)| low.is_finite() && high.is_finite())
    }
}

/// Returns how many of `n` sorted values at either end lie outside the narrowest 95 % interval of the median.
/// Returns `None` if `n` values are too few for such an interval.
fn outside(n: usize) -> Option<usize> {
    let (mut below, mut chance) = (0.0, 0.5_f64.powi(i32::try_from(n).ok()?));
    let mut outside = None;
    for k in 0..n / 2 {
        below += chance;
        if below > 0.025 {
            break;
        }
        outside = Some(k);
        chance *= (n - k) as f64 / (k + 1) as f64;
    }
    outside
}

/// Returns a percentile of sorted values (nearest rank; `part` is between 0 and 1), or `None` if there are no values.
pub(crate) fn percentile(sorted: &[f64], part: f64) -> Option<f64> {
    sorted.get((sorted.len().saturating_sub(1) as f64 * part).round() as usize).copied()
}

/// One way to reach the endpoints, and its figures.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Arm {
    pub(crate) name: String,
    pub(crate) about: String,
    /// Number of Services in the table; `None` for arms without one.
    pub(crate) services: Option<u32>,
    /// Why the arm did not run; `None` if it did.
    pub(crate) missing: Option<String>,
    #[serde(skip)]
    pub(crate) rounds: Vec<Round>,
    pub(crate) figures: BTreeMap<&'static str, Median>,
    /// Median of the per-round ratios to the arm `direct`, by measure.
    pub(crate) ratios: BTreeMap<&'static str, Median>,
}

impl Arm {
    pub(crate) fn new(name: impl Into<String>, about: impl Into<String>, services: Option<u32>) -> Self {
        let (figures, ratios) = Default::default();
        Self { name: name.into(), about: about.into(), services, missing: None, rounds: Vec::new(), figures, ratios }
    }

    /// Returns whether it connects to all Services in turn, and is compared with an arm that does so directly.
    pub(crate) fn is_in_turn(&self) -> bool {
        self.name.contains("in turn")
    }

    pub(crate) fn figure(&self, measure: &str) -> Option<f64> {
        self.figures.get(measure).map(|figure| figure.median)
    }

    /// Computes the medians of the rounds, and of their ratios to the same rounds of the arm `direct`.
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

/// Returns the median of the per-round ratios of a measure between two arms.
pub(crate) fn ratio(one: &Arm, other: &Arm, measure: &str) -> Option<Median> {
    let pairs = one.rounds.iter().zip(&other.rounds);
    Median::of(pairs.filter_map(|(one, other)| Some(one.get(measure)? / other.get(measure)?)))
}

/// Returns the median over the rounds of what one arm adds to a baseline, divided by what another one adds.
///
/// A round in which the other arm adds nothing measurable counts as an infinite ratio.
pub(crate) fn added(one: &Arm, other: &Arm, baseline: &Arm, measure: &str) -> Option<Median> {
    let rounds = one.rounds.iter().zip(&other.rounds).zip(&baseline.rounds);
    Median::of(rounds.filter_map(|((one, other), base)| {
        let base = base.get(measure)?;
        let (own, theirs) = (one.get(measure)? - base, other.get(measure)? - base);
        Some(if theirs > 0.0 { own / theirs } else { f64::INFINITY })
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_have_sign_test_intervals() {
        let of = |n: u32| Median::of((1..=n).map(f64::from)).unwrap();
        // From tables of the sign test: ranks 6 and 16 of 21, 2 and 9 of 10, 1 and 6 of 6.
        assert_eq!((of(21).median, of(21).interval), (11.0, Some((6.0, 16.0))));
        assert_eq!((of(10).median, of(10).interval), (5.5, Some((2.0, 9.0))));
        assert_eq!((of(6).median, of(6).interval), (3.5, Some((1.0, 6.0))));
        assert_eq!((of(5).median, of(5).interval), (3.0, None));
        assert!(Median::of([]).is_none());
    }

    #[test]
    fn ratios_compare_the_same_round() {
        let round = |value| Round::from([("x", value)]);
        let mut arm = Arm::new("a", "", None);
        arm.rounds = vec![round(2.0), round(20.0), round(200.0)];
        arm.sum_up(&[round(1.0), round(10.0), round(100.0)]);
        assert_eq!(arm.ratios["x"].median, 2.0);
        assert_eq!(arm.figures["x"].median, 20.0);
    }

    #[test]
    fn added_latency_leaves_out_the_baseline_and_no_round() {
        let arm = |values: [f64; 3]| {
            let mut arm = Arm::new("a", "", None);
            arm.rounds = values.map(|value| Round::from([("x", value)])).to_vec();
            arm
        };
        let baseline = arm([10.0, 20.0, 30.0]);
        let ratio = added(&arm([11.0, 21.0, 30.0]), &arm([20.0, 30.0, 30.0]), &baseline, "x").unwrap();
        assert!((ratio.median - 0.1).abs() < 1e-9, "{ratio:?}");
        let ratio = added(&arm([11.0, 21.0, 31.0]), &arm([20.0, 20.0, 30.0]), &baseline, "x").unwrap();
        assert_eq!(ratio.median, f64::INFINITY);
    }
}
