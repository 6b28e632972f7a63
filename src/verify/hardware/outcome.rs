//! How a task ended, as its process tells it.

use super::record::Ending;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What a task's process tells the one that started it, as one line of JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    pub ending: Ending,
    pub detail: String,
    pub measured: Value,
}

impl Outcome {
    pub fn new(ending: Ending, detail: impl Into<String>) -> Self {
        Self {
            ending,
            detail: detail.into(),
            measured: Value::Null,
        }
    }

    /// Failed with everything that is `wrong`, or passed with what was `right`.
    pub fn judged(wrong: impl IntoIterator<Item = String>, right: String, measured: Value) -> Self {
        let wrong: Vec<String> = wrong.into_iter().collect();
        let outcome = match wrong.is_empty() {
            true => Self::new(Ending::Passed, right),
            false => Self::new(Ending::Failed, wrong.join("; ")),
        };
        Self {
            measured,
            ..outcome
        }
    }
}
