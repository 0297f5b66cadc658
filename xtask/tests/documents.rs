//! Documents: links that lead somewhere, code that exists, forms that are kept.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn markdown() -> Vec<PathBuf> {
    let listed = Command::new("git")
        .current_dir(root())
        .args(["ls-files", "--cached", "--others", "--exclude-standard", "*.md"])
        .output()
        .unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let files: Vec<PathBuf> = listed.lines().map(PathBuf::from).filter(|path| root().join(path).exists()).collect();
    assert!(files.len() > 20, "{files:?}");
    files
}

fn read(path: &Path) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// The anchor that a heading gets.
fn anchor(heading: &str) -> String {
    let heading = heading.trim_start_matches('#').trim().to_lowercase();
    heading
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

#[test]
fn relative_links_lead_somewhere() {
    let mut broken = Vec::new();
    let mut links = 0;
    for path in markdown() {
        let text = read(&path);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") || link.is_empty() || link.contains(' ') {
                continue;
            }
            links += 1;
            let (file, fragment) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            let exists = root().join(&target).exists();
            let has_anchor = fragment.is_empty()
                || target.extension().is_none_or(|it| it != "md")
                || exists && read(&target).lines().any(|line| line.starts_with('#') && anchor(line) == fragment);
            if !exists || !has_anchor {
                broken.push(format!("{}: {link}", path.display()));
            }
        }
    }
    assert!(links > 100, "only {links} links were looked at");
    assert!(broken.is_empty(), "broken links:\n{}", broken.join("\n"));
}

#[test]
fn readme_has_at_most_a_hundred_lines() {
    let lines = read(Path::new("README.md")).lines().count();
    assert!(lines <= 100, "{lines} lines; move details to docs/");
}

/// `file.rs:function` and paths of files, in backquotes.
#[test]
fn architecture_names_code_that_exists() {
    let text = read(Path::new("ARCHITECTURE.md"));
    let (mut missing, mut seen) = (Vec::new(), 0);
    for name in text.split('`').skip(1).step_by(2) {
        let (file, function) = name.split_once(":").unwrap_or((name, ""));
        let is_path =
            file.contains('/') && !file.contains([' ', '*', '{', '<']) && Path::new(file).extension().is_some();
        if !is_path || file.starts_with('/') || file.ends_with('/') || file.starts_with("portolan.io") {
            continue;
        }
        seen += 1;
        let Ok(code) = fs::read_to_string(root().join(file)) else {
            missing.push(name.to_owned());
            continue;
        };
        let function = function.rsplit("::").next().unwrap_or_default().trim_end_matches("()");
        let declares = ["fn ", "struct ", "enum ", "const ", "static ", "trait ", "type "]
            .iter()
            .any(|keyword| code.contains(&format!("{keyword}{function}")));
        if !function.is_empty() && !declares {
            missing.push(name.to_owned());
        }
    }
    assert!(seen > 80, "only {seen} names were looked at");
    assert!(missing.is_empty(), "not in the code:\n{}", missing.join("\n"));
}

#[test]
fn decision_records_have_their_parts() {
    let index = read(Path::new("docs/adr/README.md"));
    let mut count = 0;
    for path in markdown().into_iter().filter(|path| path.starts_with("docs/adr") && !path.ends_with("README.md")) {
        let text = read(&path);
        for part in [
            "- **Status**: ",
            "- **Date**: ",
            "## Context",
            "## Decision",
            "## Alternatives considered",
            "## Consequences",
        ] {
            assert!(text.contains(part), "{} lacks {part:?}", path.display());
        }
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        assert!(index.contains(&format!("({name})")), "docs/adr/README.md lacks {name}");
        count += 1;
    }
    assert!(count >= 17);
}

#[test]
fn readme_sets_what_the_chart_requires() {
    let readme = read(Path::new("README.md"));
    let install = readme.lines().find(|line| line.starts_with("helm install")).unwrap();
    let template = read(Path::new("deploy/helm/portolan/templates/daemonset.yaml"));
    let required: Vec<&str> = template
        .split("required \"")
        .skip(1)
        .map(|rest| rest.split_once(".Values.").unwrap().1)
        .map(|path| path.split(|c: char| c != '.' && !c.is_alphanumeric()).next().unwrap())
        .collect();
    assert!(required.len() >= 2, "{required:?}");
    for value in required {
        assert!(install.contains(&format!("--set {value}=")), "the chart requires {value}: {install}");
    }
}

#[test]
fn documents_use_no_deprecated_metric() {
    let reference = read(Path::new("docs/reference/metrics.md"));
    let deprecated: Vec<&str> = reference
        .lines()
        .filter(|line| line.contains("Deprecated alias"))
        .filter_map(|line| line.split('`').nth(1))
        .collect();
    assert!(!deprecated.is_empty());
    for path in markdown() {
        if path.ends_with("docs/reference/metrics.md") || path.ends_with("CHANGELOG.md") {
            continue;
        }
        let text = read(&path);
        let words: Vec<&str> = text.split(|c: char| c != '_' && !c.is_alphanumeric()).collect();
        for name in &deprecated {
            let total = format!("{name}_total");
            assert!(!words.contains(name) && !words.contains(&total.as_str()), "{}: {name}", path.display());
        }
    }
}
