//! Errors of the CUDA driver.

use crate::error::Error;
use cudarc::driver::DriverError;

/// Creates an [`Error::Device`] for an operation `what` that the driver could not do.
pub fn error(what: &str, e: DriverError) -> Error {
    let help =
        "see `nvidia-smi` for what else uses the GPU; after a kernel fault, restart the process";
    Error::Device {
        op: format!("the CUDA driver cannot {what}"),
        status: e.0 as i32,
        text: error_text(e),
        help: help.into(),
    }
}

/// Returns the name and the description of a driver error, as the driver gives them.
pub fn error_text(e: DriverError) -> String {
    let name = e.error_name().map(|n| n.to_string_lossy().into_owned());
    let text = e.error_string().map(|t| t.to_string_lossy().into_owned());
    match (name, text) {
        (Ok(name), Ok(text)) => format!("{name}, {text}"),
        _ => format!("error {}", e.0 as i32),
    }
}
