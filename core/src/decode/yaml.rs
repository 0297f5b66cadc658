//! YAML parsing: several documents per file, and nested `List` objects.

use granit_parser::{Event, Parser, Span};
use serde_json::Value;

/// Splits a file into documents, with the line on which each begins (from 1).
/// Splitting before parsing keeps a syntax error from hiding the documents after it.
pub(super) fn split(text: &str) -> Vec<(usize, String)> {
    let mut documents = vec![(1, String::new())];
    for (i, line) in text.split_inclusive('\n').enumerate() {
        let bare = line.trim_end();
        if let Some(rest) = line.strip_prefix("--- ") {
            // A document may begin on the separator line.
            documents.push((i + 1, format!("    {rest}")));
        } else if bare == "---" || bare == "..." {
            documents.push((i + 2, String::new()));
        } else if let Some((_, document)) = documents.last_mut() {
            document.push_str(line);
        }
    }
    documents.retain(|(_, document)| {
        document.lines().any(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#'))
    });
    documents
}

/// The maximum number of nodes in one document: about 300,000 lines, or all pods of a large cluster in one List.
const MAX_NODES: usize = 2_000_000;
/// The maximum number of nodes in one document that come from aliases.
const MAX_FROM_ALIASES: usize = 50_000;

/// A syntax error in a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SyntaxError {
    pub(super) message: String,
    /// The line and column in the document, from 1; `None` if the parser does not report them.
    pub(super) at: Option<(usize, usize)>,
}

/// Parses one document. Time and memory are bounded for any input.
pub(super) fn parse(text: &str) -> Result<Value, SyntaxError> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_nodes: MAX_NODES, max_events: 4 * MAX_NODES },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: MAX_FROM_ALIASES },
    };
    serde_saphyr::from_str_with_options::<Value>(text, options).map_err(|error| {
        let message = error.without_snippet().to_string();
        let message = message.split(" at line ").next().unwrap_or_default().to_owned();
        let at = error.location().map(|at| (at.line() as usize, at.column() as usize));
        SyntaxError { message, at }
    })
}

/// Returns the position of a field in a document: line and column, from 1.
/// If the field does not exist, it is the position of the deepest parent that does.
pub(super) fn locate(text: &str, path: &str) -> Option<(usize, usize)> {
    let path = segments(path);
    let mut events = Parser::new_from_str(text)
        .map_while(Result::ok)
        .filter(|(event, _)| event.is_node() || matches!(event, Event::MappingEnd | Event::SequenceEnd));
    let mut found = None;
    seek(&mut events, &path, &mut found);
    found
}

/// `spec.to["a/b"][0]` → `spec`, `to`, `a/b`, `0`.
fn segments(path: &str) -> Vec<String> {
    let mut segments = vec![String::new()];
    let mut quoted = false;
    for c in path.chars() {
        let fresh = match c {
            '"' => {
                quoted = !quoted;
                continue;
            }
            ']' if !quoted => continue,
            '.' | '[' if !quoted => true,
            _ => false,
        };
        match segments.last_mut() {
            Some(last) if !fresh => last.push(c),
            _ => segments.push(String::new()),
        }
    }
    segments.retain(|segment| !segment.is_empty());
    segments
}

type Spanned<'a> = (Event<'a>, Span);

/// Consumes one node, and records the position of the deepest part of the path in it.
/// Returns `None` when the search is over.
fn seek<'a>(
    events: &mut dyn Iterator<Item = Spanned<'a>>,
    path: &[String],
    found: &mut Option<(usize, usize)>,
) -> Option<()> {
    let place = |span: &Span| Some((span.start.line(), span.start.col() + 1));
    let (event, _) = events.next()?;
    let path_head = path.split_first();
    match event {
        Event::MappingStart(..) => loop {
            let (key, at) = events.next()?;
            if matches!(key, Event::MappingEnd) {
                return Some(());
            }
            let Some((key, _)) = key.scalar() else {
                skip_rest(events, &key)?;
                skip(events)?;
                continue;
            };
            match path_head {
                Some((first, rest)) if first == key => {
                    *found = place(&at);
                    seek(events, rest, found)?;
                    return None;
                }
                _ => skip(events)?,
            }
        },
        Event::SequenceStart(..) => {
            for index in 0.. {
                let next = events.next()?;
                if matches!(next.0, Event::SequenceEnd) {
                    break;
                }
                if path_head.is_some_and(|(first, _)| first.parse() == Ok(index)) {
                    *found = place(&next.1);
                    let rest = path_head.map_or(&[][..], |(_, rest)| rest);
                    seek(&mut std::iter::once(next).chain(&mut *events), rest, found)?;
                    return None;
                }
                skip_rest(events, &next.0)?;
            }
            Some(())
        }
        _ => Some(()),
    }
}

