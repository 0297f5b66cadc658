//! `portolan get`

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};

use super::{
    AdminArgs, SelectArgs, block_on,
    output::{self, OutputArgs, Rows},
};
use crate::{admin, report::Report};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// Each service: how it is shared, slots and connections in the kernel
    Services,
    /// Each endpoint: its share, connections, failures
    Endpoints,
    /// The endpoints that are ejected, and until when
    Ejections,
}

/// Shows what the running agent intends, and beside it what the kernel holds.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  portolan get ejections\n  portolan get endpoints --service default/reviews -o json"
)]
pub(super) struct GetArgs {
    /// What to show
    #[arg(value_enum)]
    what: What,
    #[command(flatten)]
    select: SelectArgs,
    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) fn run(args: &GetArgs) -> Result<ExitCode> {
    let mut report: Report = block_on(admin::get(&args.admin.admin, "/v1/report"))?;
    args.select.apply(&mut report)?;
    if args.what == What::Ejections {
        for service in &mut report.services {
            service.endpoints.retain(|endpoint| endpoint.health == "ejected");
        }
        report.services.retain(|service| !service.endpoints.is_empty());
    }
    let rows = if args.what == What::Services { Rows::Services } else { Rows::Endpoints };
    output::print(args.output.output, &report, rows)?;
    Ok(ExitCode::SUCCESS)
}
