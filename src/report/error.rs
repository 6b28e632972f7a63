//! The one error type: which operation, what it expected, what it got, and what to do about it.
//!
//! Panics are reserved for bugs of this crate; whatever a user can cause comes back as an [`Error`].

use std::path::{Path, PathBuf};

/// Result of every fallible function of the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in the terms of the operation that noticed it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument, option or shape that the operation cannot take.
    #[error("{op}: expected {expected}, got {got}; {help}")]
    Invalid {
        op: String,
        expected: String,
        got: String,
        help: String,
    },
    /// The operating system refused a file operation.
    #[error("cannot {action} {}: {source}; {help}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
        help: String,
    },
    /// A file whose content is not what its name or checksum promises.
    #[error("{}: expected {expected}, got {got}; {help}", path.display())]
    File {
        path: PathBuf,
        expected: String,
        got: String,
        help: String,
    },
    /// A value that must be finite is not.
    #[error("{what} is not finite; {help}")]
    NonFinite { what: String, help: String },
    /// A device or a kernel launcher answered with an error status.
    #[error("{op}: device error {status}: {text}; {help}")]
    Device {
        op: String,
        status: i32,
        text: String,
        help: String,
    },
    /// What several ranks met alike: one of them reports it.
    #[error("{text}")]
    Ranks {
        text: String,
        /// The error, where this rank met it itself.
        cause: Option<Box<Error>>,
    },
}

impl Error {
    /// Whether a run came to it because its numbers are no longer finite, on this rank or on all.
    pub fn is_divergence(&self) -> bool {
        match self {
            Error::NonFinite { .. } => true,
            Error::Ranks { cause, .. } => cause.as_ref().is_some_and(|e| e.is_divergence()),
            _ => false,
        }
    }

    /// An [`Error::Invalid`].
    pub fn invalid(
        op: impl Into<String>,
        expected: impl Into<String>,
        got: impl Into<String>,
        help: impl Into<String>,
    ) -> Self {
        Error::Invalid {
            op: op.into(),
            expected: expected.into(),
            got: got.into(),
            help: help.into(),
        }
    }

    /// An [`Error::Io`]; use as `.map_err(|e| Error::io("read", path, e))`.
    pub fn io(action: &'static str, path: impl AsRef<Path>, source: std::io::Error) -> Self {
        use std::io::ErrorKind::*;
        let help = match source.kind() {
            NotFound => "check the path",
            PermissionDenied | ReadOnlyFilesystem => {
                "check the permissions, or choose another folder"
            }
            StorageFull | QuotaExceeded => {
                "free some space, or choose another folder; nothing saved before is lost"
            }
            _ => "nothing saved before is lost",
        };
        Error::Io {
            action,
            path: path.as_ref().to_path_buf(),
            source,
            help: help.into(),
        }
    }

    /// An [`Error::File`].
    pub fn file(
        path: impl AsRef<Path>,
        expected: impl Into<String>,
        got: impl Into<String>,
        help: impl Into<String>,
    ) -> Self {
        Error::File {
            path: path.as_ref().to_path_buf(),
            expected: expected.into(),
            got: got.into(),
            help: help.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_was_expected_what_was_got_and_what_to_do() {
        let e = Error::invalid(
            "linear",
            "an input of width 8",
            "width 7",
            "check the model's hidden size",
        );
        assert_eq!(
            e.to_string(),
            "linear: expected an input of width 8, got width 7; check the model's hidden size"
        );
    }
}
