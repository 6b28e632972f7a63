//! Reads documents from parquet files: one column holds the text, and an optional one the source.

use super::items::{Documents, Item};
use super::options::{Options, missing_column};
use crate::data::catch_panic::catch_panic;
use crate::error::{Error, Result};
use parquet::basic::Compression;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use std::collections::VecDeque;
use std::fs::File;
use std::path::Path;

/// Number of rows that are decoded at a time.
const BATCH: usize = 256;

/// The rows of a file.
pub(super) struct Columns {
    file: SerializedFileReader<File>,
    bytes: u64,
    text: Column,
    source: Option<Column>,
    /// The current row group and its number of unread rows.
    group: Option<(Group, u64)>,
    next_group: usize,
    /// Number of rows read, over all row groups.
    rows: u64,
    ready: VecDeque<Item>,
}

/// A column of strings.
#[derive(Clone, Copy)]
struct Column {
    index: usize,
    /// Whether a row may lack a value.
    optional: bool,
}

/// The values of a column in a row group.
struct Strings {
    reader: ColumnReaderImpl<ByteArrayType>,
    optional: bool,
}

struct Group {
    text: Strings,
    source: Option<Strings>,
}

/// Returns an error for columns whose compression codec this build cannot read, before anything is written.
fn expect_codecs(path: &Path, file: &SerializedFileReader<File>, columns: &[Column]) -> Result<()> {
    for group in file.metadata().row_groups() {
        for column in columns {
            let codec = group.column(column.index).compression();
            if codec == Compression::LZO {
                let help = "write the file again, for example with pyarrow's write_table(…, compression=\"zstd\")";
                let expected = "parquet compressed with any codec but LZO, or not at all";
                return Err(Error::file(path, expected, format!("{codec}"), help));
            }
        }
    }
    Ok(())
}

impl Columns {
    /// # Errors
    /// When the file is not parquet, is truncated, or lacks the columns.
    pub fn open(path: &Path, options: &Options) -> Result<Self> {
        let bad = |got: String| {
            let help = "copy the file again, or remove it";
            Error::file(path, "a complete parquet file", got, help)
        };
        let file = File::open(path).map_err(|e| Error::io("read", path, e))?;
        let metadata = file.metadata().map_err(|e| Error::io("read", path, e))?;
        let bytes = metadata.len();
        let file = catch_panic(|| SerializedFileReader::new(file)).map_err(bad)?;
        let schema = file.metadata().file_metadata().schema_descr();
        let names: Vec<String> = schema.columns().iter().map(|c| c.path().string()).collect();
        let find = |name: &str| -> Result<Option<Column>> {
            let Some(index) = names.iter().position(|n| n == name) else {
                return Ok(None);
            };
            let column = schema.column(index);
            let strings = column.physical_type() == parquet::basic::Type::BYTE_ARRAY;
            if !strings || column.max_rep_level() > 0 || column.max_def_level() > 1 {
                return Err(Error::file(
                    path,
                    format!("a column `{name}` of strings"),
                    "a column of another type",
                    "name another column",
                ));
            }
            let optional = column.max_def_level() == 1;
            Ok(Some(Column { index, optional }))
        };
        let all: Vec<&str> = names.iter().map(String::as_str).collect();
        let required = |name: &str| -> Result<Column> {
            find(name)?.ok_or_else(|| missing_column(path, name, &all))
        };
        let text = required(&options.text_column)?;
        let source = match &options.source_column {
            Some(name) => Some(required(name)?),
            None => find(options.source_column())?,
        };
        let read: Vec<Column> = [Some(text), source].into_iter().flatten().collect();
        expect_codecs(path, &file, &read)?;
        Ok(Columns {
            bytes,
            text,
            source,
            group: None,
            next_group: 0,
            rows: 0,
            ready: VecDeque::new(),
            file,
        })
    }

