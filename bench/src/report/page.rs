//! Renders the report as Markdown, and as a self-contained HTML page.

use std::fmt::Write as _;

use super::Section;

const TITLE: &str = "Portolan benchmark";

pub(super) fn markdown(heading: &[String], sections: &[Section]) -> String {
    let mut page = format!("# {TITLE}\n");
    let mut line = |text: &str| {
        // Writing to a `String` cannot fail.
        let _ = writeln!(page, "{text}");
    };
    for text in heading {
        line(&format!("\n{text}"));
    }
    for section in sections {
        line(&format!("\n## {}\n", section.title));
        if !section.about.is_empty() {
            line(&format!("{}\n", section.about));
        }
        let cells = |cells: &[String]| format!("| {} |", cells.join(" | "));
        line(&cells(&section.header));
        line(&format!("|{}", "---|".repeat(section.header.len())));
        section.rows.iter().for_each(|row| line(&cells(row)));
        for (name, _) in &section.charts {
            line(&format!("\n![{name}]({name}.svg)"));
        }
    }
    page
}

pub(super) fn html(heading: &[String], sections: &[Section]) -> String {
    let mut body = format!("<h1>{TITLE}</h1>");
    for text in heading {
        body += &format!("<p>{}</p>", escaped(text));
    }
    for section in sections {
        body += &format!("<h2>{}</h2><p>{}</p>", escaped(section.title), escaped(&section.about));
        let cells = |tag: &str, cells: &[String]| -> String {
            let cells: String = cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escaped(cell))).collect();
            format!("<tr>{cells}</tr>")
        };
        let rows: String = section.rows.iter().map(|row| cells("td", row)).collect();
        body += &format!("<table><thead>{}</thead><tbody>{rows}</tbody></table>", cells("th", &section.header));
        section.charts.iter().for_each(|(_, svg)| body += &format!("<figure>{svg}</figure>"));
    }
    let style = "body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b}\
        table{border-collapse:collapse;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}\
        th,td{border-bottom:1px solid #ccc;padding:.2rem .6rem;text-align:left}th{background:#f3f3f3}\
        figure{margin:1rem 0}svg{max-width:100%;height:auto}";
    format!(
        "<!DOCTYPE html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>{TITLE}</title><style>{style}</style></head><body>{body}</body></html>\n"
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
