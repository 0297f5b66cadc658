//! Pages that curl fetched through the gateway.

use std::{collections::BTreeMap, fmt};

/// The pages of one curl run.
#[derive(Clone, Debug, Default)]
pub(super) struct Pages {
    pages: Vec<String>,
}

const HEAD: &str = "<!DOCTYPE html>";
const SORRY: &str = "Sorry, product reviews are currently unavailable";

impl Pages {
    /// Splits the output of curl, in which one page follows another.
    pub(super) fn new(text: &str) -> Self {
        Self { pages: text.split(HEAD).skip(1).map(str::to_owned).collect() }
    }

    pub(super) fn count(&self) -> usize {
        self.pages.len()
    }

    /// Counts the lines with "full stars", as the scenario does: two per page with stars.
    pub(super) fn stars(&self) -> usize {
        self.pages.iter().flat_map(|page| page.lines()).filter(|line| line.contains("full stars")).count()
    }

    /// Counts the pages on which the call to reviews failed.
    pub(super) fn errors(&self) -> usize {
        self.pages.iter().filter(|page| page.contains(SORRY)).count()
    }

    /// Counts the pages with reviews from pods whose name starts with `pod`.
    pub(super) fn from(&self, pod: &str) -> usize {
        self.pages.iter().filter(|page| page.contains(&format!("<!-- reviews: {pod}"))).count()
    }

    /// Counts the pages by productpage pod.
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

/// Formats expected counts in the same way as [`Pages`].
pub(super) fn expect(pages: usize, stars: usize, errors: usize) -> String {
    format!("{pages} pages, {stars} lines with full stars, {errors} errors")
}
