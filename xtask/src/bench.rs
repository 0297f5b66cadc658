//! x
use anyhow::Result;
use std::process::ExitCode;
#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {}
pub(crate) fn run(_: &BenchArgs) -> Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
pub(crate) fn smoke() -> Result<()> {
    Ok(())
}
