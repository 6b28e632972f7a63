//! The commands as a user runs them, the files that they read and write, and what they say of bad input.

#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "text")]
#[path = "../tokens/mod.rs"]
mod tokens;

mod ablate;
mod analyze;
mod bad_input;
mod basics;
mod bench;
mod damage;
#[cfg(feature = "text")]
mod data;
#[cfg(feature = "text")]
mod data_corruption;
mod data_inputs;
#[cfg(feature = "text")]
mod documented;
mod exchange;
mod export;
mod fuzz;
mod hardware;
mod own_crate;
#[cfg(target_os = "linux")]
mod plan;
mod tasks;
