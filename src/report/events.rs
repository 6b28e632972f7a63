//! The event file of a run for TensorBoard: the values of `metrics.jsonl` over the steps, and the program version and
//! configuration of the run.
//!
//! The format is that of TFRecord: `length u64, crc(length) u32, bytes, crc(bytes) u32`, little-endian. Each crc is the
//! CRC-32C, rotated right by 15 bits, plus a constant. The bytes are a protocol-buffer message `Event`. This module writes
//! the three fields that are needed itself, because of the crates that write event files, one depends on an image library
//! and on an unmaintained protocol-buffer runtime, the other needs `protoc` at build time and writes only scalars, and
//! neither can continue a file that a crash truncated.

use crate::error::{Error, Result};
use crate::report::metrics::Record;
use crate::report::version;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Name of the file in a run's folder; TensorBoard looks for names with `tfevents`.
pub const EVENTS_FILE: &str = "events.out.tfevents.routegrad";

/// Maximum length of an event in bytes; a larger length means that the file is damaged.
const LONGEST: u64 = 1 << 24;

/// An event file that is open for appending.
pub struct Events {
    path: PathBuf,
    file: File,
}

impl Events {
    /// Opens the event file of the run in `folder` to continue after `step`, and writes the program version and the
    /// configuration as an event of the next step.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn begin(folder: &Path, step: u64, config: &str) -> Result<Self> {
        let mut events = Self::open(&folder.join(EVENTS_FILE), step)?;
        events.text(step + 1, "program", &version::program())?;
        // In Markdown, a line that begins with four spaces is code.
        let lines: Vec<String> = config.lines().map(|line| format!("    {line}")).collect();
        events.text(step + 1, "config", &lines.join("\n"))?;
        Ok(events)
    }

    /// Opens the file at `path`, or creates it, and removes everything after `step`: events of steps that a resumed run
    /// repeats, and an event that a crash left incomplete.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let io = |e| Error::io("open", path, e);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(io)?;
        let mut reader = BufReader::new(&file);
        let mut end = 0;
        while let Some(event) = read(&mut reader).map_err(io)? {
            match step_of(&event) {
                Some(found) if found <= step => end += event.len() as u64 + 16,
                _ => break,
            }
        }
        file.set_len(end).map_err(io)?;
        file.seek(SeekFrom::Start(end)).map_err(io)?;
        let mut events = Events {
            path: path.to_path_buf(),
            file,
        };
        if end == 0 {
            events.append(0, |event| bytes(event, 3, b"brain.Event:2"))?;
        }
        Ok(events)
    }

    /// Appends the values of one step; values that are not finite are left out.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn record(&mut self, record: &Record) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, number) in scalars(record) {
            message(&mut summary, 1, |value| {
                bytes(value, 1, tag.as_bytes());
                value.push(2 << 3 | 5);
                value.extend((number as f32).to_le_bytes());
            });
        }
        self.append(record.step, |event| bytes(event, 5, &summary))
    }

    /// Appends a Markdown text.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn text(&mut self, step: u64, tag: &str, text: &str) -> Result<()> {
        const STRING: u8 = 7;
        self.append(step, |event| {
            message(event, 5, |summary| {
                message(summary, 1, |value| {
                    bytes(value, 1, tag.as_bytes());
                    // A tensor with one string, for the TensorBoard plugin that displays texts.
                    message(value, 8, |tensor| {
                        tensor.extend([1 << 3, STRING]);
                        message(tensor, 2, |shape| bytes(shape, 2, &[1 << 3, 1]));
                        bytes(tensor, 8, text.as_bytes());
                    });
                    message(value, 9, |metadata| {
                        message(metadata, 1, |plugin| bytes(plugin, 1, b"text"));
                    });
                });
            });
        })
    }

    /// Appends an event. When this function returns, the operating system has the data.
    fn append(&mut self, step: u64, content: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let mut event = vec![1 << 3 | 1];
        event.extend(now.map_or(0.0, |t| t.as_secs_f64()).to_le_bytes());
        event.push(2 << 3);
        varint(&mut event, step);
        content(&mut event);
        let length = (event.len() as u64).to_le_bytes();
        let mut framed = Vec::with_capacity(event.len() + 16);
        framed.extend(length);
        framed.extend(checksum(&length));
        framed.extend(&event);
        framed.extend(checksum(&event));
        self.file
            .write_all(&framed)
            .map_err(|e| Error::io("write", &self.path, e))
    }
}

/// Returns the names and values of a step that TensorBoard displays.
fn scalars(record: &Record) -> Vec<(String, f64)> {
    let named = [
        ("loss/training", record.loss),
        ("loss/validation", record.validation_loss),
        ("loss/auxiliary", record.auxiliary_loss),
        ("loss/z", record.z_loss),
        ("training/gradient_norm", record.gradient_norm),
        ("training/learning_rate", Some(record.learning_rate)),
        ("training/tokens", Some(record.tokens as f64)),
        ("training/tokens_per_second", Some(record.tokens_per_second)),
        ("router/sparsity", record.sparsity),
    ];
    let named = named.map(|(tag, number)| (tag.to_owned(), number));
    let layers = record.router_entropy.iter().enumerate();
    let entropy = layers.map(|(l, h)| (format!("router_entropy/layer_{l}"), *h));
    let load = record.load.iter().enumerate().map(|(l, counts)| {
        let most = counts.iter().max().map(|most| *most as f64);
        let balanced = counts.iter().sum::<u64>() as f64 / counts.len() as f64;
        let tag = format!("busiest_expert/layer_{l}");
        (tag, most.map(|most| most / balanced))
    });
    let tasks = record.tasks.iter().flat_map(|(task, scores)| {
        let tagged = scores.iter();
        tagged.map(move |(name, score)| (format!("tasks/{task}/{name}"), Some(*score)))
    });
    let sources = record.validation_by_source.iter();
    let sources = sources.map(|(name, loss)| (format!("loss/validation/{name}"), Some(*loss)));
    let all = named.into_iter().chain(sources).chain(entropy);
    let all = all.chain(load).chain(tasks);
    // Events hold f32.
    all.filter_map(|(tag, number)| Some((tag, number.filter(|x| (*x as f32).is_finite())?)))
        .collect()
}

