//! From text to documents: YAML, several in one file, Lists taken apart.

use serde_json::Value;

/// Texts of the documents in a file, with the line that each begins on (from 1). They are split before they are
/// parsed, so that a broken one does not hide those behind it.
pub(super) fn split(text: &str) -> Vec<(usize, String)> {
    let mut documents = vec![(1, String::new())];
    for (i, line) in text.split_inclusive('\n').enumerate() {
        let bare = line.trim_end();
        if let Some(rest) = line.strip_prefix("--- ") {
            // A document may begin on the line that separates it.
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

/// Parses one document. The message of an error gives line and column inside the file.
pub(super) fn parse(first_line: usize, text: &str) -> Result<Value, String> {
    serde_saphyr::from_str::<Value>(text).map_err(|error| match error.location() {
        Some(at) => {
            let message = error.without_snippet().to_string();
            let message = message.split(" at line ").next().unwrap_or_default().to_owned();
            format!("line {}, column {}: {message}", first_line as u64 + at.line() - 1, at.column())
        }
        None => error.without_snippet().to_string(),
    })
}

/// The objects of a document: itself, or the items of a `List`.
pub(super) fn flatten(value: Value) -> Vec<Value> {
    let is_list = value.get("kind").and_then(Value::as_str).is_some_and(|kind| kind.ends_with("List"));
    match value {
        Value::Object(mut fields) if is_list => match fields.remove("items") {
            Some(Value::Array(items)) => items.into_iter().flat_map(flatten).collect(),
            _ => Vec::new(),
        },
        other => vec![other],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_document_does_not_hide_the_next() {
        let documents = split("a: 1\n---\nb: [\n--- # three\nc: 3\n---\n# nothing\n");
        let read: Vec<_> = documents.iter().map(|(line, text)| (*line, parse(*line, text))).collect();
        assert_eq!(read.len(), 3);
        assert!(read[0].1.is_ok() && read[2].1.is_ok());
        let message = read[1].1.clone().unwrap_err();
        assert!(message.starts_with("line "), "{message}");
    }

    #[test]
    fn a_document_may_begin_on_its_separator() {
        let documents = split("a: 1\n--- {b: 2}\n--- # c\nc: 3\n");
        let read: Vec<_> = documents.iter().map(|(line, text)| parse(*line, text).unwrap().to_string()).collect();
        assert_eq!(read, [r#"{"a":1}"#, r#"{"b":2}"#, r#"{"c":3}"#]);
    }

    #[test]
    fn lists_are_taken_apart() {
        let list =
            parse(1, "kind: List\nitems:\n- kind: ServiceList\n  items: [{kind: Service}]\n- kind: Node\n").unwrap();
        let kinds: Vec<_> = flatten(list).iter().map(|v| v["kind"].as_str().unwrap().to_owned()).collect();
        assert_eq!(kinds, ["Service", "Node"]);
    }

    #[test]
    fn an_alias_bomb_is_an_error() {
        let mut text = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
        for i in 1..12 {
            let p = i - 1;
            text += &format!("a{i}: &a{i} [*a{p},*a{p},*a{p},*a{p},*a{p},*a{p},*a{p},*a{p},*a{p},*a{p}]\n");
        }
        assert!(parse(1, &text).is_err());
    }
}
