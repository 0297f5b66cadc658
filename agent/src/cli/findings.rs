//! `portolan findings`: explains finding codes.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use comfy_table::Table;
use portolan_core::model::{Code, Severity};
use serde::Serialize;

use super::output::{self, Format, OutputArgs};

/// Explain finding codes: when each is reported, what stays in effect, and how to fix it.
///
/// Examples:
///   portolan findings            list all codes
///   portolan findings PTL0043    explain one
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct FindingsArgs {
    /// Code to explain, such as PTL0043; lists all codes if omitted
    code: Option<Code>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
struct Entry {
    code: Code,
    severity: Severity,
    title: &'static str,
    help: &'static str,
}

pub(super) fn run(args: &FindingsArgs) -> Result<ExitCode> {
    let codes = args.code.as_ref().map_or(Code::ALL, std::slice::from_ref);
    let entry = |code: &Code| Entry { code: *code, severity: code.severity(), title: code.title(), help: code.help() };
    let entries: Vec<Entry> = codes.iter().map(entry).collect();
    match (args.output.output, args.code) {
        (Format::Table, Some(code)) => {
            let severity = format!("{:?}", code.severity()).to_lowercase();
            output::write(&format!("{code} ({severity}): {}\n\n{}\n", code.title(), code.help()))?;
        }
        (Format::Table, None) => {
            let mut table: Table = output::new_table(&["CODE", "SEVERITY", "TITLE"]);
            for entry in &entries {
                let severity = format!("{:?}", entry.severity).to_lowercase();
                table.add_row(vec![entry.code.to_string(), severity, entry.title.to_owned()]);
            }
            output::write(&output::render(&table, |_| None))?;
        }
        (format, _) => output::print_value(format, &entries)?,
    }
    Ok(ExitCode::SUCCESS)
}
