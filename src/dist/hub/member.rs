//! What the hub knows about a rank.

use serde::{Deserialize, Serialize};

/// Where a rank runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::dist) struct Member {
    pub host: String,
    pub pid: u32,
    /// The cores that the process may use, as the system lists them.
    pub cores: String,
}
