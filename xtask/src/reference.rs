//! `cargo xtask reference`: writes the generated pages of `docs/reference`.

use anyhow::Result;

use crate::command::{cargo, run as run_command};

/// Writes the pages. A test of the agent fails when one is stale.
pub(crate) fn run() -> Result<()> {
    let mut write = cargo(&["test", "--quiet", "--package", "portolan", "--test", "reference"]);
    run_command(write.env("PORTOLAN_UPDATE_REFERENCE", "1"))?;
    println!("docs/reference: cli.md, metrics.md and findings.md are current");
    Ok(())
}
