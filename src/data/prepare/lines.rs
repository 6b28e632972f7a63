//! Reads documents from text files: JSON objects on lines, and texts with a separator between them.

use super::items::{Counted, Documents, Item};
use super::options::{Options, missing_column};
use crate::error::{Error, Result};
use serde::Deserializer;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde_json::Value;
use std::borrow::Cow;
use std::fmt;
use std::io::BufRead;
use std::path::Path;

/// The bytes of a file, which are read in parts.
pub(super) struct Parts {
    /// None after an error.
    reader: Option<Box<dyn BufRead + Send>>,
    counted: Counted,
}

impl Parts {
    pub fn new(reader: Box<dyn BufRead + Send>, counted: Counted) -> Self {
        let reader = Some(reader);
        Parts { reader, counted }
    }

    /// Reads up to and including `end`, or to the end of the file; returns `None` at the end of the file, and the item of
    /// what is lost after an error.
    fn next(&mut self, end: &[u8]) -> Option<Result<Vec<u8>, Item>> {
        let read = read_to(self.reader.as_mut()?, end).transpose()?;
        Some(read.map_err(|e| {
            self.reader = None;
            Item::Unreadable {
                rows: 1,
                what: format!("the rest of the file: {e}"),
                rest: true,
            }
        }))
    }
}

fn read_to(reader: &mut impl BufRead, end: &[u8]) -> std::io::Result<Option<Vec<u8>>> {
    let mut buffer = Vec::new();
    match end.last() {
        None => drop(reader.read_to_end(&mut buffer)?),
        Some(last) => {
            while reader.read_until(*last, &mut buffer)? > 0 {
                if buffer.ends_with(end) {
                    break;
                }
            }
        }
    }
    Ok((!buffer.is_empty()).then_some(buffer))
}

/// Texts with a separator between them; with an empty separator the file is one text.
pub(super) struct Separated {
    pub parts: Parts,
    pub separator: String,
}

impl Documents for Separated {
    fn next(&mut self) -> Option<Item> {
        let separator = self.separator.as_bytes();
        Some(match self.parts.next(separator)? {
            Ok(mut text) => {
                if text.ends_with(separator) {
                    text.truncate(text.len() - separator.len());
                }
                Item::of_utf8(text, None)
            }
            Err(lost) => lost,
        })
    }

    fn consumed(&self) -> u64 {
        self.parts.counted.get()
    }
}

/// Returns the values of these fields of a JSON object. Other fields are skipped without parsing their values, which may
/// be a number that does not fit in an f64, half of a surrogate pair, or Python's `NaN`.
fn fields<const N: usize>(
    line: &[u8],
    wanted: [&str; N],
) -> serde_json::Result<[Option<Value>; N]> {
    let read = |line: &[u8]| {
        let mut reader = serde_json::Deserializer::from_slice(line);
        let found = (&mut reader).deserialize_map(Wanted(wanted))?;
        reader.end().map(|()| found)
    };
    read(line).or_else(|e| match without_constants(line) {
        Some(line) => read(&line),
        None => Err(e),
    })
}

struct Wanted<'a, const N: usize>([&'a str; N]);

impl<'de, const N: usize> Visitor<'de> for Wanted<'_, N> {
    type Value = [Option<Value>; N];

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = [const { None }; N];
        while let Some(key) = map.next_key::<Cow<'_, str>>()? {
            match self.0.iter().position(|name| *name == key) {
                Some(i) => {
                    let value: Value = map.next_value()?;
                    found
                        .iter_mut()
                        .zip(self.0)
                        .filter(|(_, name)| *name == self.0[i])
                        .for_each(|(f, _)| *f = Some(value.clone()));
                }
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(found)
    }
}

/// Returns the line with each `NaN`, `Infinity` and `-Infinity` outside of strings replaced by `null`; Python writes these
/// words, but they are not JSON. Returns `None` if there are none.
fn without_constants(line: &[u8]) -> Option<Vec<u8>> {
    let (mut out, mut i, mut in_string, mut found) =
        (Vec::with_capacity(line.len()), 0, false, false);
    while i < line.len() {
        let constant = [&b"-Infinity"[..], b"Infinity", b"NaN"]
            .into_iter()
            .find(|c| !in_string && line[i..].starts_with(c));
        if let Some(constant) = constant {
            out.extend_from_slice(b"null");
            i += constant.len();
            found = true;
            continue;
        }
        if in_string && line[i] == b'\\' {
            out.push(line[i]);
            i += 1;
        } else if line[i] == b'"' {
            in_string = !in_string;
        }
        out.extend(line.get(i));
        i += 1;
    }
    found.then_some(out)
}

