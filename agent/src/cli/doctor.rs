//! The `portolan doctor` subcommand.

use std::{
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anstyle::{AnsiColor, Style};
use anyhow::Result;
use clap::Args;

use super::{
    AdminArgs, PinsArgs,
    output::{self, Format, OutputArgs},
};
use crate::doctor::{Diagnosis, State, diagnose};

/// Run node preflight checks: report the result of each, and how to fix what fails.
///
/// Changes nothing. Exit status 1 if a problem keeps Portolan from working.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  portolan doctor\n  portolan doctor -o json | jq '.programs'")]
pub(super) struct DoctorArgs {
    /// cgroup whose connections the agent handles [default: the cgroup v2 root]
    #[arg(long, value_name = "PATH", env = "PORTOLAN_CGROUP")]
    cgroup: Option<PathBuf>,
    #[command(flatten)]
    pins: PinsArgs,
    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let facts = portolan_datapath::inspect(args.cgroup.as_deref(), &args.pins.bpffs);
    let diagnosis = diagnose(&facts, ready(&args.admin.admin));
    match args.output.output {
        Format::Table => print(&diagnosis),
        format => output::print_value(format, &diagnosis)?,
    }
    Ok(if diagnosis.has_errors() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Queries the readiness of a running agent; `Err` has its reason, `None` means that no agent responds.
fn ready(admin: &Path) -> Option<Result<(), String>> {
    let mut stream = std::os::unix::net::UnixStream::connect(admin).ok()?;
    stream.write_all(b"GET /readyz HTTP/1.0\r\nHost: portolan\r\n\r\n").ok()?;
    let mut response = String::new();
    stream.read_to_string(&mut response).ok()?;
    let (head, body) = response.split_once("\r\n\r\n")?;
    Some(if head.split(' ').nth(1) == Some("200") { Ok(()) } else { Err(body.to_owned()) })
}

fn print(diagnosis: &Diagnosis) {
    for check in &diagnosis.checks {
        let (word, color) = match check.state {
            State::Ok => ("ok", AnsiColor::Green),
            State::Note => ("note", AnsiColor::Cyan),
            State::Warning => ("warning", AnsiColor::Yellow),
            State::Error => ("error", AnsiColor::Red),
        };
        let style = Style::new().fg_color(Some(color.into()));
        anstream::println!("{style}{word:<8}{style:#}{}: {}", check.check, check.says);
        if !check.remedy.is_empty() {
            anstream::println!("        → {}", check.remedy);
        }
    }
    if diagnosis.programs.iter().any(|program| program.attached) {
        anstream::println!("\n{:<14}{:>10}{:>10}", "program", "verified", "bytes");
        let number = |number: Option<u32>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
        for program in &diagnosis.programs {
            let (verified, bytes) = (number(program.verified_instructions), number(program.bytes));
            anstream::println!("{:<14}{verified:>10}{bytes:>10}", program.name);
        }
    }
}
