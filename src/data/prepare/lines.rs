//! Documents from plain files: JSON objects on lines, and texts with something between them.

use super::items::{Counted, Documents, Item};
use super::options::{Options, missing_column};
use crate::error::Result;
use serde_json::Value;
use std::io::BufRead;
use std::path::Path;

type Reader = Box<dyn BufRead + Send>;

/// Reads up to and with `end`, or to the end of the file; `None` there.
fn read_to(reader: &mut Reader, end: &[u8]) -> std::io::Result<Option<Vec<u8>>> {
    let mut buffer = Vec::new();
    match end.last() {
        None => drop(reader.read_to_end(&mut buffer)?),
        Some(last) => {
            while reader.read_until(*last, &mut buffer)? > 0 {
                if buffer.ends_with(end) {
                    return Ok(Some(buffer));
                }
            }
        }
    }
    Ok((!buffer.is_empty()).then_some(buffer))
}

fn rest_of_file(e: &std::io::Error) -> Item {
    Item::Unreadable {
        rows: 1,
        what: format!("the rest of the file: {e}"),
    }
}

fn not_utf8(e: std::str::Utf8Error) -> Item {
    let what = format!(
        "a byte that is not UTF-8 at offset {} of it",
        e.valid_up_to()
    );
    Item::Unreadable { rows: 1, what }
}

/// Texts with a separator between them.
pub(super) struct Separated {
    reader: Option<Reader>,
    counted: Counted,
    separator: String,
}

impl Separated {
    /// An empty separator: the file is one text.
    pub fn new(reader: Reader, counted: Counted, separator: String) -> Self {
        Separated {
            reader: Some(reader),
            counted,
            separator,
        }
    }
}

impl Documents for Separated {
    fn next(&mut self) -> Option<Item> {
        let separator = self.separator.as_bytes();
        match read_to(self.reader.as_mut()?, separator) {
            Ok(bytes) => {
                let mut bytes = bytes?;
                if !separator.is_empty() && bytes.ends_with(separator) {
                    bytes.truncate(bytes.len() - separator.len());
                }
                Some(match String::from_utf8(bytes) {
                    Ok(text) => Item::of(text, None),
                    Err(e) => not_utf8(e.utf8_error()),
                })
            }
            Err(e) => {
                self.reader = None;
                Some(rest_of_file(&e))
            }
        }
    }

    fn consumed(&self) -> u64 {
        self.counted.get()
    }
}

/// An object on each line, one of its fields the text.
pub(super) struct JsonLines {
    reader: Option<Reader>,
    counted: Counted,
    text_column: String,
    source_column: String,
    /// The first line, which was read to see whether it has the text.
    first: Option<std::io::Result<Vec<u8>>>,
}

impl JsonLines {
    /// # Errors
    /// When the first object has no such fields.
    pub fn new(
        path: &Path,
        mut reader: Reader,
        counted: Counted,
        options: &Options,
    ) -> Result<Self> {
        let first = read_to(&mut reader, b"\n").transpose();
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
            reader: Some(reader),
            counted,
            text_column: options.text_column.clone(),
            source_column: options.source_column().to_string(),
            first,
        })
    }

    fn document(&self, line: &[u8]) -> Item {
        let bad = |what: String| Item::Unreadable { rows: 1, what };
        if line.trim_ascii().is_empty() {
            return Item::Empty;
        }
        let mut value: Value = match serde_json::from_slice(line) {
            Ok(value) => value,
            Err(e) => return bad(format!("no JSON: {e}")),
        };
        let source = value[&self.source_column].as_str().map(str::to_string);
        match value.get_mut(&self.text_column).map(Value::take) {
            Some(Value::String(text)) => Item::of(text, source),
            Some(Value::Null) => Item::Empty,
            Some(other) => {
                let shown: String = other.to_string().chars().take(40).collect();
                bad(format!("`{}` is no string: {shown}", self.text_column))
            }
            None => bad(format!("no field `{}`", self.text_column)),
        }
    }
}

impl Documents for JsonLines {
    fn next(&mut self) -> Option<Item> {
        let line = match self.first.take() {
            Some(first) => first.map(Some),
            None => read_to(self.reader.as_mut()?, b"\n"),
        };
        match line {
            Ok(line) => Some(self.document(&line?)),
            Err(e) => {
                self.reader = None;
                Some(rest_of_file(&e))
            }
        }
    }

    fn consumed(&self) -> u64 {
        self.counted.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn separated(text: &'static str, separator: &str) -> Vec<Item> {
        let reader: Reader = Box::new(text.as_bytes());
        let mut found = Separated::new(reader, Counted::default(), separator.into());
        std::iter::from_fn(|| found.next()).collect()
    }

    #[test]
    fn texts_are_cut_as_split_cuts_them() {
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
