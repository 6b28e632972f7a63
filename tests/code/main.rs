//! The rules that the source tree keeps.

mod docs;
mod modules;
mod package;
mod structure;
