//! The error type of the crate. An error names the operation, what it expected, what it got, and how to fix the cause.
//!
//! Panics are reserved for bugs of this crate; everything that a user can cause is returned as an [`Error`].

use std::path::{Path, PathBuf};

/// Result type of all fallible functions of the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error, described in terms of the operation that detected it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument, option or shape that the operation does not accept.
    #[error("{op}: expected {expected}, got {got}; {help}")]
    Invalid {
        /// The operation that returned the error.
        op: String,
        /// What the operation expects.
        expected: String,
        /// What it got.
        got: String,
        /// How to fix the cause.
        help: String,
        /// Whether it is an argument of the command line or a value of the configuration, rejected before any work starts.
        usage: bool,
    },
    /// A file operation that the operating system did not complete.
    #[error("cannot {action} {}: {source}; {help}", path.display())]
    Io {
        /// The operation, as a verb: `read`, `create`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
        /// How to fix the cause.
        help: String,
    },
    /// A file whose content does not match its name, format or checksum.
    #[error("{}: expected {expected}, got {got}; {help}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The content that its name, format or checksum requires.
        expected: String,
        /// The content that it has.
        got: String,
        /// How to fix the cause.
        help: String,
    },
    /// A value that must be finite but is not.
    #[error("{what} is not finite; {help}")]
    NonFinite {
        /// The value, and where it was found.
        what: String,
        /// How to fix the cause.
        help: String,
    },
    /// An error status of a device or a kernel launcher.
    #[error("{op}: device error {status}: {text}; {help}")]
    Device {
        /// The launcher or driver call that failed.
        op: String,
        /// The status that the call returned.
        status: i32,
        /// The meaning of the status.
        text: String,
        /// How to fix the cause.
        help: String,
    },
    /// An error that several ranks have in common: only one of them reports it.
    #[error("{text}")]
    Ranks {
        /// The message on which all ranks agree.
        text: String,
        /// The original error, if it occurred on this rank.
        cause: Option<Box<Error>>,
    },
}

impl Error {
    /// Returns whether a run stopped because its values are no longer finite, on this rank or on all.
    pub fn is_divergence(&self) -> bool {
        match self {
            Error::NonFinite { .. } => true,
            Error::Ranks { cause, .. } => cause.as_ref().is_some_and(|e| e.is_divergence()),
            _ => false,
        }
    }

    /// Returns the exit status of the program: 2 for an [`Error::usage`], as for a command line that cannot be parsed, and 1
    /// otherwise.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Invalid { usage: true, .. } => 2,
            Error::Ranks { cause, .. } => cause.as_ref().map_or(1, |e| e.exit_code()),
            _ => 1,
        }
    }

    /// Creates an [`Error::Invalid`] for an argument of the command line or a value of the configuration.
    pub fn usage(
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
            usage: true,
        }
    }

    /// Creates an [`Error::Invalid`] for any other argument, option or shape.
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
            usage: false,
        }
    }

    /// Creates an [`Error::Io`]; use it as `.map_err(|e| Error::io("read", path, e))`.
    pub fn io(action: &'static str, path: impl AsRef<Path>, source: std::io::Error) -> Self {
        use std::io::ErrorKind::*;
        let help = match source.kind() {
            NotFound => "check the path",
            PermissionDenied | ReadOnlyFilesystem => {
                "check the permissions, or choose another folder"
            }
            StorageFull | QuotaExceeded => {
                "free some space, or choose another folder; everything that was saved earlier is intact"
            }
            _ => "everything that was saved earlier is intact",
        };
        Error::Io {
            action,
            path: path.as_ref().to_path_buf(),
            source,
            help: help.into(),
        }
    }

    /// Creates an [`Error::Invalid`] for a thread that the operating system cannot start.
    pub(crate) fn thread(op: &str, expected: &str, source: &std::io::Error) -> Self {
        let help = "raise the limit of threads (ulimit -u), or end other programs";
        Self::invalid(op, expected, source.to_string(), help)
    }

    /// Creates an [`Error::File`].
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
    fn an_error_names_what_was_expected_what_was_got_and_how_to_fix_it() {
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
