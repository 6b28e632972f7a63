//! Values of arguments that take more than a number or a name.

use crate::device::architectures;
use crate::device::machine::{CHIPS, Chip};

/// 80 of "sm_80".
pub(super) fn architecture(text: &str) -> Result<i32, String> {
    let number = text.strip_prefix("sm_").and_then(|n| n.parse().ok());
    number
        .filter(|n| architectures().any(|known| known == *n))
        .ok_or_else(|| {
            let known: Vec<String> = architectures().map(|n| format!("sm_{n}")).collect();
            format!("expected one of {}", known.join(", "))
        })
}

/// A GPU by its key.
pub(super) fn gpu(text: &str) -> Result<&'static Chip, String> {
    Chip::named(text).ok_or_else(|| {
        let known = CHIPS.iter().map(|chip| chip.key).collect::<Vec<_>>();
        format!("expected one of {}", known.join(", "))
    })
}

/// "5%" or "5" as 0.05.
pub(super) fn percent(text: &str) -> Result<f64, String> {
    match text.trim().trim_end_matches('%').parse::<f64>() {
        Ok(x) if x >= 0.0 && x.is_finite() => Ok(x / 100.0),
        _ => Err("expected a percentage, such as 5%".into()),
    }
}
