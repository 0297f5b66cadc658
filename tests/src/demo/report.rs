//! What was expected, what was seen.

use std::io::Write as _;

use serde::Serialize;

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// The play that it belongs to.
    pub play: String,
    /// What was looked at.
    pub step: String,
    /// What should be.
    pub expected: String,
    /// What was.
    pub seen: String,
    /// Whether it was as it should be.
    pub pass: bool,
}

/// All steps so far.
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

    /// For people who watch; goes to stderr where stdout is for a machine.
    pub(super) fn note(&self, text: &str) {
        if self.json {
            eprintln!("{text}");
        } else {
            println!("{text}");
            // Progress shall be seen while it is made, through a pipe as well.
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

    /// A step that passes where what was seen is what was expected.
    pub(super) fn check(&mut self, step: &str, expected: &str, seen: &str) {
        self.step(step, expected, seen, expected == seen);
    }

    /// The last word. Returns whether a step failed.
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
