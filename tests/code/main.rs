//! The rules that the source tree keeps.

mod bindings;
mod modules;
mod structure;
