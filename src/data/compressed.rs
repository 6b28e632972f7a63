//! Reads files that are compressed with zstd or gzip; the ending of the file name gives the format.

use super::frames::Frames;
use flate2::bufread::MultiGzDecoder;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// File name endings of compressed files.
pub(crate) const ENDINGS: [&str; 2] = [".zst", ".gz"];

/// Number of bytes of text that are decompressed at a time.
const BUFFER: usize = 1 << 18;

/// Returns the file's name without the ending of its compression format.
pub(super) fn plain_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let plain = ENDINGS.iter().find_map(|ending| name.strip_suffix(ending));
    plain.unwrap_or(&name).to_string()
}

/// Decompresses the content of the file at `path`, which is read from `inner`: all zstd frames or gzip members, one after
/// another. A file without such an ending is read unchanged.
pub(super) fn decompressed<'a>(
    path: &Path,
    inner: impl BufRead + Send + 'a,
) -> Box<dyn BufRead + Send + 'a> {
    fn buffered<'a>(inner: impl Read + Send + 'a) -> Box<dyn BufRead + Send + 'a> {
        Box::new(BufReader::with_capacity(BUFFER, inner))
    }
    match path.extension().and_then(|e| e.to_str()) {
        Some("zst") => buffered(Frames::new(inner)),
        Some("gz") => buffered(MultiGzDecoder::new(inner)),
        _ => Box::new(inner),
    }
}
