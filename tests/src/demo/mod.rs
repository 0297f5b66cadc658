//! The demo: the users' scenarios, run step by step with real programs on a real kernel.

mod pages;
mod regions;
mod report;
mod retention;
mod world;

use std::process::ExitCode;

use anyhow::{Result, bail};
use world::World;

use crate::cleanup_on_interrupt;

pub use report::{Report, Step};

/// Options of a demo run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Run only the scenarios whose name contains this; `None` runs all.
    pub only: Option<String>,
    /// Keep the last clusters running at the end, until interrupted.
    pub keep: bool,
    /// Have the agents read from API servers instead of files.
    pub kubernetes: bool,
    /// Print JSON to stdout at the end. Progress goes to stderr.
    pub json: bool,
}

/// A scenario. Each one can run alone.
struct Play {
    name: &'static str,
    about: &'static str,
    play: fn(&mut World, &mut Report) -> Result<()>,
}

/// A group of scenarios that share a pair of clusters.
struct Scenario {
    name: &'static str,
    build: fn(bool) -> Result<World>,
    plays: &'static [Play],
}

const SCENARIOS: [Scenario; 2] = [regions::SCENARIO, retention::SCENARIO];

/// Returns the name and the description of each scenario.
pub fn plays() -> impl Iterator<Item = (&'static str, &'static str)> {
    SCENARIOS.iter().flat_map(|scenario| scenario.plays).map(|play| (play.name, play.about))
}

/// Runs the selected scenarios, and prints how many steps passed. The exit code is a failure if one did not.
///
/// # Errors
/// Returns an error if no scenario matches, or if the clusters cannot be created.
/// A step that fails is not an error: it is reported, and the next scenario starts.
pub fn run(options: &Options) -> Result<ExitCode> {
    let selected = |play: &Play| options.only.as_ref().is_none_or(|only| play.name.contains(only.as_str()));
    if !SCENARIOS.iter().flat_map(|scenario| scenario.plays).any(selected) {
        let names: Vec<_> = plays().map(|(name, _)| name).collect();
        bail!(
            "--only {}: no such scenario; the scenarios are {}",
            options.only.as_deref().unwrap_or_default(),
            names.join(", ")
        );
    }
    cleanup_on_interrupt()?;
    let mut report = Report::new(options.json);
    let mut last_world = None;
    for scenario in &SCENARIOS {
        if !scenario.plays.iter().any(selected) {
            continue;
        }
        let from = if options.kubernetes { ", objects from API servers" } else { "" };
        report.note(&format!("setting up: {}{from}", scenario.name));
        // Only one pair of clusters at a time, because both use the same addresses.
        drop(last_world.take());
        let mut world = (scenario.build)(options.kubernetes)?;
        for play in scenario.plays.iter().filter(|play| selected(play)) {
            report.begin(play.name, play.about);
            if let Err(error) = (play.play)(&mut world, &mut report) {
                report.step("the scenario completes", "no error", &format!("{error:#}"), false);
                report.note(&world.logs());
            }
        }
        last_world = Some(world);
    }
    let failed = report.close();
    if let Some(world) = last_world.filter(|_| options.keep) {
        world.wait_for_visitors();
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
