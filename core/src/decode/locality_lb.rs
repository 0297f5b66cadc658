//! Parts that several Istio kinds share: `localityLbSetting` and durations.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Deserializer};

use super::context::{Context, Invalid, invalid};
use crate::model::{Code, Distribute, Failover, LabelPreference, LocalityPattern, LocalitySetting};

/// Deserializes a list or map where `null` means empty.
pub(super) fn null_as_default<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: Default + Deserialize<'de>,
    D: Deserializer<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// `localityLbSetting`, in a DestinationRule or the MeshConfig.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct LocalitySpec {
    #[serde(default)]
    enabled: Option<bool>,
    #[serde(default, deserialize_with = "null_as_default")]
    distribute: Vec<DistributeSpec>,
    #[serde(default, deserialize_with = "null_as_default")]
    failover: Vec<FailoverSpec>,
    #[serde(default, deserialize_with = "null_as_default")]
    failover_priority: Vec<String>,
}

#[derive(Deserialize)]
struct DistributeSpec {
    #[serde(default)]
    from: String,
    #[serde(default, deserialize_with = "null_as_default")]
    to: BTreeMap<String, u32>,
}

#[derive(Deserialize)]
struct FailoverSpec {
    #[serde(default)]
    from: String,
    #[serde(default)]
    to: String,
}

/// Topology labels, which express the same order as `failover`.
const TOPOLOGY_LABELS: [&str; 3] =
    ["topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone"];

/// Validates a setting like Istio's `ValidateLocalityLbSetting`.
/// `allow_both` allows distribute and failover in one setting, a Portolan extension.
pub(super) fn locality_setting(
    context: &mut Context<'_>,
    at: &str,
    spec: LocalitySpec,
    allow_both: bool,
) -> Result<LocalitySetting, Invalid> {
    if !allow_both && !spec.distribute.is_empty() {
        if !spec.failover.is_empty() {
            let message = "distribute and failover are mutually exclusive; remove one, or allow both with \
                           the annotation portolan.io/distribute-with-failover: \"true\"";
            return Err(invalid(format!("{at}.failover"), message));
        }
        if !spec.failover_priority.is_empty() {
            let message = "has no effect together with distribute; allow both with \
                           the annotation portolan.io/distribute-with-failover: \"true\"";
            context.finding(Code::NotTogether, format!("{at}.failoverPriority"), message);
        }
    }
    let mut distribute: Vec<Distribute> = Vec::new();
    for (i, rule) in spec.distribute.into_iter().enumerate() {
        let rule = distribution(&format!("{at}.distribute[{i}]"), rule)?;
        if let Some(other) = distribute.iter().find(|other| other.from.overlaps(&rule.from)) {
            let message = format!("\"{}\" and \"{}\" overlap", rule.from, other.from);
            return Err(invalid(format!("{at}.distribute[{i}].from"), message));
        }
        distribute.push(rule);
    }
    let mut failover = Vec::new();
    for (i, rule) in spec.failover.into_iter().enumerate() {
        for (field, region) in [("from", &rule.from), ("to", &rule.to)] {
            if region.is_empty() || region.contains(['/', '*']) {
                return Err(invalid(
                    format!("{at}.failover[{i}].{field}"),
                    format!("{region:?} is not a valid region"),
                ));
            }
        }
        if rule.from == rule.to {
            let message = format!("from and to name the same region, {:?}", rule.from);
            return Err(invalid(format!("{at}.failover[{i}]"), message));
        }
        failover.push(Failover { from: rule.from, to: rule.to });
    }
    let mut failover_priority = Vec::new();
    for (i, text) in spec.failover_priority.iter().enumerate() {
        let field = || format!("{at}.failoverPriority[{i}]");
        let (key, value) = text.split_once('=').map_or((text.as_str(), None), |(key, value)| (key, Some(value)));
        if key.is_empty() || value.is_some_and(|value| value.contains('=')) {
            return Err(invalid(field(), format!("{text:?} is not of the form `label` or `label=value`")));
        }
        if TOPOLOGY_LABELS.contains(&key) && !failover.is_empty() {
            return Err(invalid(field(), format!("{key} and failover are mutually exclusive; remove one of them")));
        }
        failover_priority.push(LabelPreference { key: key.to_owned(), value: value.map(str::to_owned) });
    }
    Ok(LocalitySetting {
        enabled: spec.enabled.unwrap_or(true),
        distribute,
        failover,
        failover_priority,
        distribute_with_failover: allow_both,
    })
}

