//! The demo: the users' two scenarios, played with real programs on a real kernel, step by step.

mod pages;
mod regions;
mod report;
mod retention;
mod world;

use std::process::ExitCode;

use anyhow::{Result, bail};
use world::World;

use crate::sweep_on_interrupt;

pub use report::{Report, Step};

/// How to play.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Only the plays whose name contains this.
    pub only: Option<String>,
    /// Leave everything running at the end, until interrupted.
    pub keep: bool,
    /// Have the agents read from API servers, in place of files.
    pub kubernetes: bool,
    /// JSON at the end, in place of lines on the way.
    pub json: bool,
}

/// A part of a scenario that can be played alone.
struct Play {
    name: &'static str,
    about: &'static str,
    play: fn(&mut World, &mut Report) -> Result<()>,
}

/// A scenario: the clusters that it needs, and its plays.
struct Scenario {
    name: &'static str,
    build: fn(bool) -> Result<World>,
    plays: &'static [Play],
}

const SCENARIOS: [Scenario; 2] = [regions::SCENARIO, retention::SCENARIO];

/// The plays, with what they show.
pub fn plays() -> impl Iterator<Item = (&'static str, &'static str)> {
    SCENARIOS.iter().flat_map(|scenario| scenario.plays).map(|play| (play.name, play.about))
}

/// Plays, and says at the end how many steps passed.
///
/// # Errors
/// The machine does not let the clusters be made. A step that fails is no error: it is reported, and the next play begins.
pub fn run(options: &Options) -> Result<ExitCode> {
    let wanted = |play: &Play| options.only.as_ref().is_none_or(|only| play.name.contains(only.as_str()));
    if !SCENARIOS.iter().flat_map(|scenario| scenario.plays).any(wanted) {
        let names: Vec<_> = plays().map(|(name, _)| name).collect();
        bail!("--only {}: no such play; there are: {}", options.only.as_deref().unwrap_or_default(), names.join(", "));
    }
    sweep_on_interrupt()?;
    let mut report = Report::new(options.json);
    let mut kept = None;
    for scenario in &SCENARIOS {
        if !scenario.plays.iter().any(wanted) {
            continue;
        }
        let from = if options.kubernetes { ", objects from API servers" } else { "" };
        report.note(&format!("setting up: {}{from}", scenario.name));
        // One at a time: both use the addresses of the scenario.
        drop(kept.take());
        let mut world = (scenario.build)(options.kubernetes)?;
        for play in scenario.plays.iter().filter(|play| wanted(play)) {
            report.begin(play.name, play.about);
            if let Err(error) = (play.play)(&mut world, &mut report) {
                report.step("goes through", "no error", &format!("{error:#}"), false);
                report.note(&world.logs());
            }
        }
        kept = Some(world);
    }
    let failed = report.close();
    if let Some(world) = kept.filter(|_| options.keep) {
        world.wait_for_visitors();
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
