//! Output of `portolan plan diff`: how a change of the objects affects the shares.

use anyhow::Result;
use comfy_table::{CellAlignment, Table};
use portolan_core::report::diff::{ClientDiff, Diff};

use super::output::{self, Format};

pub(super) fn print(format: Format, diff: &Diff) -> Result<()> {
    match format {
        Format::Table => output::write(&table(diff)),
        format => output::print_value(format, diff),
    }
}

fn table(diff: &Diff) -> String {
    let mut text = String::new();
    for ClientDiff { client, changes } in &diff.clients {
        text += &output::client(client);
        let mut table: Table =
            output::new_table(&["SERVICE", "ENDPOINT", "CLUSTER", "LOCALITY", "BEFORE", "AFTER", "CHANGE"]);
        for change in changes {
            table.add_row(vec![
                change.service.clone(),
                change.endpoint.clone().unwrap_or_else(|| "(refused)".to_owned()),
                change.cluster.clone(),
                change.locality.clone(),
                output::percent(change.before),
                output::percent(change.after),
                format!("{:+.2}", (change.after - change.before) * 100.0),
            ]);
        }
        for column in 4..7 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        text += &output::render(&table, |_| None);
        text.push('\n');
    }
    if diff.clients.is_empty() {
        text += "no share changes\n";
    }
    for (title, findings) in [("New findings", &diff.findings.added), ("Resolved findings", &diff.findings.removed)] {
        text += &output::findings(title, findings);
    }
    text
}
