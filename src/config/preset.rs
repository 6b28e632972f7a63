//! The presets: configurations that are embedded in the program from `configs/`.

use crate::error::{Error, Result};
use crate::report::nearest;

macro_rules! embedded {
    ($($name:literal),*) => {
        &[$(($name, include_str!(concat!("../../configs/", $name, ".toml")))),*]
    };
}

/// Name and TOML text of every preset.
pub const PRESETS: &[(&str, &str)] = embedded!["tiny", "small", "557m", "1.96b", "7.33b"];

/// Parses a setting such as `32c4`; returns the keys of the number of experts and of active experts, and their values.
///
/// # Errors
/// When the text does not have this form.
pub(crate) fn experts(text: &str) -> Result<[(&'static str, i64); 2]> {
    let numbers = text.split_once('c').map(|(n, k)| [n, k].map(str::parse));
    match numbers {
        Some([Ok(experts), Ok(active)]) if 1 <= active && active <= experts => {
            Ok([("model.num_experts", experts), ("model.top_k", active)])
        }
        _ => Err(Error::usage(
            "--experts",
            "NcK, N experts of which K are active, as in 32c4",
            format!("`{text}`"),
            "give two whole numbers, the second not above the first",
        )),
    }
}

/// Returns the TOML text of `name` in `list`; `flag` is the option that set the name, for error messages.
pub(super) fn find(
    flag: &str,
    list: &[(&'static str, &'static str)],
    name: &str,
) -> Result<&'static str> {
    if let Some((_, text)) = list.iter().find(|(n, _)| *n == name) {
        return Ok(text);
    }
    let names: Vec<&str> = list.iter().map(|(n, _)| *n).collect();
    Err(Error::usage(
        flag,
        format!("one of {}", names.join(", ")),
        format!("`{name}`"),
        match nearest(name, names.iter().copied()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => "choose one of them".into(),
        },
    ))
}
