//! The language of code and documents: standard terms, and doc comments that say more than a name.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Files under version control or about to be, with one of these extensions.
fn files(extensions: &[&str]) -> Vec<PathBuf> {
    let listed = Command::new("git")
        .current_dir(root())
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .output();
    let listed = String::from_utf8(listed.unwrap().stdout).unwrap();
    let has = |path: &&Path| path.extension().is_some_and(|it| extensions.iter().any(|wanted| it == *wanted));
    let files: Vec<PathBuf> = listed.lines().map(Path::new).filter(has).map(Path::to_owned).collect();
    assert!(!files.is_empty(), "git lists no files");
    files.into_iter().filter(|path| root().join(path).exists()).collect()
}

/// The words of the block at the end of the glossary.
fn avoided() -> Vec<String> {
    let glossary = fs::read_to_string(root().join("docs/glossary.md")).unwrap();
    let list = glossary.split_once("## Words to avoid").unwrap().1;
    let list = list.split_once("```text\n").unwrap().1.split_once("```").unwrap().0;
    list.lines().map(str::to_owned).collect()
}

/// Reports whether a phrase is in a text, at word boundaries and in any case.
fn contains(text: &str, phrase: &str) -> bool {
    let text = text.to_lowercase();
    let is_word = |c: char| c.is_alphanumeric();
    text.match_indices(phrase).any(|(at, _)| {
        let before = text[..at].chars().next_back().is_some_and(is_word);
        let after = text[at + phrase.len()..].chars().next().is_some_and(is_word);
        !before && !after
    })
}

/// Places that may use a word: names that others chose, and what older versions wrote.
fn is_allowed(path: &str, line: &str) -> bool {
    // The user `nobody` of Unix.
    (path == "tests/tests/clients/main.rs" && (line.contains("NOBODY") || line.contains("as_nobody")))
        || (path.starts_with("tests/") && line.contains("portolan_as_nobody"))
        // Kinds of events that version 0.1 wrote.
        || (path == "agent/src/controller/event_log.rs" && (line.contains("alias =") || line.contains("kind(\"")))
        || path == "docs/glossary.md"
        || path == "xtask/tests/language.rs"
}

#[test]
fn text_uses_standard_terms() {
    let avoided = avoided();
    let mut found = Vec::new();
    for path in files(&["rs", "md", "yaml", "toml", "txt", "tpl", "service"]) {
        let text = fs::read_to_string(root().join(&path)).unwrap();
        let path = path.to_string_lossy();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !is_allowed(&path, line)) {
            for word in avoided.iter().filter(|word| contains(line, word)) {
                found.push(format!("{path}:{}: {word:?} in: {}", number + 1, line.trim()));
            }
        }
    }
    assert!(found.is_empty(), "words to avoid (docs/glossary.md):\n{}", found.join("\n"));
}

/// The words of a name or a sentence, without those that carry no information, in the singular.
fn words(text: &str) -> BTreeSet<String> {
    const EMPTY: [&str; 26] = [
        "the", "a", "an", "of", "its", "this", "that", "it", "is", "are", "in", "for", "to", "which", "one", "ones",
        "all", "these", "those", "returns", "return", "gets", "get", "new", "s", "and",
    ];
    let mut spaced = String::new();
    for c in text.chars() {
        if c.is_uppercase() {
            spaced.push(' ');
        }
        spaced.push(if c.is_alphanumeric() { c.to_ascii_lowercase() } else { ' ' });
    }
    let words = spaced.split_whitespace().filter(|word| !EMPTY.contains(word));
    words.map(|word| word.trim_end_matches('s').to_owned()).collect()
}

/// The name that an item, a field or a variant declares.
fn declared(line: &str) -> Option<String> {
    let line =
        line.trim().trim_start_matches("pub(super) ").trim_start_matches("pub(crate) ").trim_start_matches("pub ");
    let line = [
        "const fn ",
        "async fn ",
        "unsafe fn ",
        "fn ",
        "struct ",
        "enum ",
        "trait ",
        "type ",
        "const ",
        "static ",
        "mod ",
    ]
    .into_iter()
    .find_map(|keyword| line.strip_prefix(keyword))
    .unwrap_or(line);
    let name: String = line.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    (!name.is_empty()).then_some(name)
}

#[test]
fn doc_comments_add_to_the_name() {
    let mut found = Vec::new();
    let mut seen = 0;
    for path in files(&["rs"]) {
        let text = fs::read_to_string(root().join(&path)).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let Some(doc) = line.trim().strip_prefix("///") else { continue };
            let is_doc = |line: &&&str| line.trim().starts_with("///");
            let continues = lines.get(i + 1).filter(is_doc).is_some() || lines[..i].last().filter(is_doc).is_some();
            if continues {
                continue;
            }
            let after = lines[i + 1..].iter().find(|next| !next.trim().starts_with("#["));
            let Some(name) = after.and_then(|after| declared(after)) else { continue };
            seen += 1;
            if words(doc).is_subset(&words(&name)) {
                found.push(format!("{}:{}: {} says no more than `{name}`", path.display(), i + 1, line.trim()));
            }
        }
    }
    assert!(seen > 500, "only {seen} doc comments were looked at");
    assert!(found.is_empty(), "{} doc comments only repeat a name:\n{}", found.len(), found.join("\n"));
}

#[test]
fn checks_of_language_find_what_they_look_for() {
    assert!(contains("Nobody reads it", "nobody") && !contains("somebodys", "somebody"));
    assert!(words("Its name.").is_subset(&words("name")));
    assert!(words("The backend id.").is_subset(&words("backend_id")));
    assert!(!words("The time between two probes, in seconds.").is_subset(&words("interval")));
    assert_eq!(declared("    pub(super) fn at(mut self)").as_deref(), Some("at"));
}