fn distribution(at: &str, spec: DistributeSpec) -> Result<Distribute, Invalid> {
    let from = spec.from.parse().map_err(|message: String| invalid(format!("{at}.from"), message))?;
    let mut to: Vec<(LocalityPattern, u32)> = Vec::new();
    for (place, percent) in spec.to {
        let field = || format!("{at}.to[{place:?}]");
        let pattern: LocalityPattern = place.parse().map_err(|message: String| invalid(field(), message))?;
        if !(1..=100).contains(&percent) {
            return Err(invalid(field(), format!("{percent} is not between 1 and 100")));
        }
        if let Some((other, _)) = to.iter().find(|(other, _)| other.overlaps(&pattern)) {
            return Err(invalid(field(), format!("overlaps \"{other}\"")));
        }
        to.push((pattern, percent));
    }
    let sum: u32 = to.iter().map(|(_, percent)| percent).sum();
    if sum != 100 {
        return Err(invalid(format!("{at}.to"), format!("the percentages must sum to 100, not {sum}")));
    }
    Ok(Distribute { from, to })
}

/// Parses a duration in Go's format (`1h30m`, `1.5s`), from 1 ms to ten years.
pub(super) fn duration(at: impl Into<String>, text: &str) -> Result<Duration, Invalid> {
    match go_duration(text) {
        None => Err(invalid(at, format!("{text:?} is not a valid duration"))),
        Some(duration) if duration < Duration::from_millis(1) => {
            Err(invalid(at, format!("{text:?} is less than 1 ms")))
        }
        Some(duration) if duration > LONGEST => Err(invalid(at, format!("{text:?} is longer than ten years"))),
        Some(duration) => Ok(duration),
    }
}

/// Parses an optional duration; see [`duration`].
pub(super) fn maybe_duration(at: impl Into<String>, text: Option<String>) -> Result<Option<Duration>, Invalid> {
    text.map(|text| duration(at, &text)).transpose()
}

/// The upper bound of durations, which keeps their sums far from overflow.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Parses a duration like Go's `time.ParseDuration`, without a sign.
/// The usual crate panics on some inputs and hangs on others.
fn go_duration(text: &str) -> Option<Duration> {
    let is_number = |c: char| c.is_ascii_digit() || c == '.';
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let (number, tail) = rest.split_at(rest.find(|c| !is_number(c))?);
        let (unit, tail) = tail.split_at(tail.find(is_number).unwrap_or(tail.len()));
        let unit = match unit {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        seconds += number.parse::<f64>().ok()? * unit;
        rest = tail;
    }
    if text.is_empty() { None } else { Duration::try_from_secs_f64(seconds).ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_go_durations() {
        for (text, milliseconds) in [
            ("1s", 1_000),
            ("1.5s", 1_500),
            ("1m", 60_000),
            ("1h30m", 5_400_000),
            ("10ms", 10),
            ("2000µs", 2),
            (".5s", 500),
        ] {
            assert_eq!(duration("at", text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        let nines = format!("0.{}s", "9".repeat(60));
        assert_eq!(duration("at", &nines).map(|time| time.as_secs_f64().round()), Ok(1.0));
        for text in ["", "s", "5", "5с", "10s…", "1µs", "-5s", "1d", "1..2s", "soon", "999999999h", "1s 2s"] {
            assert!(duration("at", text).is_err(), "{text}");
        }
    }
}
