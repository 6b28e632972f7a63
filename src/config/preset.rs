//! The configurations that come with the program, embedded from `configs/`.

use crate::error::{Error, Result};
use crate::report::nearest;

macro_rules! embedded {
    ($($name:literal),*) => {
        &[$(($name, include_str!(concat!("../../configs/", $name, ".toml")))),*]
    };
}

/// Name and TOML of every model.
pub const PRESETS: &[(&str, &str)] = embedded!["tiny", "small", "557m", "1.96b", "7.33b"];

/// Name and TOML of every expert setting: `32c4` is 32 experts, 4 of them active.
pub const EXPERTS: &[(&str, &str)] = embedded!["8c1", "8c2", "32c1", "32c2", "32c4"];

/// The TOML of `name` in `list`; `flag` is the option that named it.
pub(super) fn find(
    flag: &str,
    list: &[(&'static str, &'static str)],
    name: &str,
) -> Result<&'static str> {
    if let Some((_, text)) = list.iter().find(|(n, _)| *n == name) {
        return Ok(text);
    }
    let names: Vec<&str> = list.iter().map(|(n, _)| *n).collect();
    Err(Error::invalid(
        flag,
        format!("one of {}", names.join(", ")),
        format!("`{name}`"),
        match nearest(name, names.iter().copied()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => "choose one of them".into(),
        },
    ))
}
