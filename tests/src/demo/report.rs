//! Expected and observed results.

use std::io::Write as _;

use serde::Serialize;

/// A checked result.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// Name of the scenario.
    pub play: String,
    /// What was checked.
    pub step: String,
    /// The expected value, as text.
    pub expected: String,
    /// The observed value, as text.
    pub seen: String,
    /// Whether the observed value is acceptable.
    pub pass: bool,
}

/// The steps so far, which are printed as they complete.
#[derive(Debug)]
pub struct Report {
    steps: Vec<Step>,
    play: String,
    json: bool,
}

#[derive(Serialize)]
struct Summary<'a> {
    steps: &'a [Step],
    passed: usize,
    failed: usize,
}

impl Report {
    pub(super) fn new(json: bool) -> Self {
        Self { steps: Vec::new(), play: String::new(), json }
    }

    /// Prints text for people: to stdout, or to stderr if stdout carries JSON.
    pub(super) fn note(&self, text: &str) {
        if self.json {
            eprintln!("{text}");
        } else {
            println!("{text}");
            // Flush, so that progress is visible through a pipe too.
            let _ = std::io::stdout().flush();
        }
    }

    pub(super) fn begin(&mut self, play: &str, about: &str) {
        play.clone_into(&mut self.play);
        self.note(&format!("\n{play}: {about}"));
    }

    pub(super) fn step(&mut self, step: &str, expected: &str, seen: &str, pass: bool) {
        self.note(&format!(
            "  {} {step}\n       expected: {expected}\n       seen:     {seen}",
            if pass { "PASS" } else { "FAIL" }
        ));
        self.steps.push(Step {
            play: self.play.clone(),
            step: step.to_owned(),
            expected: expected.to_owned(),
            seen: seen.to_owned(),
            pass,
        });
    }

    /// Records a step that passes if `seen` equals `expected`.
    pub(super) fn check(&mut self, step: &str, expected: &str, seen: &str) {
        self.step(step, expected, seen, expected == seen);
    }

    /// Prints the summary. Returns whether a step failed.
    pub(super) fn close(&self) -> bool {
        let failed = self.steps.iter().filter(|step| !step.pass).count();
        let passed = self.steps.len() - failed;
        if self.json {
            let summary = Summary { steps: &self.steps, passed, failed };
            println!("{}", serde_json::to_string_pretty(&summary).unwrap_or_default());
        } else {
            println!("\n{passed} passed, {failed} failed");
        }
        failed > 0
    }
}
