//! Runs every text of the fuzzing corpus, and every example in `docs/`, from decoding to the report.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
#![allow(clippy::disallowed_methods, reason = "a test gets its times and files from somewhere")]

mod common;

use std::{fs, path::Path};

use common::through;
use portolan_core::{
    decode::{DecodeOptions, read_text},
    model::Scope,
};

fn texts(folder: &str) -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut texts = Vec::new();
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        // Inputs that the fuzzer found need not be UTF-8.
        let text = String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned();
        texts.push((path.file_name().unwrap().to_string_lossy().into_owned(), text));
    }
    assert!(!texts.is_empty(), "{} is empty", folder.display());
    texts
}

#[test]
fn corpus_does_not_panic() {
    for (name, text) in texts("fuzz/corpus/readers") {
        println!("{name}");
        through(&text);
    }
}

/// The findings of each example include the codes on its first line, such as `# PTL0002`.
#[test]
fn examples_have_the_findings_in_their_first_lines() {
    let mut shown = 0;
    for (name, text) in texts("../docs/examples/broken") {
        through(&text);
        let world = common::World::read("", &[("c1", &text)]);
        let report = world.report("c1", "n1");
        let expected: Vec<&str> = text.lines().next().unwrap().trim_start_matches("# ").split_whitespace().collect();
        for code in expected {
            assert!(
                report.findings.iter().any(|finding| finding.code.to_string() == code),
                "{name}: {:#?}",
                report.findings
            );
            shown += 1;
        }
    }
    assert!(shown >= 10, "the examples show only {shown} codes");
}

/// The limits of the parser bound time and memory, so each of these becomes a finding quickly.
#[test]
fn yaml_bombs_are_rejected() {
    let mut laughs = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
    for i in 1..12 {
        let p = i - 1;
        laughs += &format!("a{i}: &a{i} [*a{p},*a{p},*a{p},*a{p},*a{p},*a{p},*a{p},*a{p},*a{p},*a{p}]\n");
    }
    let deep = format!("{}{}", "{a: ".repeat(50_000), "}".repeat(50_000));
    let indented: String = (0..5_000).map(|i| format!("{}a:\n", " ".repeat(i))).collect();
    for (what, text) in [("laughs", laughs), ("deep", deep), ("indented", indented)] {
        let contents = read_text(DecodeOptions::default(), &Scope::Mesh, "bomb.yaml", &text);
        assert_eq!(contents.findings.len(), 1, "{what}");
        assert_eq!(contents.findings[0].code.to_string(), "PTL0002", "{what}");
        assert!(contents.objects.is_empty() && !contents.complete);
    }
}

/// A large cluster as `kubectl get -o yaml` prints it: one List with more than 100,000 lines.
#[test]
fn list_of_a_hundred_thousand_lines_is_read() {
    let mut text = "apiVersion: v1\nkind: List\nitems:\n".to_owned();
    for i in 0..10_000 {
        text += &format!(
            "- apiVersion: v1\n  kind: Pod\n  metadata:\n    name: web-{i}\n    namespace: default\n    labels:\n      \
             app: web\n      version: v{}\n  spec:\n    nodeName: n1\n    containers: []\n",
            i % 3
        );
    }
    assert!(text.lines().count() > 100_000);
    let contents = read_text(DecodeOptions::default(), &Scope::Cluster("c1".to_owned()), "c1/pods.yaml", &text);
    assert_eq!((contents.objects.len(), contents.findings.len()), (10_000, 0));
}
