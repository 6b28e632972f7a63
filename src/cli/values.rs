//! Parsers for argument values that are not plain numbers or names.

use crate::device::architectures;
use crate::device::machine::{CHIPS, Chip};

/// Parses a GPU architecture: "sm_80" gives 80.
pub(super) fn architecture(text: &str) -> Result<i32, String> {
    let number = text.strip_prefix("sm_").and_then(|n| n.parse().ok());
    number
        .filter(|n| architectures().any(|known| known == *n))
        .ok_or_else(|| {
            let known: Vec<String> = architectures().map(|n| format!("sm_{n}")).collect();
            format!("expected one of {}", known.join(", "))
        })
}

/// Finds a GPU by its key.
pub(super) fn gpu(text: &str) -> Result<&'static Chip, String> {
    Chip::named(text).ok_or_else(|| {
        let known = CHIPS.iter().map(|chip| chip.key).collect::<Vec<_>>();
        format!("expected one of {}", known.join(", "))
    })
}

/// Parses a percentage: "5%" and "5" give 0.05.
pub(super) fn percent(text: &str) -> Result<f64, String> {
    match text.trim().trim_end_matches('%').parse::<f64>() {
        Ok(x) if x >= 0.0 && x.is_finite() => Ok(x / 100.0),
        _ => Err("expected a percentage, such as 5%".into()),
    }
}
