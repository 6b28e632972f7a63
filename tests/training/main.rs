//! Training: steps, routers, ranks, devices, saving and resuming.

#[path = "../common/mod.rs"]
mod common;

mod causality;
mod collectives;
mod devices;
mod gradcheck;
mod hooks;
mod interruption;
mod long_steps;
mod other_gpus;
mod ranks;
mod router_fixtures;
mod routers;
mod saving;
mod step;
mod threads;