    /// Opens the next row group; returns `None` after the last.
    fn open_group(&mut self) -> Option<()> {
        let i = self.next_group;
        if i >= self.file.num_row_groups() {
            return None;
        }
        self.next_group += 1;
        let (file, text, source) = (&self.file, self.text, self.source);
        let opened = catch_panic(|| {
            let group = file.get_row_group(i).map_err(|e| e.to_string())?;
            let strings = |column: Column| match group.get_column_reader(column.index) {
                Ok(ColumnReader::ByteArrayColumnReader(reader)) => Ok(Strings {
                    reader,
                    optional: column.optional,
                }),
                Ok(_) => Err("a column of another type".to_string()),
                Err(e) => Err(e.to_string()),
            };
            Ok::<_, String>(Group {
                text: strings(text)?,
                source: source.map(strings).transpose()?,
            })
        });
        let rows = self.file.metadata().row_group(i).num_rows().max(0) as u64;
        match opened {
            Ok(group) => self.group = Some((group, rows)),
            Err(e) => self.give_up(rows, &e),
        }
        Some(())
    }

    /// Skips the remaining rows of a row group that cannot be read.
    fn give_up(&mut self, rows: u64, e: &str) {
        let what = format!("the rest of row group {}: {e}", self.next_group - 1);
        let rows = rows.max(1);
        // The number comes from the file and may be wrong.
        self.rows = self.rows.saturating_add(rows);
        let rest = true;
        self.ready.push_back(Item::Unreadable { rows, what, rest });
    }

    /// Decodes the next rows of the current row group.
    fn read_batch(&mut self) {
        let Some((mut group, left)) = self.group.take() else {
            return;
        };
        if left == 0 {
            return;
        }
        let n = (left as usize).min(BATCH);
        let read = catch_panic(|| {
            let texts = group.text.read(n)?;
            let sources = match &mut group.source {
                Some(column) => column.read(n)?,
                None => vec![None; n],
            };
            Ok::<_, ParquetError>((texts, sources))
        });
        match read {
            Ok((texts, sources)) => {
                self.rows += n as u64;
                let items = texts.into_iter().zip(sources).map(|(t, s)| item(t, s));
                self.ready.extend(items);
                self.group = Some((group, left - n as u64));
            }
            Err(e) => self.give_up(left, &e),
        }
    }
}

fn item(text: Option<ByteArray>, source: Option<ByteArray>) -> Item {
    let Some(text) = text else {
        return Item::Empty;
    };
    let source = source.and_then(|s| String::from_utf8(s.data().to_vec()).ok());
    Item::of_utf8(text.data().to_vec(), source)
}

impl Strings {
    /// Reads the next `n` values.
    fn read(&mut self, n: usize) -> Result<Vec<Option<ByteArray>>, ParquetError> {
        let (mut levels, mut values) = (Vec::new(), Vec::new());
        let (records, ..) = (self.reader).read_records(n, Some(&mut levels), None, &mut values)?;
        if records != n {
            let message = format!("expected {n} more values in a column, got {records}");
            return Err(ParquetError::General(message));
        }
        if !self.optional {
            return Ok(values.into_iter().map(Some).collect());
        }
        let mut values = values.into_iter();
        let value = |level: &i16| if *level == 1 { values.next() } else { None };
        Ok(levels.iter().map(value).collect())
    }
}

impl Documents for Columns {
    fn next(&mut self) -> Option<Item> {
        loop {
            if let Some(item) = self.ready.pop_front() {
                return Some(item);
            }
            match self.group {
                Some((_, left)) if left > 0 => self.read_batch(),
                _ => self.open_group()?,
            }
        }
    }

    fn skip(&mut self, rows: u64) {
        // Row groups that lie completely before the position are not opened. An empty one may count as a row that cannot be read.
        while let Some(group) = self.file.metadata().row_groups().get(self.next_group) {
            let after = self.rows.saturating_add(group.num_rows() as u64);
            if group.num_rows() <= 0 || after > rows {
                break;
            }
            (self.rows, self.next_group) = (after, self.next_group + 1);
        }
        self.skip_from(self.rows, rows);
    }

    fn consumed(&self) -> u64 {
        let all = self.file.metadata().file_metadata().num_rows().max(1) as f64;
        (self.bytes as f64 * (self.rows as f64 / all).min(1.0)) as u64
    }
}
