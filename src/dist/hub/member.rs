//! A rank as the hub knows it.

use serde::{Deserialize, Serialize};

/// Where a rank runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::dist) struct Member {
    pub host: String,
    pub pid: u32,
    /// The cores that the process may use, as the system writes them.
    pub cores: String,
}
