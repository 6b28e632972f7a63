//! Ranks whose device memory NCCL moves: by a stand-in for its library on the host's memory, which holds them to the calls
//! that it leaves undefined. What only GPUs can show is not shown here.

pub mod calls;
mod faults;
mod same;

pub use crate::common::stand_in;
use routegrad::config::{Config, Layers};
use routegrad::routers;

/// A model for the simulator whose micro-batches of four sequences ranks can share; two MoE layers.
pub const SMALL: &[&str] = &[
    "model.hidden=64",
    "model.heads=1",
    "model.layers=3",
    "model.num_experts=4",
    "model.expert_ffn_width=64",
    "model.dense_ffn_width=64",
    "model.sequence_length=16",
    "train.micro_batch=4",
    "train.sequences_per_step=8",
    "train.device=\"sim\"",
];

/// Its configuration, with some keys changed.
pub fn config(set: &[&str]) -> Config {
    let mut layers = Layers::preset("tiny");
    layers.set = SMALL.iter().chain(set).map(|s| s.to_string()).collect();
    Config::load(&layers, &routers::resolve).unwrap()
}
