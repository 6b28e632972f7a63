//! What reading a file of documents gives.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What stands at one place of a file.
#[derive(Debug, PartialEq)]
pub(super) enum Item {
    Document {
        text: String,
        /// Where it came from, if the file says so.
        source: Option<String>,
    },
    /// A document without text.
    Empty,
    /// `rows` documents, and what is wrong with them.
    Unreadable {
        rows: u64,
        what: String,
        /// Whether more may be lost than one document: the rest of a file or of a row group.
        rest: bool,
    },
}

impl Item {
    /// Places it takes in its file.
    pub fn rows(&self) -> u64 {
        match self {
            Item::Unreadable { rows, .. } => *rows,
            _ => 1,
        }
    }

    /// One document that cannot be read.
    pub fn one_unreadable(what: String) -> Self {
        Item::Unreadable {
            rows: 1,
            what,
            rest: false,
        }
    }

    /// A document, or none where there is nothing but white space.
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

    /// Passes over `rows` places that were read before.
    fn skip(&mut self, rows: u64) {
        let mut passed = 0;
        while passed < rows {
            match self.next() {
                Some(item) => passed = item.rows().saturating_add(passed),
                None => return,
            }
        }
    }

    /// Bytes of the file that were read.
    fn consumed(&self) -> u64;
}

/// Counts the bytes that are read.
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
