//! Normalises text files of other systems: removes a byte order mark and converts Windows line endings to `\n`.

use std::io::{self, BufRead, Read};

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// A reader of UTF-8 that removes a byte order mark at the start and, if requested, converts `\r\n` to `\n`.
pub(super) struct PlainText<R> {
    inner: R,
    line_ends: bool,
    /// Number of bytes of the mark that were read, until it is known whether the text begins with one.
    mark: Option<usize>,
    /// Whether a carriage return was read whose next byte is not known.
    carriage_return: bool,
    /// Bytes that were read and are returned next.
    next: &'static [u8],
}

impl<R: BufRead> PlainText<R> {
    pub fn new(inner: R, line_ends: bool) -> Self {
        PlainText {
            inner,
            line_ends,
            mark: Some(0),
            carriage_return: false,
            next: &[],
        }
    }
}

impl<R: BufRead> Read for PlainText<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.next.is_empty() || buffer.is_empty() {
                return self.next.read(buffer);
            }
            let bytes = self.inner.fill_buf()?;
            if let Some(n) = self.mark {
                match bytes.first() == Some(&BYTE_ORDER_MARK[n]) {
                    true => {
                        self.inner.consume(1);
                        self.mark = Some(n + 1).filter(|n| *n < BYTE_ORDER_MARK.len());
                    }
                    false => (self.mark, self.next) = (None, &BYTE_ORDER_MARK[..n]),
                }
                continue;
            }
            if std::mem::take(&mut self.carriage_return) && bytes.first() != Some(&b'\n') {
                self.next = b"\r";
                continue;
            }
            let bytes = &bytes[..bytes.len().min(buffer.len())];
            let n = match self.line_ends {
                true => bytes.iter().position(|b| *b == b'\r'),
                false => None,
            };
            if n == Some(0) {
                self.inner.consume(1);
                self.carriage_return = true;
                continue;
            }
            let n = n.unwrap_or(bytes.len());
            buffer[..n].copy_from_slice(&bytes[..n]);
            self.inner.consume(n);
            return Ok(n);
        }
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
    use std::io::BufReader;

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
                PlainText::new(BufReader::new(Slow(text.as_bytes(), step)), true)
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
