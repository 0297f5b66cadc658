//! The `portolan events` subcommand.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use super::{
    AdminArgs, block_on,
    output::{Format, OutputArgs},
};
use crate::{admin::Stream, controller::event_log::Event};

/// Show events on this node, oldest first. JSON output has one object per line.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  portolan events --follow -o json")]
pub(super) struct EventsArgs {
    /// Keep printing new events until interrupted
    #[arg(short, long)]
    follow: bool,
    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) fn run(args: &EventsArgs) -> Result<ExitCode> {
    block_on(async {
        let mut stream = Stream::open(&args.admin.admin, &format!("/v1/events?follow={}", args.follow)).await?;
        while let Some(line) = stream.next_line().await? {
            match args.output.output {
                Format::Json => anstream::println!("{line}"),
                Format::Yaml => {
                    let event: Event = serde_json::from_str(&line)?;
                    anstream::print!("---\n{}", serde_saphyr::to_string(&event)?);
                }
                Format::Table => {
                    let event: Event = serde_json::from_str(&line)?;
                    anstream::println!("{}  {:<16}  {}", event.time, event.kind.as_str(), event.message);
                }
            }
        }
        anyhow::Ok(ExitCode::SUCCESS)
    })
}
