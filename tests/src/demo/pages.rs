//! Pages as curl got them through the gateway.

use std::{collections::BTreeMap, fmt};

/// What pages showed.
#[derive(Clone, Debug, Default)]
pub(super) struct Pages {
    pages: Vec<String>,
}

const HEAD: &str = "<!DOCTYPE html>";
const SORRY: &str = "Sorry, product reviews are currently unavailable";

impl Pages {
    /// From the output of curl, one page behind the other.
    pub(super) fn new(text: &str) -> Self {
        Self { pages: text.split(HEAD).skip(1).map(str::to_owned).collect() }
    }

    pub(super) fn count(&self) -> usize {
        self.pages.len()
    }

    /// Lines with "full stars", as the scenario counts them.
    pub(super) fn stars(&self) -> usize {
        self.pages.iter().flat_map(|page| page.lines()).filter(|line| line.contains("full stars")).count()
    }

    /// Pages on which the call to reviews had failed.
    pub(super) fn errors(&self) -> usize {
        self.pages.iter().filter(|page| page.contains(SORRY)).count()
    }

    /// Pages with reviews of pods whose name begins like this.
    pub(super) fn from(&self, pod: &str) -> usize {
        self.pages.iter().filter(|page| page.contains(&format!("<!-- reviews: {pod}"))).count()
    }

    /// Pages by productpage pod.
    pub(super) fn by_productpage(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for page in &self.pages {
            let pod = page.split("<!-- productpage: ").nth(1).and_then(|rest| rest.split(' ').next());
            *counts.entry(pod.unwrap_or_default().to_owned()).or_default() += 1;
        }
        counts
    }
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages, {} lines with full stars, {} errors", self.count(), self.stars(), self.errors())
    }
}

/// What pages should show, in the same words.
pub(super) fn expect(pages: usize, stars: usize, errors: usize) -> String {
    format!("{pages} pages, {stars} lines with full stars, {errors} errors")
}
