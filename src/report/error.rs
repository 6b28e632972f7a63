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
        /// The operation that refused it.
        op: String,
        /// What it takes.
        expected: String,
        /// What it was given.
        got: String,
        /// What to do.
        help: String,
    },
    /// An argument of the command line or a value of the configuration that is refused before any work begins.
    #[error("{op}: expected {expected}, got {got}; {help}")]
    Usage {
        /// The option or the key.
        op: String,
        /// What it takes.
        expected: String,
        /// What it was given.
        got: String,
        /// What to do.
        help: String,
    },
    /// The operating system refused a file operation.
    #[error("cannot {action} {}: {source}; {help}", path.display())]
    Io {
        /// What was tried, as a verb: `read`, `create`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system answered.
        source: std::io::Error,
        /// What to do.
        help: String,
    },
    /// A file whose content is not what its name or checksum promises.
    #[error("{}: expected {expected}, got {got}; {help}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What its name, format or checksum promises.
        expected: String,
        /// What it holds.
        got: String,
        /// What to do.
        help: String,
    },
    /// A value that must be finite is not.
    #[error("{what} is not finite; {help}")]
    NonFinite {
        /// Which value, and where.
        what: String,
        /// What to do.
        help: String,
    },
    /// A device or a kernel launcher answered with an error status.
    #[error("{op}: device error {status}: {text}; {help}")]
    Device {
        /// The launcher or driver call that failed.
        op: String,
        /// The status that it returned.
        status: i32,
        /// What that status means.
        text: String,
        /// What to do.
        help: String,
    },
    /// What several ranks met alike: one of them reports it.
    #[error("{text}")]
    Ranks {
        /// The message that all ranks agree on.
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

    /// What a program ends with: 2 for [`Error::Usage`], as for a command line that cannot be parsed, and 1 otherwise.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage { .. } => 2,
            Error::Ranks { cause, .. } => cause.as_ref().map_or(1, |e| e.exit_code()),
            _ => 1,
        }
    }

    /// An [`Error::Usage`].
    pub fn usage(
        op: impl Into<String>,
        expected: impl Into<String>,
        got: impl Into<String>,
        help: impl Into<String>,
    ) -> Self {
        Error::Usage {
            op: op.into(),
            expected: expected.into(),
            got: got.into(),
            help: help.into(),
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
