//! The rules that the source tree keeps.

mod bindings;
mod docs;
mod modules;
mod package;
mod structure;
