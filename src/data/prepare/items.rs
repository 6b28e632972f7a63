//! The items that are read from an input file.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// One item of a file; its documents are of type `D`: a [`Document`] until it is encoded.
#[derive(Debug, PartialEq)]
pub(super) enum Item<D = Document> {
    Document(D),
    /// A document without text.
    Empty,
    /// `rows` documents that could not be read, and the reason.
    Unreadable {
        rows: u64,
        what: String,
        /// Whether more than one document may be lost: the rest of a file or of a row group.
        rest: bool,
    },
}

/// A document as it was read.
#[derive(Debug, PartialEq)]
pub(super) struct Document {
    pub text: String,
    /// The source of the document, if the file names one.
    pub source: Option<String>,
}

impl<D> Item<D> {
    /// Returns the number of rows that the item takes in its file.
    pub fn rows(&self) -> u64 {
        match self {
            Item::Unreadable { rows, .. } => *rows,
            _ => 1,
        }
    }

    /// An item for one document that cannot be read.
    pub fn one_unreadable(what: String) -> Self {
        Item::Unreadable {
            rows: 1,
            what,
            rest: false,
        }
    }
}

impl Item {
    /// A document, or an empty item if the text is only white space.
    pub fn of(text: String, source: Option<String>) -> Self {
        match text.trim().is_empty() {
            true => Item::Empty,
            false => Item::Document(Document { text, source }),
        }
    }

    /// The same for a text that has to be UTF-8.
    pub fn of_utf8(text: Vec<u8>, source: Option<String>) -> Self {
        String::from_utf8(text).map_or_else(
            |e| {
                let place = e.utf8_error().valid_up_to();
                Item::one_unreadable(format!(
                    "a byte that is not UTF-8 at offset {place} of the text"
                ))
            },
            |text| Item::of(text, source),
        )
    }
}

/// The documents of a file, in order.
pub(super) trait Documents: Send {
    fn next(&mut self) -> Option<Item>;

    /// Skips `rows` rows that were read in an earlier process.
    fn skip(&mut self, rows: u64) {
        self.skip_from(0, rows);
    }

    /// The same if `passed` of these rows were skipped.
    fn skip_from(&mut self, mut passed: u64, rows: u64) {
        while passed < rows
            && let Some(item) = self.next()
        {
            passed = item.rows().saturating_add(passed);
        }
    }

    /// Returns the number of bytes of the file that were read.
    fn consumed(&self) -> u64;
}

/// Counts the bytes that are read through it.
#[derive(Clone, Default)]
pub(super) struct Counted(Arc<AtomicU64>);

impl Counted {
    pub fn of<R: Read>(self, inner: R) -> Counting<R> {
        Counting { inner, count: self }
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

pub(super) struct Counting<R> {
    inner: R,
    count: Counted,
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.count.0.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}
