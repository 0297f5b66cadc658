//! Localities, and the patterns that match them.

use std::{fmt, str::FromStr};

/// A region, zone, and subzone, in Istio's terms. A part that is unknown is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Locality {
    /// `topology.kubernetes.io/region` of the node.
    pub region: String,
    /// `topology.kubernetes.io/zone` of the node.
    pub zone: String,
    /// `topology.istio.io/subzone` of the node.
    pub subzone: String,
}

impl fmt::Display for Locality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.region)?;
        if !self.zone.is_empty() || !self.subzone.is_empty() {
            write!(f, "/{}", self.zone)?;
        }
        if !self.subzone.is_empty() {
            write!(f, "/{}", self.subzone)?;
        }
        Ok(())
    }
}

impl FromStr for Locality {
    type Err = String;

    /// Parses `REGION[/ZONE[/SUBZONE]]`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split('/');
        let mut next = || parts.next().unwrap_or_default().to_owned();
        let locality = Self { region: next(), zone: next(), subzone: next() };
        if parts.next().is_some() {
            return Err(format!("{text:?} has more than three parts (REGION/ZONE/SUBZONE)"));
        }
        Ok(locality)
    }
}

/// A pattern for localities, `REGION[/ZONE[/SUBZONE]]`.
/// A part that is `*` or absent matches everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalityPattern {
    parts: [String; 3],
}

impl LocalityPattern {
    /// Returns whether the pattern matches the locality (Istio's `LocalityMatch`).
    pub fn matches(&self, locality: &Locality) -> bool {
        let [region, zone, subzone] = &self.parts;
        (region == "*" || *region == locality.region)
            && Self::part(zone, &locality.zone)
            && Self::part(subzone, &locality.subzone)
    }

    /// Returns the locality that the pattern names, with parts that match everything left empty.
    pub fn place(&self) -> Locality {
        let [region, zone, subzone] = self.parts.clone().map(|part| if part == "*" { String::new() } else { part });
        Locality { region, zone, subzone }
    }

    fn part(rule: &str, part: &str) -> bool {
        rule.is_empty() || rule == "*" || rule == part
    }

    /// Returns whether some locality could match both patterns.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.parts
            .iter()
            .zip(&other.parts)
            .all(|(a, b)| a == b || [a, b].iter().any(|part| part.is_empty() || *part == "*"))
    }
}

impl FromStr for LocalityPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split('/').collect();
        if parts.len() > 3 {
            return Err(format!("{text:?} has more than three parts (region/zone/subzone)"));
        }
        for (i, part) in parts.iter().enumerate() {
            if part.is_empty() {
                return Err(format!("{text:?} has an empty part"));
            }
            if part.contains('*') && (*part != "*" || i + 1 != parts.len()) {
                return Err(format!("{text:?}: `*` is allowed only as the last part"));
            }
        }
        let part = |i: usize| parts.get(i).copied().unwrap_or_default().to_owned();
        Ok(Self { parts: [part(0), part(1), part(2)] })
    }
}

impl fmt::Display for LocalityPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<_> = self.parts.iter().filter(|part| !part.is_empty()).map(String::as_str).collect();
        f.write_str(&parts.join("/"))
    }
}
