//! Normalises text files of other systems: removes a byte order mark and converts Windows line endings to `\n`.

use std::io::{self, Read};

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// A reader of UTF-8 that removes a byte order mark at the start and, if requested, converts `\r\n` to `\n`.
pub(super) struct PlainText<R> {
    inner: R,
    line_ends: bool,
    started: bool,
    ended: bool,
    /// Bytes that were read but not returned yet: those from index `given` on.
    pending: Vec<u8>,
    given: usize,
}

impl<R: Read> PlainText<R> {
    pub fn new(inner: R, line_ends: bool) -> Self {
        PlainText {
            inner,
            line_ends,
            started: false,
            ended: false,
            pending: Vec::new(),
            given: 0,
        }
    }

    /// Reads more bytes into `pending`, which then holds at most a carriage return whose next byte is not known.
    fn refill(&mut self) -> io::Result<()> {
        let kept = self.pending.split_off(self.given);
        self.pending = kept;
        self.given = 0;
        let old = self.pending.len();
        self.pending.resize(old + (1 << 16), 0);
        let read = self.inner.read(&mut self.pending[old..]);
        self.pending.truncate(old + *read.as_ref().unwrap_or(&0));
        self.ended = read? == 0;
        Ok(())
    }

    /// Returns the number of bytes of `pending` that can be returned to the caller.
    fn prepare(&mut self) -> io::Result<usize> {
        self.refill()?;
        while !self.started && self.pending.len() < BYTE_ORDER_MARK.len() && !self.ended {
            self.refill()?;
        }
        if !self.started {
            self.started = true;
            if self.pending.starts_with(BYTE_ORDER_MARK) {
                self.pending.drain(..BYTE_ORDER_MARK.len());
            }
        }
        if !self.line_ends {
            return Ok(self.pending.len());
        }
        let mut kept = 0;
        for i in 0..self.pending.len() {
            let ends_line = self.pending[i] == b'\r' && self.pending.get(i + 1) == Some(&b'\n');
            if !ends_line {
                self.pending[kept] = self.pending[i];
                kept += 1;
            }
        }
        self.pending.truncate(kept);
        let waits = !self.ended && self.pending.last() == Some(&b'\r');
        Ok(kept - usize::from(waits))
    }
}

impl<R: Read> Read for PlainText<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut ready = self.pending.len() - self.given;
        let waits = self.line_ends && !self.ended && self.pending.last() == Some(&b'\r');
        ready -= usize::from(waits && ready > 0);
        while ready == 0 && !self.ended && !buffer.is_empty() {
            ready = self.prepare()?;
        }
        if self.ended {
            ready = self.pending.len() - self.given;
        }
        let n = ready.min(buffer.len());
        buffer[..n].copy_from_slice(&self.pending[self.given..self.given + n]);
        self.given += n;
        Ok(n)
    }
}

/// Normalises a text in memory in the same way, including line endings.
pub(super) fn plain(text: String) -> String {
    let text = match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_string(),
        None => text,
    };
    match text.contains("\r\n") {
        true => text.replace("\r\n", "\n"),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reader that returns at most this number of bytes at a time.
    struct Slow<'a>(&'a [u8], usize);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let n = self.1.min(self.0.len()).min(buffer.len());
            buffer[..n].copy_from_slice(&self.0[..n]);
            self.0 = &self.0[n..];
            Ok(n)
        }
    }

    #[test]
    fn byte_order_marks_and_windows_line_endings_are_removed_for_every_read_size() {
        for (text, expected) in [
            ("\u{feff}a\r\n\r\nb", "a\n\nb"),
            ("a\rb\r\r\n", "a\rb\r\n"),
            ("\r", "\r"),
            ("\u{feff}", ""),
            ("", ""),
            ("a\u{feff}\r\n", "a\u{feff}\n"),
        ] {
            for step in 1..5 {
                let mut found = String::new();
                PlainText::new(Slow(text.as_bytes(), step), true)
                    .read_to_string(&mut found)
                    .unwrap();
                assert_eq!(found, expected, "{text:?} by {step}");
            }
            assert_eq!(plain(text.into()), expected);
        }
    }

    #[test]
    fn line_endings_are_kept_unless_their_conversion_is_requested() {
        let mut found = String::new();
        PlainText::new("\u{feff}a\r\n".as_bytes(), false)
            .read_to_string(&mut found)
            .unwrap();
        assert_eq!(found, "a\r\n");
    }
}