/// Consumes one complete node.
fn skip<'a>(events: &mut dyn Iterator<Item = Spanned<'a>>) -> Option<()> {
    let (event, _) = events.next()?;
    skip_rest(events, &event)
}

/// Consumes the rest of a node, given its first event.
fn skip_rest<'a>(events: &mut dyn Iterator<Item = Spanned<'a>>, first: &Event<'a>) -> Option<()> {
    let opens = |event: &Event<'_>| matches!(event, Event::MappingStart(..) | Event::SequenceStart(..));
    let mut depth = usize::from(opens(first));
    while depth > 0 {
        let (event, _) = events.next()?;
        match event {
            Event::MappingEnd | Event::SequenceEnd => depth -= 1,
            event if opens(&event) => depth += 1,
            _ => {}
        }
    }
    Some(())
}

/// Returns the objects of a document with their paths: the document itself, or the items of a `List`, recursively.
pub(super) fn flatten(value: Value) -> Vec<(String, Value)> {
    let mut objects = Vec::new();
    flatten_into(String::new(), value, &mut objects);
    objects
}

fn flatten_into(at: String, value: Value, objects: &mut Vec<(String, Value)>) {
    let is_list = value.get("kind").and_then(Value::as_str).is_some_and(|kind| kind.ends_with("List"));
    match value {
        Value::Object(mut fields) if is_list => {
            let items = match fields.remove("items") {
                Some(Value::Array(items)) => items,
                _ => Vec::new(),
            };
            for (i, item) in items.into_iter().enumerate() {
                flatten_into(format!("{at}items[{i}]."), item, objects);
            }
        }
        other => objects.push((at, other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_document_does_not_hide_later_documents() {
        let documents = split("a: 1\n---\nb: [\n--- # three\nc: 3\n---\n# nothing\n");
        let read: Vec<_> = documents.iter().map(|(line, text)| (*line, parse(text))).collect();
        assert_eq!(read.len(), 3);
        assert!(read[0].1.is_ok() && read[2].1.is_ok());
        assert_eq!(read[1].1.as_ref().unwrap_err().at.map(|(line, _)| line), Some(1));
    }

    #[test]
    fn document_can_begin_on_separator_line() {
        let documents = split("a: 1\n--- {b: 2}\n--- # c\nc: 3\n");
        let read: Vec<_> = documents.iter().map(|(_, text)| parse(text).unwrap().to_string()).collect();
        assert_eq!(read, [r#"{"a":1}"#, r#"{"b":2}"#, r#"{"c":3}"#]);
    }

    #[test]
    fn nested_lists_are_flattened() {
        let list =
            parse("kind: List\nitems:\n- kind: ServiceList\n  items: [{kind: Service}]\n- kind: Node\n").unwrap();
        let kinds: Vec<_> = flatten(list).iter().map(|(_, v)| v["kind"].as_str().unwrap().to_owned()).collect();
        assert_eq!(kinds, ["Service", "Node"]);
    }

    #[test]
    fn alias_bomb_is_rejected() {
        let mut text = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
        for i in 1..12 {
            let p = i - 1;
            text += &format!("a{i}: &a{i} [*a{p},*a{p},*a{p},*a{p},*a{p},*a{p},*a{p},*a{p},*a{p},*a{p}]\n");
        }
        assert!(parse(&text).is_err());
    }

    #[test]
    fn fields_are_located_by_path() {
        let text = "# a comment\nkind: X\nspec:\n  list:\n  - {a: 1}\n  - to:\n      \"r1/*\": 90\n      r2/z.2: 11\n  other: |\n    text\n";
        for (path, place) in [
            ("kind", (2, 1)),
            ("spec.list[0].a", (5, 6)),
            ("spec.list[1].to[\"r1/*\"]", (7, 7)),
            ("spec.list[1].to[\"r2/z.2\"]", (8, 7)),
            ("spec.list[1].nowhere.at.all", (6, 5)),
            ("spec.other.deeper", (9, 3)),
        ] {
            assert_eq!(locate(text, path), Some(place), "{path}");
        }
        assert_eq!(locate(text, "status"), None);
        assert_eq!(locate("a: [", "a.b"), Some((1, 1)));
    }

    #[test]
    fn nesting_depth_is_bounded() {
        let deep = "[".repeat(100_000);
        assert!(parse(&deep).is_err());
        let block: String = (0..2_000).map(|i| format!("{}a:\n", " ".repeat(i))).collect();
        assert!(parse(&block).is_err());
    }
}
