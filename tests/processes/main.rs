//! Runs of several processes under launchers of MPI.

#[path = "../common/mod.rs"]
mod common;
mod launchers;

mod ablate;
mod faults;
mod runs;