/// Reads a JSON object per line; one of its fields is the text.
pub(super) struct JsonLines {
    parts: Parts,
    text_column: String,
    source_column: String,
    /// The first line, which was read to check that it has the text field.
    first: Option<Result<Vec<u8>, Item>>,
}

impl JsonLines {
    /// # Errors
    /// When the first object lacks the required fields.
    pub fn new(path: &Path, mut parts: Parts, options: &Options) -> Result<Self> {
        let first = parts.next(b"\n");
        if let Some(Ok(line)) = &first
            && line.trim_ascii_start().starts_with(b"[")
        {
            let help = "write each document on its own line, as with `jq -c '.[]'`";
            return Err(Error::file(path, "an object on each line", "a list", help));
        }
        if let Some(Ok(line)) = &first
            && let Ok(Value::Object(fields)) = serde_json::from_slice(line)
        {
            for column in options.required_columns() {
                if !fields.contains_key(column) {
                    let names: Vec<&str> = fields.keys().map(String::as_str).collect();
                    return Err(missing_column(path, column, &names));
                }
            }
        }
        Ok(JsonLines {
            parts,
            text_column: options.text_column.clone(),
            source_column: options.source_column().to_string(),
            first,
        })
    }

    fn document(&self, line: &[u8]) -> Item {
        let bad = Item::one_unreadable;
        if line.trim_ascii().is_empty() {
            return Item::Empty;
        }
        let wanted = [self.text_column.as_str(), self.source_column.as_str()];
        let [text, source] = match fields(line, wanted) {
            Ok(found) => found,
            Err(e) => return bad(format!("text that is not JSON: {e}")),
        };
        let source = source.and_then(|s| s.as_str().map(str::to_string));
        match text {
            Some(Value::String(text)) => Item::of(text, source),
            Some(Value::Null) => Item::Empty,
            Some(other) => {
                let shown: String = other.to_string().chars().take(40).collect();
                bad(format!("`{}` is not a string: {shown}", self.text_column))
            }
            None => bad(format!("no field `{}`", self.text_column)),
        }
    }
}

impl Documents for JsonLines {
    fn next(&mut self) -> Option<Item> {
        let line = match self.first.take() {
            Some(first) => first,
            None => self.parts.next(b"\n")?,
        };
        Some(line.map_or_else(|lost| lost, |line| self.document(&line)))
    }

    fn consumed(&self) -> u64 {
        self.parts.counted.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unused_fields_never_make_a_document_unreadable() {
        for other in [
            "NaN",
            "-Infinity",
            "1e400",
            r#""\ud800""#,
            r#"{"text": "inner"}"#,
            r#"["NaN", Infinity]"#,
        ] {
            let line = format!(r#"{{"x": {other}, "text": "a NaN \" b", "source": "s"}}"#);
            let found = fields(line.as_bytes(), ["text", "source"]).unwrap();
            assert_eq!(
                found,
                [Some("a NaN \" b".into()), Some("s".into())],
                "{line}"
            );
        }
        let (open, close) = ("[".repeat(100_000), "]".repeat(100_000));
        let deep = format!(r#"{{"x": {open}{close}, "text": "t"}}"#);
        let found = fields(deep.as_bytes(), ["text"]).unwrap();
        assert_eq!(found, [Some("t".into())]);
        for broken in [r#"{"text": NaN"#, r#"["text"]"#, r#"{"text": "t"} x"#] {
            assert!(fields(broken.as_bytes(), ["text"]).is_err(), "{broken}");
        }
    }

    fn separated(text: &'static str, separator: &str) -> Vec<Item> {
        let mut found = Separated {
            parts: Parts::new(Box::new(text.as_bytes()), Counted::default()),
            separator: separator.into(),
        };
        std::iter::from_fn(|| found.next()).collect()
    }

    #[test]
    fn texts_are_split_as_by_str_split() {
        for text in [
            "a\n\n\nb",
            "a\n\n\n\nb\n\n\n",
            "a\n\nb",
            "\n\n\na",
            "\n\n\n\n\n\na\n",
        ] {
            for separator in ["\n\n\n", "\n\n", "b"] {
                let expected: Vec<Item> = text
                    .split(separator)
                    .filter(|t| !t.trim().is_empty())
                    .map(|t| Item::of(t.into(), None))
                    .collect();
                let mut found = separated(text, separator);
                found.retain(|item| *item != Item::Empty);
                assert_eq!(found, expected, "{text:?} by {separator:?}");
            }
            let whole = separated(text, "");
            assert_eq!(whole, [Item::of(text.into(), None)]);
        }
    }
}
