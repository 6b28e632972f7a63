//! Files that are compressed with zstd or gzip, as their names say.

use super::frames::Frames;
use flate2::bufread::MultiGzDecoder;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// Endings of compressed files.
pub(crate) const ENDINGS: [&str; 2] = [".zst", ".gz"];

/// Bytes of text that are decompressed at a time.
const BUFFER: usize = 1 << 18;

/// A file's name without the ending that says how it is compressed.
pub(super) fn plain_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let plain = ENDINGS.iter().find_map(|ending| name.strip_suffix(ending));
    plain.unwrap_or(&name).to_string()
}

/// Reads what is compressed in the file at `path`, whose bytes `inner` gives: every zstd frame or gzip member, one behind the
/// other. A file without such an ending is read as it is.
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
