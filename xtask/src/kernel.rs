//! The kernel tests: every test program of `portolan-tests`, in two lanes.
//!
//! Tests of API servers mostly wait, and all others mostly compute, so that both at once take little longer than one of them.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::Value;

use crate::command::{cargo, output, root};

/// Test programs that mostly wait: a lane of their own, with more tests at once than processors.
const WAITING: [&str; 1] = ["kubernetes"];
const WAITING_THREADS: &str = "4";

/// A test program: its name and its file.
type Program = (String, PathBuf);

/// How a test program ended, how long it took, and what it printed.
#[derive(Clone)]
struct Outcome {
    name: String,
    passed: bool,
    seconds: f64,
    text: String,
}

/// Runs all test programs, even if some fail.
pub(crate) fn run() -> Result<()> {
    let (waiting, computing): (Vec<_>, Vec<_>) =
        programs()?.into_iter().partition(|(name, _)| WAITING.contains(&name.as_str()));
    ensure!(waiting.len() == WAITING.len(), "there are no test programs {WAITING:?}");
    let other_lane = thread::spawn(move || lane(&waiting, &["--test-threads", WAITING_THREADS]));
    let computing = lane(&computing, &[]);
    // Joined even if this lane failed, so that no test outlives the task.
    let waiting = other_lane.join().map_err(|_| anyhow!("a lane panicked"))?;
    let outcomes = [computing?, waiting?].concat();
    println!("test program      seconds");
    for outcome in &outcomes {
        println!("  {:<14} {:>8.1}{}", outcome.name, outcome.seconds, if outcome.passed { "" } else { "  FAILED" });
    }
    let failed: Vec<&str> = outcomes.iter().filter(|it| !it.passed).map(|it| it.name.as_str()).collect();
    if !failed.is_empty() {
        bail!("test programs failed: {}; their output is above", failed.join(", "));
    }
    Ok(())
}

/// Builds the test programs, and returns them in the order of their names.
fn programs() -> Result<Vec<Program>> {
    let build =
        ["test", "--quiet", "--no-run", "--package", "portolan-tests", "--message-format", "json-render-diagnostics"];
    let messages = output(&mut cargo(&build))?;
    let mut programs: Vec<Program> = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["profile"]["test"] == true)
        .filter_map(|message| {
            let name = message["target"]["name"].as_str()?.to_owned();
            Some((name, PathBuf::from(message["executable"].as_str()?)))
        })
        .collect();
    programs.sort();
    ensure!(!programs.is_empty(), "cargo built no test programs of portolan-tests");
    Ok(programs)
}

/// Runs test programs one after the other, and prints the output of each when it ends.
fn lane(programs: &[Program], arguments: &[&str]) -> Result<Vec<Outcome>> {
    let run = |(name, file): &Program| {
        let outcome = run_one(name, file, arguments)?;
        // In one piece, for the lanes print at the same time.
        println!("{}", outcome.text);
        Ok(outcome)
    };
    programs.iter().map(run).collect()
}

fn run_one(name: &str, file: &Path, arguments: &[&str]) -> Result<Outcome> {
    let began = Instant::now();
    let mut command = Command::new(file);
    // As cargo does it.
    command.current_dir(root().join("tests")).arg("--show-output").args(arguments).stdin(Stdio::null());
    let output = command.output().with_context(|| format!("cannot start {}", file.display()))?;
    let seconds = began.elapsed().as_secs_f64();
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    let text = format!("--- {name}: {} in {seconds:.1} s\n{}\n{}", output.status, out.trim(), err.trim());
    Ok(Outcome { name: name.to_owned(), passed: output.status.success(), seconds, text })
}
