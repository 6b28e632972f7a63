//! The items that are read from an input file.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// One item of a file.
#[derive(Debug, PartialEq)]
pub(super) enum Item {
    Document {
        text: String,
        /// The source of the document, if the file names one.
        source: Option<String>,
    },
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

impl Item {
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

    /// A document, or an empty item if the text is only white space.
    pub fn of(text: String, source: Option<String>) -> Self {
        match text.trim().is_empty() {
            true => Item::Empty,
            false => Item::Document { text, source },
        }
    }
}

/// The documents of a file, in order.
pub(super) trait Documents: Send {
    fn next(&mut self) -> Option<Item>;

    /// Skips `rows` rows that were read in an earlier process.
    fn skip(&mut self, rows: u64) {
        let mut passed = 0;
        while passed < rows {
            match self.next() {
                Some(item) => passed = item.rows().saturating_add(passed),
                None => return,
            }
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
