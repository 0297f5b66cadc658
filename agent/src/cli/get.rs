//! The `portolan get` subcommand.

use std::process::ExitCode;

use anstyle::AnsiColor;
use anyhow::Result;
use clap::{Args, ValueEnum};
use portolan_core::report::Report;

use super::{
    AdminArgs, SelectArgs, block_on,
    output::{self, OutputArgs, Rows},
};
use crate::{
    admin,
    opt_out::{self, AskedBy},
    source::SourcesReport,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// Services: mode, share of each locality; slots and connections in the kernel
    Services,
    /// Endpoints: share, connections, failures
    Endpoints,
    /// Ejected endpoints, and when their ejection ends
    Ejections,
    /// Sources by cluster and resource: number of objects, last sync, errors
    Sources,
    /// Pods of this node that a label excludes (portolan.io/opt-out)
    OptOuts,
}

/// Show what the running agent intends, next to what the kernel holds.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  portolan get ejections\n  portolan get endpoints --service default/reviews -o json"
)]
pub(super) struct GetArgs {
    /// Kind of state to show
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
    match args.what {
        What::Sources => return sources(args),
        What::OptOuts => return opt_outs(args),
        What::Services | What::Endpoints | What::Ejections => {}
    }
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

fn sources(args: &GetArgs) -> Result<ExitCode> {
    let reading: SourcesReport = block_on(admin::get(&args.admin.admin, "/v1/sources"))?;
    if !matches!(args.output.output, output::Format::Table) {
        output::print_value(args.output.output, &reading)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = output::new_table(&["CLUSTER", "RESOURCE", "OBJECTS", "SYNCED", "LAST SEEN", "LISTS", "ERROR"]);
    for source in &reading.sources {
        let last_seen = source.lag_seconds.map(|seconds| {
            format!("{} ago", humantime::format_duration(std::time::Duration::from_secs(seconds as u64)))
        });
        table.add_row([
            if source.cluster.is_empty() { "-".to_owned() } else { source.cluster.clone() },
            source.resource.clone(),
            source.objects.to_string(),
            source.synced.clone().unwrap_or_else(|| "never".to_owned()),
            last_seen.unwrap_or_else(|| "never".to_owned()),
            source.lists.to_string(),
            source.error.clone().unwrap_or_default(),
        ]);
    }
    let failing: Vec<bool> = reading.sources.iter().map(|source| source.error.is_some()).collect();
    let style = |i: usize| failing.get(i).copied().unwrap_or_default().then(|| AnsiColor::Yellow.on_default());
    output::write(&output::render(&table, style))?;
    Ok(ExitCode::SUCCESS)
}

fn opt_outs(args: &GetArgs) -> Result<ExitCode> {
    let outs: opt_out::Report = block_on(admin::get(&args.admin.admin, "/v1/opt-outs"))?;
    if !matches!(args.output.output, output::Format::Table) {
        output::print_value(args.output.output, &outs)?;
        return Ok(ExitCode::SUCCESS);
    }
    if outs.pods.is_empty() {
        anstream::println!("no pod of this node is known to have opted out");
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = output::new_table(&["NAMESPACE", "POD", "OPTED OUT BY", "CGROUP"]);
    for pod in &outs.pods {
        let asked_by = match pod.asked_by {
            AskedBy::Pod => "pod label",
            AskedBy::Namespace => "namespace label",
        };
        let cgroups = if pod.cgroups.is_empty() { "not found yet".to_owned() } else { pod.cgroups.join(" ") };
        table.add_row([pod.namespace.clone(), pod.name.clone(), asked_by.to_owned(), cgroups]);
    }
    output::write(&output::render(&table, |_| None))?;
    Ok(ExitCode::SUCCESS)
}
