//! The outcome of a task, as its process reports it.

use super::record::Ending;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The outcome that a task's process prints as one line of JSON for its parent process.
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

    /// Failed, with all messages in `wrong`; passed, with the message `right`, if there are none.
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
