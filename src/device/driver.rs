//! What the CUDA driver says of its errors.

use crate::error::Error;
use cudarc::driver::DriverError;

/// An [`Error::Device`] of something that the driver refused.
pub fn error(what: &str, e: DriverError) -> Error {
    let help = "see `nvidia-smi` for what else uses the GPU; after a fault of a kernel the process must start anew";
    Error::Device {
        op: format!("the CUDA driver cannot {what}"),
        status: e.0 as i32,
        text: error_text(e),
        help: help.into(),
    }
}

/// Name and meaning of a driver's error, in its own words.
pub fn error_text(e: DriverError) -> String {
    let name = e.error_name().map(|n| n.to_string_lossy().into_owned());
    let text = e.error_string().map(|t| t.to_string_lossy().into_owned());
    match (name, text) {
        (Ok(name), Ok(text)) => format!("{name}, {text}"),
        _ => format!("error {}", e.0 as i32),
    }
}
