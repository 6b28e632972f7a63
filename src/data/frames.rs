//! Decompresses zstd as the text is read.

use super::catch_panic::catch_panic;
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};
use std::io::{BufRead, Chain, Cursor, Error, ErrorKind, Read, Result, copy, sink};

/// The bytes by which a frame was recognized, and the rest of the file.
type Begun<R> = Chain<Cursor<Vec<u8>>, R>;

/// Reads all zstd frames of a file, one after another, and verifies the checksum of each frame that has one.
pub(super) struct Frames<R: BufRead> {
    /// Between two frames.
    source: Option<R>,
    /// Inside a frame.
    decoder: Option<StreamingDecoder<Begun<R>, FrameDecoder>>,
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

/// Passes over frames without text, which readers have to skip (RFC 8878, section 3.1.2). Returns the next frame, or `None` at the
/// end of the file.
fn next_frame<R: BufRead>(mut source: R) -> Result<Option<Begun<R>>> {
    loop {
        let mut magic = Vec::new();
        source.by_ref().take(4).read_to_end(&mut magic)?;
        let number = magic.as_slice().try_into().map(u32::from_le_bytes);
        if !number.is_ok_and(|n| n & 0xffff_fff0 == 0x184d_2a50) {
            return Ok((!magic.is_empty()).then(|| Cursor::new(magic).chain(source)));
        }
        let mut length = Vec::new();
        source.by_ref().take(4).read_to_end(&mut length)?;
        match length.as_slice().try_into().map(u32::from_le_bytes) {
            Ok(n) if copy(&mut source.by_ref().take(n.into()), &mut sink())? == u64::from(n) => {}
            _ => return Err(bad("a frame without text that is cut off".into())),
        }
    }
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        loop {
            if let Some(decoder) = &mut self.decoder {
                let n = catch_panic(|| decoder.read(buffer)).map_err(|e| {
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
                self.source = Some(source.into_inner().1);
            }
            let Some(source) = self.source.take() else {
                return Ok(0);
            };
            let Some(frame) = next_frame(source)? else {
                return Ok(0);
            };
            let decoder = catch_panic(|| StreamingDecoder::new(frame))
                .map_err(|e| bad(format!("a bad or cut-off frame header ({e})")))?;
            self.decoder = Some(decoder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    fn read(bytes: &[u8]) -> Result<String> {
        let mut text = String::new();
        Frames::new(bytes).read_to_string(&mut text).map(|_| text)
    }

    #[test]
    fn frames_without_text_are_passed_over_wherever_they_stand() {
        let frame = |text: &str| compress_to_vec(text.as_bytes(), CompressionLevel::Fastest);
        let skipped = |bytes: u32| {
            let begin = [0x184d_2a53u32.to_le_bytes(), bytes.to_le_bytes()].concat();
            [begin, vec![7; bytes as usize]].concat()
        };
        let whole = [
            skipped(3),
            frame("one "),
            skipped(0),
            skipped(70_000),
            frame("two"),
            skipped(5),
        ];
        assert_eq!(read(&whole.concat()).unwrap(), "one two");
        assert_eq!(read(&skipped(4)).unwrap(), "");
        for cut in [1, 5, 6] {
            let bytes = [frame("one"), skipped(5)].concat();
            let error = read(&bytes[..bytes.len() - cut]).unwrap_err().to_string();
            assert!(error.contains("cut off"), "{cut}: {error}");
        }
    }
}
