//! Runs of several processes under launchers of MPI or with torchrun's variables, and of several ranks that NCCL connects.

#[path = "../common/mod.rs"]
mod common;
mod launchers;

mod ablate;
mod faults;
mod nccl;
mod runs;
mod slurm;
mod stalls;
mod studies;
mod torchrun;
