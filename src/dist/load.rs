//! Loads the libraries of MPI and NCCL at run time.

use crate::error::{Error, Result};
use libloading::os::unix::{Library, RTLD_NOW};
use std::ffi::c_int;

/// Loads the first library of `names` that exists, with symbols of the given `scope`, and returns it with its name. It
/// stays loaded until the process ends.
///
/// # Errors
/// Returns an error of `op` with this `help` when no library can be loaded.
pub(super) fn load(
    op: &str,
    names: &[String],
    scope: c_int,
    help: String,
) -> Result<(&'static Library, String)> {
    let mut reasons = Vec::new();
    for name in names {
        // SAFETY: the initialisers of these libraries only prepare the library.
        match unsafe { Library::open(Some(name), RTLD_NOW | scope) } {
            Ok(loaded) => return Ok((Box::leak(Box::new(loaded)), name.clone())),
            Err(e) => reasons.push(e.to_string()),
        }
    }
    let expected = format!("one of the libraries {}", names.join(", "));
    Err(Error::invalid(op, expected, reasons.join("; "), help))
}