/// Returns the CRC-32C in the form that a TFRecord stores.
fn checksum(bytes: &[u8]) -> [u8; 4] {
    let crc = crc32c::crc32c(bytes).rotate_right(15);
    crc.wrapping_add(0xa282_ead8).to_le_bytes()
}

/// Reads the next event; returns `None` at the end of the file, or if the next event is incomplete or damaged.
fn read(from: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut whole = |buffer: &mut [u8]| match from.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    };
    let (mut length, mut crc) = ([0; 8], [0; 4]);
    if !whole(&mut length)? || !whole(&mut crc)? || crc != checksum(&length) {
        return Ok(None);
    }
    let length = u64::from_le_bytes(length);
    if length > LONGEST {
        return Ok(None);
    }
    let mut event = vec![0; length as usize];
    let good = whole(&mut event)? && whole(&mut crc)? && crc == checksum(&event);
    Ok(good.then_some(event))
}

/// Returns the step of an event that [`Events`] wrote: its second field, after the time.
fn step_of(event: &[u8]) -> Option<u64> {
    let (key, rest) = event.get(9..)?.split_first()?;
    if *key != 2 << 3 {
        return None;
    }
    let mut step = 0u64;
    for (i, byte) in rest.iter().enumerate().take(10) {
        step |= u64::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return Some(step);
        }
    }
    None
}

/// Appends a variable-length integer: seven bits per byte, the lowest first.
fn varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Appends field `number`, below 16, with bytes as its value.
fn bytes(out: &mut Vec<u8>, number: u8, content: &[u8]) {
    out.push(number << 3 | 2);
    varint(out, content.len() as u64);
    out.extend(content);
}

/// Appends field `number`, below 16, with a message as its value.
fn message(out: &mut Vec<u8>, number: u8, content: impl FnOnce(&mut Vec<u8>)) {
    let mut inner = Vec::new();
    content(&mut inner);
    bytes(out, number, &inner);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::metrics::tests::record;

    /// Computes CRC-32C bit by bit from its polynomial.
    fn crc32c(bytes: &[u8]) -> u32 {
        let mut crc = !0u32;
        for byte in bytes {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ (0x82f6_3b78 * (crc & 1));
            }
        }
        !crc
    }

    #[test]
    fn every_frame_has_the_checksums_of_its_length_and_its_bytes() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(EVENTS_FILE);
        let mut events = Events::open(&path, 0).unwrap();
        events.text(1, "config", "    seed = 1").unwrap();
        for step in 1..=300 {
            events.record(&record(step)).unwrap();
        }
        let file = std::fs::read(&path).unwrap();
        let mut rest = file.as_slice();
        let mut steps = Vec::new();
        let mut take = |n: usize| {
            let (taken, left) = rest.split_at(n);
            rest = left;
            (taken, left.is_empty())
        };
        loop {
            let masked = |bytes: &[u8]| {
                let crc = crc32c(bytes);
                crc.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
            };
            let (length, _) = take(8);
            assert_eq!(take(4).0, masked(length));
            let (event, _) = take(u64::from_le_bytes(length.try_into().unwrap()) as usize);
            let (crc, end) = take(4);
            assert_eq!(crc, masked(event));
            steps.push(step_of(event).unwrap());
            if end {
                break;
            }
        }
        let expected: Vec<u64> = [0, 1].into_iter().chain(1..=300).collect();
        assert_eq!(steps, expected);
    }

    #[test]
    fn reopening_removes_later_steps_and_an_incomplete_event() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(EVENTS_FILE);
        let lengths: Vec<u64> = (0..=5)
            .map(|step| {
                let mut events = Events::open(&path, step).unwrap();
                if step > 0 {
                    events.record(&record(step)).unwrap();
                }
                std::fs::metadata(&path).unwrap().len()
            })
            .collect();
        let whole = std::fs::read(&path).unwrap();
        let damaged = [&whole[..whole.len() - 1], &[whole[whole.len() - 1] ^ 1]].concat();
        for (bytes, kept) in [
            (&whole[..], 5),
            (&whole[..whole.len() - 3], 4),
            (&damaged, 4),
            (&[&whole[..], &[0; 30]].concat(), 5),
        ] {
            for step in [3, 5] {
                std::fs::write(&path, bytes).unwrap();
                Events::open(&path, step).unwrap();
                let left = std::fs::read(&path).unwrap();
                let end = lengths[kept.min(step as usize)] as usize;
                assert_eq!(left, &whole[..end]);
            }
        }
    }

    #[test]
    fn numbers_that_are_not_finite_are_left_out() {
        let mut broken = record(2);
        broken.loss = None;
        broken.tokens_per_second = f64::INFINITY;
        let tags: Vec<String> = scalars(&broken).into_iter().map(|s| s.0).collect();
        assert!(tags.contains(&"loss/validation".into()), "{tags:?}");
        for absent in ["loss/training", "training/tokens_per_second"] {
            assert!(!tags.contains(&absent.into()), "{tags:?}");
        }
        // Three of four rows went to the first of two experts.
        assert!(scalars(&broken).contains(&("busiest_expert/layer_0".into(), 1.5)));
    }
}
