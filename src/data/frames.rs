//! Decompresses zstd as the text is read.

use super::catch_panic::catch_panic;
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};
use std::io::{BufRead, Error, ErrorKind, Read, Result};

/// Reads all zstd frames of a file, one after another, and verifies the checksum of each frame that has one.
pub(super) struct Frames<R: BufRead> {
    /// Between two frames.
    source: Option<R>,
    /// Inside a frame.
    decoder: Option<StreamingDecoder<R, FrameDecoder>>,
    /// Number of bytes of text returned so far.
    read: u64,
}

impl<R: BufRead> Frames<R> {
    pub fn new(source: R) -> Self {
        Frames {
            source: Some(source),
            decoder: None,
            read: 0,
        }
    }
}

fn bad(what: String) -> Error {
    Error::new(ErrorKind::InvalidData, what)
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        loop {
            if let Some(decoder) = &mut self.decoder {
                let n = catch_panic(|| decoder.read(buffer).map_err(|e| e.to_string()))
                    .and_then(|read| read)
                    .map_err(|e| {
                        let place = format!("after {} bytes of text", self.read);
                        bad(format!("bad or cut-off data {place} ({e})"))
                    })?;
                if n > 0 || buffer.is_empty() {
                    self.read += n as u64;
                    return Ok(n);
                }
            }
            if let Some(decoder) = self.decoder.take() {
                let (source, frame) = decoder.into_parts();
                let stored = frame.get_checksum_from_data();
                if stored.is_some() && stored != frame.get_calculated_checksum() {
                    return Err(bad("data that does not match its checksum".into()));
                }
                self.source = Some(source);
            }
            let Some(mut source) = self.source.take() else {
                return Ok(0);
            };
            if source.fill_buf()?.is_empty() {
                return Ok(0);
            }
            let decoder = catch_panic(|| StreamingDecoder::new(source).map_err(|e| e.to_string()))
                .and_then(|decoder| decoder)
                .map_err(|e| bad(format!("a bad or cut-off frame header ({e})")))?;
            self.decoder = Some(decoder);
        }
    }
}
